"""Rows of ids → batches of few shapes, in an order that is a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np

from jax_lora.data.prompts import Row
from jax_lora.errors import ConfigError, DataError


@dataclass(frozen=True)
class Batch:
    """A micro-batch, numpy arrays (B, T): `tokens` int32, right-padded; `loss_mask`, True on the
    tokens to predict, or the weights of their losses; `example` int32, the place of the token's
    example in the global batch, -1 on padding. A packed row holds several examples, one after the
    other."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    example: np.ndarray


def bucket_for(length: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `length` tokens.

    Raises:
      ConfigError: a length above the largest bucket.
    """
    fitting = [bucket for bucket in buckets if length <= bucket]
    if not fitting:
        raise ConfigError(
            f"a row has {length} tokens, expected at most the largest bucket of {tuple(buckets)}"
        )
    return min(fitting)


def pack(lengths: Sequence[int], order: Sequence[int], room: int) -> list[list[int]]:
    """First fit: each example, in `order`, goes into the first row that still has room for it.

    Longest first, this needs at most 11/9 of the fewest rows possible (Johnson 1973).

    Args:
      lengths: tokens of every example, none above `room`.
      order: the examples, as indices of `lengths`.
      room: tokens of a row.

    Returns:
      Rows of indices; every example is in one of them.
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for i in order:
        at = next((r for r, space in enumerate(left) if lengths[i] <= space), len(rows))
        if at == len(rows):
            rows.append([])
            left.append(room)
        rows[at].append(i)
        left[at] -= lengths[i]
    return rows


def _longest_first(lengths: Sequence[int], places: Iterable[int]) -> list[int]:
    return sorted(places, key=lambda i: (-lengths[i], i))


@dataclass(frozen=True)
class Batches:
    """The batches of a training run.

    Attributes:
      rows: the training rows.
      batch_size: examples of a global batch; the last one of an epoch may be smaller.
      seed: of the order; every epoch is one permutation of the rows.
      buckets: lengths in tokens that rows are padded to; each shape compiles once.
      by_example: an example's losses weigh 1 together, however long its answer; otherwise each
        token's does.
      packed: lay several examples into a row of the largest bucket; what is left for the last
        micro-batch of a step, into rows of the smallest bucket that holds it.
      micro_tokens: most tokens (padding included) of a micro-batch in each of its `row_parts`,
        unless one row has more.
      answer_only: loss on the answer and its end token only; otherwise on the prompt too.
      pad_id: fills the rows. It is never a loss token, so it may equal the end token.
      row_parts: devices that rows are dealt out to, each as many; `sharding.row_parts` of a mesh.
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
    row_parts: int = 1

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
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))
        return order[place * self.batch_size : (place + 1) * self.batch_size]

    def at(self, step: int) -> list[Batch]:
        """The micro-batches of a step.

        Rows are sorted by length and cut from the longest down, each micro-batch as many rows as
        its bucket allows; the last one is filled with empty rows, so that a bucket is one shape.
        Packed rows, which are fewer than the examples, are cut evenly, and the last of them laid
        anew in a shorter bucket if they fit.
        """
        chosen = self.indices(step)
        lengths = [len(self.rows[i].ids) for i in chosen]
        if self.packed:
            laid = self._packed(step)
        else:
            laid = [[place] for place in _longest_first(lengths, range(len(lengths)))]
        batches = []
        while laid:
            bucket = max(self.buckets)
            if not self.packed:
                bucket = bucket_for(lengths[laid[0][0]], self.buckets)
            size = self.rows_of(bucket)
            rows, laid = laid[:size], laid[size:]
            if self.packed and not laid:
                rows, bucket = self._shortened(rows, lengths, size)
            batches.append(self._fill(rows, chosen, size, bucket))
        return batches

    def rows_of(self, bucket: int) -> int:
        """Rows of a micro-batch of this bucket."""
        most = self._most_packed if self.packed else self.batch_size
        share, limit = -(-most // self.row_parts), max(1, self.micro_tokens // bucket)
        if not self.packed:
            return self.row_parts * min(share, limit)
        batches = -(-share // limit)
        return self.row_parts * -(-share // batches)

    @cached_property
    def _most_packed(self) -> int:
        # Of the first epoch; a later step that needs more has a micro-batch more.
        return max(len(self._packed(step)) for step in range(self.steps_per_epoch))

    def _packed(self, step: int) -> list[list[int]]:
        lengths = [len(self.rows[i].ids) for i in self.indices(step)]
        return pack(lengths, _longest_first(lengths, range(len(lengths))), max(self.buckets))

    def _shortened(
        self, rows: list[list[int]], lengths: Sequence[int], size: int
    ) -> tuple[list[list[int]], int]:
        # The examples of these rows in at most `size` rows of the smallest bucket.
        places = _longest_first(lengths, chain.from_iterable(rows))
        for bucket in sorted(self.buckets):
            if lengths[places[0]] <= bucket:
                shorter = pack(lengths, places, bucket)
                if len(shorter) <= size:
                    return shorter, bucket
        return rows, max(self.buckets)  # a subset may pack worse than within the whole

    def _fill(self, laid: list[list[int]], chosen: np.ndarray, size: int, bucket: int) -> Batch:
        tokens = np.full((size, bucket), self.pad_id, np.int32)
        loss_mask = np.zeros((size, bucket), np.float32 if self.by_example else bool)
        example = np.full((size, bucket), -1, np.int32)
        for r, places in enumerate(laid):
            start = 0
            for place in places:
                row = self.rows[chosen[place]]
                end = start + len(row.ids)
                tokens[r, start:end] = row.ids
                mask = row.loss_mask(self.answer_only)
                loss_mask[r, start:end] = mask / mask.sum() if self.by_example else mask
                example[r, start:end] = place
                start = end
        return Batch(tokens, loss_mask, example)

    def stream(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """Batches of the steps start … stop-1, the next one prepared in the background."""
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self.at, start) if start < stop else None
            for step in range(start, stop):
                assert ahead is not None
                ready = ahead.result()
                ahead = pool.submit(self.at, step + 1) if step + 1 < stop else None
                yield ready
