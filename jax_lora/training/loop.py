"""The loop around the step: no waiting for the device, one report per step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jax_lora.data.loader import MicroBatch
from jax_lora.training.step import State, Step, zeros

_COMPILED = {"seconds": 0.0}


def _listen(event: str, duration_secs: float, **_: str | int) -> None:
    # Of the events of a compilation the one that never lies within another of its kind.
    if event == "/jax/core/compile/backend_compile_duration":
        _COMPILED["seconds"] += duration_secs


jax.monitoring.register_event_duration_secs_listener(_listen)


def compiled_seconds() -> float:
    """Seconds that XLA has compiled for this process so far, or read programs from its cache."""
    return _COMPILED["seconds"]


class Report(NamedTuple):
    """One step. `loss` and `gradient_norm` (before the clip) are still on the device: reading
    them waits for it. Tokens are counted on the host: `tokens` real ones, `padded` the padding,
    `loss_tokens` those that have a loss."""

    step: int
    loss: Array
    gradient_norm: Array
    tokens: int
    padded: int
    loss_tokens: int


def total_loss_weight(batch: Sequence[MicroBatch]) -> np.float32:
    """The sum of the loss weights of a global batch: what its loss is divided by.

    The first token of a row has no loss. Every process holds the whole global batch, so that
    nothing is to be summed over processes.
    """
    return np.float32(sum(float(micro.loss_weights[:, 1:].sum()) for micro in batch))


def train(
    state: State,
    frozen: PyTree,
    batches: Iterable[Sequence[MicroBatch]],
    functions: Step,
    device_put: Callable[[MicroBatch], MicroBatch] | None = None,
) -> Iterator[tuple[State, Report]]:
    """Take a step for every global batch; nothing here waits for the device.

    Args:
      state: where to start; its buffers are donated.
      frozen: the frozen half of the variables, never returned or changed.
      batches: global batches, each a sequence of micro-batches.
      functions: from `step.make_step`.
      device_put: puts a micro-batch on its devices; by default on the one there is.

    Yields:
      The state after each step, valid until the next one is asked for, and its report.
    """
    put = device_put or partial(jax.tree.map, jnp.asarray)
    step = int(state.step)
    for batch in batches:
        total_weight = total_loss_weight(batch)
        diff_params = functions.prepare(state, frozen)
        gradients, loss = zeros(diff_params)
        for micro in batch:
            gradients, loss = functions.accumulate(
                gradients, loss, diff_params, state.step, frozen, put(micro), total_weight
            )
        state, norm = functions.update(state, frozen, gradients)
        step += 1
        tokens = sum(int((micro.segment_ids >= 0).sum()) for micro in batch)
        padded = sum(micro.tokens.size for micro in batch) - tokens
        loss_tokens = sum(int((micro.loss_weights[:, 1:] > 0).sum()) for micro in batch)
        yield state, Report(step, loss, norm, tokens, padded, loss_tokens)
