"""The loop around the step: no waiting for the device, one report a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jax_lora.training.step import Micro, State, zeros


class Report(NamedTuple):
    """One step. `loss` and `gradient_norm` (before the clip) are still on the device: reading
    them waits for it. Tokens are counted on the host: `tokens` real ones, `padded` the padding,
    `loss_tokens` those that the loss is a mean over."""

    step: int
    loss: Array
    gradient_norm: Array
    tokens: int
    padded: int
    loss_tokens: int


def train(
    state: State,
    frozen: Any,
    batches: Iterable[Sequence[Any]],
    accumulate: Callable[..., Any],
    update: Callable[..., Any],
) -> Iterator[tuple[State, Report]]:
    """Take a step for every global batch.

    Args:
      state: where to start; its buffers are given up.
      frozen: the frozen half of the variables, never returned or changed.
      batches: global batches, each a sequence of micro-batches with `tokens` (B, T), `loss_mask`
        (B, T), `position` (B,) and `lengths` (B,), the rows' real tokens, as numpy arrays.
      accumulate, update: from `step.make_step`.

    Yields:
      The state after each step, valid until the next one is asked for, and its report.
    """
    step = int(state.step)
    for batch in batches:
        loss_tokens = sum(int(micro.loss_mask[:, 1:].sum()) for micro in batch)
        gradients, loss = zeros(state)
        for micro in batch:
            moved = Micro(
                *(jnp.asarray(x) for x in (micro.tokens, micro.loss_mask, micro.position))
            )
            gradients, loss = accumulate(
                gradients, loss, state, frozen, moved, jnp.float32(loss_tokens)
            )
        state, norm = update(state, gradients)
        step += 1
        tokens = sum(int(micro.lengths.sum()) for micro in batch)
        padded = sum(micro.tokens.size for micro in batch) - tokens
        yield state, Report(step, loss, norm, tokens, padded, loss_tokens)
