"""A study of rank × task set × round: its results as data, tables, figures and a report.

The contract between who runs a study and who reads it: `results` has one row per cell × test
set × task (COLUMNS), `expected` one row per cell of the grid (GRID). A cell is one trained model; a
configuration is what its rounds share on one set: method, variant, rank and learning rate.
"""

from __future__ import annotations

import errno
import json
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from jax_lora.errors import DataError, MissingFileError, first_line

if TYPE_CHECKING:
    Frame = Any  # what pyright infers from pandas' source are unions that refuse every method
else:
    Frame = pd.DataFrame

COLUMNS = {
    "cell": "text", "model": "text", "method": "text", "variant": "text", "rank": "rank",
    "set": "text", "set_tasks": "count", "train_examples": "count", "round": "number",
    "learning_rate": "number", "test": "text", "task": "text", "category": "text",
    "examples": "count", "exact_match": "percent", "rougeL": "percent", "closed_label": "flag",
    "majority_baseline": "percent if closed", "out_of_options": "percent if closed",
    "top_answer_share": "percent", "answer_entropy": "number",
    "exact_match_given_valid": "percent or null", "empty": "percent", "copies": "percent",
    "unfinished": "percent", "trainable": "count", "frozen": "number", "train_tokens": "count",
    "train_operations": "number", "base_operations": "number",
}  # fmt: skip
MEASURES = {  # see docs/study.md; null where they were not measured, in all rows of older studies
    "reference_loss": "number or null", "adapter_rank": "number or null", "alpha": "number or null",
    "text_loss": "number or null", "forgetting": "real or null",
    "effective_rank": "number or null", "intruder_dimensions": "number or null",
    "memorized_bits": "real or null",
}  # fmt: skip
GRID = ["cell", "method", "rank", "variant", "set", "round", "learning_rate"]
TESTS = ("seen", "unseen")
METRICS = {"exact_match": "EM", "rougeL": "R-L"}
CHOICES = {"method": ("lora", "full"), "test": TESTS}
MEASURES_OF_A_CELL = [name for name in MEASURES if name != "reference_loss"]
OF_A_CELL = [
    "model", *GRID[1:], "set_tasks", "train_examples", "trainable", "frozen", "train_tokens",
    "train_operations", "base_operations",
]  # fmt: skip


def read(path: str | Path) -> Frame:
    """Read a study's results.parquet.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a complete parquet file, or a column is missing.
    """
    if not Path(path).is_file():
        text = "no such file, expected a study's results.parquet"
        raise MissingFileError(errno.ENOENT, text, str(path))
    try:
        results = pd.read_parquet(path)
    except (ValueError, OSError) as error:  # what pyarrow raises is one of these
        reason = first_line(error).rstrip(".")
        raise DataError(f"{path}: {reason}; expected a whole parquet file") from None
    _require_columns(results, list(COLUMNS), str(path))
    return with_measures(results)


def with_measures(results: Frame) -> Frame:
    """The results with a column for each of `MEASURES`, empty where there was none."""
    absent = [name for name in MEASURES if name not in results]
    return results.assign(**dict.fromkeys(absent, np.nan))


@cache
def paper() -> dict:
    """The paper's numbers: paper.json of this package."""
    return json.loads(resources.files("jax_lora.study").joinpath("paper.json").read_text("utf-8"))


def is_papers_model(name: str) -> bool:
    """Whether a model's name is one of LLaMA-7B, the first generation's."""
    return Path(name).name.lower() in ("llama-7b", "llama-7b-hf")


def check(results: Frame, expected: Frame) -> None:
    """Check a study's rows one by one, against each other and against the grid.

    Args:
      results: COLUMNS, perhaps MEASURES.
      expected: GRID, one row per cell, finished or not.

    Raises:
      ValueError: one line with what is missing, doubled, out of range or contradictory.
    """
    _require_columns(results, list(COLUMNS), "results")
    _require_columns(expected, GRID, "expected cells")
    if results.empty or expected.empty:
        raise DataError(
            f"found {len(results)} results of {len(expected)} cells, expected some of both"
        )
    results = with_measures(results)
    _check_values(results, COLUMNS | MEASURES)
    _check_values(expected, {name: COLUMNS[name] for name in GRID})
    _check_cells(results, expected)
    _check_tasks(results)


@dataclass(frozen=True)
class Study:
    """Checked results and grid, each with a column `config`: a configuration's name.

    `rows` keep columns beyond COLUMNS, such as further metrics of `config.run.eval.metrics`.
    `grid` also says in `main` whether a cell has its configuration's main learning rate: the only
    one of its set and round, as a study has it that chose one (see `choice`); else the one that
    most cells of the grid have, of several the paper's, else the lowest.
    """

    rows: Frame
    grid: Frame

    @classmethod
    def of(cls, results: Frame, expected: Frame) -> Study:
        """Check a study (see `check`, which raises) and name its configurations."""
        check(results, expected)
        rows, grid = with_measures(results), expected[GRID].copy()
        for frame in (rows, grid):
            frame["rank"] = frame["rank"].astype("Int64")
        grid["main"] = _main_rates(grid)
        names = [
            ("full" if row["method"] == "full" else f"rank {row['rank']}")
            + (f", {row['variant']}" if row["variant"] else "")
            + ("" if row["main"] else f", rate {row['learning_rate']}")
            for row in grid.to_dict("records")
        ]
        grid["config"] = names
        rows["config"] = rows["cell"].map(dict(zip(grid["cell"], names, strict=True)))
        percents = [name for name, kind in COLUMNS.items() if kind.startswith("percent")]
        floats = dict.fromkeys((*percents, *MEASURES), float)
        return cls(rows.astype({**floats, "closed_label": bool}), grid)

    @property
    def model(self) -> str:
        """The base model's name."""
        return self.rows["model"].iloc[0]

    @property
    def sets(self) -> list[str]:
        """The grid's sets, the small first, T*100 and its like behind all others."""
        return sorted(self.grid["set"].unique(), key=set_order)

    def configs(self, method: str | None = None, variant: str | None = None) -> list[str]:
        """The configurations at their main rates: the paper's recipe first, ranks rising."""
        cells = self.grid[self.grid["main"]]
        for name, value in (("method", method), ("variant", variant)):
            cells = cells if value is None else cells[cells[name] == value]
        keys = cells.sort_values(["variant", "rank"], na_position="last")
        return list(dict.fromkeys(keys["config"]))

    def scores(self, set_name: str, test: str, metric: str, closed: bool = False) -> Frame:
        """One metric in percent: one row per round × task, one column per configuration.

        Args:
          set_name: what was trained on.
          test: "seen" or "unseen".
          metric: a column of the results.
          closed: closed-label tasks only.
        """
        rows = self.rows[(self.rows["set"] == set_name) & (self.rows["test"] == test)]
        rows = rows[rows["closed_label"]] if closed else rows
        return rows.pivot(index=["round", "task", "examples"], columns="config", values=metric)


def set_order(name: str) -> tuple[bool, float, str]:
    """A key that sorts sets: T100, T250, Tall, then T*100 and its like."""
    number = re.search(r"\d+", name)
    return "*" in name, int(number.group()) if number else np.inf, name


def _require_columns(frame: Frame, names: list[str], what: str) -> None:
    if absent := [name for name in names if name not in frame.columns]:
        raise DataError(f"{what}: no column {', '.join(absent)}; expected {', '.join(names)}")


def _check_values(rows: Frame, columns: dict[str, str]) -> None:
    for name, kind in columns.items():
        allowed, expects = _allowed(rows, name, kind)
        if not allowed.all():
            bad = rows[~allowed].iloc[0]
            where = ", ".join(str(bad[key]) for key in ("cell", "test", "task") if key in columns)
            value = bad[name].item() if isinstance(bad[name], np.generic) else bad[name]
            raise DataError(f"{where}: {name} is {value!r}, expected {expects}")
    if "model" in columns and (models := sorted(rows["model"].unique()))[1:]:
        found = ", ".join(models)
        raise DataError(f"results: found models {found}; expected one, so take them one by one")


def _allowed(rows: Frame, name: str, kind: str) -> tuple[np.ndarray, str]:
    """Which rows have a good value in a column, and what a good one is."""
    column, null = rows[name], rows[name].isna().to_numpy()
    if name in CHOICES:
        return column.isin(CHOICES[name]).to_numpy(), " or ".join(CHOICES[name])
    if kind == "text":
        return ~null, "a text"
    numbers = np.asarray(pd.to_numeric(column, errors="coerce"), float)
    if kind == "rank":
        full = (rows["method"] == "full").to_numpy()
        valid = (numbers >= 1) & (numbers % 1 == 0)
        return np.where(full, null, valid), "a whole number, or null where the method is full"
    if kind == "flag":
        return np.isin(numbers, [0.0, 1.0]), "true or false"
    least = 1 if kind == "count" else -np.inf if kind.startswith("real") else 0
    most = 100 + 1e-6 if kind.startswith("percent") else np.inf
    good = (numbers >= least) & (numbers <= most) & np.isfinite(numbers)
    if kind == "percent if closed":
        closed = (rows["closed_label"] == 1).to_numpy()
        return np.where(closed, good, null), "0 to 100, or null where the task is not closed-label"
    good |= null & kind.endswith("or null")
    bounds = (f", at least {least}" if least > -np.inf else "") + (
        ", at most 100" if most < np.inf else ""
    )
    return good, kind + bounds


def _check_cells(rows: Frame, grid: Frame) -> None:
    """A cell is one thing, in the results as in the grid, and no two cells are the same thing."""
    of_a_cell = [*OF_A_CELL, *MEASURES_OF_A_CELL]
    distinct = rows[["cell", *of_a_cell]].drop_duplicates()
    if (doubled := distinct["cell"][distinct["cell"].duplicated()]).size:
        cell = doubled.iloc[0]
        rows_of_cell = distinct[distinct["cell"] == cell]
        name = next(n for n in of_a_cell if rows_of_cell[n].nunique(dropna=False) > 1)
        found = " and ".join(map(str, rows_of_cell[name].iloc[:2]))
        raise DataError(f"results, cell {cell}: {name} is {found}, expected one value")
    for what, keys in (("cell", ["cell"]), ("configuration, set and round", GRID[1:])):
        if grid.duplicated(keys).any():
            names = ", ".join(grid["cell"][grid.duplicated(keys, keep=False)].iloc[:2])
            raise DataError(f"expected cells {names}: the same {what}, expected different ones")
    planned = grid.set_index("cell")[GRID[1:]].to_dict("index")
    for row in distinct.to_dict("records"):
        cell = row["cell"]
        if cell not in planned:
            raise DataError(f"results: cell {cell} is not in the grid, expected cells of it only")
        for name, there in planned[cell].items():
            here = row[name]
            if pd.isna(here) != pd.isna(there) or (pd.notna(here) and here != there):
                raise DataError(f"results, cell {cell}: {name} is {here}, expected {there}")


def _check_tasks(rows: Frame) -> None:
    """The cells of a round were tested on the same examples, so that they can be compared."""
    if (double := rows.duplicated(["cell", "test", "task"])).any():
        cell, test, task = rows[double].iloc[0][["cell", "test", "task"]]
        raise DataError(f"results, cell {cell}, {test}: {task} is there twice, expected once")
    groups = rows.groupby(["round", "test", "task"])
    for name in ("examples", "closed_label", "category", "majority_baseline"):
        differs = groups[name].nunique(dropna=False) > 1
        if differs.any():
            round_, test, task = differs.index[differs][0]
            raise DataError(
                f"results, round {round_}, {test}, {task}: {name} differs between cells, "
                "expected the same test examples for all cells of a round"
            )
    expected = rows.groupby(["round", "test"])["task"].nunique()
    counts = rows.groupby(["round", "test", "cell"]).size()
    for (round_, test, cell), found in counts.items():
        if found != expected[round_, test]:
            raise DataError(
                f"results, cell {cell}, {test}: {found} tasks where round {round_} has "
                f"{expected[round_, test]}; expected the same ones in all its cells"
            )


def _main_rates(grid: Frame) -> Frame:
    keys, rates = ["method", "variant", "rank"], paper()["learning_rate"]
    counts = grid.groupby([*keys, "learning_rate"], dropna=False).size().reset_index(name="cells")
    counts["paper"] = counts["learning_rate"] == counts["method"].map(rates)
    best = counts.sort_values(["cells", "paper", "learning_rate"], ascending=[False, False, True])
    best = best.drop_duplicates(keys)[[*keys, "learning_rate"]]
    rate = grid[keys].merge(best, on=keys, how="left")["learning_rate"]
    is_only = ~grid.duplicated([*keys, "set", "round"], keep=False)
    return is_only | (rate.set_axis(grid.index) == grid["learning_rate"])
