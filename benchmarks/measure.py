"""Stopwatches: sides that take turns in this process, and one side in a fresh process."""

from __future__ import annotations

import functools
import gc
import importlib
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from benchmarks import work
from benchmarks.work import Case

WARM = 2  # calls before those that count: the first compiles, the second still allocates


def turns(sides: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Any]:
    """Call every side in turn, `WARM + repeats` times: side → {all_seconds, answers}."""
    found: dict[str, Any] = {name: {"all_seconds": [], "answers": []} for name in sides}
    for _ in range(WARM + repeats):
        for name, call in sides.items():
            start = time.perf_counter()
            answer = call()
            found[name]["all_seconds"].append(time.perf_counter() - start)
            found[name]["answers"].append(answer)
    return found


def median(one: Mapping[str, Any]) -> float:
    """Seconds of the calls that count."""
    return float(np.median(one["all_seconds"][WARM:]))


def together(case: Case, sides: Sequence[str], repeats: int, new_tokens: int = 0) -> dict[str, Any]:
    """Training steps, or greedy decoding of `new_tokens`, the sides taking turns on the same
    weights: side → {all_seconds, answers}, an answer being a loss or the new tokens."""
    weights = importlib.import_module("benchmarks.ours").variables(case)
    calls = {side: _work(side, case, weights, new_tokens) for side in sides}
    del weights
    return turns(calls, repeats)


def _work(side: str, case: Case, weights: Any, new_tokens: int) -> Callable[[], Any]:
    module = importlib.import_module(f"benchmarks.{side}")
    micro = work.batch(case)
    if new_tokens:
        return functools.partial(module.generator(case, weights), micro.tokens, new_tokens)
    return functools.partial(module.Trainer(case, weights).step, micro)


def in_fresh_process(
    side: str, case: Case, repeats: int, new_tokens: int = 0, same_weights: bool = True
) -> dict[str, Any]:
    """The same of one side in a fresh process, with the seconds from its start to the end of the
    first call and the peak of memory, of the device or, on a CPU, of the process.

    Without `same_weights` PyTorch initializes its own weights, in a process without JAX.
    """
    return in_child(_fresh, side, case, repeats, new_tokens, same_weights, time.time())


def _fresh(
    side: str, case: Case, repeats: int, new_tokens: int, same_weights: bool, asked: float
) -> dict[str, Any]:
    module = _side(side)
    imported = time.time()
    call, built = _call(side, case, new_tokens, same_weights), time.time()
    found = turns({side: call}, repeats)[side]
    first = found["all_seconds"][0]
    return found | {
        "import_seconds": imported - asked,
        "build_seconds": built - imported,
        "first_seconds": first,
        "start_seconds": built - asked + first,
        "peak_bytes": module.peak_bytes() or _peak_of_process(),
    }


def _side(side: str) -> Any:
    # All of a GPU for ours; no more than it needs, and given back, where JAX but makes weights.
    if side == "ours":
        os.environ |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_CLIENT_MEM_FRACTION": "0.93"}
    else:
        os.environ["XLA_PYTHON_CLIENT_ALLOCATOR"] = "platform"
    return importlib.import_module(f"benchmarks.{side}")


def _call(side: str, case: Case, new_tokens: int, same_weights: bool) -> Callable[[], Any]:
    weights = None
    if side == "ours" or same_weights:
        weights = importlib.import_module("benchmarks.ours").variables(case)
    return _work(side, case, weights, new_tokens)


def in_a_row(
    side: str, cases: Sequence[Case], repeats: int, new_tokens: int, profiled: bool
) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Cases one after another in one process of a side, each with its own weights, as they are
    measured: with `peak_bytes`, the most memory so far, where the case has raised it, and, if
    `profiled`, with the `kernels` of one more call. A case that fails has an "error", and one that
    kills the process lets the next start in a fresh one."""
    context, left = multiprocessing.get_context("spawn"), list(cases)
    while left:
        receiving, sending = context.Pipe(duplex=False)
        arguments = (sending, side, left, repeats, new_tokens, profiled)
        process = context.Process(target=_in_a_row, args=arguments)
        process.start()
        sending.close()
        try:
            while left:
                one = receiving.recv()
                yield left.pop(0), one
        except EOFError:
            yield left.pop(0), {"error": "the process was killed: out of memory?"}
        finally:
            process.join()


def _in_a_row(sending: Any, side: str, cases: Sequence[Case], repeats: int, *more: Any) -> None:
    module, peak = _side(side), 0
    new_tokens, profiled = more
    for case in cases:
        try:
            call = _call(side, case, new_tokens, same_weights=False)
            found = turns({side: call}, repeats)[side]
            if (now := module.peak_bytes() or _peak_of_process()) > peak:
                found["peak_bytes"] = peak = now
            if profiled:
                found["kernels"] = module.kernels(call)
        except Exception as error:
            found = {"error": _in_short(error)}
        sending.send(found)
        call = None
        gc.collect()  # gives back the memory


def _peak_of_process() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux


def in_child(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a fresh process; {"error": one line} if it failed, so that a case too
    large does not end the whole run."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool:
            return {"error": "the process was killed: out of memory?"}
        except Exception as error:
            return {"error": _in_short(error)}


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
