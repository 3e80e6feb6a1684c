"""Rows of few lengths: the bucket of a row, and several examples in one row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jax_lora.errors import ConfigError


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


def longest_first(lengths: Sequence[int], examples: Iterable[int]) -> list[int]:
    """The examples, indices of `lengths`, by falling length; equal ones in their order."""
    return sorted(examples, key=lambda i: (-lengths[i], i))


def pack(lengths: Sequence[int], order: Sequence[int], size: int) -> list[list[int]]:
    """First fit: each example, in `order`, goes into the first row that has enough room for it.

    Longest first, this needs at most 11/9 of the fewest rows possible (Johnson 1973).

    Args:
      lengths: tokens of every example, none above `size`.
      order: the examples, as indices of `lengths`.
      size: tokens of a row.

    Returns:
      Rows of indices; every example is in one of them.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i in order:
        row = next((r for r, free in enumerate(room) if lengths[i] <= free), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(size)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


def pack_shorter(
    lengths: Sequence[int], examples: Iterable[int], buckets: Iterable[int], most: int
) -> tuple[list[list[int]], int] | None:
    """The examples in at most `most` rows of the smallest bucket that allows it.

    Returns:
      The rows and their bucket; None where no bucket does: a subset may pack worse than it did
      within the whole.
    """
    order = longest_first(lengths, examples)
    for bucket in sorted(buckets):
        if lengths[order[0]] <= bucket:
            rows = pack(lengths, order, bucket)
            if len(rows) <= most:
                return rows, bucket
    return None
