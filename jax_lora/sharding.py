"""Many devices: a mesh, a table of where every leaf lies on it, and the start of many processes.

The mesh has three axes. `data`: copies of the parameters, each with rows of its own. `fsdp`: rows
too, but a device keeps a part of the parameters and borrows the rest a layer at a time
(Rajbhandari et al. 2020, arXiv:1910.02054). `tensor`: the same rows, each device with a part of
the heads and of the mlp (Shoeybi et al. 2019, arXiv:1909.08053).

What a compiled function takes and returns is laid out here, and what stands between its layers;
XLA's partitioner finds the communication. The functions take real and abstract meshes, arrays
and `jax.ShapeDtypeStruct`s alike, so that memory can be planned where there are no devices.
"""

from __future__ import annotations

import errno
import functools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # its store of keys and values has no public name
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_lora.errors import ConfigError
from jax_lora.model.arch import LINEARS, NORMS

AXES = ("data", "fsdp", "tensor")
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

# The ends of leaf names, and how such a leaf is cut. Ends, so that a gradient or a moment of Adam
# lies where its parameter does: `1/0/mu/lora/layers/…/q_proj/a`. `tensor` cuts kernels where they
# leave D (q, k, v, gate and up) and where they come back to it (o and down). `fsdp` cuts them along
# the side they read: to gather the last side XLA first copies all layers with that side in front.
# Adapters are cut along both sides by both axes, the kernel's first, and never along the rank.
_ROW = "|".join(linear.name for linear in LINEARS if linear.is_row_parallel)
_COLUMN = "|".join(linear.name for linear in LINEARS if not linear.is_row_parallel)
_NORM = "|".join(("norm", *("/".join(norm.path) for norm in NORMS)))
TABLE = (
    (r"embed_tokens/embedding", P("tensor", "fsdp")),
    (r"lm_head/kernel", P("fsdp", "tensor")),
    (rf"({_COLUMN})(/kernel)?", P(None, "fsdp", "tensor")),  # without /kernel: a delta
    (rf"({_ROW})(/kernel)?", P(None, ("tensor", "fsdp"))),
    (rf"({_COLUMN})/bias", P(None, "tensor")),
    (rf"({_ROW})/bias", P()),
    (rf"({_COLUMN})/a", P(None, ("fsdp", "tensor"), None)),
    (rf"({_COLUMN})/b", P(None, None, ("tensor", "fsdp"))),
    (rf"({_ROW})/a", P(None, ("tensor", "fsdp"), None)),
    (rf"({_ROW})/b", P(None, None, ("fsdp", "tensor"))),
    (rf"({_COLUMN}|{_ROW})/(m|scale)", P()),
    (rf"({_NORM})/scale", P()),
)

# ------------------------------------------------------------------ where things lie


def make_mesh(sizes: Sequence[int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices.

    Args:
      sizes: of data, fsdp and tensor; one of them may be -1, which is what the others leave.
      devices: by default those of all processes.

    Raises:
      ConfigError: sizes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    found = " × ".join(map(str, sizes))
    if len(sizes) != 3 or list(sizes).count(-1) > 1 or any(n < 1 and n != -1 for n in sizes):
        raise ConfigError(
            f"mesh: found {found}, expected the sizes of data, fsdp and tensor, each at least 1, "
            "or -1 for one that takes what the others leave"
        )
    left = len(devices) // int(np.prod([n for n in sizes if n != -1]))
    full = tuple(left if n == -1 else n for n in sizes)
    if np.prod(full) != len(devices):
        raise ConfigError(
            f"mesh: found data × fsdp × tensor = {found} on {len(devices)} devices, expected "
            f"a product of {len(devices)}"
        )
    return jax.make_mesh(full, AXES, (AxisType.Auto,) * 3, devices=devices)


def row_parts(mesh: Mesh | AbstractMesh | None) -> int:
    """How many equal parts the rows of a batch are cut into: data × fsdp; 1 without a mesh."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def spec(name: str, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    """How the table cuts a leaf; an axis that does not divide its side is left out.

    Args:
      name: such as `params/layers/self_attn/q_proj/kernel`, with anything before it.
      shape: of the leaf; a scalar is whole on every device.

    Raises:
      ValueError: a name that the table does not cover.
    """
    if not shape:
        return P()
    for end, cut in TABLE:
        if re.fullmatch(rf"(.*/)?{end}", name):
            return _dividing(cut, shape, mesh)
    raise ValueError(f"sharding: no expression of the table covers the leaf {name}, {shape}")


def _dividing(cut: P, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    # In the form in which compiled functions return it, without axes of size 1 and Nones at the
    # end: an array laid out in other words would have the function compiled once more.
    sides: list[Any] = []
    for axes, size in zip(cut, shape, strict=False):
        kept = []
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            if mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0:
                kept.append(axis)
                size //= mesh.shape[axis]
        sides.append(kept[0] if len(kept) == 1 else tuple(kept) or None)
    while sides and sides[-1] is None:
        sides.pop()
    return P(*sides)


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A `NamedSharding` for every leaf, after the table."""

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(one, tree)


def abstract(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The tree as `jax.ShapeDtypeStruct`s with their shardings."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        tree,
        shardings(tree, mesh),
    )


def local_bytes(tree: Any, mesh: Mesh | AbstractMesh) -> int:
    """Bytes of a tree on one device; all devices hold equally much."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(abstract(tree, mesh))
    )


# ------------------------------------------------------------------ putting them there


def place(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays laid out after the table: of the mesh already, or whole in every process.

    Without a mesh they stay where they are.
    """
    return tree if mesh is None else jax.tree.map(_put, tree, shardings(tree, mesh))


@functools.lru_cache(maxsize=8)  # equal meshes get the same function, which may key a cache
def placer(mesh: Mesh) -> Callable[[tuple[str, ...], np.ndarray], jax.Array]:
    """(path in the base tree, numpy array) → that leaf on its devices: `place` of a reader."""

    def put(path: tuple[str, ...], array: np.ndarray) -> jax.Array:
        return _put(array, NamedSharding(mesh, spec("/".join(path), array.shape, mesh)))

    return put


def place_layer(tree: Any, mesh: Mesh) -> Any:
    """One layer's part of stacked arrays, laid out as the stacks are."""
    # The table is of stacks, whose first side is never cut.
    stacks = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), tree)
    return jax.tree.map(
        lambda x, where: _put(x, NamedSharding(mesh, P(*where.spec[1:]))),
        tree,
        shardings(stacks, mesh),
    )


def place_rows(batch: Any, mesh: Mesh | None) -> Any:
    """A micro-batch, equal in every process, each device taking its rows; without a mesh, all.

    Raises:
      ValueError: rows that data × fsdp does not divide.
    """
    if mesh is None:
        return jax.tree.map(jnp.asarray, batch)
    parts, rows = row_parts(mesh), {len(x) for x in jax.tree.leaves(batch)}
    if any(n % parts for n in rows):
        raise ValueError(
            f"micro-batch: found {max(rows)} rows, expected a multiple of data × fsdp = {parts}"
        )
    return jax.tree.map(lambda x: _put(x, NamedSharding(mesh, ROWS)), batch)


def _put(array: Any, where: NamedSharding) -> jax.Array:
    if isinstance(array, jax.Array) and (
        array.sharding.device_set == where.device_set
        or (array.is_fully_addressable and where.is_fully_addressable)
    ):
        return jax.device_put(array, where)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def make(function: Callable[..., Any], mesh: Mesh | None, *args: Any) -> Any:
    """`function(*args)`, on a mesh compiled so that no device ever holds more than its part."""
    if mesh is None:
        return function(*args)
    where = shardings(jax.eval_shape(function, *args), mesh)
    return jax.jit(function, out_shardings=where)(*args)


def whole(tree: Any) -> Any:
    """The tree in the memory of every process, numpy arrays; all processes take part."""

    def one(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(one, tree)


# ------------------------------------------------------------------ inside compiled functions


def constrain(tree: Any, mesh: Mesh) -> Any:
    """Parameters or gradients inside a compiled function, kept where the table has them."""
    return jax.lax.with_sharding_constraint(tree, shardings(tree, mesh))


def embeddings_gathered(variables: Any, mesh: Mesh) -> Any:
    """The variables, the embeddings no longer cut by `fsdp`.

    Rows are looked up in them before there is a layer to borrow for, and the partitioner knows
    no better way from a table cut along D to rows cut by the same axis than to copy both.
    """
    params = dict(variables["params"])
    table = params["embed_tokens"]["embedding"]
    where = NamedSharding(mesh, _dividing(P("tensor", None), table.shape, mesh))
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
        sharding = NamedSharding(self.mesh, _dividing(spec, x.shape, self.mesh))
        return jax.lax.with_sharding_constraint(x, sharding)


@dataclass(frozen=True)
class LocalAttention:
    """A kernel of `jax_lora.model.attention` that each device runs on its own rows and heads.

    The partitioner cannot look into fused kernels. `Llama.attention` of a model on many devices;
    kv heads that `tensor` does not divide are replicated.
    """

    kernel: Callable[..., jax.Array]
    mesh: Mesh

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, segments: Any) -> jax.Array:
        heads = _dividing(P(("data", "fsdp"), "tensor"), k.shape, self.mesh)
        rows = P(*heads[:1])
        run = jax.shard_map(
            self.kernel,
            mesh=self.mesh,
            in_specs=(heads, heads, heads, rows),
            out_specs=heads,
            check_vma=False,
        )
        return run(q, k, v, segments)


# ------------------------------------------------------------------ many processes


def join(coordinator: str = "", processes: int = -1, process: int = -1) -> None:
    """Make this process one of many, before anything touches a device.

    Args:
      coordinator: host:port of process 0; "auto" where the cluster knows (SLURM, Open MPI,
        Kubernetes, TPU pods), see `jax.distributed.initialize`; "" for what the environment's
        JAX_COORDINATOR_ADDRESS says, and without it this process stays alone.
      processes, process: how many there are and which this one is, from 0; -1 for what
        JAX_NUM_PROCESSES and JAX_PROCESS_ID say. Unused with "auto".

    Raises:
      ConfigError: an address without a port, or numbers missing or out of range.
      OSError: the others could not be reached.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    if not coordinator:
        return
    arguments: dict[str, Any] = {}
    if coordinator != "auto":
        count = _from_environment(processes, "JAX_NUM_PROCESSES")
        which = _from_environment(process, "JAX_PROCESS_ID")
        if not re.fullmatch(r".+:\d+", coordinator):
            raise ConfigError(f"coordinator: found {coordinator!r}, expected host:port or auto")
        if not 0 <= which < count:
            raise ConfigError(
                f"coordinator: found process {which} of {count}, expected 0 to one less than their "
                "number (--process and --processes, or JAX_PROCESS_ID and JAX_NUM_PROCESSES)"
            )
        # No detection: a cluster's word on how many devices a process has is for its own ways.
        arguments = dict(
            coordinator_address=coordinator,
            num_processes=count,
            process_id=which,
            cluster_detection_method="deactivate",
        )
    try:
        jax.distributed.initialize(**arguments)
    except ValueError:
        raise ConfigError(
            "coordinator: found no cluster that jax knows, expected host:port in place of auto"
        ) from None
    except RuntimeError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        text = f"the processes did not meet: {reason}"
        raise OSError(errno.ETIMEDOUT, text, f"coordinator {coordinator}") from None


def store() -> Any | None:
    """The runtime's keys and values, which all processes see; None in a process that is alone.

    An object with `key_value_set(key, value, allow_overwrite=False)` and `key_value_dir_get(key)`
    → [(key, value)].
    """
    return distributed.global_state.client


def _from_environment(number: int, name: str) -> int:
    text = os.environ.get(name, "-1") if number == -1 else str(number)
    if not re.fullmatch(r"-?\d+", text):
        raise ConfigError(f"{name}: found {text!r}, expected a number")
    return int(text)


def anywhere(flag: bool, after: Any) -> bool:
    """Whether the flag is set in any process; all of them must ask.

    `after`: a result of what was started last. CPUs run programs that do not depend on each other
    at once, and two that communicate would take each other's messages.
    """
    if jax.process_count() == 1:
        return flag
    jax.block_until_ready(after)
    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())
