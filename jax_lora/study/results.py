"""What the cells of a study came to: their rows, and the files that gather them."""

from __future__ import annotations

import errno
import filecmp
import json
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from jax_lora.evaluation import behaviour, evaluate
from jax_lora.evaluation.metrics import normalize
from jax_lora.files import fresh_file, read_json, read_jsonl
from jax_lora.study import COLUMNS, MEASURES, TESTS, set_order, with_measures
from jax_lora.study.grid import Cell
from jax_lora.study.runner import cell_folder

UPDATE = "update.parquet"  # of a cell, see `update.measure`
_TYPES = {"text": "str", "rank": "Int64", "count": "int64", "flag": "bool"}  # others are floats


def rows(
    cell: Cell,
    folder: Path,
    facts: Mapping[str, object],
    metrics: Sequence[str],
    reference_losses: Mapping[tuple[str, str], float],
) -> list[dict[str, object]]:
    """The rows of a scored cell, from the files of its evaluation.

    Args:
      cell: which one.
      folder: its own.
      facts: the other columns that are the same in all of its rows.
      metrics: that were scored, `config.run.eval.metrics`.
      reference_losses: see `measures.Measured`.

    Returns:
      One row per test set × task, with the keys of `COLUMNS` and `MEASURES`, then the metrics that
      are not among these, and values that JSON can hold.
    """
    found = []
    columns = dict.fromkeys((*COLUMNS, *MEASURES, *metrics))
    facts = dict.fromkeys(MEASURES) | {**facts}
    for test in TESTS:
        there = folder / "eval" / test
        answers = {(p["task"], p["id"]): p for p in read_jsonl(there / "predictions.jsonl")}
        labels = evaluate.read_labels(there)
        by_task: dict[str, list[dict]] = {}
        for example in read_jsonl(there / "examples.jsonl"):
            answer = answers[example["task"], example["id"]]
            by_task.setdefault(example["task"], []).append(example | answer)
        for task, scores in read_json(there / "scores.json")["tasks"].items():
            row = asdict(cell) | {**facts} | {"cell": cell.id, "test": test, "task": task} | scores
            row |= behaviour.describe(by_task[task], labels.get(task))
            row["reference_loss"] = reference_losses.get((test, task))
            found.append({name: row[name] for name in columns})
    return found


def share_examples(cell: Cell, folder: Path, shared: Path) -> None:
    """Keep the prompts once per round: the cells' examples.jsonl become one file of many names.

    Args:
      cell: which one.
      folder: its own.
      shared: folder of the files of all rounds, created if it does not exist.
    """
    shared.mkdir(parents=True, exist_ok=True)
    for test in TESTS:
        path, one = folder / "eval" / test / "examples.jsonl", shared / f"{test}-{cell.round}.jsonl"
        try:
            with suppress(FileExistsError):
                os.link(path, one)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.ENOTSUP):
                raise
            return  # no links there: every cell keeps its copy
        if not path.samefile(one) and filecmp.cmp(path, one, shallow=False):
            with fresh_file(path) as fresh:
                os.link(one, fresh)


def gather(cells: Sequence[Cell], folder: Path) -> None:
    """Write results.parquet, timings.parquet and, where there are any, updates.parquet from what
    the folders of `cells` hold, in their order.

    Times are in the second file alone: the first one is a function of the study's config.
    """

    def done() -> dict[str, Path]:
        paths = {cell.id: cell_folder(folder, cell) / "done.json" for cell in cells}
        return {name: path for name, path in paths.items() if path.is_file()}

    found: dict[str, Path] = {}
    # Another process may finish a cell, and write these files, while we do.
    while found.keys() != (now := done()).keys():
        found = now
        saved = {name: read_json(path) for name, path in found.items()}
        rows = [row for one in saved.values() for row in one["rows"]]
        results = with_measures(pd.DataFrame(rows))
        if rows:  # the base, which a digest knows, may have another file name where we went on
            results["model"] = rows[0]["model"]
        kinds = COLUMNS | MEASURES | {"round": "count"}
        types = {name: _TYPES.get(kind, "float64") for name, kind in kinds.items()}
        timings = pd.DataFrame([{"cell": name} | one["timings"] for name, one in saved.items()])
        for name, table in (("results", results.astype(types)), ("timings", timings)):
            with fresh_file(folder / f"{name}.parquet") as fresh:
                table.to_parquet(fresh, index=False)
        updates = {name: path.with_name(UPDATE) for name, path in found.items()}
        tables = [
            pd.read_parquet(path).assign(cell=name)
            for name, path in updates.items()
            if path.is_file()
        ]
        if tables:
            with fresh_file(folder / "updates.parquet") as fresh:
                pd.concat(tables).to_parquet(fresh, index=False)


def write_cases(cells: Sequence[Cell], folder: Path) -> None:
    """Write cases.jsonl: of every test task the first example that models answer differently.

    The models are those of the largest set and the first round, one per method, rank and variant;
    a task that all of them answer alike has no case. Neither has a test set whose prompts are not
    here, as where the cells' small files came from another machine: the next cell brings them.

    Args:
      cells: of the study.
      folder: of the study.
    """
    found = [cell for cell in cells if (cell_folder(folder, cell) / "done.json").is_file()]
    if not found:
        return
    largest = max((cell.set for cell in found), key=lambda name: ("*" not in name, set_order(name)))
    first = min(cell.round for cell in found if cell.set == largest)
    models: dict[str, Path] = {}
    for cell in found:
        if (cell.set, cell.round) == (largest, first):
            name = "full" if cell.rank is None else f"rank {cell.rank}"
            models.setdefault(
                " ".join(filter(None, (name, cell.variant))), cell_folder(folder, cell)
            )

    lines = []
    for test in TESTS:
        files = {
            name: model / "eval" / test / "predictions.jsonl" for name, model in models.items()
        }
        answers = {
            name: {
                (p.get("task"), p.get("id")): p.get("prediction", "")
                for p in read_jsonl(path, pass_over_damage=True)
            }
            for name, path in files.items()
        }
        shown: set[str] = set()
        prompts = [path.with_name("examples.jsonl") for path in files.values()]
        prompts.append(folder / "examples" / f"{test}-{first}.jsonl")  # of any cell of the round
        there = [path for path in prompts if path.is_file()]
        for example in read_jsonl(there[0], pass_over_damage=True) if there else ():
            key = example.get("task"), example.get("id")
            if not all(key in by_id for by_id in answers.values()):
                continue  # a line of one of them is damaged
            by_model = {name: by_id[key] for name, by_id in answers.items()}
            if example["task"] in shown or len(set(map(normalize, by_model.values()))) < 2:
                continue
            shown.add(example["task"])
            case = {name: example[name] for name in ("task", "input", "references")}
            case["task"] += f", {test}: trained on {largest}, round {first}"
            lines.append(json.dumps(case | {"answers": by_model}, ensure_ascii=False) + "\n")
    with fresh_file(folder / "cases.jsonl") as fresh:
        fresh.write_text("".join(lines), encoding="utf-8")


class Took(NamedTuple):
    """Seconds of a cell: training grows with its operations, scoring and measuring do not."""

    training: float
    scoring: float

    @classmethod
    def of(cls, timings: Mapping[str, float]) -> Took:
        """Of a row of timings.parquet or the timings of a done.json."""
        scoring = timings.get("scoring", 0.0) + timings.get("measuring", 0.0)
        return cls(timings.get("training", 0.0), scoring)


def seconds(
    wanted: Mapping[str, float], scored: Collection[str], took: Mapping[str, Took]
) -> dict[str, float]:
    """How long cells take, by what others took.

    Args:
      wanted: their operations, by id, with those of the finished cells among them.
      scored: the ids of those that are scored, too.
      took: by finished cell. The operations per second of training are those of all together, and
        what scoring takes is its mean.

    Returns:
      Seconds of each; empty where nothing is known.
    """
    if not took:
        return {}
    speed = sum(one.training for one in took.values()) / sum(wanted[name] for name in took)
    scoring = sum(one.scoring for one in took.values()) / len(took)
    return {n: speed * x + (scoring if n in scored else 0.0) for n, x in wanted.items()}


def finished(folder: Path, operations: Mapping[str, float]) -> dict[str, Took]:
    """What the finished ones among the cells of `operations` took, by their ids."""
    path = folder / "timings.parquet"
    rows = pd.read_parquet(path).fillna(0.0).to_dict("records") if path.is_file() else []
    took = {row["cell"]: Took.of(row) for row in rows}
    return {name: took[name] for name in operations if name in took}
