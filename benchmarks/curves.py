"""How time grows: one size at a time, our side only."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from benchmarks import measure, work
from benchmarks.work import Case

VALUES: dict[str, dict[str, tuple[int, ...]]] = {
    "tiny": {"rank": (64,), "layers": (4,)},
    "smollm2": {
        "rank": (4, 16, 64, 256, 1024, 4096),
        "length": (64, 128, 256, 512, 1024),
        "rows": (1, 2, 4, 8, 16),
        "layers": (5, 10, 20, 30, 60),
    },
    "7b": {
        "rank": (8, 64, 512, 2048, 4096),
        "length": (512, 1024, 2048),
        "rows": (1, 2, 4, 8),
        "layers": (4, 8, 16, 32),
    },
}
VALUES["8b"] = VALUES["7b"]
EXAMPLES = {"tiny": (200,)}


def curves(flags: Namespace, sides: list[str]) -> Iterator[dict[str, Any]]:
    """Compilation and a step by rank, length, rows and layers, each changed by itself in the first
    case; and the host's work for an epoch by its number of examples."""
    base = flags.cases[0]
    for axis, values in VALUES[flags.size].items():
        for value in values:
            case = base.changed(axis, value)
            one = measure.together(case, ["ours"], flags.repeats)["ours"]
            seconds = measure.median(one)
            yield {
                "axis": axis,
                "value": value,
                "first_seconds": one["all_seconds"][0],
                "seconds": seconds,
                "tokens_per_second": case.tokens / seconds,
            }
    for count in EXAMPLES.get(flags.size, (1000, 10_000, 100_000)):
        yield {"axis": "examples", "value": count} | _batching(base, count)


def _batching(case: Case, count: int) -> dict[str, Any]:
    # Packing an epoch's batches of 128, which in training happens beside the device's work.
    from jax_lora.data.loader import Batches

    cut = Batches(
        work.made_up_rows(case, count),
        batch_size=128,
        seed=0,
        buckets=(384,),
        micro_tokens=4096,
        answer_only=False,
        pad_id=0,
        packed=True,
    )
    start, real, computed = time.perf_counter(), 0, 0
    for step in range(cut.steps_per_epoch):
        for micro in cut.at(step):
            real, computed = (
                real + int((micro.segment_ids >= 0).sum()),
                computed + micro.tokens.size,
            )
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "tokens_per_second": real / seconds,
        "padding": 1 - real / computed,
    }
