"""Hugging Face folders: `config.json` and safetensors in, the same out. No torch."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jax_lora.errors import DataError, MissingFileError, first_line
from jax_lora.files import fresh_folder, read_json, write_json
from jax_lora.model.config import LlamaConfig
from jax_lora.weights.finite import check_finite
from jax_lora.weights.hf_config import config_to_hf, parse_config
from jax_lora.weights.quantize import kernel_reader
from jax_lora.weights.tree import DevicePut, assemble, check_tensors, disassemble, numpy_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SMALL = ["*.json", "tokenizer.model", "*.jinja", "merges.txt"]  # all but the weights


# ---------------------------------------------------------------- reading


def resolve(source: str | os.PathLike[str], weights: bool = True) -> Path:
    """Where a source lies on this machine.

    Args:
      source: a folder, a `.gguf` file, or a Hugging Face hub id (`org/name`), which is fetched
        into (or, offline, found in) the hub's cache.
      weights: whether a hub id's weights are fetched too, or its configuration and tokenizer alone.

    Raises:
      MissingFileError: it is none of them, or the download failed.
      DataError: it is a file of another kind.
    """
    path = Path(source).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise DataError(f"{source}: found a file, expected a folder or a .gguf file")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or str(source).startswith("."):
        text = "no such folder or file, nor a hub id such as 'org/name'"
        raise MissingFileError(errno.ENOENT, text, str(source))
    from huggingface_hub import snapshot_download

    wanted = [*_SMALL, "*.safetensors"] if weights else _SMALL
    try:
        return Path(snapshot_download(str(source), allow_patterns=wanted, ignore_patterns="*/*"))
    except Exception as error:  # the hub's client has many kinds; the user needs one line
        reason = first_line(error)
        text = f"no such folder or file here, and as a hub id it could not be had: {reason}"
        raise MissingFileError(errno.ENOENT, text, str(source)) from None


def read_config(folder: str | os.PathLike[str]) -> LlamaConfig:
    """The configuration of a Hugging Face folder.

    Raises:
      MissingFileError: no config.json.
      DataError: see `parse_config`.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        text = "no config.json, expected a Hugging Face model folder"
        raise MissingFileError(errno.ENOENT, text, str(folder))
    return parse_config(read_json(path, dict), str(path))


def load(
    source: str | os.PathLike[str],
    dtype: DTypeLike = "bfloat16",
    put: DevicePut | None = None,
    quantization: str = "none",
) -> tuple[LlamaConfig, PyTree]:
    """Read a Hugging Face folder of a Llama, tensor by tensor.

    Args:
      source: the folder, with `config.json` and `model.safetensors` or its index and shards.
      dtype: of the parameters: bfloat16, float16 or float32.
      put: what to do with each finished leaf, see `tree.assemble`.
      quantization: of the linear layers, see `quantize.kernel_reader`.

    Returns:
      The configuration and the base tree (see `tree`).

    Raises:
      MissingFileError: no config.json, no weights, or a shard that the index names is not there.
      DataError: see `parse_config` and `tree.check_tensors`; or a damaged file. All before any
        weight is read.
    """
    dtype = numpy_dtype(dtype)
    folder = Path(source)
    config = read_config(folder)
    with open_tensors(folder) as (files, shapes):
        check_tensors(str(folder), config, shapes)

        def read(name: str) -> np.ndarray:
            return check_finite(files[name].get_tensor(name), name, folder)

        if config.tie_word_embeddings and "lm_head.weight" in files:
            _check_tied(folder, files)
        kernels = kernel_reader(quantization, config, read, folder)
        return config, assemble(config, dtype, read, put, kernels)


def check(folder: Path) -> None:
    """Raise what `load` would raise before it reads a weight."""
    config = read_config(folder)
    with open_tensors(folder) as (_, shapes):
        check_tensors(str(folder), config, shapes)


def _check_tied(folder: Path, files: Mapping[str, safe_open]) -> None:
    """Refuse a head that is called tied and is another matrix, which transformers 5 uses."""
    head, table = (files[n].get_slice(n) for n in ("lm_head.weight", "model.embed_tokens.weight"))
    rows, block = head.get_shape()[0], 4096  # rows that are read at a time
    cuts = [slice(i, min(i + block, rows)) for i in range(0, rows, block)]
    same = head.get_shape() == table.get_shape() and all(
        np.array_equal(head[cut], table[cut]) for cut in cuts
    )
    if not same:
        raise DataError(
            f"{folder}: lm_head.weight differs from model.embed_tokens.weight, though "
            "tie_word_embeddings is true; expected false in config.json, which keeps the head"
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: `model.safetensors`, or its index's shards."""
    return _shards(folder)[0]


def _shards(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single], None
    if index.is_file():
        wanted = read_json(index, dict).get("weight_map")
        if not isinstance(wanted, dict) or not all(isinstance(v, str) for v in wanted.values()):
            raise DataError(f"{index}: no weight_map, expected tensor names and their shards")
        names = sorted(set(wanted.values()))
        for name in names:
            if name != Path(name).name or name in ("", "..") or "\0" in name:
                raise DataError(
                    f"{index}: weight_map: found {name!r:.60}, expected the name of a file"
                )
        return [folder / name for name in names], wanted
    text = "no weights, expected model.safetensors or model.safetensors.index.json"
    raise MissingFileError(errno.ENOENT, text, str(folder))


@contextmanager
def open_tensors(folder: Path) -> Iterator[tuple[dict[str, safe_open], dict[str, tuple[int, ...]]]]:
    """Open a folder's safetensors: name → open file, and name → shape. Reads headers only."""
    paths, wanted = _shards(folder)
    index = folder / "model.safetensors.index.json"
    files: dict[str, safe_open] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        if not path.is_file():
            text = f"this shard is missing, though {index.name} names it"
            raise MissingFileError(errno.ENOENT, text, str(path))
        try:
            shard = safe_open(path, framework="np")
        except SafetensorError as error:
            size = path.stat().st_size
            raise DataError(f"{path}: damaged or cut short at {size} bytes: {error}") from None
        for name in shard.keys():  # noqa: SIM118  (not a dict)
            view = shard.get_slice(name)
            if view.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                kind = view.get_dtype()
                raise DataError(f"{path}: {name} is {kind}, expected unquantised floats")
            files[name], shapes[name] = shard, tuple(view.get_shape())
    lost = [name for name in wanted or () if name not in shapes]
    if lost and wanted:
        raise DataError(
            f"{folder / wanted[lost[0]]}: no tensor {lost[0]}, though {index.name} says so"
        )
    yield files, shapes


# ---------------------------------------------------------------- writing


def save(
    folder: str | os.PathLike[str],
    config: LlamaConfig,
    base: PyTree,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: DTypeLike = "bfloat16",
    *,
    generation: Mapping[str, object] | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a folder that transformers 4 and 5 load; it appears complete or not at all.

    Args:
      folder: where; must be new or empty.
      config: the model's shape.
      base: the parameters (see `tree`), numpy or jax.
      tokenizer: a transformers tokenizer; gives the special ids and its own files.
      dtype: bfloat16, float16 or float32.
      generation: the contents of `generation_config.json`; default: the tokenizer's ids.
      shard_bytes: size in bytes above which the weights are split; a single larger tensor becomes a
        shard by itself.

    Raises:
      FileExistsError: the folder has something in it.
      ValueError: the tree does not fit the configuration.
      DataError: a value does not fit float16.
    """
    dtype = numpy_dtype(dtype)
    shards: list[dict[str, Callable[[], np.ndarray]]] = [{}]
    total = filled = 0
    for name, shape, fetch in disassemble(config, base, dtype):
        size = int(np.prod(shape)) * dtype.itemsize
        if filled and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = fetch
        filled, total = filled + size, total + size
    ids = {
        f"{k}_token_id": getattr(tokenizer, f"{k}_token_id", None) for k in ("bos", "eos", "pad")
    }
    generation = dict(generation) if generation is not None else ids
    if (eos := generation.get("eos_token_id")) is not None:
        ids["eos_token_id"] = eos  # may be a list: every id that ends an answer

    with fresh_folder(folder) as partial:
        raw = config_to_hf(config) | ids | {"dtype": dtype.name, "torch_dtype": dtype.name}
        write_json(partial / "config.json", raw)
        if any(value is not None for value in generation.values()):
            write_json(partial / "generation_config.json", generation)
        if tokenizer is not None:
            _save_tokenizer(partial, tokenizer)
        weight_map = {}
        for i, shard in enumerate(shards, 1):
            file = f"model-{i:05}-of-{len(shards):05}.safetensors"
            if len(shards) == 1:
                file = "model.safetensors"
            tensors = {name: fetch() for name, fetch in shard.items()}
            write_tensors(partial / file, tensors)
            del tensors  # one shard is freed before the next is fetched
            weight_map |= dict.fromkeys(shard, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(partial / "model.safetensors.index.json", index)


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file, in place.

    Raises:
      OSError: with the path, where it cannot be written.
    """
    path.touch()  # with the mode of any new file; safetensors would let its owner alone read it
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # its only way to say that a disk is full
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from None
    path.chmod(mode)


def _save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = read_json(path)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        # The name that both transformers 4 and 5 know for "just what tokenizer.json says".
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        write_json(path, settings)
