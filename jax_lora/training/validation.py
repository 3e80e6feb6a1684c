"""The loss on held-out examples while a model trains, and which step had the lowest one.

The forward pass is training's own: the same mesh, materialized deltas, buckets and chunks, without
dropout. It changes nothing of the state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jax_lora.data.loader import Batches, MicroBatch
from jax_lora.training.step import State, Step


@dataclass(frozen=True)
class ValidationData:
    """What a run validates on.

    Attributes:
      batches: of rows whose loss is on the answers alone; an epoch of them is one validation.
      answer_bytes: UTF-8 bytes of the answers' texts as the data has them. The tokens that end an
        answer have a loss, and no bytes.
    """

    batches: Batches
    answer_bytes: int


class Validation(NamedTuple):
    """The losses of one validation.

    Attributes:
      loss: mean cross-entropy per token of the answers, their end tokens included, in nats.
      bits_per_byte: the summed cross-entropy in bits over `answer_bytes`; it compares models of
        different tokenizers. NaN where all answers are empty.
      tokens: how many tokens had a loss.
    """

    loss: float
    bits_per_byte: float
    tokens: int

    def values(self) -> dict[str, float]:
        """The values under their names in metrics.jsonl."""
        return {f"validation_{name}": value for name, value in self._asdict().items()}


def validate(
    state: State,
    frozen: PyTree,
    data: ValidationData,
    functions: Step,
    device_put: Callable[[MicroBatch], MicroBatch] | None = None,
) -> Validation:
    """The loss of a state on all of the validation data; equal each time that it is computed.

    Args:
      state: its buffers are left as they are; the optimizer's half is not read.
      frozen: the frozen half of the variables.
      data: the rows.
      functions: from `step.make_step`.
      device_put: as for `loop.train`.
    """
    put = device_put or partial(jax.tree.map, jnp.asarray)
    diff_params = functions.prepare(state, frozen)
    losses, tokens = [], 0
    for batch in data.batches.stream(0, data.batches.steps_per_epoch):
        for micro in batch:
            losses.append(functions.loss(diff_params, frozen, put(micro)))
            tokens += int((micro.loss_weights[:, 1:] > 0).sum())
    total = math.fsum(map(float, jax.device_get(losses)))
    bits = total / math.log(2)
    return Validation(
        total / tokens, bits / data.answer_bytes if data.answer_bytes else math.nan, tokens
    )


class Best(NamedTuple):
    """The lowest validation loss of a run so far. A checkpoint stores it beside its state.

    Attributes:
      step: that had it; None before the first validation.
      loss: of the step.
      since: validations after it, none of which was lower.
    """

    step: int | None = None
    loss: float = math.inf
    since: int = 0

    def after(self, step: int, loss: float) -> Best:
        """After the validation of one more step; a loss that is not finite is no improvement."""
        if math.isfinite(loss) and loss < self.loss:
            return Best(step, loss)
        return self._replace(since=self.since + 1)

    def ends(self, stop_after: int) -> bool:
        """Whether as many validations in a row brought no improvement; 0 never ends a run."""
        return bool(stop_after) and self.since >= stop_after

    def to_json(self) -> dict[str, object]:
        """What a checkpoint stores; JSON has no infinity."""
        loss = None if self.step is None else self.loss
        return {"step": self.step, "loss": loss, "since": self.since}

    @classmethod
    def from_json(cls, stored: Mapping[str, object]) -> Best:
        """The inverse of `to_json`; nothing stored is no validation yet."""
        step, loss, since = (stored.get(name) for name in cls._fields)
        return cls(
            step if isinstance(step, int) else None,
            float(loss) if isinstance(loss, float | int) else math.inf,
            since if isinstance(since, int) else 0,
        )
