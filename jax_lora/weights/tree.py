"""Which tensor of a checkpoint is which leaf of the base parameters.

Every format is brought to Hugging Face's names and orientation first; this module alone knows how
those become the base tree (layers stacked on axis 0, kernels `(in, out)`):

    embed_tokens/embedding (V, D)        norm/scale (D,)        lm_head/kernel (D, V) if untied
    layers/input_layernorm/scale (L, D)  layers/post_attention_layernorm/scale (L, D)
    layers/self_attn/{q,k,v,o}_proj/kernel (L, in, out)  [bias (L, out)]  [{q,k}_norm/scale (L, H)]
    layers/mlp/{gate,up,down}_proj/kernel (L, in, out)   [bias (L, out)]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors relies on)
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from jax_lora.errors import ConfigError, DataError
from jax_lora.model.arch import LINEARS
from jax_lora.model.config import LlamaConfig

DTYPES = ("bfloat16", "float16", "float32")
DevicePut = Callable[[tuple[str, ...], np.ndarray], PyTree]


class Leaf(NamedTuple):
    """One leaf: its path in the base tree, and the tensors that fill it.

    `names`: one per layer for a stacked leaf, else one. `shape`: of each tensor in the file, a
    kernel as `(out, in)` when `transposed`.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    shape: tuple[int, ...]
    stacked: bool = False
    transposed: bool = False

    @property
    def is_kernel(self) -> bool:
        """Whether it is the kernel of a linear layer of a block."""
        return self.stacked and self.path[-1] == "kernel"

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        shape = self.shape[::-1] if self.transposed else self.shape
        return (len(self.names), *shape) if self.stacked else shape


def leaves(config: LlamaConfig) -> tuple[Leaf, ...]:
    """All leaves of a model of this shape, in the order in which they are read and written."""
    d, v = config.hidden_size, config.vocab_size
    layers = [f"model.layers.{i}." for i in range(config.num_hidden_layers)]

    def stacked(path: tuple[str, ...], suffix: str, shape: tuple[int, ...], transposed=False):
        names = tuple(layer + suffix for layer in layers)
        return Leaf(("layers", *path), names, shape, True, transposed)

    table = [Leaf(("embed_tokens", "embedding"), ("model.embed_tokens.weight",), (v, d))]
    for norm in config.norms():
        size = config.size(norm.axis)
        table.append(stacked((*norm.path, "scale"), f"{'.'.join(norm.path)}.weight", (size,)))
    for linear in LINEARS:
        module = ".".join(linear.path)
        size_in, size_out = config.size(linear.inputs), config.size(linear.outputs)
        kernel = (size_out, size_in)
        table.append(stacked((*linear.path, "kernel"), f"{module}.weight", kernel, True))
        if linear.name in config.biases:
            table.append(stacked((*linear.path, "bias"), f"{module}.bias", (size_out,)))
    table.append(Leaf(("norm", "scale"), ("model.norm.weight",), (d,)))
    if not config.tie_word_embeddings:
        table.append(Leaf(("lm_head", "kernel"), ("lm_head.weight",), (v, d), transposed=True))
    return tuple(table)


def check_tensors(
    where: str,
    config: LlamaConfig,
    found: Mapping[str, tuple[int, ...]],
    label: Callable[[str], str] = str,
) -> None:
    """Compare the tensors of a file with those a model of this shape needs.

    Args:
      where: the file or folder, for the message.
      config: the shape to expect.
      found: Hugging Face name → shape.
      label: Hugging Face name → the name that the file's own format has for it.

    Raises:
      DataError: a tensor is missing, has another shape, or is not part of the model.
    """
    if config.num_hidden_layers > len(found):  # a damaged number may have no end of layers
        layers = config.num_hidden_layers
        raise DataError(f"{where}: found {len(found)} tensors, expected those of {layers} layers")
    expected = {name: leaf.shape for leaf in leaves(config) for name in leaf.names}
    missing = [name for name in expected if name not in found]
    if missing == ["lm_head.weight"]:
        raise DataError(
            f"{where}: {label(missing[0])} is missing, though tie_word_embeddings is false"
        )
    if missing:
        raise DataError(
            f"{where}: missing {_some(missing, label)}; expected {len(expected)} tensors"
        )
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise DataError(
                f"{where}: {label(name)} has shape {tuple(found[name])}, expected {shape}"
            )
    extra = [name for name in found if name not in expected and not _harmless(name, config)]
    if extra:
        raise DataError(f"{where}: unexpected {_some(extra, label)}, not part of this model")


def _harmless(name: str, config: LlamaConfig) -> bool:
    # Old checkpoints keep the rotary frequencies as a buffer, or the tied head a second time.
    tied = config.tie_word_embeddings and name == "lm_head.weight"
    return tied or name.endswith("rotary_emb.inv_freq")


def _some(names: list[str], label: Callable[[str], str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    few = ", ".join(label(name) for name in names[:3])
    return f"tensor{'s' if len(names) > 1 else ''} {few}{more}"


def numpy_dtype(dtype: DTypeLike) -> np.dtype:
    """The numpy dtype of a name such as "bfloat16" (or of a dtype); one of `DTYPES`.

    Raises:
      ConfigError: it is none of them.
    """
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in DTYPES:
        raise ConfigError(f"dtype: found {dtype!r}, expected one of {', '.join(DTYPES)}")
    return found


def assemble(
    config: LlamaConfig,
    dtype: DTypeLike,
    read: Callable[[str], np.ndarray],
    put: DevicePut | None = None,
    read_kernel: Callable[[Leaf, DevicePut], PyTree] | None = None,
) -> PyTree:
    """Build the base tree, one leaf at a time.

    Args:
      config: the shape; `check_tensors` has passed for it.
      dtype: of every leaf.
      read: Hugging Face name → that tensor, in Hugging Face's orientation.
      put: gets a leaf's path and its numpy array, returns what the tree holds (default: a
        jax array on the default device). The numpy array is not touched again.
      read_kernel: of the linear layers where they are quantized, see `quantize.kernel_reader`.

    Returns:
      The tree of the module's docstring. Beside what `put` returns, no more than one leaf and
      one tensor are alive at a time.
    """
    dtype = numpy_dtype(dtype)
    put = put or (lambda path, array: jnp.asarray(array))
    tree: PyTree = {}
    for leaf in leaves(config):
        node = tree
        for key in leaf.path[:-1]:
            node = node.setdefault(key, {})
        if read_kernel is not None and leaf.is_kernel:
            node[leaf.path[-1]] = read_kernel(leaf, put)
        else:
            node[leaf.path[-1]] = put(leaf.path, _fill(leaf, dtype, read))
    return tree


def _fill(leaf: Leaf, dtype: np.dtype, read: Callable[[str], np.ndarray]) -> np.ndarray:
    # A function of its own, so that no name keeps the last leaf alive while the next is filled.
    buffer = np.empty(leaf.leaf_shape, dtype)
    for slot, name in zip(buffer if leaf.stacked else [buffer], leaf.names, strict=True):
        tensor = _cast(read(name), dtype, name)  # first: it halves what is to be transposed
        np.copyto(slot, tensor.T if leaf.transposed else tensor)
    return buffer


def disassemble(
    config: LlamaConfig, base: PyTree, dtype: DTypeLike
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
    """The way back: Hugging Face name, shape, and a function that fetches the tensor.

    Raises:
      ValueError: a leaf is missing or has another shape than the configuration says.
    """
    dtype = numpy_dtype(dtype)
    for leaf in leaves(config):
        node: PyTree = base
        for key in leaf.path:
            node = node[key] if isinstance(node, Mapping) and key in node else None
        if node is None or tuple(node.shape) != leaf.leaf_shape:
            found = "nothing" if node is None else tuple(node.shape)
            path = "/".join(leaf.path)
            raise ValueError(f"base parameter {path}: found {found}, expected {leaf.leaf_shape}")
        for layer, name in enumerate(leaf.names):

            def fetch(node=node, leaf=leaf, layer=layer, name=name) -> np.ndarray:
                tensor = _cast(np.asarray(node[layer] if leaf.stacked else node), dtype, name)
                return np.ascontiguousarray(tensor.T if leaf.transposed else tensor)

            yield name, leaf.shape, fetch


def _cast(tensor: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    if tensor.dtype == dtype:
        return tensor
    with np.errstate(over="ignore"):  # told below, with the tensor's name
        cast = tensor.astype(dtype)
    if dtype == np.float16 and not np.isfinite(cast).all() and np.isfinite(tensor).all():
        largest = float(np.abs(tensor.astype(np.float32)).max())
        raise DataError(f"{name}: holds {largest:.6g}, above float16's largest 65504")
    return cast
