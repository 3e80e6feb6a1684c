"""What a run does about a step whose loss or gradient is not finite: `config.on_nonfinite`."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np

from jax_lora.run.prepare import Inputs, Training
from jax_lora.training import loop
from jax_lora.training.nonfinite import cause
from jax_lora.training.step import State

logger = logging.getLogger(__name__)
SHOWN = 8  # ids of examples in a message


def handle(given: Inputs, training: Training, state: State, report: loop.Report) -> str:
    """Say why a step is not finite, and whether the run goes on without it.

    All processes take part. The step's micro-batches are computed once more.

    Args:
      given, training: of the run.
      state: a later one; the step has changed no parameter.
      report: of the step.

    Returns:
      Why the step was skipped, where `config.on_nonfinite` is "skip".

    Raises:
      FloatingPointError: it is "stop"; or the loss alone is not finite, or a weight, which nothing
        skips.
    """
    batch = given.batches.at(report.step - 1)
    found = cause(state, training.frozen, batch, training.step, report.step, given.device_put)
    chosen, where = batch, ""
    if found.micro is not None:
        chosen = [batch[found.micro]]
        where = f" of micro-batch {found.micro + 1} of {len(batch)}"
    ids = _ids(given, report.step, [np.asarray(micro.segment_ids) for micro in chosen])
    text = (
        f"step {report.step}: not finite: {found.what}{where} (loss {float(report.loss)}, gradient "
        f"norm {float(report.gradient_norm)}); examples {ids}"
    )
    may_skip = not math.isfinite(float(report.gradient_norm)) and not found.is_weight
    if given.resolved.config.on_nonfinite == "skip" and may_skip:
        logger.warning("skipped %s", text)
        return text
    advice = "; try a lower optim.learning_rate in another --workdir"
    if may_skip:
        advice += ", or config.on_nonfinite=skip"
    raise FloatingPointError(text + advice)


def _ids(given: Inputs, step: int, segment_ids: Sequence[np.ndarray]) -> str:
    """The ids of a step's examples, by their positions in its global batch."""
    positions = sorted({int(i) for rows in segment_ids for i in np.unique(rows)} - {-1})
    order = given.batches.indices(step - 1)
    ids = [given.examples[order[i]].id for i in positions]
    more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    return ", ".join(ids[:SHOWN]) + more
