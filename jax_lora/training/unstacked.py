"""Frozen kernels as one array per layer, for a step whose layers are all unrolled.

A product by cuBLAS does not read a slice of a stack in place: XLA copies the slice, of every layer
in every step, and keeps the copies from the forward to the backward pass. An array of its own is
read where it lies. `benchmarks/scan_forms.py` counts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree


def unstack(frozen: PyTree) -> PyTree:
    """Kernels (L, in, out) as tuples of L arrays (in, out); other leaves as they are.

    Args:
      frozen: a tree of arrays, or of `jax.ShapeDtypeStruct`s with shardings.
    """

    def one(path, x):
        return _layers(x) if path[-1] == jax.tree_util.DictKey("kernel") and x.ndim == 3 else x

    return jax.tree_util.tree_map_with_path(one, frozen)


def stack(frozen: PyTree) -> PyTree:
    """The inverse of `unstack`, inside a compiled function.

    It costs nothing where the layers are unrolled: a slice of a concatenation is its operand.
    """
    return jax.tree.map(lambda x: jnp.stack(x) if _is_layers(x) else x, frozen, is_leaf=_is_layers)


def put(path: tuple[str, ...], array: np.ndarray) -> PyTree:
    """Put a leaf of the base on the device, a kernel layer by layer."""
    if path[-1] == "kernel" and array.ndim == 3:
        return tuple(map(jnp.asarray, array))
    return jnp.asarray(array)


def restacked(held: list[PyTree]) -> PyTree:
    """The base of `put` with stacked kernels, or a stacked one as `put` has it, on its device.

    What training leaves is so scored, and the other way around, without another read of the files.

    Args:
      held: the tree alone, which is taken out: where nobody else holds it, each leaf is freed as
        soon as the other form of it is there.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(held.pop(), is_leaf=_is_layers)
    for i, (path, leaf) in enumerate(leaves):
        leaves[i] = (path, None)
        is_kernel = path[-1] == jax.tree_util.DictKey("kernel") and not _is_layers(leaf)
        leaf = jnp.stack(leaf) if _is_layers(leaf) else leaf
        leaves[i] = (path, _layers(leaf) if is_kernel and leaf.ndim == 3 else leaf)
        leaf = None
    return jax.tree.unflatten(treedef, [leaf for _, leaf in leaves])


def _is_layers(x: PyTree) -> bool:
    return type(x) is tuple  # a MaskedNode is another one


def _layers(x: jax.Array | jax.ShapeDtypeStruct) -> tuple[PyTree, ...]:
    if not isinstance(x, jax.ShapeDtypeStruct):
        return tuple(x)
    assert isinstance(x.sharding, NamedSharding)
    where = NamedSharding(x.sharding.mesh, P(*x.sharding.spec[1:]))
    return (jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=where),) * x.shape[0]
