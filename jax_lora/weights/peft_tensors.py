"""`adapter_model.safetensors`: PEFT's tensors of an adapter, read, and cut from our stacks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import PyTree
from safetensors import SafetensorError, safe_open

from jax_lora.errors import DataError
from jax_lora.model.arch import BY_NAME, GROUP, LINEAR_NAMES, OUTSIDE, TARGETS
from jax_lora.weights.finite import check_finite
from jax_lora.weights.peft_config import SELECTION
from jax_lora.weights.tree import numpy_dtype

_OUTSIDE = "|".join(linear.name for linear in OUTSIDE)
_KEY = re.compile(
    rf"base_model\.model\.(?:model\.layers\.(0|[1-9][0-9]{{0,2}})\.(\w+)\.(\w+)|({_OUTSIDE}))"
    r"\.lora_(A\.weight|B\.weight|magnitude_vector(\.weight)?)"
)
# The frozen weight of a module outside the blocks, of which PEFT writes a copy.
_FROZEN = re.compile(rf"base_model\.model\.({_OUTSIDE})\.base_layer\.weight")
PARTS = {"a": "A", "b": "B", "m": "magnitude"}

# Linear layer → layer → part → tensor
Tensors = dict[str, dict[int, dict[str, np.ndarray]]]


def module_name(name: str, layer: int) -> str:
    """Of a linear layer, as transformers has it: "model.layers.0.self_attn.q_proj", "lm_head"."""
    path = ".".join(BY_NAME[name].path)
    return f"model.layers.{layer}.{path}" if name in GROUP else path


def read(path: Path, parts: Sequence[str]) -> Tensors:
    """All tensors of a file, float32 and in PEFT's orientation.

    Args:
      path: of the file.
      parts: "a" and "b", and for DoRA "m".

    Raises:
      DataError: a damaged file, a value that is not finite, a tensor of something else.
    """
    numpy_dtype("bfloat16")  # registers it, for adapters that are stored so
    try:
        with safe_open(path, framework="np") as file:
            tensors = {
                name: check_finite(file.get_tensor(name), name, path)
                for name in file.keys()  # noqa: SIM118
                if not _FROZEN.fullmatch(name)
            }
    except SafetensorError as error:
        size = path.stat().st_size
        raise DataError(f"{path}: damaged or cut short at {size} bytes: {error}") from None
    found: Tensors = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        name = match[3] or match[4] if match else ""
        if match is None or GROUP.get(name) != match[2]:
            expected = f"layers.N.(self_attn|mlp).({'|'.join(LINEAR_NAMES)}).lora_(A|B).weight"
            expected += f" or base_model.model.({_OUTSIDE}).lora_(A|B).weight"
            raise DataError(f"{path}: found {key}, expected base_model.model.model.{expected}")
        part = match[5][0].lower()
        if part not in parts:
            raise DataError(f"{path}: found {key}, expected use_dora: true with it")
        dimensions = 1 if part == "m" else 2
        if tensor.ndim != dimensions or 0 in tensor.shape:
            found_shape = f"found shape {tensor.shape}, expected {dimensions} dimensions"
            raise DataError(f"{path}: {key}: {found_shape}")
        layer = found.setdefault(name, {}).setdefault(int(match[1] or 0), {})
        layer[part] = tensor.astype(np.float32, copy=False)
    if not found:
        raise DataError(f"{path}: found no tensors, expected a LoRA adapter's")
    return found


def check_complete(
    path: Path, found: Tensors, chosen: Mapping[str, Iterable[int]], parts: Sequence[str]
) -> None:
    """Make sure that a file holds what its config says, and nothing else.

    Args:
      path: for the message.
      found: see `read`.
      chosen: linear layer → the layers in which it has an adapter; 0 outside the blocks.
      parts: as for `read`.

    Raises:
      DataError: what is there and should not be, or is missing.
    """
    choice = f"{', '.join(SELECTION[:-1])} and {SELECTION[-1]}"
    there = {(name, i) for name, layers in found.items() for i in layers}
    wanted = {(name, i) for name, layers in chosen.items() for i in layers}

    def some(modules: set[tuple[str, int]]) -> str:
        order = sorted(modules, key=lambda module: (TARGETS.index(module[0]), module[1]))
        more = f" and {len(order) - 3} more" if len(order) > 3 else ""
        names = (module_name(*module).removeprefix("model.layers.") for module in order[:3])
        return ", ".join(names) + more

    if there - wanted:
        raise DataError(
            f"{path}: found tensors of {some(there - wanted)}, expected none by {choice}"
        )
    if lost := {(n, i) for n, i in wanted if set(found.get(n, {}).get(i, {})) != set(parts)}:
        raise DataError(
            f"{path}: found no complete ({', '.join(PARTS[part] for part in parts)}) for "
            f"{some(lost)}; expected them by {choice}"
        )


def cut(name: str, leaf: PyTree, ranks: Sequence[int]) -> dict[str, np.ndarray]:
    """PEFT's tensors of one linear layer; a layer of the model whose rank is 0 has none.

    Args:
      name: of the linear layer.
      leaf: `a` (L, in, R), `b` (L, R, out) and perhaps `m` (L, out), float32.
      ranks: of each layer, at most R.

    Raises:
      ValueError: other layers, or more than zeros beyond a rank.
    """
    a, b = (np.asarray(leaf[part], np.float32) for part in ("a", "b"))
    if len(ranks) != len(a) or max(ranks) > a.shape[-1]:
        raise ValueError(
            f"adapters of {name}: found {len(a)} layers of up to rank {a.shape[-1]}, "
            f"expected {len(ranks)} of ranks {ranks}"
        )
    tensors = {}
    for i, r in enumerate(ranks):
        if np.any(a[i, :, r:]) or np.any(b[i, r:]):
            raise ValueError(f"adapters of {name}: layer {i} is not zero beyond its rank {r}")
        if not r:
            continue
        key = f"base_model.model.{module_name(name, i)}"
        tensors[f"{key}.lora_A.weight"] = np.ascontiguousarray(a[i, :, :r].T)
        tensors[f"{key}.lora_B.weight"] = np.ascontiguousarray(b[i, :r].T)
        if "m" in leaf:
            tensors[f"{key}.lora_magnitude_vector"] = np.array(leaf["m"][i], np.float32)
    return tensors
