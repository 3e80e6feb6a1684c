"""Many devices: a mesh, and a table of the PartitionSpec of every leaf.

The mesh has three axes. `data`: copies of the parameters, each with its own rows. `fsdp`: rows
too, but a device holds a shard of the parameters and gathers the rest one layer at a time
(Rajbhandari et al. 2020, arXiv:1910.02054). `tensor`: the same rows, each device with a shard of
the heads and of the mlp (Shoeybi et al. 2019, arXiv:1909.08053).

The arguments, results and activations of compiled functions are sharded here; XLA's partitioner
finds the communication. The functions take real and abstract meshes, arrays and
`jax.ShapeDtypeStruct`s alike, so that memory can be planned where there are no devices.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any  # of devices, whose type jax does not export to type checkers

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from jax_lora.config import MeshConfig, MeshSizes
from jax_lora.model.arch import BY_NAME, NORMS

AXES = MeshSizes._fields
ROWS = P(("data", "fsdp"))  # of a batch
# Logical axes of activations, see `Llama.shard_activation` → mesh axes.
LOGICAL_AXES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "embed": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}

# Regular expressions for the last part of a leaf's path, and the PartitionSpec of such a leaf. The
# last part alone, so that a gradient or a moment of Adam (`1/0/mu/lora/layers/…/q_proj/a`) is
# sharded as its parameter is. What they say of a linear layer, `-` being an axis that is whole:
#
#                                  column-parallel              row-parallel, as in Megatron
#                                  q_proj k_proj v_proj         o_proj down_proj
#                                  gate_proj up_proj (lm_head)
#   kernel (layers, in, out)       -, fsdp, tensor              -, tensor × fsdp, -
#   A      (layers, in, rank)      -, fsdp × tensor, -          -, tensor × fsdp, -
#   B      (layers, rank, out)     -, -, tensor × fsdp          -, -, fsdp × tensor
#
# `fsdp` never cuts a kernel's outputs: to gather those XLA would first copy all layers into another
# order. The rank is never cut. lm_head is not stacked: its kernel has no axis of layers.
_ROW_PARALLEL = "|".join(name for name, x in BY_NAME.items() if x.is_row_parallel)
_COLUMN_PARALLEL = "|".join(name for name, x in BY_NAME.items() if not x.is_row_parallel)
_NORM = "|".join(("norm", *("/".join(norm.path) for norm in NORMS)))
_STORED = "kernel(/stored)?"  # with PiSSA `kernel` is a `quantization.Residual`: stored, a, b
PARTITION_RULES = (
    (r"embed_tokens/embedding", P("tensor", "fsdp")),
    (r"lm_head/kernel", P("fsdp", "tensor")),
    (rf"({_NORM})/scale", P()),
    # Kernels (without /kernel: a materialized delta) and biases.
    (rf"({_COLUMN_PARALLEL})(/kernel)?", P(None, "fsdp", "tensor")),
    (rf"({_ROW_PARALLEL})(/kernel)?", P(None, ("tensor", "fsdp"))),
    (rf"({_COLUMN_PARALLEL})/bias", P(None, "tensor")),
    (rf"({_ROW_PARALLEL})/bias", P()),
    # Adapters: A, B, DoRA's magnitudes, the scales of padded ranks.
    (rf"({_COLUMN_PARALLEL})(/kernel)?/a", P(None, ("fsdp", "tensor"), None)),
    (rf"({_COLUMN_PARALLEL})(/kernel)?/b", P(None, None, ("tensor", "fsdp"))),
    (rf"({_ROW_PARALLEL})(/kernel)?/a", P(None, ("tensor", "fsdp"), None)),
    (rf"({_ROW_PARALLEL})(/kernel)?/b", P(None, None, ("fsdp", "tensor"))),
    (rf"({_COLUMN_PARALLEL}|{_ROW_PARALLEL})/(m|scale)", P()),
    # Quantized kernels, see `model.quantization`: their blocks are dimensions that are never cut.
    (rf"({_COLUMN_PARALLEL})/{_STORED}/(packed|blocks)", P(None, "fsdp", None, "tensor")),
    (rf"({_COLUMN_PARALLEL})/{_STORED}/(values|constants)", P(None, "fsdp", "tensor")),
    (rf"({_ROW_PARALLEL})/{_STORED}/(packed|blocks|values|constants)", P(None, ("tensor", "fsdp"))),
    (rf"({_COLUMN_PARALLEL})/{_STORED}/scale", P(None, "tensor")),
    (rf"({_ROW_PARALLEL})/{_STORED}/scale", P()),
    (rf"({_COLUMN_PARALLEL}|{_ROW_PARALLEL})/{_STORED}/(groups|offset|kind)", P()),
)

# Adafactor's v_row and v_col, the means of the second moments over columns and rows, are small and
# have another shape than the parameter that they are named after: replicated.
_FACTORED = re.compile(r"(.*/)?v_(row|col)/.*")

# What is stored of a quantized kernel by blocks. There are few blocks along the side that a kernel
# reads, 43 in LLaMA's down_proj: an axis that does not divide their number cuts the outputs.
_BLOCKS = re.compile(r".*/kernel(/stored)?/(packed|blocks|values|constants)")

# ------------------------------------------------------------------ meshes and shardings


def make_mesh(sizes: MeshSizes, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices.

    Args:
      sizes: one of them may be -1, which takes what the others leave.
      devices: by default those of all processes.

    Raises:
      ConfigError: sizes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = MeshConfig(*sizes).sizes(len(devices))
    return jax.make_mesh(sizes, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def row_groups(mesh: Mesh | AbstractMesh | None) -> int:
    """Groups of devices that compute different rows: data × fsdp; 1 without a mesh."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def spec(name: str, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    """The PartitionSpec of a leaf; a mesh axis that does not divide its dimension is left out.

    Args:
      name: such as `params/layers/self_attn/q_proj/kernel`, with anything before it.
      shape: of the leaf; a scalar is replicated.

    Raises:
      ValueError: a name that the table does not cover.
    """
    if not shape:
        return P()
    for expression, axes in PARTITION_RULES:
        if re.fullmatch(rf"(.*/)?{expression}", name):
            if _BLOCKS.fullmatch(name):
                return _divisible(_cut_outputs(axes, shape, mesh), shape, mesh)
            return P() if _FACTORED.fullmatch(name) else _divisible(axes, shape, mesh)
    raise ValueError(f"sharding: no expression of the table covers the leaf {name}, {shape}")


def _cut_outputs(spec: P, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    # The mesh axes that do not divide their dimension, moved to the last one.
    sides: list[tuple[str, ...]] = [
        (axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in spec
    ]
    sides += [()] * (len(shape) - len(sides))
    divided = _divisible(spec, shape, mesh)
    used = {name for axes in divided for name in ((axes,) if isinstance(axes, str) else axes or ())}
    left = tuple(name for axes in sides[:-1] for name in axes if name not in used)
    return P(*(tuple(n for n in axes if n in used) for axes in sides[:-1]), (*sides[-1], *left))


def _divisible(spec: P, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    # Without the mesh axes that do not divide their dimension; in the form in which compiled
    # functions return it, without axes of size 1 and Nones at the end: for an equal sharding in
    # another form the function would be compiled once more.
    found: list[str | tuple[str, ...] | None] = []
    for axes, size in zip(spec, shape, strict=False):
        dividing = []
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            if mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0:
                dividing.append(axis)
                size //= mesh.shape[axis]
        found.append(dividing[0] if len(dividing) == 1 else tuple(dividing) or None)
    while found and found[-1] is None:
        found.pop()
    return P(*found)


def shardings(tree: PyTree, mesh: Mesh | AbstractMesh) -> PyTree:
    """The `NamedSharding` of every leaf."""

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(one, tree)


def abstract(tree: PyTree, mesh: Mesh | AbstractMesh) -> PyTree:
    """The tree as `jax.ShapeDtypeStruct`s with their shardings."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        tree,
        shardings(tree, mesh),
    )


def local_bytes(tree: PyTree, mesh: Mesh | AbstractMesh) -> int:
    """Bytes of a tree on one device; all devices hold equally much."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(abstract(tree, mesh))
    )


# ------------------------------------------------------------------ arrays on devices


def shard(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """The arrays, of this mesh already or complete in every process, sharded by the table.

    Without a mesh they stay where they are.
    """
    return tree if mesh is None else jax.tree.map(_device_put, tree, shardings(tree, mesh))


@functools.lru_cache(maxsize=8)  # equal meshes get the same function, which may key a cache
def leaf_sharder(mesh: Mesh) -> Callable[[tuple[str, ...], np.ndarray], jax.Array]:
    """(path in the base tree, numpy array) → that leaf on its devices: `shard` for a reader."""

    def put(path: tuple[str, ...], array: np.ndarray) -> jax.Array:
        return _device_put(array, NamedSharding(mesh, spec("/".join(path), array.shape, mesh)))

    return put


def shard_layer(tree: PyTree, mesh: Mesh) -> PyTree:
    """One layer's part of stacked arrays, sharded as the stacks are."""
    # The table is of stacks, whose first dimension is never sharded.
    stacks = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), tree)
    return jax.tree.map(
        lambda x, where: _device_put(x, NamedSharding(mesh, P(*where.spec[1:]))),
        tree,
        shardings(stacks, mesh),
    )


def shard_batch(batch: PyTree, mesh: Mesh | None) -> PyTree:
    """A micro-batch, equal in every process, each device taking its rows; without a mesh, all.

    Raises:
      ValueError: rows that data × fsdp does not divide.
    """
    if mesh is None:
        return jax.tree.map(jnp.asarray, batch)
    groups, rows = row_groups(mesh), {len(x) for x in jax.tree.leaves(batch)}
    if any(n % groups for n in rows):
        raise ValueError(
            f"micro-batch: found {max(rows)} rows, expected a multiple of data × fsdp = {groups}"
        )
    return jax.tree.map(lambda x: _device_put(x, NamedSharding(mesh, ROWS)), batch)


def _device_put(array: np.ndarray | jax.Array, where: NamedSharding) -> jax.Array:
    if isinstance(array, jax.Array) and (
        array.sharding.device_set == where.device_set
        or (array.is_fully_addressable and where.is_fully_addressable)
    ):
        return jax.device_put(array, where)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def init_sharded(function: Callable[..., PyTree], mesh: Mesh | None, *args: PyTree) -> PyTree:
    """`function(*args)`, on a mesh compiled so that no device ever holds more than its shard."""
    if mesh is None:
        return function(*args)
    where = shardings(jax.eval_shape(function, *args), mesh)
    return jax.jit(function, out_shardings=where)(*args)


def gather(tree: PyTree) -> PyTree:
    """The tree as numpy arrays in the memory of every process; all processes take part."""

    def one(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(one, tree)


# ------------------------------------------------------------------ inside compiled functions


def constrain(tree: PyTree, mesh: Mesh) -> PyTree:
    """Parameters or gradients inside a compiled function, sharded by the table."""
    return jax.lax.with_sharding_constraint(tree, shardings(tree, mesh))


def gather_embeddings(variables: PyTree, mesh: Mesh) -> PyTree:
    """The variables, the embeddings no longer sharded by `fsdp`.

    Rows are looked up in them before the first layer gathers its kernels, and from a table sharded
    along D to rows sharded by the same axis the partitioner knows no better way than to copy both.
    """
    params = dict(variables["params"])
    table = params["embed_tokens"]["embedding"]
    where = NamedSharding(mesh, _divisible(P("tensor", None), table.shape, mesh))
    params["embed_tokens"] = {"embedding": jax.lax.with_sharding_constraint(table, where)}
    return {**variables, "params": params}


@dataclass(frozen=True)
class Activations:
    """Constrains the sharding of activations by their logical axes, as in Flax.

    `Llama.shard_activation` of a model on many devices. Without it the partitioner shards
    activations as the adapters are and communicates them in every layer. The same holds for the
    product with a B (R, out): gathering B, or its shard along `tensor`, costs less.
    """

    mesh: Mesh

    def __call__(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """`axes`: of the dimensions of x, keys of `LOGICAL_AXES` or None; the rest is None."""
        spec = P(*(None if axis is None else LOGICAL_AXES[axis] for axis in axes))
        sharding = NamedSharding(self.mesh, _divisible(spec, x.shape, self.mesh))
        return jax.lax.with_sharding_constraint(x, sharding)


@dataclass(frozen=True)
class LocalAttention:
    """A kernel of `jax_lora.model.attention` that each device runs on its own rows and heads.

    The partitioner cannot look into fused kernels. `Llama.attention` of a model on many devices;
    kv heads that `tensor` does not divide are replicated.
    """

    kernel: Callable[..., jax.Array]
    mesh: Mesh

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None
    ) -> jax.Array:
        heads = _divisible(P(("data", "fsdp"), "tensor"), k.shape, self.mesh)
        rows = P(*heads[:1])
        run = jax.shard_map(
            self.kernel,
            mesh=self.mesh,
            in_specs=(heads, heads, heads, rows),
            out_specs=heads,
            check_vma=False,
        )
        return run(q, k, v, segments)
