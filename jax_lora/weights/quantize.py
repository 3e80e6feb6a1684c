"""Kernels quantized on the host, one layer at a time; `model.quantization` says what they are.

On the host and in numpy, so that a base becomes the same numbers for every device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Float, PyTree

from jax_lora.errors import ConfigError, DataError
from jax_lora.model.config import LlamaConfig
from jax_lora.model.quantization import (
    NF4,
    NF4_BLOCK,
    NF4_CODES,
    NF4_GROUP,
    Int8,
    QuantizedKernel,
    dynamic_codes,
)
from jax_lora.weights.tree import DevicePut, Leaf, leaves

Fields = dict[str, np.ndarray]
# The stacked kernel of a leaf, its arrays given to the second argument.
KernelReader = Callable[[Leaf, DevicePut], QuantizedKernel]
_CHUNK = 1 << 18  # numbers that are compared at a time, so that they stay in a processor's cache


def int8(weight: Float[np.ndarray, "out in"]) -> Fields:
    """The fields of an `Int8`: w ≈ scale · values, where scale = max |w| / 127 of each output."""
    scale = np.abs(weight).max(axis=1) / np.float32(127)
    divisor = np.where(scale == 0, np.float32(1), scale)
    values = np.rint(weight / divisor[:, None]).astype(np.int8)
    return {"values": values.T, "scale": scale}


def nf4(weight: Float[np.ndarray, "out in"]) -> Fields:
    """The fields of an `NF4`, as QLoRA defines them (Dettmers et al. 2023, section 3).

    The constant of a block is its max |w|. The constants less their mean are quantized to the
    dynamic 8-bit float in groups of 256, each scaled by its largest absolute value.
    """
    out, size = weight.shape
    blocks = weight.reshape(out, size // NF4_BLOCK, NF4_BLOCK)
    constants = np.abs(blocks).max(axis=2)
    codes = _nearest(_divided(blocks, constants[..., None]), np.array(NF4_CODES, np.float32))
    halves = codes.reshape(out, -1, 2, NF4_BLOCK // 2)
    packed = halves[:, :, 0] | (halves[:, :, 1] << 4)  # (out, in / 64, 32)

    offset = np.float32(constants.mean(dtype=np.float64))
    centred = (constants - offset).reshape(-1)
    padded = np.pad(centred, (0, -len(centred) % NF4_GROUP)).reshape(-1, NF4_GROUP)
    groups = np.abs(padded).max(axis=1)
    second = _nearest(_divided(padded, groups[:, None]), dynamic_codes())
    second = second.reshape(-1)[: len(centred)].reshape(constants.shape)
    return {
        "packed": packed.transpose(1, 2, 0),
        "constants": second.T,
        "groups": groups,
        "offset": np.asarray(offset),
    }


def _divided(x: np.ndarray, constants: np.ndarray) -> np.ndarray:
    return x / np.where(constants == 0, np.float32(1), constants)


def _nearest(x: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The index of the nearest code, of at most 256 ascending ones; uint8."""
    bounds = (codes[:-1] + codes[1:]) / 2
    flat, found = x.reshape(-1), np.zeros(x.size, np.uint8)
    for start in range(0, x.size, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        if len(codes) > 16:
            found[chunk] = np.searchsorted(bounds, flat[chunk])
        else:  # faster than a search
            for bound in bounds:
                found[chunk] += flat[chunk] > bound
    return found.reshape(x.shape)


_FORMS: dict[str, tuple[type, Callable[[np.ndarray], Fields], int]] = {
    "int8": (Int8, int8, 1),
    "nf4": (NF4, nf4, NF4_BLOCK),
}


def check_shapes(quantization: str, config: LlamaConfig, where: object) -> None:
    """Make sure that blocks divide every kernel.

    Raises:
      DataError: one that they do not, by the name of its first layer.
    """
    if quantization not in _FORMS:
        return
    *_, block = _FORMS[quantization]
    for leaf in leaves(config):
        if leaf.is_kernel and leaf.shape[-1] % block:
            raise DataError(
                f"{where}: {leaf.names[0]} has {leaf.shape[-1]} inputs, expected a multiple of "
                f"{block} for model_quantization={quantization}"
            )


def kernel_reader(
    quantization: str, config: LlamaConfig, read: Callable[[str], np.ndarray], where: object
) -> KernelReader | None:
    """Reads kernels as they are stored; None where they are not quantized.

    Args:
      quantization: "none", "int8" or "nf4".
      config: the model's shape.
      read: Hugging Face name → that tensor (out, in).
      where: the file or folder, for the message.

    Raises:
      ConfigError: a quantization that this source does not have.
      DataError: as `check_shapes`.
    """
    if quantization == "none":
        return None
    if quantization not in _FORMS:
        raise ConfigError(
            f"model_quantization: found {quantization!r} for {where}, expected none, "
            f"{' or '.join(_FORMS)}; gguf keeps the blocks of a GGUF file"
        )
    check_shapes(quantization, config, where)
    form, quantize, _ = _FORMS[quantization]

    def read_kernel(leaf: Leaf, put: DevicePut) -> QuantizedKernel:
        layers = (quantize(np.asarray(read(name), np.float32)) for name in leaf.names)
        return form(**put_stacks(leaf, layers, put))

    return read_kernel


def put_stacks(leaf: Leaf, layers: Iterable[Fields], put: DevicePut) -> dict[str, PyTree]:
    """The fields of all layers, stacked, and given to `put` one after another."""
    stacks: Fields = {}
    for i, fields in enumerate(layers):
        for name, array in fields.items():
            if name not in stacks:
                stacks[name] = np.empty((len(leaf.names), *array.shape), array.dtype)
            stacks[name][i] = array
    return {name: put((*leaf.path, name), stacks.pop(name)) for name in list(stacks)}
