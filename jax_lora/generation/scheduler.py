"""Which prompt is answered when and in which row: continuous batching, on the host.

A row whose answer has ended takes in the next prompt while the others go on. What the prompts of a
group begin with is prefilled once. Shapes are few: for every bucket one program each prefills
chunks of prompts, copies rows and decodes; at the end the batch is halved as it empties.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import NamedTuple

import jax
import numpy as np

from jax_lora import signals
from jax_lora.generation import greedy
from jax_lora.generation.stop_texts import Ids, Stop
from jax_lora.model.transformer import Llama

Answers = Iterator[list[tuple[int, np.ndarray]]]  # a prompt's index and its answer's ids
Generate = Callable[..., Answers]  # `answers`, all but the prompts and their groups bound
SHORTEST_PREFIX = 16  # tokens; to copy fewer does not pay


class ChunkSizes(NamedTuple):
    """Tokens of a chunk of a prompt (more is more padding), the fewest chunks that are prefilled
    together and the fewest rows of a batch (still fewer are no faster), the tokens per row that
    are decoded before the host looks whether an answer is to be stopped (more are decoded in vain,
    fewer keep the device waiting), and the batches of a device, see `batches`."""

    chunk: int
    smallest_step: int
    smallest_batch: int
    stop_chunk: int
    batches: int


CPU, ACCELERATOR = ChunkSizes(16, 8, 8, 8, 2), ChunkSizes(128, 4, 32, 32, 1)


class Request(NamedTuple):
    """A prompt in the queue: its index, the bucket that it is padded to, and how many of its first
    tokens the others of its group and bucket have too."""

    prompt: int
    bucket: int
    shared: int


def answers(
    model: Llama,
    weights: greedy.Weights,
    prompts: Sequence[Ids],
    groups: Sequence[Hashable] | None = None,
    *,
    max_new_tokens: int,
    end_ids: tuple[int, ...],
    buckets: Sequence[int],
    batch_tokens: int,
    max_batch: int,
    stop: Stop | None = None,
    dispatch: AbstractContextManager[object] | None = None,
) -> Answers:
    """Greedy answers, as they end.

    Args:
      model: the module.
      weights: see `greedy.unstack_layers`.
      prompts: ids, at least one each.
      groups: one label per prompt; those of a label are expected to begin alike. By default all
        prompts are one group.
      max_new_tokens: where to stop an answer that does not end.
      end_ids: the stop tokens (EOS): any of these ends an answer, and is its last token.
      buckets: prompt lengths that the cache is made for.
      batch_tokens: prompt tokens of a batch, padding included.
      max_batch: most rows of a batch.
      stop: (ids of a prompt, ids of its answer so far, how many of these it was asked about
        before) → the length that the answer is cut to, or None where it goes on. The length must
        not depend on how far the answer has been generated. See `stop_texts.StopRule`.
      dispatch: entered while programs are compiled and sent to the device, not while it computes.

    Yields:
      Pairs of a prompt's index and its answer's ids, a few at a time, every prompt once.

    Raises:
      ValueError: a prompt that is longer than the largest bucket, or empty.
    """
    scaling = model.config.rope_scaling
    if scaling is not None and scaling.rope_type == "dynamic":
        groups = range(len(prompts))  # what follows a prefix decides how its keys are rotated
    queue = deque(make_queue(prompts, groups, buckets))
    batch = _Batch(model, weights, prompts, max_new_tokens, end_ids, stop)
    ended: list[tuple[int, np.ndarray]] = []
    while queue or any(batch.requests):
        # Long prompts come first, so that a row's slots only ever become fewer.
        bucket = max(
            request.bucket for request in (*batch.requests, *itertools.islice(queue, 1)) if request
        )
        size, left = max(1, min(max_batch, batch_tokens // bucket)), len(batch.busy) + len(queue)
        smallest = batch.chunk_sizes.smallest_batch
        while size > smallest and size // 2 >= left:
            size //= 2
        with dispatch or nullcontext():
            batch.fit(size, bucket)
            if queue and len(batch.free_rows) >= min(batch.admit_size, len(queue)):
                count = min(len(batch.free_rows), len(queue))
                batch.admit([queue.popleft() for _ in range(count)])
            admit_size = min(batch.admit_size, len(queue))
            max_running = size - admit_size if queue else size // 2 if size > smallest else 0
            batch.decode(max_running)
        if ended:
            yield ended  # while the device goes on
        ended = batch.pop_finished()
    if ended:
        yield ended


def batches(one: partial[Answers]) -> list[Generate]:
    """`answers` of one device, bound as for `round_robin`, as several of fewer rows each.

    On a CPU with several cores two, where each may have enough rows. The operations of decoding are
    short, and after each the cores wait for one another: they then compute for the other batch.
    """
    sizes, limits = _chunk_sizes(one.args[0]), one.keywords
    longest = limits["batch_tokens"] // max(limits["buckets"])  # rows of the longest bucket
    most = min(limits["max_batch"] // sizes.smallest_batch, longest)
    count = max(1, min(sizes.batches, _cores(), most))
    fewer = {name: limits[name] // count for name in ("max_batch", "batch_tokens")}
    # Two threads would compile each program twice.
    return [partial(one, **fewer, dispatch=Lock())] * count


def round_robin(parts: Sequence[Generate]) -> Generate:
    """`answers` of several devices or batches as one.

    Each is driven by a thread of its own and answers a share of the prompts, of about as many
    tokens as the others'.

    Args:
      parts: `answers`, all but the prompts and their groups bound: with weights on a device each,
        or those of `batches`.
    """
    if len(parts) == 1:
        return parts[0]

    def answer_all(
        prompts: Sequence[Ids],
        groups: Sequence[Hashable] | None = None,
        **options: int | tuple[int, ...],
    ) -> Answers:
        found: SimpleQueue[list[tuple[int, np.ndarray]] | BaseException | None] = SimpleQueue()
        is_closed = Event()

        def work(one: Generate, share: Sequence[int]) -> None:
            try:
                labels = None if groups is None else [groups[i] for i in share]
                for ended in one([prompts[i] for i in share], labels, **options):
                    if is_closed.is_set():
                        return
                    found.put([(share[i], ids) for i, ids in ended])
                found.put(None)
            except BaseException as error:
                found.put(error)

        shares = _shares(prompts, groups, len(parts))
        threads = [
            Thread(target=work, args=pair, daemon=True) for pair in zip(parts, shares, strict=True)
        ]
        for thread in threads:
            thread.start()
        at_work, patience = len(parts), None
        try:
            while at_work:
                ended = found.get()
                if isinstance(ended, BaseException):
                    raise ended
                if ended is None:
                    at_work -= 1
                else:
                    yield ended
        except SystemExit:
            patience = signals.PATIENCE / 2 / len(threads)  # after a stop the process has to end
            raise
        finally:
            is_closed.set()
            # JAX cannot be taken down while a thread computes, nor its memory be used again.
            for thread in threads:
                thread.join(patience)

    return answer_all


def _shares(
    prompts: Sequence[Ids], groups: Sequence[Hashable] | None, count: int
) -> list[list[int]]:
    """The prompts of each of `count` parts, as indices.

    Whole groups, so that what their prompts begin with is read once; of a group that is much of a
    part, each gets as many prompts.
    """
    members: dict[Hashable, list[int]] = {}
    for i in range(len(prompts)):
        members.setdefault(None if groups is None else groups[i], []).append(i)

    def tokens(some: Sequence[int]) -> int:
        return sum(len(prompts[i]) for i in some)

    shares: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    most = tokens(range(len(prompts))) / count / 8
    for some in sorted(members.values(), key=tokens, reverse=True):
        pieces = [some] if tokens(some) <= most else [some[k::count] for k in range(count)]
        for piece in pieces:
            least = loads.index(min(loads))
            shares[least] += piece
            loads[least] += tokens(piece)
    return shares


class _Batch:
    """The rows on the device, and on the host whose answer is in each (`requests`; None: free)."""

    def __init__(self, model, weights, prompts, max_new_tokens, end_ids, stop):
        self.model, self.weights, self.prompts = model, weights, prompts
        self.max_new_tokens, self.end_ids, self.stop = max_new_tokens, end_ids, stop
        self.requests: list[Request | None] = []
        self.checked: dict[int, int] = {}  # prompt → tokens of its answer that `stop` has seen
        self.bucket = 0
        self.rows: greedy.Rows | None = None
        self.chunk_sizes = _chunk_sizes(model)
        self.texts: list[tuple[int, ...]] = []  # the prompt in the caches of each row, ended or not

    @property
    def busy(self) -> list[int]:
        return [row for row, request in enumerate(self.requests) if request]

    @property
    def free_rows(self) -> list[int]:
        return [row for row, request in enumerate(self.requests) if not request]

    @property
    def admit_size(self) -> int:
        """Prompts to admit together: many are faster, few leave fewer rows idle."""
        return max(1, len(self.requests) // 4)

    @property
    def chunks_per_step(self) -> int:
        chunks = len(self.requests) * -(-self.bucket // self.chunk_sizes.chunk)  # of full rows
        return min(max(self.admit_size, self.chunk_sizes.smallest_step), chunks)

    @property
    def slots(self) -> int:
        return self.bucket + self.max_new_tokens

    def fit(self, size: int, bucket: int) -> None:
        """Give the batch `size` rows for prompts of at most `bucket` tokens."""
        if (size, bucket) == (len(self.requests), self.bucket):
            return
        self.bucket = bucket
        if busy := self.busy:
            chosen = _pad_to(busy, size, len(self.requests))
            self.rows = greedy.gather_rows(self.model, self.rows, chosen, self.slots)
        else:
            self.rows = greedy.empty_rows(self.model, size, self.slots, self.max_new_tokens)
        self.requests = [self.requests[row] for row in busy] + [None] * (size - len(busy))
        self.texts = [self.texts[row] for row in busy] + [()] * (size - len(busy))

    def admit(self, requests: Sequence[Request]) -> None:
        """Prefill prompts into free rows. What a prompt shares with one in the caches is copied
        from there first, with one that is admitted here once that is prefilled."""
        free, ready, new = self.free_rows, {row: self.texts[row] for row in self.busy}, {}
        before, after = {}, {}  # row → row to copy from, before and after `first` is prefilled
        first, last, others = [], [], []
        for request in requests:
            text, start = tuple(map(int, self.prompts[request.prompt])), request.shared
            row, chunks = _holder({row: self.texts[row] for row in free}, text[:start]), others
            if row is not None:
                ready[row] = text[:start]  # the rest is not there yet
            elif (source := _holder(ready, text[:start])) is not None:
                before[row := free[0]] = source
            elif (source := _holder(new, text[:start])) is not None:
                after[row := free[0]], chunks = source, last
            elif start:  # others wait for it
                new[row := free[0]], chunks, start = text, first, 0
            else:
                row = free[0]
            free.remove(row)
            self.requests[row], self.texts[row] = request, text
            width = self.chunk_sizes.chunk
            chunks += [(row, at, text) for at in range(start, len(text), width)]
        # Chunks that wait for no copy fill the last step before `after`.
        spare = -len(first) % self.chunks_per_step if last else len(others)
        self._copy(before)
        self._prefill(first + others[:spare])
        self._copy(after)
        self._prefill(last + others[spare:])

    def _copy(self, sources: dict[int, int]) -> None:
        count, size = self.admit_size, len(self.requests)
        for rows in _batched(list(sources), count):
            source = _pad_to([sources[row] for row in rows], count, 0)
            self.rows = greedy.copy_caches(self.rows, source, _row_ids(rows, count, size))

    def _prefill(self, chunks: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        """Prefill chunks: (row, position of its first token in the prompt, the prompt)."""
        count, width = self.chunks_per_step, self.chunk_sizes.chunk
        for some in _batched(chunks, count):
            rows, starts, prompts = zip(*some, strict=True)
            texts = [text[start : start + width] for _, start, text in some]
            tokens = np.zeros((count, width), np.int32)
            for row, text in zip(tokens, texts, strict=False):
                row[: len(text)] = text
            step = greedy.Chunks(
                row=_row_ids(rows, count, len(self.requests)),
                start=_pad_to(starts, count, 0),
                tokens=tokens,
                length=_pad_to([len(text) for text in texts], count, 1),
                prompt=_pad_to([len(prompt) for prompt in prompts], count, 1),
            )
            self.rows = greedy.prefill(
                self.model, self.weights, self.rows, step, end_ids=self.end_ids
            )

    def decode(self, max_running: int) -> None:
        """Start decoding until at most `max_running` answers are running or, where answers can be
        stopped, are to be checked; does not wait."""
        max_steps = self.chunk_sizes.stop_chunk if self.stop else self.max_new_tokens
        self.rows = greedy.decode(
            self.model, self.weights, self.rows, max_running, max_steps, end_ids=self.end_ids
        )

    def pop_finished(self) -> list[tuple[int, np.ndarray]]:
        """Wait for the device; the answers that have ended, whose rows are free from now on."""
        assert self.rows is not None  # `fit` came first
        rows, ended = self.rows, []
        new, count, running = jax.device_get((rows.new, rows.count, rows.running))
        for row in self.busy:
            request = self.requests[row]
            assert request
            answer = new[row, : count[row]]
            length = self._stopped(request.prompt, answer)
            if length is not None or not running[row]:
                ended.append((request.prompt, answer[:length]))
                self.requests[row] = None
        if self.stop:
            running = np.isin(np.arange(len(self.requests)), self.busy)
            self.rows = rows._replace(running=jax.device_put(running, rows.running.sharding))
        return ended

    def _stopped(self, prompt: int, answer: np.ndarray) -> int | None:
        if not self.stop:
            return None
        length = self.stop(self.prompts[prompt], answer, self.checked.pop(prompt, 0))
        if length is None:
            self.checked[prompt] = len(answer)
        return length


def make_queue(
    prompts: Sequence[Ids], groups: Sequence[Hashable] | None, buckets: Sequence[int]
) -> list[Request]:
    """All prompts: the longest bucket first, in it group by group, the longest prompt first."""
    parts: dict[tuple[int, Hashable], list[int]] = {}
    for i, prompt in enumerate(prompts):
        label = None if groups is None else groups[i]
        parts.setdefault((_bucket_for(len(prompt), buckets), label), []).append(i)
    requests = []
    for (bucket, _), members in sorted(parts.items(), key=lambda item: -item[0][0]):
        shared = shared_prefix_length([prompts[i] for i in members])
        members.sort(key=lambda i: -len(prompts[i]))
        requests += [Request(i, bucket, shared) for i in members]
    return requests


def shared_prefix_length(prompts: Sequence[Ids]) -> int:
    """How many tokens several prompts begin with alike, the last one of each left out; 0 where
    to read them once does not pay."""
    if len(prompts) < 2:
        return 0
    most = min(map(len, prompts)) - 1
    alike = np.stack([prompt[:most] for prompt in prompts])
    same = (alike == alike[0]).all(axis=0)
    length = most if same.all() else int(same.argmin())
    return length if length >= SHORTEST_PREFIX else 0


def _chunk_sizes(model: Llama) -> ChunkSizes:
    return CPU if model.platform == "cpu" else ACCELERATOR


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _bucket_for(length: int, buckets: Sequence[int]) -> int:
    if not 1 <= length <= max(buckets):
        raise ValueError(
            f"a prompt has {length} tokens, expected 1 to the largest bucket of {tuple(buckets)}"
        )
    return min(bucket for bucket in buckets if length <= bucket)


def _holder(texts: dict[int, tuple[int, ...]], prefix: tuple[int, ...]) -> int | None:
    """A row whose text begins so; None without a prefix."""
    if not prefix:
        return None
    return next((row for row, text in texts.items() if text[: len(prefix)] == prefix), None)


def _batched(things: Sequence, size: int) -> Iterator[Sequence]:
    return (things[i : i + size] for i in range(0, len(things), size))


def _pad_to(numbers: Sequence[int], size: int, filler: int) -> np.ndarray:
    """`numbers` and as often `filler` as it takes to make them `size`."""
    return np.asarray([*numbers, *[filler] * (size - len(numbers))], np.int32)


def _row_ids(rows: Sequence[int], count: int, size: int) -> np.ndarray:
    """`rows` of a batch of `size`, and as many behind its last one as make them `count`."""
    return np.asarray([*rows, *range(size, size + count - len(rows))], np.int32)
