"""What a training run reads and builds before its first step.

`read_inputs` checks everything that can be wrong, before any compute and before anything is
written; `build` then loads the base and puts the arrays on the devices.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from jax.sharding import Mesh
from jaxtyping import PyTree

from jax_lora import sharding
from jax_lora.config import RunConfig
from jax_lora.data.example import Example
from jax_lora.data.loader import Batches, MicroBatch
from jax_lora.data.prompts import Row
from jax_lora.data.tasksets import TaskSet
from jax_lora.errors import ConfigError
from jax_lora.files import write_json
from jax_lora.model import lora
from jax_lora.model.xla_cpu import bitcast_bf16
from jax_lora.planning import counts
from jax_lora.run import folder, initial_weights, inputs, trackers, validation
from jax_lora.training import trainable_mask, unstacked
from jax_lora.training.checkpoints import Checkpoints
from jax_lora.training.resolve import Resolved, resolve
from jax_lora.training.step import State, Step
from jax_lora.training.validation import ValidationData
from jax_lora.weights import base as base_weights
from jax_lora.weights import peft

logger = logging.getLogger(__name__)
MOST_STEPS = 10_000_000  # of a run, whose learning rates are an array


@dataclass(frozen=True)
class Inputs:
    """All that a training run reads, checked.

    Attributes:
      resolved: the config with nothing left open.
      mesh: of all devices; None where there is one.
      shapes: of {"params": base, "lora": adapters}; adapters that are drawn are arrays already, and
        kernels are as they are before they are quantized.
      mask: which leaves train.
      digests: of the data, the base and the rows, and of the adapter that a run starts from.
      taskset: what is trained on.
      examples: those of it that fit into a row.
      rows: one per example.
      batches, total: the global batches, and how many steps the run has.
      validation: what the run validates on; None where there is nothing.
    """

    resolved: Resolved
    mesh: Mesh | None
    shapes: PyTree
    mask: PyTree
    digests: dict[str, str]
    taskset: TaskSet
    examples: list[Example]
    rows: list[Row]
    batches: Batches
    total: int
    validation: ValidationData | None

    @property
    def parameters(self) -> pd.DataFrame:
        """Frozen and trainable parameters by module, see `counts.table`."""
        return counts.table(self.shapes, self.mask)

    def device_put(self, batch: MicroBatch) -> MicroBatch:
        """A micro-batch on the devices of the run."""
        return sharding.shard_batch(batch, self.mesh)


def read_inputs(config: RunConfig, workdir: Path, verify: bool = False) -> Inputs:
    """Read and check everything that a run needs but the base's weights.

    Args:
      config: of the run.
      workdir: its folder, which may hold an interrupted run of the same config.
      verify: see `instructions.read_checkout`.

    Raises:
      ConfigError, DataError, OSError: one line, see `jax_lora.errors`.
    """
    for key, value in (("model", config.model), ("data.path", config.data.path)):
        if not value:
            raise ConfigError(f"config.{key}: found none, expected a folder or a hub id")
    trackers.check(config)
    if config.lora.init == "pissa" and jax.process_count() > 1:
        raise ConfigError(
            f"config.lora.init: found pissa in {jax.process_count()} processes, expected one "
            "that has the whole base"
        )
    shape = base_weights.read_config(config.model)
    base_weights.check(config.model)  # before anything of a size that its config names is made
    kinds = base_weights.check_quantization(config.model, config.model_quantization)
    resolved = resolve(config, shape, jax.default_backend(), len(jax.devices()), kinds)
    config = resolved.config
    mesh = sharding.make_mesh(resolved.mesh_sizes)
    mesh = mesh if mesh.size > 1 else None
    shapes: dict[str, PyTree] = {"params": counts.base_shapes(shape)}
    if resolved.is_lora:
        shapes["lora"] = initial_weights.adapters_of(config, shape, mesh)
    mask = trainable_mask.mask(shapes, config.trainable, config.frozen)
    trainable_mask.check_kernels_frozen(mask["params"], config.model_quantization)
    jax.eval_shape(resolved.model().apply, shapes, jnp.zeros((1, 2), jnp.int32))

    logger.info("reading tasks")
    digests = {
        "data_fingerprint": inputs.fingerprint(config, verify),
        "base_digest": inputs.base_digest(config.model),
    }
    if resolved.is_lora and config.lora.init not in (*lora.INITS, "pissa"):
        if not (workdir / "config.json").is_file():  # afterwards its checkpoint has all of it
            initial_weights.check_start(config, shape)
        digests["init_digest"] = peft.digest(config.lora.init)
    folder.check_same_run(workdir, config, digests)
    taskset = inputs.training_set(config)

    logger.info("encoding examples")
    encoder = inputs.encoder(config)
    pairs = inputs.training_rows(
        encoder, taskset, config.data.answer, config.seed, inputs.is_strict(config)
    )
    examples, rows = [example for example, _ in pairs], [row for _, row in pairs]
    # They depend on the tokenizer's files and its chat template, too.
    if not inputs.is_dated(config):
        digests["rows_digest"] = inputs.rows_digest(rows)
    folder.check_same_run(workdir, config, digests)
    longest = max((len(row.ids) for row in rows), default=0)
    is_dynamic = shape.rope_scaling is not None and shape.rope_scaling.rope_type == "dynamic"
    if longest > shape.max_position_embeddings and not is_dynamic:
        logger.warning(
            "config.data: the longest row has %d tokens, and %s was made for %d",
            *(longest, config.model, shape.max_position_embeddings),
        )
    inputs.check_tests(config, encoder)
    batches, total = batches_of(config, rows, resolved.row_groups)
    resolved.schedule(total)  # checks the warm-up
    held_out = validation.read(config, encoder, resolved.row_groups)
    return Inputs(
        resolved, mesh, shapes, mask, digests, taskset, examples, rows, batches, total, held_out
    )


def batches_of(config: RunConfig, rows: list[Row], row_groups: int = 1) -> tuple[Batches, int]:
    """The batches of a run and the number of its steps."""
    batches = Batches(
        rows,
        batch_size=config.batch_size,
        seed=config.seed,
        buckets=config.data.buckets,
        micro_tokens=config.micro_tokens,
        answer_only=config.data.answer_only,
        by_example=config.data.loss_mean == "examples",
        pad_id=0,
        packed=config.data.packed,
        row_groups=row_groups,
    )
    total = batches.steps_per_epoch * config.epochs
    total = min(total, config.max_steps) if config.max_steps else total
    if total > MOST_STEPS:
        raise ConfigError(
            f"config.epochs and max_steps: found {total:,} steps, expected at most {MOST_STEPS:,}"
        )
    return batches, total


@dataclass
class Training:
    """Arrays and compiled functions of a run, where it starts or is resumed.

    Attributes:
      state: what a step changes; its buffers are donated to the step.
      frozen: the other half of the variables.
      step: the compiled functions.
      learning_rates: (total,) of every step, on the host.
      checkpoints: of the run.
      start: steps that are done.
    """

    state: State
    frozen: PyTree
    step: Step
    learning_rates: np.ndarray
    checkpoints: Checkpoints
    start: int


def load_variables(given: Inputs, workdir: Path) -> tuple[PyTree, PyTree]:
    """Both halves of the variables before the first step, trainable and frozen, on the devices."""
    config, mesh = given.resolved.config, given.mesh
    logger.info("loading the base model")
    put = sharding.leaf_sharder(mesh) if mesh else None
    if given.resolved.unstacks and not any(jax.tree.leaves(given.mask["params"])):
        put = unstacked.put  # layer by layer, or `unstack` below would hold the kernels twice
    params = initial_weights.load_base(
        config.model, config.dtype, given.mask["params"], put, config.model_quantization
    )
    variables = {"params": params}
    if given.resolved.is_lora:
        variables["lora"], variables["params"] = initial_weights.on_base(
            given.shapes["lora"],
            params,
            given.resolved.shape,
            init=config.lora.init,
            variant=config.lora.variant,
            folder=workdir / "pissa",
            dtype=config.dtype,
        )
    del params
    variables = sharding.shard(variables, mesh)
    trainable, frozen = trainable_mask.partition(variables, given.mask)
    frozen = bitcast_bf16(frozen, given.resolved.platform)
    return trainable, unstacked.unstack(frozen) if given.resolved.unstacks else frozen


def build(given: Inputs, workdir: Path) -> Training:
    """Load the base, shard the variables, and restore the last checkpoint if there is one."""
    config, mesh = given.resolved.config, given.mesh
    trainable, frozen = load_variables(given, workdir)
    rate = given.resolved.schedule(given.total)
    optimizer = given.resolved.optimizer(rate)
    number = sharding.shard(jnp.zeros((), jnp.int32), mesh)
    state = State(number, trainable, sharding.init_sharded(optimizer.init, mesh, trainable))
    checkpoints = Checkpoints(workdir / "checkpoints", keep_best=config.keep == "best")
    # A resumed run holds one copy of what trains: only the shapes of the first state are left when
    # the last one is read. Of the adapters that were drawn nothing is needed any more.
    del trainable
    if "lora" in given.shapes:
        given.shapes["lora"] = jax.tree.map(_shape, given.shapes["lora"])
    if checkpoints.latest() is not None:
        jax.block_until_ready(state)  # before processes talk, see `distributed.any_process`
        state = jax.tree.map(_shape, state)
    state = checkpoints.restore(state)
    start = int(state.step)
    step = given.resolved.step(optimizer, mesh)
    return Training(state, frozen, step, learning_rates(rate, given.total), checkpoints, start)


def _shape(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def learning_rates(rate: optax.Schedule, total: int) -> np.ndarray:
    """The learning rate of every step, as numbers on the host.

    Asked one at a time, each would be a small program on the device, and reading its result would
    wait for the training step that is queued before it.
    """
    rates = jax.vmap(lambda step: jnp.asarray(rate(step), jnp.float32))(jnp.arange(total))
    return np.asarray(rates)


def write_start(given: Inputs, workdir: Path) -> None:
    """Write config.json and parameters.json."""
    table, device = given.parameters, jax.devices()[0]
    frozen, trainable = (int(table[kind].to_numpy().sum()) for kind in ("frozen", "trainable"))
    write_json(
        workdir / "config.json",
        {
            "config": given.resolved.config.to_dict(),
            **given.digests,
            "steps": given.total,
            "versions": folder.versions(),
            "device": f"{len(jax.devices())} × {device.device_kind} ({device.platform})",
        },
    )
    write_json(
        workdir / "parameters.json",
        {
            "frozen": frozen,
            "trainable": trainable,
            "trainable_percent": 100 * trainable / (frozen + trainable),
            "modules": table.to_dict("records"),
        },
    )
