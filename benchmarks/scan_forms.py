"""Forms of the loop over layers, compiled ahead of time for a device that is not here.

    python -m benchmarks.scan_forms --target=h200                     8 layers of LLaMA-7B
    python -m benchmarks.scan_forms --target=h200 --layers=32 --forms=1,all

One row per form, of a micro-batch of a training step: how many gigabytes the compiled program
writes as it has read them, of frozen weights and of other arrays, how many it fills with zeros, the
milliseconds that both take at the bandwidth of the device, the compiler's seconds on all cores and
the peak of memory. With --library all products are cuBLAS's; without a card at hand the compiler
chooses Triton for nearly all, with one it tries out both. Needed: the extra cuda12 or tpu.

Forms: a number is the layers per iteration, `all` unrolls them with frozen kernels as one array per
layer (`jax_lora.training.unstacked`), `stacked` the same with stacked kernels, and `split` is
`lax.scan(_split_transpose=True)`.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs here: take no accelerator

import flax.linen as nn
import jax
from jax.stages import Compiled

from benchmarks import work
from benchmarks.moves import Array, moves
from benchmarks.report import table
from benchmarks.work import Case
from jax_lora.cli import exit_codes
from jax_lora.model.arch import LINEARS
from jax_lora.planning.compile import lower_step
from jax_lora.planning.targets import Target, target
from jax_lora.training.resolve import Resolved

FORMS = "1,split,2,4,stacked,all"
LIBRARY = {"xla_gpu_enable_triton_gemm": False}


def compiled(case: Case, where: Target, form: str, library: bool) -> tuple[Compiled, float]:
    """The function of a micro-batch in one form, and the processor's seconds for it."""
    layers = case.shape.num_hidden_layers
    unroll = layers if form in ("all", "stacked") else 1 if form == "split" else int(form)
    changed = Case(
        case.config.replace(unroll=unroll), case.size, case.rows, case.length, case.loss, layers
    )
    with _patch(form):
        lowered = lower_step(changed.planned(where.device.platform), where)["accumulate"]
    start = time.process_time()
    program = lowered.compile(LIBRARY if library else None)
    return program, time.process_time() - start


def _patch(form: str) -> AbstractContextManager[Any]:
    if form == "split":
        return mock.patch.object(nn, "scan", functools.partial(nn.scan, _split_transpose=True))
    if form == "stacked":
        return mock.patch.object(Resolved, "unstacks", False)
    return nullcontext()


def count(case: Case, program: Compiled) -> dict[str, int]:
    """Bytes per micro-batch that a program moves: of frozen `weights`, `other` ones, `zeros`."""
    found = {"weights": 0, "other": 0, "zeros": 0}
    for move in moves(program.as_text() or ""):
        kind = "zeros" if move.source is None else "other"
        if move.source is not None and _is_kernel(case, move.source):
            kind = "weights"
        found[kind] += move.bytes * move.times
    return found


def _is_kernel(case: Case, array: Array) -> bool:
    # A layer's kernel or a stack of them, either side first; the case must have no activations of
    # such sizes.
    sides = [{case.shape.size(one.inputs), case.shape.size(one.outputs)} for one in LINEARS]
    assert not {case.length, case.tokens} & set().union(*sides)
    dtype = {"bfloat16": "bf16", "float32": "f32"}[case.config.dtype]
    return array.dtype == dtype and set(array.sizes[-2:]) in sides and len(array.sizes) > 1


def rows(case: Case, where: Target, forms: Sequence[str], library: bool) -> Iterator[dict]:
    """A record of every form, as it is compiled."""
    for form in forms:
        program, seconds = compiled(case, where, form, library)
        moved = count(case, program)
        passes = 2 * (moved["weights"] + moved["other"]) + moved["zeros"]  # reads and writes
        memory = program.memory_analysis()
        assert memory is not None
        yield {
            "form": form,
            **{f"{kind} bytes": value for kind, value in moved.items()},
            "ms": 1e3 * passes / (where.device.bandwidth or float("nan")),
            "compile s": round(seconds),
            "peak bytes": memory.peak_memory_in_bytes,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("--target", default="h200")
    flag("--size", default="7b", choices=("tiny", *work.NAMES))
    flag("--layers", type=int, default=8)
    flag("--forms", default=FORMS)
    flag("--remat", default="none")
    flag("--rank", type=int, default=8)
    flag("--shape", default="4x2048", help="rows x length")
    flag("--library", action="store_true", help="all products by cuBLAS")
    flags = parser.parse_args()
    number, length = map(int, flags.shape.split("x"))
    case = work.case(
        size=flags.size,
        rank=flags.rank,
        rows=number,
        length=length,
        layers=flags.layers,
        remat=flags.remat,
        dtype="bfloat16",
        loss_chunk=1024,
        **{"lora.dropout": 0.05},
    )
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot read such programs back
    found = []
    with exit_codes():
        for record in rows(case, target(flags.target), flags.forms.split(","), flags.library):
            found.append(record)
            print(record, flush=True)
    print(f"\n{table(found)}")


if __name__ == "__main__":
    main()
