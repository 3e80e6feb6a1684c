"""How many devices each model and method needs: writes docs/scale.md.

    python -m benchmarks.scale                           by formula, a minute
    python -m benchmarks.scale --compile=a100-80gb,v5e   and compiles the rows that no record has

A compiled row takes up to a minute and the extra cuda12 or tpu; it is added to
tests/recorded/aot.json at once, so that the command goes on where it was stopped. The tests
compare the formula with all that is recorded.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs here: take no accelerator

import jax

from jax_lora.cli import input_errors, write_json
from jax_lora.model import attention, lora
from jax_lora.model.config import ATTENTION, CONFIGS, LINEAR
from jax_lora.planning.compile import compile_step
from jax_lora.planning.memory import MOST_DEVICES, fewest, memory
from jax_lora.planning.setup import Setup
from jax_lora.planning.targets import DEVICES, target
from jax_lora.training import masks

RECORD = Path(__file__).resolve().parents[1] / "tests" / "recorded" / "aot.json"
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
MODELS = ("llama-7b", "llama-13b", "llama-33b", "llama-65b", "llama-3-70b")
METHODS = (16, 2048, 4096, None)  # ranks; None is full fine-tuning
KINDS = ("a100-80gb", "h100", "h200", "v5e", "v5p")
COMPILERS = {"cuda": "jax-cuda12-plugin", "tpu": "libtpu"}
GIB = 2**30


def setup(model: str, rank: int | None, kind: str, **fields: Any) -> Setup:
    """A run of the paper's kind: q, k, v, o, batches of 128 rows; `fields` as in `Setup`, and
    contract=False for A and B as two products at every rank."""
    config = CONFIGS[model]
    if rank is None:
        fields = {"trainable": masks.FULL[0], "frozen": masks.FULL[1], "dropout": 0.0} | fields
    elif fields.pop("contract", True):
        fields = {"materialized": lora.materialized_targets(config, rank, ATTENTION)} | fields
    platform = DEVICES[kind].platform
    if "attention" not in fields:
        fields = fields | {"attention": attention.best(platform, "bfloat16", config.head_dim)}
    return Setup(config, rank, platform=platform, **fields)


def wanted() -> Iterator[dict[str, Any]]:
    """What is compiled: arguments of `setup`."""
    seven: dict[str, Any] = {"model": "llama-7b", "kind": "a100-80gb"}
    for rank in METHODS:
        yield seven | {"rank": rank}
    for rank in METHODS:
        yield seven | {"rank": rank, "mesh": (1, 8, 1)}
    yield seven | {"rank": 4096, "mesh": (1, 2, 1)}
    # The configs of this repository, in the shape of micro-batch that needs most.
    yield seven | {"rank": 2048, "remat": "products", "rows": 32, "length": 128}
    yield seven | {"rank": None, "remat": "products", "rows": 16, "length": 512, "mesh": (1, 8, 1)}
    # Every kind of device, and every model on a card and on a TPU.
    yield smallest("llama-7b", 2048, "h100")
    yield smallest("llama-7b", None, "h200")
    yield smallest("llama-13b", 2048, "a100-80gb")
    yield smallest("llama-33b", 16, "h100")
    yield smallest("llama-65b", 2048, "h200")
    yield smallest("llama-3-70b", 16, "a100-80gb")
    one: dict[str, Any] = {"model": "llama-7b", "kind": "v5e", "rank": 16}
    yield one | {"rows": 1}
    yield one
    yield one | {"rows": 1, "mesh": (1, 4, 1)}
    yield one | {"mesh": (1, 8, 1)}
    yield one | {"rank": None, "mesh": (1, 8, 1)}
    for rank in (2048, 4096):
        yield one | {"kind": "v5p", "rank": rank, "mesh": (1, 4, 1)}
    yield one | {"kind": "v5p", "rank": None, "mesh": (1, 8, 1)}
    yield smallest("llama-13b", None, "v5p")
    yield smallest("llama-33b", 2048, "v5e")
    yield smallest("llama-65b", 2048, "v5p")
    yield smallest("llama-3-70b", None, "v5p")
    yield smallest("llama-3-70b", 16, "v5e")
    # What else a config may ask for.
    for fields in (
        {"remat": "none"},
        {"remat": "none", "dropout": 0.0},
        {"remat": "products", "dropout": 0.0},
        {"variant": "dora"},
        {"targets": tuple(LINEAR)},
    ):
        yield seven | {"rank": 16} | fields


def smallest(model: str, rank: int | None, kind: str) -> dict[str, Any]:
    """The row on the fewest devices that fit, a row of tokens each."""
    count = fewest(setup(model, rank, kind), DEVICES[kind])
    return {"model": model, "rank": rank, "kind": kind, "rows": 1, "mesh": (1, count, 1)}


def from_record(row: dict[str, Any]) -> Setup:
    """The setup of a recorded row."""
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in row["setup"].items()}
    return setup(**fields)


def read_record() -> list[dict[str, Any]]:
    """All compiled rows."""
    return json.loads(RECORD.read_text("utf-8")) if RECORD.is_file() else []


def compile_missing(kinds: list[str]) -> None:
    """Compile what is wanted of these kinds and not yet recorded."""
    record = read_record()
    known = [row["setup"] for row in record]
    for arguments in wanted():
        plain = json.loads(json.dumps(arguments))
        if plain["kind"] not in kinds or plain in known:
            continue
        print(json.dumps(plain), flush=True)
        where = target(plain["kind"])
        verdict = compile_step(setup(**arguments), where)
        compiler = COMPILERS[where.device.platform]
        record.append(
            {
                "setup": plain,
                "date": datetime.now(UTC).date().isoformat(),
                "versions": {name: metadata.version(name) for name in ("jax", compiler)},
                "programs": {name: asdict(one) for name, one in verdict.programs.items()},
            }
        )
        write_json(RECORD, record)


def document(record: list[dict[str, Any]]) -> str:
    """The page, in Markdown."""
    parts = [HEAD, "| | " + " | ".join(KINDS) + " |\n|---|" + "---:|" * len(KINDS)]
    for model in MODELS:
        for rank in METHODS:
            counts = [fewest(setup(model, rank, kind), DEVICES[kind]) for kind in KINDS]
            cells = [str(count) if count else f"> {MOST_DEVICES}" for count in counts]
            parts.append(f"| {model}, {_method(rank)} | " + " | ".join(cells) + " |")
    told = {(row["date"], *(f"{k} {v}" for k, v in row["versions"].items())) for row in record}
    parts.append(COMPILED.format("; ".join(", ".join(one) for one in sorted(told))))
    for row in sorted(record, key=_order):
        made, asked = from_record(row), row["setup"]
        device = DEVICES[asked["kind"]]
        found = max(one["peak"] for one in row["programs"].values())
        other = {k: v for k, v in asked.items() if k not in ("model", "rank", "kind", "mesh")}
        cells = [
            f"{asked['model']}, {_method(made.rank)}",
            f"{made.devices} × {asked['kind']}",
            ", ".join(f"{k} {'all' if k == 'targets' else v}" for k, v in other.items()),
            f"{memory(made).peak / GIB:.2f}",
            f"{found / GIB:.2f}",
            f"{device.usable / GIB:.2f}",
            "fits" if found <= device.usable else "does not fit",
        ]
        parts.append("| " + " | ".join(cells) + " |")
    return "\n".join(parts) + "\n"


def _method(rank: int | None) -> str:
    return "full" if rank is None else f"rank {rank}"


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    asked = row["setup"]
    mesh, rank = asked.get("mesh", [1, 1, 1]), asked["rank"] or 1e9
    place = KINDS.index(asked["kind"]), MODELS.index(asked["model"])
    return (*place, len(asked.keys() - {"mesh"}), mesh, rank)


HEAD = """# How many devices

Written by `python -m benchmarks.scale`: the fewest devices, a power of two, on which a step fits
by the formula of `jax_lora/planning/memory.py`. Everything is cut by `mesh.fsdp`, a micro-batch is
one row of 1,024 tokens on each device, frozen weights are bfloat16, what trains and Adam's moments
float32, layers are computed again in the backward pass (`remat="full"`); LoRA is on q, k, v and o,
with A·B formed once a step where that is cheaper. A card counts with 95% of its memory; a v5p is a
chip, of which Google's `v5p-8` has four. The batch has 128 rows, so there is nothing above 128
devices.
"""
COMPILED = """
## What the compilers say

GiB on one device at the worst moment of a step: by formula, and of the same step compiled ahead of
time for the device, without owning one (`--compile`; `tests/recorded/aot.json`). Micro-batches are
4 rows of 1,024 tokens on each device unless a cell says otherwise. For a card it is the peak of the
compiled program. A TPU's compiler lays the memory out and says what it needs; code is not made.

Compiled: {}.

| | devices | other than above | formula | compiled | usable | |
|---|---|---|---:|---:|---:|---|"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--compile", default="", help=f"some of {','.join(KINDS)}")
    chosen = [kind for kind in parser.parse_args().compile.split(",") if kind]
    if unknown := set(chosen) - set(KINDS):
        parser.error(f"--compile: found {', '.join(unknown)}, expected some of {','.join(KINDS)}")
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot read such programs back
    with input_errors():
        compile_missing(chosen)
    DOCUMENT.write_text(document(read_record()), encoding="utf-8")
    print(DOCUMENT)


if __name__ == "__main__":
    main()
