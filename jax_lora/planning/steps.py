"""A training step to plan: the resolved config and the shape of a micro-batch; no array exists."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxtyping import PyTree

from jax_lora import sharding
from jax_lora.config import RunConfig
from jax_lora.data.loader import MicroBatch
from jax_lora.errors import ConfigError
from jax_lora.model import lora
from jax_lora.model.arch import GROUP
from jax_lora.model.config import LlamaConfig
from jax_lora.model.families import CONFIGS
from jax_lora.model.gguf_blocks import Kinds
from jax_lora.model.quantization import Residual, stored_shapes
from jax_lora.planning import counts
from jax_lora.planning.targets import Target
from jax_lora.training import trainable_mask
from jax_lora.training.resolve import Resolved, resolve
from jax_lora.training.step import State, Step

TRAIN_TASKS = 756  # in Tall, as the paper counts them


@dataclass(frozen=True)
class PlannedStep:
    """A training step to plan.

    Attributes:
      resolved: the model, the mask, the optimizer and the mesh, as training has them.
      rows, length: of a micro-batch: the rows that one device computes (each of the data × fsdp
        groups has as many) and the tokens per row, padding included.
      loss_share: the share of the positions that are loss tokens.
    """

    resolved: Resolved
    rows: int
    length: int
    loss_share: float = 1.0

    @property
    def shape(self) -> LlamaConfig:
        """Of the base model."""
        return self.resolved.shape

    @property
    def config(self) -> RunConfig:
        """Of the run."""
        return self.resolved.config

    @property
    def batch_rows(self) -> int:
        """Rows of a whole optimizer step, on all devices."""
        return self.config.batch_size

    @property
    def devices(self) -> int:
        """In the mesh."""
        return math.prod(self.resolved.mesh_sizes)

    @property
    def abstract_mesh(self) -> AbstractMesh:
        """The mesh without devices."""
        return AbstractMesh(self.resolved.mesh_sizes, sharding.AXES)

    def functions(self, mesh: Mesh | None = None) -> tuple[Step, optax.GradientTransformation]:
        """The step that training compiles, and its optimizer."""
        optimizer = self.resolved.optimizer(optax.constant_schedule(0.0))
        return self.resolved.step(optimizer, mesh), optimizer


def planned(
    config: RunConfig,
    model: str | LlamaConfig,
    platform: str,
    devices: int = 1,
    rows: int = 4,
    length: int = 1024,
    loss_share: float = 1.0,
) -> PlannedStep:
    """A step with micro-batches of one given shape, whatever the config's buckets.

    Args:
      config: of the run.
      model: the name of a known model, such as "llama-7b", or a shape.
      platform: of the devices: "cpu", "cuda" or "tpu".
      devices: how many there are.
      rows, length, loss_share: as in `PlannedStep`.

    Raises:
      ConfigError: as `resolve`.
    """
    shape = CONFIGS[model] if isinstance(model, str) else model
    config = config.replace(**{"data.buckets": (length,)})
    return PlannedStep(resolve(config, shape, platform, devices), rows, length, loss_share)


def planned_steps(
    config: RunConfig, shape: LlamaConfig, where: Target, gguf_kinds: Kinds = ()
) -> list[PlannedStep]:
    """One step for every shape of micro-batch that the config trains on.

    A target without a number has as many devices as the config's mesh.

    Raises:
      ConfigError: as `resolve`.
    """
    mesh = config.mesh
    count = where.count or math.prod(max(1, n) for n in (mesh.data, mesh.fsdp, mesh.tensor))
    return steps_of(resolve(config, shape, where.device.platform, count, gguf_kinds))


def steps_of(resolved: Resolved) -> list[PlannedStep]:
    """One step for every shape of micro-batch that a resolved config trains on."""
    config = resolved.config
    share = -(-config.batch_size // resolved.row_groups)  # rows of the batch per device
    return [
        PlannedStep(resolved, min(share, max(1, config.micro_tokens // length)), length)
        for length in config.data.buckets
    ]


def step_count(config: RunConfig) -> int:
    """Steps of the run, if no task has fewer examples than the config asks for.

    Raises:
      ConfigError: an unknown set.
    """
    d = config.data
    tasks = {f"T{size}": size for size in d.sizes} | {"Tall": TRAIN_TASKS}
    tasks |= dict.fromkeys((f"T*{d.sizes[0]}", f"T*{d.sizes[-1]}"), d.sizes[1])
    if d.set not in tasks:
        raise ConfigError(f"config.data.set: found {d.set!r}, expected one of {', '.join(tasks)}")
    steps = -(-tasks[d.set] * d.train_per_task // config.batch_size) * config.epochs
    return min(steps, config.max_steps) if config.max_steps else steps


# ---------------------------------------------------------------- arrays, as shapes


class Trees(NamedTuple):
    """The arrays of a step as `jax.ShapeDtypeStruct`s, sharded on a mesh.

    `frozen` and `state` are what a run holds, `diff_params` is what a step differentiates and what
    its gradients look like, `micro` is one micro-batch of all devices.
    """

    frozen: PyTree
    state: State
    diff_params: PyTree
    micro: MicroBatch


@lru_cache(maxsize=64)
def variables(step: PlannedStep) -> tuple[dict[str, PyTree], PyTree]:
    """Shapes of {"params": …, "lora": …} in the dtypes of a run, and the mask, which has one leaf
    for a quantized kernel.

    Raises:
      ConfigError: a quantization that the model cannot have.
      ValueError: a rank below 1, an unknown target, or expressions that `trainable_mask.mask`
        refuses.
    """
    config, shape = step.config, step.shape
    tree: dict[str, PyTree] = {"params": counts.base_shapes(shape)}
    if step.resolved.rank is not None:
        tree["lora"] = counts.adapter_shapes(shape, step.resolved.rank, config.lora.targets)
        for leaf in lora.by_target(tree["lora"]).values():
            copies, _, size_out = leaf["b"].shape
            leaf["scale"] = jax.ShapeDtypeStruct((copies,), jnp.float32)
            if config.lora.variant == "dora":
                leaf["m"] = jax.ShapeDtypeStruct((copies, size_out), jnp.float32)
    trains = trainable_mask.mask(tree, config.trainable, config.frozen)

    def with_dtype(x, trained):
        return jax.ShapeDtypeStruct(x.shape, jnp.float32 if trained else jnp.dtype(config.dtype))

    params = jax.tree.map(with_dtype, tree["params"], trains["params"])
    trainable_mask.check_kernels_frozen(trains["params"], config.model_quantization)
    if config.model_quantization != "none":
        kinds = dict(step.resolved.gguf_kinds)
        is_pissa = step.resolved.is_lora and config.lora.init == "pissa"
        keeps_start = config.lora.targets if is_pissa else ()
        for name, group in GROUP.items():
            leaf = params["layers"][group][name]
            leaf["kernel"] = stored_shapes(
                config.model_quantization, leaf["kernel"].shape, kinds.get(name, ())
            )
            if name in keeps_start:
                leaf["kernel"] = Residual(leaf["kernel"], **tree["lora"]["layers"][group][name])
    return tree | {"params": params}, trains


def trees(step: PlannedStep, mesh: Mesh | AbstractMesh | None = None) -> Trees:
    """The arrays of a step on a mesh, by default on the step's own, without devices."""
    mesh = mesh or step.abstract_mesh
    trainable, frozen = trainable_mask.partition(*variables(step))
    functions, optimizer = step.functions()
    state = jax.eval_shape(
        lambda t: State(jnp.zeros((), jnp.int32), t, optimizer.init(t)), trainable
    )
    diff_params = jax.eval_shape(functions.prepare, state, frozen)
    tokens = (step.rows * step.resolved.row_groups, step.length)
    by_rows = NamedSharding(mesh, sharding.ROWS)
    micro: PyTree = [
        jax.ShapeDtypeStruct(tokens, dtype, sharding=by_rows)
        for dtype in (jnp.int32, jnp.float32, jnp.int32)
    ]
    return Trees(
        frozen=sharding.abstract(frozen, mesh),
        state=sharding.abstract(state, mesh),
        diff_params=sharding.abstract(diff_params, mesh),
        micro=MicroBatch(*micro),
    )
