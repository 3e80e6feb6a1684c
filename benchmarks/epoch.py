"""An epoch of the real task mix, with each side's own way of making batches of it."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from benchmarks import work
from benchmarks.work import Case

BATCH = 16  # examples of an optimizer step
THEIR_ROWS = 8  # of a micro-batch: what Trainer's `per_device_train_batch_size` is by default
# Row lengths, and micro_tokens: few of them, or 16 examples would leave many rows empty.
OURS = {"packed": ((128, 256, 384, 512), 512), "buckets": (tuple(range(64, 385, 32)), 384)}


class Contender(NamedTuple):
    """A trainer, and a function that starts its epoch of global batches."""

    trainer: Any
    batches: Callable[[], Iterable[Any]]


def epoch(flags: Namespace, sides: list[str]) -> Iterator[dict[str, Any]]:
    """The task mix once: our batches packed and in buckets, theirs random and by length.

    All take one optimizer step in turn. What compiles does so before, and is timed separately.
    """
    for case in {replace(case, rows=1, length=1): None for case in flags.cases}:
        rows, source = work.task_rows(case, flags.examples)
        contenders = _contenders(case, rows, "theirs" in sides)
        found = {name: _warmed_up(one) for name, one in contenders.items()}
        running = {name: one.trainer.steps(one.batches()) for name, one in contenders.items()}
        for _ in range(-(-len(rows) // BATCH)):
            for name, steps in running.items():
                start = time.perf_counter()
                next(steps)
                found[name]["seconds"] += time.perf_counter() - start
        real = sum(len(row.ids) for row in rows)
        shared = {
            key: value for key, value in case.record().items() if key not in ("rows", "length")
        }
        for name, record in found.items():
            seconds, computed = record["seconds"], record["computed_tokens"]
            record |= {"real_tokens": real, "padding": 1 - real / computed}
            record["real_tokens_per_second"] = real / seconds
            if "theirs, random" in found:
                record["ratio"] = found["theirs, random"]["seconds"] / seconds
            yield {"side": name, **shared, "tasks": source, "examples": len(rows), **record}


def _contenders(case: Case, rows: list[Any], peer: bool) -> dict[str, Contender]:
    import jax

    from benchmarks import ours
    from jax_lora.data.loader import Batches

    weights = ours.variables(case)
    answer_only = case.loss == "answer"
    found = {}
    for name, (buckets, micro_tokens) in OURS.items():
        cut = Batches(
            rows,
            batch_size=BATCH,
            seed=0,
            buckets=buckets,
            micro_tokens=micro_tokens,
            answer_only=answer_only,
            pad_id=0,
            packed=name == "packed",
        )
        # A trainer donates the buffers of what it trains; the frozen parameters are shared.
        part = "params" if case.rank is None else "lora"
        copies = weights | {part: jax.tree.map(lambda x: x.copy(), weights[part])}
        trainer = ours.Trainer(case, copies, cut.packed)
        found[f"ours, {name}"] = Contender(
            trainer, lambda cut=cut: cut.stream(0, cut.steps_per_epoch)
        )
    if peer:
        from benchmarks import theirs

        for name, grouped in (("random", False), ("by length", True)):
            found[f"theirs, {name}"] = Contender(
                theirs.Trainer(case, weights),
                lambda grouped=grouped: theirs.batches(
                    rows, BATCH, THEIR_ROWS, grouped=grouped, answer_only=answer_only
                ),
            )
    return found


def _warmed_up(one: Contender) -> dict[str, Any]:
    # A step of every shape that the epoch will meet, and the tokens that it will compute.
    start, shapes, computed = time.perf_counter(), set(), 0
    for batch in one.batches():
        for micro in batch:
            shape = tuple(micro.tokens.shape)
            computed += int(np.prod(shape))
            if shape not in shapes:
                shapes.add(shape)
                next(one.trainer.steps([[micro]]))
    return {
        "computed_tokens": computed,
        "shapes": len(shapes),
        "warm_up_seconds": time.perf_counter() - start,
        "seconds": 0.0,
    }
