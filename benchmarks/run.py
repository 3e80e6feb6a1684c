"""Our speed and memory beside transformers + PEFT: the same work, the same machine, one run.

    python benchmarks/run.py                                  ours alone, SmolLM2's shape
    python benchmarks/run.py --peer=hf_peft --parts=step,epoch,startup
    python benchmarks/run.py --peer=hf_peft --size=7b --dtype=bfloat16 --ranks=8,4096,full --isolate

Parts: `products` says what plain matrix products reach here; `step` times a training step on
identical batches (tokens, mask, weights, adapters), the sides taking turns, and says whether their
losses agree; `epoch` the real task mix with each side's own batching; `startup` fresh processes;
`curves` time against rank, length, batch, depth and number of examples; `decode` greedy decoding.
With --isolate, for models of which a device holds but one, each side has its own process and random
weights. Every result is in FOLDER/results.json, and in the tables of FOLDER/results.md, as soon
as it is there.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a file, from a checkout that may not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import parts, work
from benchmarks.curves import curves
from benchmarks.epoch import epoch
from benchmarks.report import Results
from jax_lora import cli
from jax_lora.model import arch

PARTS = {
    "products": parts.products,
    "step": parts.step,
    "epoch": epoch,
    "startup": parts.startup,
    "curves": curves,
    "decode": parts.decode,
}
REMAT = ("none", "full", "products")
KERNELS = ("auto", "xla", "cudnn", "flash")
SHAPES = {"tiny": "2x32", "smollm2": "8x128,4x256", "7b": "4x2048", "8b": "2x4096"}
TARGETS = {"attention": arch.ATTENTION, "all": arch.LINEAR_NAMES}


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags, wrong ones answered by argparse."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("--parts", default="products,step,epoch,startup,curves", help=f"among {','.join(PARTS)}")
    flag("--peer", choices=("none", "hf_peft"), default="none")
    flag("--size", choices=tuple(SHAPES), default="smollm2")
    flag("--ranks", default="16", help="of the adapters, or full: 8,64,full")
    flag("--targets", choices=tuple(TARGETS), default="attention", help="all: the MLP's as well")
    flag("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the arithmetic")
    flag("--shapes", help="rows x length of the batches: 8x128,4x256")
    flag("--loss", default="all,answer", help="loss on all tokens, on the last eighth, or both")
    flag("--remat", default="none", help="none, full, products, or several; PEFT's checkpointing")
    flag("--attention", default="auto", help="auto, xla, cudnn, flash, or several; ours")
    flag("--dropout", type=float, default=0.0)
    flag("--unroll", type=int, default=0, help="layers per iteration of the scan, 0: auto; ours")
    flag("--loss-chunk", type=int, default=256, help="positions with logits at a time; ours")
    flag("--layers", type=int, default=0, help="in place of the size's own")
    flag("--repeats", type=int, default=5, help="steps that count, behind two that do not")
    flag("--isolate", action="store_true", help="step, decode: each side in its own process")
    flag("--profile", action="store_true", help="with --isolate: our kernels of one more call")
    flag("--examples", type=int, default=64, help="epoch: rows of the task mix")
    flag("--batches", default="1,32", help="decode: rows of a batch")
    flag("--new-tokens", type=int, default=64, help="decode: tokens per row")
    flag("--out", type=Path, default=Path("runs/benchmark"))
    flags = parser.parse_args(argv)
    flags.shapes = flags.shapes or SHAPES[flags.size]
    try:
        flags.parts = _several(flags, "parts", _among(PARTS), f"some of {','.join(PARTS)}")
        flags.batches = _several(flags, "batches", _positive, "numbers of rows as 1,32")
        flags.cases = [
            work.case(
                size=flags.size,
                rank=rank,
                rows=rows,
                length=length,
                loss=loss,
                layers=flags.layers,
                dtype=flags.dtype,
                remat=remat,
                attention=attention,
                unroll=flags.unroll,
                loss_chunk=flags.loss_chunk,
                **{"lora.dropout": flags.dropout, "lora.targets": TARGETS[flags.targets]},
            )
            for (rows, length), loss, remat, attention, rank in itertools.product(
                _several(flags, "shapes", _shape, "rows x length as 8x128,4x256"),
                _several(flags, "loss", _among(("all", "answer")), "all, answer or both"),
                _several(flags, "remat", _among(REMAT), f"some of {','.join(REMAT)}"),
                _several(flags, "attention", _among(KERNELS), f"some of {','.join(KERNELS)}"),
                _several(flags, "ranks", _rank, "numbers or full as 8,64,full"),
            )
        ]
    except ValueError as error:
        parser.error(str(error))
    return flags


def _several(flags: argparse.Namespace, name: str, read: Callable[[str], Any], expected: str):
    text = getattr(flags, name)
    try:
        return [read(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--{name}: found {text!r}, expected {expected}") from None


def _among(known: Collection[str]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in known:
            raise ValueError
        return text

    return read


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def _rank(text: str) -> int | None:
    return None if text == "full" else _positive(text)


def _shape(text: str) -> tuple[int, int]:
    rows, length = map(_positive, text.split("x"))
    return rows, length


def main(argv: list[str]) -> None:
    """Measure what the flags say."""
    flags = parse(argv)
    cli.set_xla_flags()
    cli.keep_memory()  # as our scripts do; PyTorch's side, in the same process, gains as much
    # JAX and PyTorch share the device where sides take turns.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    device = parts.device()
    results = Results(flags.out, ["python", "benchmarks/run.py", *argv], device)
    sides = ["ours"] if flags.peer == "none" else ["ours", "theirs"]
    flags.product_rate = None  # until it is measured
    flags.peak = parts.data_sheet_rate(device)
    for part in flags.parts:
        for record in PARTS[part](flags, sides):
            results.add(part, record)
            print(part, record, flush=True)
    print(flags.out / "results.md")


if __name__ == "__main__":
    main(sys.argv[1:])
