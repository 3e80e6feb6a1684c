"""Which of several learning rates a study goes on with: the validation loss decides, no test set.

The trials of a method, rank and variant, one per rate, are trained on `config.choose_on` in the
first round and validated. The rate with the lowest loss is then scored there, trained once more
with another seed, which says how far chance alone moves the loss, and carried to the other rounds
and sets. A rate that fails, as one that is too high does, is not chosen.

    <folder>/cells/<id>/tried.json     the validation of a trial or a repeat that is not scored
             choices/<trials>.json     the rate that was chosen
             rates.parquet             every trial and repeat with its loss (COLUMNS)

A choice is made once: what is tried again later does not change it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path

import pandas as pd

from jax_lora.errors import ConfigError, DataError
from jax_lora.files import fresh_file, read_json, write_json
from jax_lora.study import GRID, Frame
from jax_lora.study.config import EACH, StudyConfig
from jax_lora.study.grid import Cell, cells_of, frame, is_trial
from jax_lora.study.runner import DONE, LATER, NEVER, TRIED, cell_folder

COLUMNS = [*GRID, "repeat", "step", "validation_loss", "validation_tokens", "chosen"]


class Choices:
    """What is to be done with the cells of a study, as far as it is known.

    Args:
      config: of the study.
      chosen: the trials of a group → the learning rate that was chosen, None as long as none is.
    """

    def __init__(self, config: StudyConfig, chosen: Callable[[Sequence[Cell]], float | None]):
        self._config, self._chosen = config, chosen
        self._cells = cells_of(config)
        self._trials: dict[object, list[Cell]] = {}
        for cell in self._cells:
            if is_trial(config, cell) and not cell.repeat:
                self._trials.setdefault(self._group(cell), []).append(cell)
        self._known: dict[object, float] = {}

    @classmethod
    def in_folder(cls, config: StudyConfig, workdir: Path) -> Choices:
        """Of a study's folder, where a choice is made as soon as its trials are over."""
        return cls(config, partial(_choose, workdir))

    @classmethod
    def seen_in_folder(cls, config: StudyConfig, workdir: Path) -> Choices:
        """The same for whoever only looks at the folder: nothing is written."""
        return cls(config, lambda trials: _decision(workdir, trials)[0])

    @classmethod
    def in_table(cls, config: StudyConfig, rates: Frame) -> Choices:
        """Of what a rates.parquet says."""
        made = rates[rates["chosen"]].set_index("cell")["learning_rate"].to_dict()
        return cls(config, lambda trials: next((made[c.id] for c in trials if c.id in made), None))

    def _group(self, cell: Cell) -> object:
        """What the cells share that have one choice: all but the rate, the round and the seed, and
        the set where one set chooses for all."""
        name = cell.set if self._config.choose_on == EACH else self._config.choose_on
        return astuple(replace(cell, id="", learning_rate=0.0, set=name, round=0, repeat=0))

    def _rate(self, cell: Cell) -> float | None:
        group = self._group(cell)
        if group not in self._trials:
            return cell.learning_rate  # the only one
        if group not in self._known:
            rate = self._chosen(self._trials[group])
            if rate is None:
                return None
            self._known[group] = rate
        return self._known[group]

    def stage(self, cell: Cell) -> str:
        """How a cell ends: DONE, scored; TRIED, validated; LATER, which is not known yet; or NEVER,
        since another rate was chosen."""
        rate, trial = self._rate(cell), is_trial(self._config, cell) and not cell.repeat
        if rate == cell.learning_rate:
            return TRIED if cell.repeat else DONE
        return TRIED if trial else LATER if rate is None else NEVER

    def planned(self, cells: Iterable[Cell]) -> list[Cell]:
        """The cells that are to be run; one stands for all whose rate is not known, and has none in
        its name."""
        found: dict[str, Cell] = {}
        for cell in cells:
            stage = self.stage(cell)
            shown = replace(cell, id=without_rate(cell)) if stage == LATER else cell
            if stage != NEVER:
                found.setdefault(shown.id, shown)
        return list(found.values())

    def scored(self, cells: Iterable[Cell] | None = None) -> list[Cell]:
        """The cells that are scored, all or some, as `planned` has them: what a report expects."""
        found: dict[str, Cell] = {}
        for cell in self._cells if cells is None else cells:
            rate = self._rate(cell)
            shown = replace(cell, id=without_rate(cell)) if rate is None else cell
            if rate in (None, cell.learning_rate) and not cell.repeat:
                found.setdefault(shown.id, shown)
        return list(found.values())

    def check_only(self, cells: Sequence[Cell]) -> None:
        """Make sure that a choice which some cells wait for is made, or made among them.

        Raises:
          ConfigError: one that is not.
        """
        there = {cell.id for cell in cells}
        for cell in cells:
            trials = self._trials.get(self._group(cell), [])
            missing = [trial.id for trial in trials if trial.id not in there]
            if missing and self._rate(cell) is None:
                raise ConfigError(
                    f"--only: {without_rate(cell)} waits for a learning rate, expected its trials "
                    f"among the cells, too: {', '.join(missing)}"
                )

    def forget_failures(self, workdir: Path) -> None:
        """Forget which trials failed where no choice is made: they are to be tried once more, and
        none is to be chosen before all are over."""
        for trials in self._trials.values():
            for trial in trials if self._rate(trials[0]) is None else ():
                (cell_folder(workdir, trial) / "failed.json").unlink(missing_ok=True)

    def write_table(self, workdir: Path) -> None:
        """Write rates.parquet, where the study has something to choose."""
        rows = []
        for cell in self._cells:
            if is_trial(self._config, cell) and (found := _validation(workdir, cell)):
                made = not cell.repeat and self._rate(cell) == cell.learning_rate
                values = {"repeat": cell.repeat, "chosen": made, **found}
                rows.append(frame([cell]).assign(**values)[COLUMNS])
        if rows:
            with fresh_file(workdir / "rates.parquet") as fresh:
                pd.concat(rows, ignore_index=True).to_parquet(fresh, index=False)


def without_rate(cell: Cell) -> str:
    """The name of a cell without its learning rate."""
    return cell.id.replace(f"-lr{cell.learning_rate:g}", "")


def _choose(workdir: Path, trials: Sequence[Cell]) -> float | None:
    """The rate that was chosen, or that is chosen and written down now; None: not known yet."""
    rate, losses = _decision(workdir, trials)
    if losses is not None:
        write_json(_file(workdir, trials), {"learning_rate": rate, "validation_losses": losses})
    return rate


def _file(workdir: Path, trials: Sequence[Cell]) -> Path:
    return workdir / "choices" / f"{without_rate(trials[0])}.json"


def _decision(
    workdir: Path, trials: Sequence[Cell]
) -> tuple[float | None, dict[str, float | None] | None]:
    """The rate, and the losses of all trials where it is not written down yet."""
    path = _file(workdir, trials)
    if path.is_file():
        return float(read_json(path, dict)["learning_rate"]), None
    losses: dict[str, float | None] = {}
    for trial in trials:
        if (found := _validation(workdir, trial)) is None:
            return None, None
        loss = float(found["validation_loss"])
        losses[trial.id] = loss if math.isfinite(loss) else None
    finite = [(x, t.learning_rate) for t in trials if (x := losses[t.id]) is not None]
    return (min(finite)[1], losses) if finite else (None, None)


def _validation(workdir: Path, cell: Cell) -> dict[str, float] | None:
    """The validation of a trial or a repeat, a loss of NaN where it failed; None: not yet."""
    folder = cell_folder(workdir, cell)
    for name in (DONE, TRIED):
        if (path := folder / f"{name}.json").is_file():
            saved = read_json(path, dict).get("validation")
            if not isinstance(saved, dict):
                raise DataError(f"{path}: found no validation, expected that of a trial")
            return {key: math.nan if value is None else value for key, value in saved.items()}
    if (folder / "failed.json").is_file():
        return {"step": 0, "validation_loss": math.nan, "validation_tokens": 0}
    return None
