"""The weights that a run starts from: the base and new adapters.

The base is cached for the next run of the same process: the cells of a study share it.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from jax_lora import sharding
from jax_lora.config import RunConfig
from jax_lora.errors import ConfigError
from jax_lora.model import lora, variants
from jax_lora.model.config import LlamaConfig
from jax_lora.training import unstacked
from jax_lora.weights import base as base_weights
from jax_lora.weights import origin, peft

Put = Callable[..., PyTree]  # (path, numpy array) → the array on its device or devices
VARIANTS = ("lora", "dora")


def load_base(
    source: str, dtype: str, trains: PyTree, put: Put | None = None, quantization: str = "none"
) -> PyTree:
    """Base parameters: float32 for what trains (its master copy), `dtype` for what is frozen.

    A base that stays frozen is cached for the next call.

    Args:
      source: folder, hub id or GGUF file.
      dtype: of the arithmetic, which a quantized base is dequantized to.
      trains: the mask's part for the base, one boolean per leaf.
      put: (path, numpy array) → the array on its device or devices.
      quantization: of the linear layers, `config.model_quantization`.
    """
    if not any(jax.tree.leaves(trains)):
        return _frozen_base(source, dtype, put, quantization)
    _CACHED.clear()  # a device may not hold two

    def cast(path, array):
        trained = trains
        for key in path:
            if isinstance(trained, bool):  # a field of a quantized kernel
                return (put or _put_on_device)(path, array)
            trained = trained[key]
        return (put or _put_on_device)(path, array if trained else array.astype(dtype))

    return base_weights.load(source, "float32", cast, quantization)[1]


# The last base, by its arguments and what tells its files from others of the same name.
_CACHED: dict[tuple[str, str, Put | None, str, str], PyTree] = {}


def _frozen_base(source: str, dtype: str, put: Put | None, quantization: str) -> PyTree:
    stamp = base_weights.stamp(source)
    key = (source, dtype, put, quantization, stamp)
    if key not in _CACHED:
        forms = {None: unstacked.put, unstacked.put: None}  # both are on one device
        other = (source, dtype, forms[put], quantization, stamp) if put in forms else None
        held = [_CACHED.pop(other)] if other in _CACHED else []
        _CACHED.clear()  # first: a device may not hold two
        if held:
            loaded = unstacked.restacked(held)
        else:
            loaded = base_weights.load(source, dtype, put or _put_on_device, quantization)[1]
        _CACHED[key] = loaded
    return _CACHED[key]


def _put_on_device(_, array: np.ndarray) -> jax.Array:
    return jnp.asarray(array)


def adapters_of(config: RunConfig, shape: LlamaConfig, mesh: Mesh | None = None) -> PyTree:
    """The adapters that a run starts from, see `new_adapters`; drawn ones made on the mesh."""
    c = config.lora
    _check_memory(config, shape)
    draw = functools.partial(
        new_adapters,
        shape,
        seed=config.seed,
        rank=c.rank,
        alpha=c.alpha,
        targets=c.targets,
        scaling=c.scaling,
        init=c.init,
        variant=c.variant,
    )
    drawn = c.init in (*lora.INITS, "pissa")  # else read from a folder
    return sharding.init_sharded(draw, mesh) if drawn else draw()


def _check_memory(config: RunConfig, shape: LlamaConfig) -> None:
    """Refuse adapters that no device here can hold, before they are made."""
    sizes = lora.shapes(shape, config.lora.rank, config.lora.targets)
    need = 4 * sum(math.prod(size) for leaf in sizes.values() for size in leaf.values())
    stats = jax.local_devices()[0].memory_stats() or {}  # None on a CPU
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    room = stats["bytes_limit"] * len(jax.devices()) if "bytes_limit" in stats else host
    if need > room:
        raise ConfigError(
            f"config.lora.rank: found {config.lora.rank}, whose adapters take "
            f"{need / 2**30:,.1f} GiB, expected at most the {room / 2**30:,.1f} GiB of the devices"
        )


def new_adapters(
    config: LlamaConfig,
    *,
    seed: int,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    scaling: str,
    init: str,
    variant: str,
) -> PyTree:
    """Adapters before the first step, but for what needs the base (see `on_base`).

    Args:
      seed, rank, alpha, targets, scaling: as for `lora.init`.
      init: "kaiming" or "gaussian" (see `lora.init`), "pissa", or the folder of a PEFT adapter to
        go on from, whose rank, α, targets and variant must be these.
      variant: "lora" or "dora".

    Raises:
      ConfigError: an unknown choice, an `init` that is neither a choice nor a folder, or an adapter
        of another shape, scale or variant.
    """
    if variant not in VARIANTS:
        raise ConfigError(f"lora variant: found {variant!r}, expected one of {', '.join(VARIANTS)}")
    if variant == "dora" and init == "pissa":
        raise ConfigError("lora variant and init: found dora and pissa, expected one of the two")
    drawn = lora.init(
        lora.seed_keys(seed).adapters,
        config,
        rank,
        alpha=alpha,
        targets=targets,
        a_init=init if init in lora.INITS else "kaiming",
        scaling=scaling,
    )
    if variant == "dora":
        for leaf in lora.by_target(drawn).values():
            leaf["m"] = jnp.zeros((leaf["b"].shape[0], leaf["b"].shape[2]), jnp.float32)
    if init in (*lora.INITS, "pissa"):
        return drawn
    if not Path(init).is_dir():
        choices = ", ".join((*lora.INITS, "pissa"))
        raise ConfigError(f"lora init: found {init!r}, expected {choices} or a PEFT folder")
    read = peft.load(init, config.num_hidden_layers)
    if partial := [name for name, ranks in read.ranks.items() if not all(ranks)]:
        raise ConfigError(
            f"{init}: found layers without an adapter of {', '.join(partial)}, expected one in all"
        )
    found = read.adapters
    lora.check(found, config)
    there, here = (
        {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (found, drawn))
    )
    for name in sorted(there.keys() | here.keys()):
        shapes = [jnp.shape(part[name]) if name in part else None for part in (there, here)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"{init}: {name} is {shapes[0]}, expected {shapes[1]}: "
                "give the adapter's own lora.rank, targets and variant"
            )
        if name.endswith("/scale") and not jnp.allclose(
            *(there[name], here[name]),
            *(1e-6, 0),  # as near as `peft.save` asks for
        ):
            raise ConfigError(
                f"{init}: {name} is {there[name]}, expected {here[name][0]}: "
                "give the adapter's own lora.alpha_per_rank and scaling"
            )
    return jax.tree.map(jnp.asarray, found)


def check_start(config: RunConfig, shape: LlamaConfig) -> None:
    """Refuse an adapter, `lora.init`, that a run should not start from.

    Raises:
      ConfigError: layers of another rank, whose padding would never train.
      DataError: it was trained on another base, or its run trained weights of the base as well.
    """
    init, rank = config.lora.init, config.lora.rank
    override = "a copy of it without its jax_lora.json"
    origin.check_base(init, peft.base_digest(init), config.model, override)
    peft.check_complete(init)
    for name, ranks in peft.load(init, shape.num_hidden_layers).ranks.items():
        if {*ranks} != {rank}:
            raise ConfigError(
                f"{init}: found ranks {sorted({*ranks})} of {name}, expected {rank}, lora.rank, in "
                "all layers"
            )


def on_base(
    adapters: PyTree,
    params: PyTree,
    config: LlamaConfig,
    *,
    init: str,
    variant: str,
    folder: Path,
    dtype: str = "float32",
) -> tuple[PyTree, PyTree]:
    """Finish what starts from the base: DoRA's magnitudes, PiSSA's principal parts.

    Args:
      adapters: from `new_adapters`.
      params: the base.
      config: its shape.
      init, variant: as there.
      folder: keeps PiSSA's start, which a resumed or scored run must find unchanged.
      dtype: of the arithmetic.

    Returns:
      The adapters, and the base that they belong to: PiSSA's lacks what they hold.
    """
    if variant == "dora" and init in lora.INITS:
        return variants.with_magnitudes(adapters, params, dtype), params
    if init != "pissa":
        return adapters, params
    if not (folder / "adapter_config.json").is_file():  # which `save` writes last
        leaf = next(iter(lora.by_target(adapters).values()))
        rank, factor = leaf["a"].shape[-1], float(leaf["scale"][0])
        made = variants.pissa(params, config, adapters)
        peft.save(folder, jax.device_get(made), rank=rank, alpha=factor * rank)
    start = jax.tree.map(jnp.asarray, peft.load(folder).adapters)
    return start, variants.without(params, start)
