"""Parts of `run.py`: training steps, fresh processes, decoding. Each yields records, plain dicts,
as soon as they are measured."""

from __future__ import annotations

import importlib
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks import measure, work
from benchmarks.work import Case

AGREE = 1e-3  # relative difference of losses up to which two sides did the same work
# Names that drivers give, by those of `jax_lora.planning.targets`, for their data sheets.
TARGETS = {
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "TPU v5 lite": "v5e",
    "TPU v5p": "v5p",
}
Record = dict[str, Any]


def device() -> str:
    """The default device of JAX, in words."""
    return measure.in_child(_device)


def _device() -> str:
    import jax

    found = jax.devices()[0]
    return f"{len(jax.devices())} × {found.device_kind} ({found.platform})"


# ------------------------------------------------------------------ plain products


def products(flags: Namespace, sides: list[str]) -> Iterator[Record]:
    """How fast square matrices multiply here: operations per second of either framework."""
    side = {"tiny": 128, "smollm2": 2048}.get(flags.size, 8192)
    record = {"dtype": flags.dtype, "side": side}
    for name in sides:
        record[name] = measure.in_child(_product, name, flags.dtype, side)
    flags.product_rate = record["ours"]["operations_per_second"]
    yield record


def _product(name: str, dtype: str, side: int) -> Record:
    call = importlib.import_module(f"benchmarks.{name}").product(dtype, side)
    seconds = measure.median(measure.turns({name: call}, 20)[name])
    return {"operations_per_second": 2 * side**3 / seconds}


# ------------------------------------------------------------------ a training step


def step(flags: Namespace, sides: list[str]) -> Iterator[Record]:
    """A training step of every case on both sides."""
    if flags.isolate:
        yield from _in_own_processes(flags, sides, flags.cases)
        return
    for case in flags.cases:
        found = measure.together(case, sides, flags.repeats)
        record: Record = case.record()
        for side, one in found.items():
            record[side] = _speed(case, side, one, flags)
        if len(found) > 1:
            a, b = (np.array(found[side]["answers"]) for side in ("ours", "theirs"))
            record["ratio"] = measure.median(found["theirs"]) / measure.median(found["ours"])
            record["loss_difference"] = float(np.max(np.abs(a - b) / np.abs(b)))
            record["same_work"] = record["loss_difference"] <= AGREE
        yield record


def _in_own_processes(
    flags: Namespace, sides: list[str], cases: list[Case], new_tokens: int = 0
) -> Iterator[Record]:
    # Each side in its own process, ours first; one record per side and case.
    seconds: dict[tuple[str, Case], float] = {}
    for side in sides:
        profiled = flags.profile and side == "ours"
        found = measure.in_a_row(side, cases, flags.repeats, new_tokens, profiled)
        for case, one in found:
            record = {"side": side} | case.record()
            if new_tokens:
                record["new_tokens"] = new_tokens
                one.pop("answers", None)
            if "error" in one:
                yield record | one
                continue
            seconds[side, case] = measure.median(one)
            if new_tokens:
                rate = case.rows * new_tokens / seconds[side, case]
                record |= {"seconds": seconds[side, case], "new_tokens_per_second": rate} | one
            else:
                record |= _speed(case, side, one, flags)
                if side == "ours":
                    record["planned_bytes"] = work.planned_bytes(case)
            if side == "theirs" and ("ours", case) in seconds:
                record["ratio"] = seconds[side, case] / seconds["ours", case]
            yield record


def _speed(case: Case, side: str, one: Record, flags: Namespace) -> Record:
    seconds = measure.median(one)
    rate = case.tokens / seconds
    record = {"seconds": seconds, "tokens_per_second": rate}
    worth, computed = work.operations(case)
    if flags.peak and case.config.dtype == "bfloat16":
        record["mfu"] = worth * rate / flags.peak
    if side == "ours" and flags.product_rate:
        record["ceiling_share"] = computed * rate / flags.product_rate
    return record | _renamed(one, answers="losses")


def _renamed(one: Record, answers: str) -> Record:
    return {answers if key == "answers" else key: value for key, value in one.items()}


def data_sheet_rate(kind: str) -> float | None:
    """Operations per second of a device in bfloat16 by its data sheet; None if it is not known."""
    from jax_lora.planning.targets import DEVICES

    name = next((target for known, target in TARGETS.items() if known in kind), None)
    return None if name is None else 1e12 * DEVICES[name].tflops


# ------------------------------------------------------------------ fresh processes


def startup(flags: Namespace, sides: list[str]) -> Iterator[Record]:
    """From nothing to the end of the first step, and the peak of memory, side by side."""
    for case in flags.cases:
        for side in sides:
            one = measure.in_fresh_process(side, case, repeats=2, same_weights=False)
            if "error" not in one:
                one = {"seconds": measure.median(one)} | _renamed(one, answers="losses")
            yield {"side": side} | case.record() | one


# ------------------------------------------------------------------ decoding


def decode(flags: Namespace, sides: list[str]) -> Iterator[Record]:
    """Greedy continuations of random prompts of one length, which nothing ends early."""
    cases = [replace(case, rows=rows) for case in flags.cases for rows in flags.batches]
    if flags.isolate:
        yield from _in_own_processes(flags, sides, cases, flags.new_tokens)
        return
    for case in cases:
        found = measure.together(case, sides, flags.repeats, flags.new_tokens)
        record = case.record() | {"new_tokens": flags.new_tokens}
        tokens = {side: one.pop("answers")[-1] for side, one in found.items()}
        for side, one in found.items():
            seconds = measure.median(one)
            rate = case.rows * flags.new_tokens / seconds
            record[side] = {"seconds": seconds, "new_tokens_per_second": rate} | one
        if len(found) > 1:
            record["ratio"] = record["theirs"]["seconds"] / record["ours"]["seconds"]
            record["same_tokens"] = float(np.mean(tokens["ours"] == tokens["theirs"]))
        yield record
