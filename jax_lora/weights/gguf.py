"""GGUF files of LLaMA-shaped architectures, de-quantised with the `gguf` package. No torch.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from jax_lora.errors import DataError
from jax_lora.model.arch import LINEARS, NORMS
from jax_lora.model.config import LARGEST_INT, LlamaConfig, RopeScaling
from jax_lora.model.families import FAMILIES
from jax_lora.weights import gguf_kernels
from jax_lora.weights.finite import check_finite
from jax_lora.weights.gguf_file import GGUFFile, Tensor, open_gguf
from jax_lora.weights.quantize import kernel_reader
from jax_lora.weights.tree import DevicePut, assemble, check_tensors, numpy_dtype

# Hugging Face's name of a module in a block → llama.cpp's.
_MODULES = {".".join(part.path): part.gguf for part in (*LINEARS, *NORMS)}
_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
# Rotary frequencies as a buffer: what they say is in the metadata, or read in `_rope`.
_BUFFERS = ("rope_freqs.weight", "attn_rot_embd.weight")
# llama.cpp's further knobs of rope scaling, and the value at which each does nothing.
_NEUTRAL = {
    "attn_factor": 1,
    "yarn_attn_factor": 1,
    "yarn_ext_factor": 1,
    "yarn_log_multiplier": 0,
    "alpha": 0,
}


def read_config(file: GGUFFile) -> LlamaConfig:
    """The configuration that a file's metadata and tensor names describe.

    Raises:
      DataError: another architecture, a mixture of experts, a key that is missing or has a
        value that this model cannot have.
    """
    where, metadata = file.path, file.metadata
    architecture = metadata.get("general.architecture")
    names = {family.gguf: name for name, family in FAMILIES.items() if family.gguf}
    if not isinstance(architecture, str) or architecture not in names:
        raise DataError(
            f"{where}: general.architecture: found {architecture!r:.60}, expected one of "
            f"{', '.join(names)}"
        )
    family = FAMILIES[names[architecture]]

    def get(key: str, default: Any = None, kind: type = int, least: int = 1) -> Any:
        found = metadata.get(f"{architecture}.{key}", default)
        if type(found) is not kind or not (
            kind is str or (least <= found <= LARGEST_INT if kind is int else math.isfinite(found))
        ):
            shown = "nothing" if found is None else repr(found)[:60]
            expected = {int: "one positive integer", float: "a number", str: "text"}[kind]
            raise DataError(f"{where}: {architecture}.{key}: found {shown}, expected {expected}")
        return found

    if experts := get("expert_count", 0, least=0):
        raise DataError(
            f"{where}: {architecture}.expert_count: found {experts}, expected a dense model"
        )
    hidden, heads = get("embedding_length"), get("attention.head_count")
    head_dim = get("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (found := get(key, head_dim)) != head_dim:
            raise DataError(
                f"{where}: {architecture}.{key}: found {found}, expected the head size {head_dim}"
            )
    tokens = metadata.get("tokenizer.ggml.tokens")
    tokens = tokens if isinstance(tokens, list) else None
    theta = get("rope.freq_base", 10000.0, float)
    try:
        return LlamaConfig(
            vocab_size=get("vocab_size", len(tokens) if tokens else None),
            hidden_size=hidden,
            intermediate_size=get("feed_forward_length"),
            num_hidden_layers=get("block_count"),
            num_attention_heads=heads,
            num_key_value_heads=get("attention.head_count_kv", heads),
            head_dim=head_dim,
            rms_norm_eps=get("attention.layer_norm_rms_epsilon", kind=float),
            rope_theta=theta,
            rope_scaling=_rope(file, head_dim, theta, get),
            max_position_embeddings=get("context_length"),
            tie_word_embeddings="output.weight" not in file.tensors,
            family=names[architecture],
            biases=tuple(
                x.name
                for x in LINEARS
                if x.name in family.biases or f"blk.0.{x.gguf}.bias" in file.tensors
            ),
            qk_norm=family.qk_norm,
        )
    except ValueError as error:
        text = str(error)
        raise DataError(text if text.startswith(str(where)) else f"{where}: {text}") from None


def _rope(file: GGUFFile, head_dim: int, theta: float, get) -> RopeScaling | None:
    where, architecture = file.path, file.metadata["general.architecture"]
    for key, neutral in _NEUTRAL.items():
        if (found := get(f"rope.scaling.{key}", float(neutral), float)) != neutral:
            key = f"{architecture}.rope.scaling.{key}"
            raise DataError(f"{where}: {key}: found {found:g}, expected {neutral} or no such key")
    factor = get("rope.scaling.factor", get("rope.scale_linear", 0.0, float), float)
    kind = get("rope.scaling.type", "linear" if factor else "none", str)
    scaling = None
    if kind == "yarn":
        original = get("rope.scaling.original_context_length", get("context_length"))
        betas = {
            beta: get(f"rope.scaling.yarn_{beta}", kind=float)
            for beta in ("beta_fast", "beta_slow")
            if f"{architecture}.rope.scaling.yarn_{beta}" in file.metadata
        }
        scaling = RopeScaling("yarn", factor or 1.0, original, **betas)
    elif kind == "linear":
        scaling = RopeScaling("linear", factor) if factor not in (0.0, 1.0) else None
    elif kind != "none":
        key = f"{architecture}.rope.scaling.type"
        raise DataError(f"{where}: {key}: found {kind!r}, expected none, linear or yarn")
    table = file.tensors.get("rope_freqs.weight")
    if table is None:
        return scaling
    divisors = table.read().ravel()
    if scaling is None and divisors.size == head_dim // 2:
        if np.all(divisors == 1):
            return None
        # Llama 3.1 and 3.2 files give the outcome only, so its parameters are found by trying.
        for factor in (8.0, 32.0):
            if np.allclose(divisors, llama3_divisors(head_dim, theta, factor), rtol=1e-4):
                return RopeScaling(
                    "llama3", factor, 8192, low_freq_factor=1.0, high_freq_factor=4.0
                )
    raise DataError(
        f"{where}: rope_freqs.weight: found a table of {divisors.size} divisors up to "
        f"{divisors.max():g}, expected Llama 3.1's (factor 8 or 32 over 8192 tokens)"
    )


def llama3_divisors(head_dim: int, theta: float, factor: float) -> np.ndarray:
    """What Llama 3.1 divides each rotary frequency by, (head_dim / 2,); see `model/rope.py`."""
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((8192 * frequencies / (2 * math.pi) - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    return 1 / ((1 - smooth) / factor + smooth)


def _gguf_name(name: str) -> str:
    """Hugging Face's name of a tensor → the file's."""
    if name in _OUTER:
        return _OUTER[name]
    _, _, layer, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_MODULES[module]}.{kind}"


def _hf_name(name: str) -> str:
    """The file's name of a tensor → Hugging Face's; one that is no part of a model stays."""
    outer = {theirs: ours for ours, theirs in _OUTER.items()}
    modules = {theirs: ours for ours, theirs in _MODULES.items()}
    if name in outer:
        return outer[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in modules:
        return f"model.layers.{parts[1]}.{modules[parts[2]]}.{parts[3]}"
    return name


def check(path: str | os.PathLike[str]) -> None:
    """Raise what `load` would raise of a header."""
    _open(path)


def _open(path: str | os.PathLike[str]) -> tuple[GGUFFile, LlamaConfig, dict[str, Tensor]]:
    """The file, its configuration, and the tensors that it names, by Hugging Face's names."""
    file = open_gguf(path)
    config = read_config(file)
    tensors = [t for t in file.tensors.values() if not t.name.endswith(_BUFFERS)]
    found = {_hf_name(t.name): t for t in tensors}

    def label(name: str) -> str:
        return found[name].name if name in found else _gguf_name(name)

    check_tensors(str(path), config, {name: t.shape for name, t in found.items()}, label)
    return file, config, found


def load(
    path: str | os.PathLike[str],
    dtype: DTypeLike = "bfloat16",
    put: DevicePut | None = None,
    quantization: str = "none",
) -> tuple[LlamaConfig, PyTree]:
    """Read a GGUF file, de-quantising tensor by tensor.

    Args:
      path: the file.
      dtype: of the parameters: bfloat16, float16 or float32.
      put: what to do with each finished leaf, see `tree.assemble`.
      quantization: of the linear layers: "none"; "gguf", the blocks of the file as they are; or as
        for `quantize.kernel_reader`.

    Returns:
      The configuration and the base tree (see `tree`).

    Raises:
      MissingFileError, DataError: see `open_gguf`, `read_config`, `gguf_kernels` and
        `tree.check_tensors`; all before any weight is read.
    """
    dtype = numpy_dtype(dtype)
    file, config, found = _open(path)
    for tensor in {t.kind: t for t in found.values()}.values():
        try:  # one row of each kind, before anything large
            tensor._replace(
                shape=(-1,), data=tensor.data.reshape(-1, tensor.data.shape[-1])[:1]
            ).read()
        except ValueError as error:
            raise DataError(f"{path}: {error}") from None

    def in_order(name: str, rows: np.ndarray) -> np.ndarray:
        # llama.cpp's order of the rows → Hugging Face's
        if not FAMILIES[config.family].gguf_interleaved:
            return rows
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        module = name.split(".")[-2]
        return _unpermute(rows, heads[module]) if module in heads else rows

    def read(name: str) -> np.ndarray:
        return in_order(name, check_finite(found[name].read(), found[name].name, path))

    if quantization == "gguf":
        read_kernel = gguf_kernels.kernel_reader(file, found, in_order)
    else:
        read_kernel = kernel_reader(quantization, config, read, path)
    return config, assemble(config, dtype, read, put, read_kernel)


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    # llama.cpp rotates neighbouring rows (2i, 2i + 1), Hugging Face the pairs (i, i + H/2).
    pairs = rows.reshape(
        heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:]
    )  # (heads, H/2, 2, …)
    return pairs.swapaxes(1, 2).reshape(rows.shape)
