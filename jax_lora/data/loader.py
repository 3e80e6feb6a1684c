"""Rows of ids → batches of few shapes, in an order that is a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jax_lora.data.packing import bucket_for, longest_first, pack, pack_shorter
from jax_lora.data.prompts import Row
from jax_lora.errors import ConfigError, DataError

if TYPE_CHECKING:
    from jax import Array


class MicroBatch(NamedTuple):
    """A part of a global batch, of one shape (B, T), on the host or on devices.

    Attributes:
      tokens: int32 ids, right-padded.
      loss_weights: float32, the weight of the loss of predicting the token from those before it;
        0 where it is not to be predicted.
      segment_ids: int32, the position of the token's example in the global batch, -1 on padding.
        A packed row holds several examples, one after the other.
    """

    tokens: np.ndarray | Array
    loss_weights: np.ndarray | Array
    segment_ids: np.ndarray | Array


@lru_cache(maxsize=2)  # of a million rows one takes longer than a step should wait
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of the rows in an epoch; all steps share it, so it is read only."""
    order = np.random.default_rng((seed, epoch)).permutation(count)
    order.flags.writeable = False
    return order


@dataclass(frozen=True)
class Batches:
    """The batches of a training run.

    Attributes:
      rows: the training rows.
      batch_size: examples of a global batch; the last one of an epoch may be smaller.
      seed: of the order; every epoch is one permutation of the rows.
      buckets: lengths in tokens that rows are padded to; each shape compiles once.
      by_example: the loss weights of an example sum to 1, however long its answer; otherwise each
        of its tokens weighs 1.
      packed: pack several examples into a row of the largest bucket; the rest, in the last
        micro-batch of a step, into rows of the smallest bucket that holds it.
      micro_tokens: most tokens (padding included) of a micro-batch in each of its `row_groups`,
        unless one row has more.
      answer_only: loss on the answer and its end token only; otherwise on the prompt too.
      pad_id: fills the rows. It is never a loss token, so it may equal the end token.
      row_groups: equal parts that the rows of a micro-batch are divided into, one per group of
        devices that computes different rows; `sharding.row_groups` of a mesh.
    """

    rows: Sequence[Row]
    batch_size: int
    seed: int
    buckets: Sequence[int]
    micro_tokens: int
    answer_only: bool
    pad_id: int
    packed: bool = False
    by_example: bool = False
    row_groups: int = 1

    def __post_init__(self):
        if not self.rows:
            raise DataError("training rows: found none, expected at least one")
        if self.batch_size < 1 or self.micro_tokens < 1:
            raise ConfigError(
                f"batch_size and micro_tokens: found {self.batch_size} and {self.micro_tokens}, "
                "expected at least 1"
            )
        bucket_for(max(len(row.ids) for row in self.rows), self.buckets)

    @property
    def steps_per_epoch(self) -> int:
        """Global batches that cover the rows once."""
        return -(-len(self.rows) // self.batch_size)

    def examples_until(self, step: int) -> int:
        """Examples in the first `step` global batches."""
        epochs, rest = divmod(step, self.steps_per_epoch)
        return epochs * len(self.rows) + min(len(self.rows), rest * self.batch_size)

    def indices(self, step: int) -> np.ndarray:
        """Which rows make up the global batch of a step (counted from 0)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _order(self.seed, epoch, len(self.rows))
        return order[position * self.batch_size : (position + 1) * self.batch_size]

    def at(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step.

        Rows are sorted by length and taken from the longest down, as many per micro-batch as its
        bucket allows; the last one is filled with empty rows, so that a bucket is one shape.
        Packed rows, which are fewer than the examples, are divided evenly, and those of the last
        micro-batch packed again into a shorter bucket if they fit.
        """
        chosen = self.indices(step)
        lengths = [len(self.rows[i].ids) for i in chosen]
        if self.packed:
            left = self._packed(step)
        else:
            left = [[position] for position in longest_first(lengths, range(len(lengths)))]
        batches = []
        while left:
            bucket = max(self.buckets)
            if not self.packed:
                bucket = bucket_for(lengths[left[0][0]], self.buckets)
            size = self.rows_of(bucket)
            rows, left = left[:size], left[size:]
            if self.packed and not left:
                shorter = pack_shorter(lengths, chain.from_iterable(rows), self.buckets, size)
                rows, bucket = shorter or (rows, bucket)
            batches.append(self._filled(rows, chosen, size, bucket))
        return batches

    def rows_of(self, bucket: int) -> int:
        """Rows of a micro-batch of this bucket."""
        most = self._most_packed if self.packed else self.batch_size
        share, limit = -(-most // self.row_groups), max(1, self.micro_tokens // bucket)
        if not self.packed:
            return self.row_groups * min(share, limit)
        batches = -(-share // limit)
        return self.row_groups * -(-share // batches)

    @cached_property
    def _most_packed(self) -> int:
        # Of the first epoch; a later step that needs more has a micro-batch more.
        return max(len(self._packed(step)) for step in range(self.steps_per_epoch))

    def _packed(self, step: int) -> list[list[int]]:
        lengths = [len(self.rows[i].ids) for i in self.indices(step)]
        return pack(lengths, longest_first(lengths, range(len(lengths))), max(self.buckets))

    def _filled(
        self, rows: list[list[int]], chosen: np.ndarray, size: int, bucket: int
    ) -> MicroBatch:
        tokens = np.full((size, bucket), self.pad_id, np.int32)
        loss_weights = np.zeros((size, bucket), np.float32)
        segment_ids = np.full((size, bucket), -1, np.int32)
        for r, examples in enumerate(rows):
            start = 0
            for position in examples:
                row = self.rows[chosen[position]]
                end = start + len(row.ids)
                tokens[r, start:end] = row.ids
                mask = row.loss_mask(self.answer_only)
                loss_weights[r, start:end] = mask / mask.sum() if self.by_example else mask
                segment_ids[r, start:end] = position
                start = end
        return MicroBatch(tokens, loss_weights, segment_ids)

    def stream(self, start: int, stop: int) -> Iterator[list[MicroBatch]]:
        """Batches of the steps start … stop-1, the next one prepared in the background."""
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self.at, start) if start < stop else None
            for step in range(start, stop):
                assert ahead is not None
                ready = ahead.result()
                ahead = pool.submit(self.at, step + 1) if step + 1 < stop else None
                yield ready
