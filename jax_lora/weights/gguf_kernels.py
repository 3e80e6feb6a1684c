"""Kernels that stay in the blocks of a GGUF file: bytes are moved, and never dequantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from jax_lora.errors import DataError
from jax_lora.model import gguf_blocks
from jax_lora.model.arch import LINEARS
from jax_lora.model.gguf_blocks import KINDS, Kinds
from jax_lora.model.quantization import GGUF
from jax_lora.weights.finite import check_finite
from jax_lora.weights.gguf_file import GGUFFile, Tensor
from jax_lora.weights.quantize import Fields, KernelReader, put_stacks
from jax_lora.weights.tree import DevicePut, Leaf


def kernel_kinds(file: GGUFFile) -> Kinds:
    """The kinds of blocks of the linear layers.

    Raises:
      DataError: a tensor in a kind that `gguf_blocks` does not have.
    """
    kinds: dict[str, set[str]] = {linear.name: set() for linear in LINEARS}
    for linear in LINEARS:
        for name, tensor in file.tensors.items():
            if not name.startswith("blk.") or not name.endswith(f".{linear.gguf}.weight"):
                continue
            if tensor.kind.name not in KINDS:
                raise DataError(
                    f"{file.path}: {name} is {tensor.kind.name}, expected one of "
                    f"{', '.join(KINDS)} for model_quantization=gguf"
                )
            kinds[linear.name].add(tensor.kind.name)
    return tuple((name, tuple(sorted(found))) for name, found in kinds.items())


def kernel_reader(
    file: GGUFFile,
    tensors: Mapping[str, Tensor],
    in_order: Callable[[str, np.ndarray], np.ndarray],
) -> KernelReader:
    """Reads kernels in the blocks of the file.

    Args:
      file: the file.
      tensors: its tensors by Hugging Face's names.
      in_order: (Hugging Face's name, rows in the order of the file) → in Hugging Face's.

    Raises:
      DataError: as `kernel_kinds`; and from the reader, a block whose scale is not finite.
    """
    known = dict(kernel_kinds(file))

    def read_kernel(leaf: Leaf, put: DevicePut) -> GGUF:
        kinds = known[leaf.path[-2]]

        def layers() -> Iterator[Fields]:
            for name in leaf.names:
                tensor = tensors[name]
                _check_scales(tensor, file.path)
                rows = in_order(name, tensor.data)
                index = np.asarray(kinds.index(tensor.kind.name), np.int32)
                yield {"blocks": _units(rows, tensor.kind.name, kinds), "kind": index}

        return GGUF(**put_stacks(leaf, layers(), put), kinds=kinds)

    return read_kernel


def _check_scales(tensor: Tensor, path: object) -> None:
    # What is finite in a block is finite in its weights.
    kind = KINDS[tensor.kind.name]
    blocks = tensor.data.reshape(-1, kind.bytes)
    for at in kind.scales:
        scales = blocks[:, at : at + 2].copy().view(np.float16)[:, 0]
        check_finite(scales, f"{tensor.name}, scales of its blocks", path)


def _units(rows: np.ndarray, kind: str, kinds: Sequence[str]) -> np.ndarray:
    # (out, bytes) → (in / unit, bytes, out), padded to the largest of the kinds, see `GGUF`
    unit = gguf_blocks.unit(kinds)
    used = unit // KINDS[kind].weights * KINDS[kind].bytes
    units = rows.reshape(len(rows), -1, used)
    spare = gguf_blocks.unit_bytes(kinds) - used
    return np.pad(units, ((0, 0), (0, 0), (0, spare))).transpose(1, 2, 0)
