"""What `eval.py --check` says: do answers, updates and sums depend on what they must not?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora import sharding
from jax_lora.config import MeshSizes, RunConfig
from jax_lora.data.prompts import Row
from jax_lora.errors import DataError
from jax_lora.generation import scheduler
from jax_lora.model.transformer import Llama
from jax_lora.model.xla_cpu import reduction_error
from jax_lora.run import inputs, invariance, scoring
from jax_lora.training import trainable_mask
from jax_lora.training.resolve import resolve
from jax_lora.weights import peft

Say = Callable[[str], None]
TOLERANCE = 1e-5  # relative error of a sum or of an update in float32


class Rows(NamedTuple):
    """What is computed in several ways: prompts, their tasks, and rows of one training batch."""

    prompts: Sequence[Row]
    tasks: Sequence[str]
    trained: Sequence[Row]


def check(workdir: Path, config: RunConfig, adapter: str, count: int, say: Say) -> bool:
    """Answer prompts and train in several arrangements, and compare; one base is held at a time.

    Args:
      workdir: of the run.
      config: of the run.
      adapter: as for `scoring.load`.
      count: prompts; a quarter as many examples are trained on.
      say: gets a line per comparison.

    Returns:
      Whether no answer in float32 changes, and no update or sum by more than rounding. Updates are
      those of the run's own adapter; of others, and of full fine-tuning, there are none to compare.

    Raises:
      ConfigError, DataError, OSError: wrong input, before any compute.
    """
    rows = _rows(config, count)
    if config.dtype != "float32" or config.eval.int8_products:
        _answers(config, scoring.load(workdir, config, adapter), rows, say)
    # Rounded to 8 bits, activations differ by a step wherever they differ in the last bit.
    exact = config.replace(dtype="float32", **{"eval.int8_products": False})
    good, logits = _in_float32(exact, scoring.load(workdir, exact, adapter), adapter, rows, say)
    error = reduction_error()
    say(f"\na sum that XLA is known to get wrong: error {error:.1e}, relative")
    for what, other in _other_forms(config.replace(dtype="float32"), adapter).items():
        found = _logits(scoring.load(workdir, other, adapter), rows)
        moved, largest = np.abs(found - logits).max(), np.abs(logits).max()
        say(
            f"\n{what} moves a logit by up to {moved:.3g} (logits up to {largest:.3g}; "
            f"{len(logits)} prompts)"
        )
    if len(jax.devices()) == 1:
        say("\non several devices: one device here, not tried")
    return good and error <= TOLERANCE


def _rows(config: RunConfig, count: int) -> Rows:
    # Every so many examples, so that all tasks take part.
    sets, encoder = inputs.examples(config), inputs.encoder(config)
    is_strict, test = inputs.is_strict(config), next(iter(inputs.test_sets(config).values()))
    seen = inputs.prompt_rows(encoder, test, is_strict)
    train = inputs.fitting(encoder.training_row, sets["train"], is_strict)
    for what, rows in ((test.name, seen), ("train", train)):
        if not rows:
            raise DataError(f"{config.data.path}: found no example of {what}, expected some")
    some = seen[:: -(-len(seen) // count)]
    trained = train[:: -(-len(train) // max(1, count // 4))]
    return Rows(
        [row for _, row in some],
        [example.task for example, _ in some],
        [row for _, row in trained],
    )


def _other_forms(config: RunConfig, adapter: str) -> dict[str, RunConfig]:
    # What else a product with the base may be: of integers, where that is asked for, and of the
    # form that the adapter was trained on or, where that is the run's, of no quantization.
    found, form = {}, config.model_quantization
    if config.eval.int8_products:
        found["multiplying integers"] = config
        config = config.replace(**{"eval.int8_products": False})
    trained_on = peft.base_quantization(adapter) if adapter not in ("last", "none") else form
    other = trained_on if trained_on != form else "none"
    if other != form:
        name = f"the base in {other} in place of {form}"
        found[name] = config.replace(model_quantization=other)
    return found


def _in_float32(
    config: RunConfig, scored: scoring.Scored, adapter: str, rows: Rows, say: Say
) -> tuple[bool, np.ndarray]:
    good = _answers(config, scored, rows, say) == 0
    if config.method == "lora" and adapter == "last":
        good &= _updates(config, scored, rows, say)
    else:
        say("\nupdates: of the run's own adapter alone, not tried")
    return good, _logits(scored, rows)


def _answers(config: RunConfig, scored: scoring.Scored, rows: Rows, say: Say) -> int:
    # The most answers that an arrangement changes.
    model = Llama(scored.shape, dtype=jnp.dtype(config.dtype))
    meshes = scoring.copies(config)
    end_ids, stop = inputs.end_ids(config), inputs.stop_rule(config)
    each = scoring.generators(config, model, scored.variables, meshes, end_ids, stop)
    several = scoring.side_by_side(each, meshes)
    many = scheduler.round_robin(several) if len(several) > 1 else None
    prompts, most = rows.prompts, 0
    say(f"\n{scored.origin}, {config.dtype}: answers to {len(prompts)} prompts that change")
    arranged = invariance.answers(each[0], prompts, rows.tasks, config.eval.buckets, many)
    for name, changed in arranged:
        say(f"  {name:<32}{changed:>4}  {100 * changed / len(prompts):5.1f}%")
        most = max(most, changed)
    return most


def _updates(config: RunConfig, scored: scoring.Scored, rows: Rows, say: Say) -> bool:
    # Whether no arrangement of a batch moves the loss or a gradient.
    devices = len(jax.devices())
    any_mesh = config.replace(**{"mesh.data": 1, "mesh.fsdp": -1, "mesh.tensor": 1})
    resolved = resolve(any_mesh, scored.shape, jax.default_backend(), devices)
    say(f"\nfloat32: a step on {len(rows.trained)} examples at once, and cut otherwise")
    good = True
    for name, loss, gradient in invariance.updates(
        Llama(scored.shape, dtype=jnp.float32, remat="full"),
        scored.variables,
        trainable_mask.mask(scored.variables, config.trainable, config.frozen),
        rows.trained,
        dropout_rate=config.lora.dropout,
        materialized=resolved.materialized,
        mesh=sharding.make_mesh(MeshSizes(fsdp=-1)) if devices > 1 else None,
    ):
        say(f"  {name:<32}loss {loss:.1e}  gradient {gradient:.1e}, relative")
        good &= loss <= TOLERANCE and gradient <= TOLERANCE
    return good


def _logits(scored: scoring.Scored, rows: Rows) -> np.ndarray:
    model = Llama(scored.shape, dtype=jnp.float32)
    return invariance.last_logits(model, scored.variables, rows.prompts[:8])
