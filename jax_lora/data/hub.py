"""The hub's copy of Natural Instructions: one row per answer, no categories.

Source of the format: the hub's data set Muennighoff/natural-instructions, whose folders `train/`
and `test/` hold one jsonl file per task.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jax_lora.data.instructions import (
    Checkout,
    Instance,
    Task,
    first_text,
    parse_object,
    unique_id,
)
from jax_lora.data.sources.tables import NI_COLUMNS, load
from jax_lora.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


def read_hub(
    source: str | Path = "Muennighoff/natural-instructions",
    *,
    categories: Mapping[str, str] | str | Path | None = None,
    cache: str | Path | None = None,
) -> Checkout:
    """Reads the hub's copy of the default split, one row an answer, through `datasets`.

    Its columns are task_name, id, definition, inputs, targets; rows of one task that share id and
    input are one instance with several outputs. It carries no categories.

    Arguments:
        source: a data set's name on the hub, or a folder in its format: parquet or jsonl files
            under `train/` and `test/`.
        categories: task name -> category, or a JSON file with such an object or with
            `{"tasks": [{"task": ..., "category": ...}, ...]}`. Others get "unknown".
        cache: where `datasets` keeps its Arrow files; None is its own default.
    Returns:
        The tasks; rows stay in the memory-mapped Arrow table.
    Raises:
        MissingFileError, DataError: one line with the source, what was found and is expected.
    """
    table = _load_splits(str(source), None if cache is None else str(cache))
    known = _read_categories(categories)
    train, test = (
        _hub_tasks(table[split], f"{source}:{split}", known) for split in ("train", "test")
    )
    both = sorted({task.name for task in train} & {task.name for task in test})
    if both:
        raise DataError(f"{source}: {both[0]!r} is in both train and test, expected in one")
    unknown = [task.name for task in (*train, *test) if task.name not in known]
    if unknown:
        logger.warning(
            "%s: no category for %d of %d tasks (first %s), they become 'unknown'; "
            "pass categories to sample in proportion",
            source,
            len(unknown),
            len(train) + len(test),
            unknown[0],
        )
    return Checkout(train=train, test=test)


def _load_splits(source: str, cache: str | None) -> Mapping[str, Dataset]:
    table = load(source, "hub", cache)
    needed = {*NI_COLUMNS}
    for split in ("train", "test"):
        if split not in table:
            raise DataError(f"{source}: found splits {sorted(table)}, expected train and test")
        columns = set(table[split].column_names)
        if needed - columns:
            raise DataError(
                f"{source}: {split} has columns {sorted(columns)}, expected {sorted(needed)} and id"
            )
    return table


def _read_categories(categories: Mapping[str, str] | str | Path | None) -> Mapping[str, str]:
    if categories is None or isinstance(categories, Mapping):
        return categories or {}
    record, _ = parse_object(Path(categories))
    rows = record.get("tasks", [{"task": k, "category": v} for k, v in record.items()])
    try:
        known: dict = {row["task"]: row["category"] for row in rows}
    except (KeyError, TypeError):
        known = {"": None}
    if not all(isinstance(category, str) for category in known.values()):
        raise DataError(
            f"{categories}: expected an object task -> category, or a list `tasks` of objects "
            "with `task` and `category`"
        )
    return known


def _read(table: Dataset, rows: int | slice, where: str) -> dict:
    """`table[rows]`; the bytes of a text are looked at here for the first time."""
    try:
        found = table[rows]
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8: {error}") from None
    assert isinstance(found, dict)
    return found


def _hub_tasks(table: Dataset, where: str, categories: Mapping[str, str]) -> tuple[Task, ...]:
    rows_of: dict[str, list[np.ndarray]] = defaultdict(list)
    step = 100_000  # names in slices, positions in arrays: 8 bytes per row, 5 million rows
    for start in range(0, len(table), step):
        names = np.asarray(_read(table, slice(start, start + step), where)["task_name"])
        for name in np.unique(names):
            rows_of[str(name)].append(start + np.flatnonzero(names == name))
    return tuple(
        _hub_task(table, np.concatenate(rows_of[name]), name, where, categories)
        for name in sorted(rows_of)
    )


def _hub_task(
    table: Dataset, rows: np.ndarray, name: str, where: str, categories: Mapping[str, str]
) -> Task:
    read = partial(_hub_instances, table, rows, name, where)
    instances = read()
    definition = _read(table, int(rows[0]), where)["definition"]
    first_text({"Definition": definition}, "Definition", Path(f"{where}:{name}"))
    return Task(
        name=name,
        category=categories.get(name, "unknown"),
        definition=definition,
        count=len(instances),
        distinct=len({instance.key for instance in instances}),
        content=_hash_instances(definition, instances),
        path=f"{where}:{name}",
        read=read,
    )


def _hub_instances(table: Dataset, rows: np.ndarray, name: str, where: str) -> tuple[Instance, ...]:
    """One task's rows as instances, in the order in which each first appears."""
    columns = _read(table.select(rows), slice(None), f"{where}:{name}")
    ids = columns.get("id") or [None] * len(rows)
    outputs: dict[tuple[str | None, str], list[str]] = {}
    for given, text, target in zip(ids, columns["inputs"], columns["targets"], strict=True):
        if not isinstance(text, str) or not isinstance(target, str):
            raise DataError(
                f"{where}:{name}: found inputs {text!r:.60} and targets {target!r:.60}, "
                "expected strings"
            )
        answers = outputs.setdefault((given, text), [])
        if target not in answers:
            answers.append(target)
    seen: set[str] = set()
    return tuple(
        Instance(unique_id(given, index, name, seen), text, tuple(answers))
        for index, ((given, text), answers) in enumerate(outputs.items())
    )


def _hash_instances(definition: str, instances: Iterable[Instance]) -> str:
    digest = hashlib.sha256(json.dumps(definition).encode())
    for instance in instances:
        digest.update(json.dumps([instance.id, instance.input, *instance.outputs]).encode())
    return digest.hexdigest()
