"""How many devices each model and method needs: writes docs/scale.md.

    python -m benchmarks.scale                           by formula, a minute
    python -m benchmarks.scale --compile=a100-80gb,v5e   and compiles the rows that no record has

A compiled row takes up to a minute and the extra cuda12 or tpu. It is written to
tests/recorded/aot.json at once: rerun the same command to resume. The formula's coefficients were
read off those rows. Rows that they were not fitted to are in tests/recorded/aot_held_out.json, and
those of a quantized base in aot_quantized.json; the command prints the error of the formula on all
of them, and the tests check it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs here: take no accelerator

import jax

from jax_lora.cli import exit_codes
from jax_lora.config import RunConfig
from jax_lora.files import write_json
from jax_lora.model.arch import LINEAR_NAMES
from jax_lora.planning.compile import compile_step
from jax_lora.planning.memory import MOST_DEVICES, fewest, memory
from jax_lora.planning.steps import PlannedStep, planned
from jax_lora.planning.targets import DEVICES, target
from jax_lora.training import trainable_mask

RECORD = Path(__file__).resolve().parents[1] / "tests" / "recorded" / "aot.json"
HELD_OUT = RECORD.with_name("aot_held_out.json")
QUANTIZED = RECORD.with_name("aot_quantized.json")
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
MODELS = ("llama-7b", "llama-13b", "llama-33b", "llama-65b", "llama-3-70b")
SMALL = ("smollm2-135m", "llama-3.2-1b", "llama-3.2-3b")  # tied embeddings, no fitted row
METHODS = (16, 2048, 4096, None)  # ranks; None is full fine-tuning
KINDS = ("a100-80gb", "h100", "h200", "v5e", "v5p")
SMALL_KINDS = ("rtx4090", *KINDS)  # for a quantized base
COMPILERS = {"cuda": "jax-cuda12-plugin", "tpu": "libtpu"}
FULL = {"method": "full", "trainable": trainable_mask.FULL[0], "frozen": trainable_mask.FULL[1]}
KEYS = {key: f"lora.{key}" for key in ("dropout", "variant", "targets")}  # of a recorded row
KEYS["quantization"] = "model_quantization"
GIB = 2**30


def step(
    model: str,
    rank: int | None,
    kind: str,
    mesh: tuple[int, int, int] = (1, 1, 1),
    rows: int = 4,
    length: int = 1024,
    **keys: Any,
) -> PlannedStep:
    """A step of the paper's kind: LoRA on q, k, v, o or full, batches of 128 rows.

    `keys` are of the recorded rows: remat, dropout, variant, targets, quantization.
    """
    changes: dict[str, Any] = FULL if rank is None else {"lora.rank": rank}
    changes = changes | dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True))
    changes |= {KEYS.get(key, key): value for key, value in keys.items()}
    config = RunConfig().replace(**changes)
    return planned(config, model, DEVICES[kind].platform, math.prod(mesh), rows, length)


def wanted() -> Iterator[dict[str, Any]]:
    """What is compiled: arguments of `step`."""
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
        {"targets": tuple(LINEAR_NAMES)},
    ):
        yield seven | {"rank": 16} | fields


def held_out() -> Iterator[dict[str, Any]]:
    """What is compiled to judge the formula: arguments of `step`.

    The coefficients were read off `wanted`, and these rows were listed before any of them was
    compiled. The rule: no row has the model, rank, rows and length of a fitted one, and none of
    the ranks is fitted except full fine-tuning. Every kind of device, remat policy and model size
    is among them, and so are DoRA, all seven targets and the mesh axes data and tensor.
    """
    card: dict[str, Any] = {"model": "llama-7b", "kind": "a100-80gb", "rank": 1024}
    yield card | {"rows": 6, "length": 1152}
    yield card | {"rank": 256, "rows": 16, "length": 384, "remat": "products"}
    yield card | {"rank": 64, "rows": 2, "length": 768, "remat": "none"}
    yield card | {"rank": 128, "rows": 8, "length": 512, "variant": "dora"}
    yield card | {"model": "llama-13b", "rank": 512, "rows": 2, "length": 2048}
    yield card | {"model": "llama-33b", "rank": 256, "rows": 2, "length": 512, "mesh": (1, 4, 1)}
    for model, fields in (
        ("llama-3-8b", {"rank": 64, "rows": 2, "length": 2048}),
        ("llama-3-8b", {"rank": 512, "rows": 8, "length": 512, "remat": "products"}),
        ("llama-3-8b", {"rank": None, "rows": 2, "length": 2048, "mesh": (1, 8, 1)}),
        ("llama-3.2-1b", {"rank": 32, "rows": 16, "length": 512, "targets": tuple(LINEAR_NAMES)}),
        ("llama-13b", {"rank": 64, "rows": 2, "length": 768, "mesh": (1, 2, 2)}),
        ("llama-65b", {"rank": 128, "rows": 2, "length": 512, "mesh": (2, 4, 1)}),
    ):
        yield {"model": model, "kind": "h100"} | fields
    for model, fields in (
        ("llama-13b", {"rank": 3072, "rows": 2, "length": 512}),
        ("llama-3.2-3b", {"rank": None, "rows": 4, "length": 768}),
        ("llama-2-70b", {"rank": 512, "rows": 2, "length": 768, "mesh": (1, 4, 1)}),
        ("smollm2-135m", {"rank": None, "rows": 32, "length": 512, "remat": "none"}),
    ):
        yield {"model": model, "kind": "h200"} | fields
    for kind, model, fields in (
        ("v5e", "llama-3.2-1b", {"rank": 64, "rows": 8, "length": 512}),
        ("v5e", "llama-3-8b", {"rank": 128, "rows": 2, "length": 768, "mesh": (1, 4, 1)}),
        ("v5e", "llama-3.2-3b", {"rank": None, "rows": 2, "length": 512, "mesh": (1, 8, 1)}),
        ("v5p", "llama-7b", {"rank": 1024, "rows": 8, "length": 512, "mesh": (1, 4, 1)}),
        ("v5p", "llama-13b", {"rank": 512, "rows": 2, "length": 2048, "mesh": (1, 4, 1)}),
        ("v5p", "llama-33b", {"rank": None, "rows": 2, "length": 512, "mesh": (1, 8, 1)}),
    ):
        yield {"model": model, "kind": kind} | fields


def quantized() -> Iterator[dict[str, Any]]:
    """What is compiled with a quantized base, one row of 1,024 tokens: arguments of `step`."""
    seven: dict[str, Any] = {"model": "llama-7b", "rank": 16, "rows": 1, "quantization": "nf4"}
    yield seven | {"kind": "rtx4090"}
    yield seven | {"kind": "rtx4090", "quantization": "int8"}
    yield seven | {"kind": "rtx4090", "rank": 256, "remat": "none"}
    yield seven | {"kind": "v5e"}
    for kind in ("h100", "h200"):
        yield seven | {"model": "llama-3-70b", "kind": kind}
    yield seven | {"model": "llama-3-70b", "kind": "v5e", "mesh": (1, 4, 1)}


def smallest(model: str, rank: int | None, kind: str) -> dict[str, Any]:
    """The row on the fewest devices that fit, one row of tokens on each."""
    count = fewest(step(model, rank, kind), DEVICES[kind])
    return {"model": model, "rank": rank, "kind": kind, "rows": 1, "mesh": (1, count, 1)}


def from_record(row: dict[str, Any]) -> PlannedStep:
    """The step of a recorded row."""
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in row["setup"].items()}
    return step(**fields)


def read_record(path: Path = RECORD) -> list[dict[str, Any]]:
    """All compiled rows of one file."""
    return json.loads(path.read_text("utf-8")) if path.is_file() else []


def errors(record: list[dict[str, Any]]) -> list[float]:
    """How far the formula's peak is from the compiled one, relative to it, row by row."""
    return [memory(from_record(row)).peak / compiled_peak(row) - 1 for row in record]


def compiled_peak(row: dict[str, Any]) -> int:
    """Bytes on one device at the worst moment of a recorded step."""
    return max(program["peak"] for program in row["programs"].values())


def groups() -> dict[str, list[dict[str, Any]]]:
    """The compiled rows by how they judge the formula."""
    held_out_rows = read_record(HELD_OUT)
    return {
        "fitted": read_record(),
        "held out, 7B and above": [r for r in held_out_rows if r["setup"]["model"] not in SMALL],
        "held out, below 7B": [r for r in held_out_rows if r["setup"]["model"] in SMALL],
        "quantized bases": read_record(QUANTIZED),
    }


def judged(name: str, record: list[dict[str, Any]]) -> str:
    """The mean and the worst error of the formula on compiled rows, in words."""
    sizes = [abs(error) for error in errors(record)] or [0.0]
    mean, worst = sum(sizes) / len(sizes), max(sizes)
    within = sum(size < 0.03 for size in sizes)
    return (
        f"{name}: {len(record)} rows, mean error {mean:.1%}, worst {worst:.1%}, {within} within 3%"
    )


def compile_missing(kinds: list[str], rows: Iterator[dict[str, Any]], path: Path) -> None:
    """Compile those of the rows that are of these kinds and not yet recorded in the file."""
    record = read_record(path)
    known = [row["setup"] for row in record]
    for arguments in rows:
        plain = json.loads(json.dumps(arguments))
        if plain["kind"] not in kinds or plain in known:
            continue
        print(json.dumps(plain), flush=True)
        where = target(plain["kind"])
        verdict = compile_step(step(**arguments), where)
        compiler = COMPILERS[where.device.platform]
        record.append(
            {
                "setup": plain,
                "date": datetime.now(UTC).date().isoformat(),
                "versions": {name: metadata.version(name) for name in ("jax", compiler)},
                "programs": {name: asdict(one) for name, one in verdict.programs.items()},
            }
        )
        write_json(path, record)


def document(record: list[dict[str, Any]]) -> str:
    """The page, in Markdown."""
    parts = [HEAD, "| | " + " | ".join(KINDS) + " |\n|---|" + "---:|" * len(KINDS)]
    for model in MODELS:
        for rank in METHODS:
            counts = [fewest(step(model, rank, kind), DEVICES[kind]) for kind in KINDS]
            cells = [str(count) if count else f"> {MOST_DEVICES}" for count in counts]
            parts.append(f"| {model}, {_method(rank)} | " + " | ".join(cells) + " |")
    versions = {(row["date"], *(f"{k} {v}" for k, v in row["versions"].items())) for row in record}
    parts.append(COMPILED.format("; ".join(", ".join(one) for one in sorted(versions))))
    parts += map(_row, sorted(record, key=_order))
    parts.append(QUANTIZED_HEAD + "| | " + " | ".join(SMALL_KINDS))
    parts[-1] += " |\n|---|" + "---:|" * len(SMALL_KINDS)
    for model in MODELS:
        asked = [step(model, 16, kind, rows=1, quantization="nf4") for kind in SMALL_KINDS]
        counts = [fewest(one, DEVICES[kind]) for one, kind in zip(asked, SMALL_KINDS, strict=True)]
        parts.append(f"| {model}, nf4, rank 16 | " + " | ".join(map(str, counts)) + " |")
    parts.append(QUANTIZED_COMPILED)
    parts += map(_row, read_record(QUANTIZED))
    return "\n".join(parts) + "\n"


def _row(row: dict[str, Any]) -> str:
    made, asked = from_record(row), row["setup"]
    device = DEVICES[asked["kind"]]
    found = compiled_peak(row)
    other = {k: v for k, v in asked.items() if k not in ("model", "rank", "kind", "mesh")}
    cells = [
        f"{asked['model']}, {_method(made.resolved.rank)}",
        f"{made.devices} × {asked['kind']}",
        ", ".join(f"{k} {'all' if k == 'targets' else v}" for k, v in other.items()),
        f"{memory(made).peak / GIB:.2f}",
        f"{found / GIB:.2f}",
        f"{device.usable / GIB:.2f}",
        "fits" if found <= device.usable else "does not fit",
    ]
    return "| " + " | ".join(cells) + " |"


def _method(rank: int | None) -> str:
    return "full" if rank is None else f"rank {rank}"


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    asked = row["setup"]
    mesh, rank = asked.get("mesh", [1, 1, 1]), asked["rank"] or 1e9
    order = KINDS.index(asked["kind"]), MODELS.index(asked["model"])
    return (*order, len(asked.keys() - {"mesh"}), mesh, rank)


HEAD = """# How many devices

Written by `python -m benchmarks.scale`: the fewest devices, a power of two, on which a step fits
by the formula of `jax_lora/planning/memory.py`. `mesh.fsdp` shards everything, a micro-batch is
one row of 1,024 tokens on each device, frozen weights are bfloat16, what trains and Adam's moments
float32, layers are computed again in the backward pass (`remat="full"`); LoRA is on q, k, v and o,
with A·B formed once per step where that is cheaper. A card counts with 95% of its memory; a v5p is
a chip, of which Google's `v5p-8` has four. The batch has 128 rows, so there is nothing above 128
devices.
"""
COMPILED = """
## What the compilers say

GiB on one device at the worst moment of a step: by formula, and of the same step compiled ahead of
time for the device, without having one (`--compile`; `tests/recorded/aot.json`). Micro-batches are
4 rows of 1,024 tokens on each device unless a cell says otherwise. For a card it is the peak of the
compiled program. A TPU's compiler lays the memory out and says what it needs; code is not made.

Compiled: {}.

| | devices | other than above | formula | compiled | usable | |
|---|---|---|---:|---:|---:|---|"""

QUANTIZED_HEAD = """
## A quantized base

The frozen linear layers in nf4 (`config.model_quantization`), the rest as above: the fewest devices
by formula, a power of two.

"""
QUANTIZED_COMPILED = """
And what the compilers say (`tests/recorded/aot_quantized.json`); 15.75 GiB are usable on a v5e. The
formula was fitted to bases that are not quantized, and is used as it is. On the v5e it leaves out
the vocabulary's table, 1.96 GiB of Llama-3-70B, which a device gathers to compute the logits.

| | devices | other than above | formula | compiled | usable | |
|---|---|---|---:|---:|---:|---|"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--compile", default="", help=f"some of {','.join(SMALL_KINDS)}")
    chosen = [kind for kind in parser.parse_args().compile.split(",") if kind]
    if unknown := set(chosen) - set(SMALL_KINDS):
        expected = ",".join(SMALL_KINDS)
        parser.error(f"--compile: found {', '.join(unknown)}, expected some of {expected}")
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot read such programs back
    with exit_codes():
        compile_missing(chosen, wanted(), RECORD)
        compile_missing(chosen, held_out(), HELD_OUT)
        compile_missing(chosen, quantized(), QUANTIZED)
    DOCUMENT.write_text(document(read_record()), encoding="utf-8")
    print(DOCUMENT)
    for name, rows in groups().items():
        print(judged(name, rows))


if __name__ == "__main__":
    main()
