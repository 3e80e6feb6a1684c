"""Which of several learning rates a study goes on with: the validation loss decides, no test set.

The trials of a method, rank and variant, one per rate, are trained on `config.choose_on` in the
first round and validated. The rate with the lowest loss is then scored there, trained once more
with another seed, which says how far chance alone moves the loss, and carried to the other rounds
and sets. A rate that diverges, as one that is too high does, is not chosen. A trial that failed for
any other reason says nothing of its rate: nothing is chosen until it is tried again.

    <folder>/cells/<id>/tried.json     the validation of a trial or a repeat that is not scored
             choices/<trials>.json     the rate that was chosen
             rates.parquet             every trial and repeat with its loss (COLUMNS)

A choice is made once: what is tried again later does not change it, and of several workers that
choose at the same time the first one decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from jax_lora.errors import ConfigError, DataError
from jax_lora.files import fresh_file, read_json, write_json_once
from jax_lora.study import GRID, Frame
from jax_lora.study.config import EACH, StudyConfig
from jax_lora.study.grid import Cell, cells_of, frame, is_trial
from jax_lora.study.runner import DONE, LATER, NEVER, TRIED, cell_folder

COLUMNS = [*GRID, "repeat", "step", "validation_loss", "validation_tokens", "outcome", "chosen"]
VALIDATED, DIVERGED, FAILED = "validated", "diverged", "failed"  # how a trial came out


class Trial(NamedTuple):
    """How a trial or a repeat came out.

    Attributes:
      step: of the validation.
      validation_loss: NaN where there is none.
      validation_tokens: of it.
      outcome: VALIDATED, DIVERGED, or FAILED for any other reason.
    """

    step: int
    validation_loss: float
    validation_tokens: int
    outcome: str


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

    def forget_failures(self, workdir: Path, cells: Iterable[Cell]) -> None:
        """Forget which trials among `cells` failed where no choice is made: they are to be tried
        once more, and none is to be chosen before all are over."""
        there = {cell.id for cell in cells}
        for trials in self._trials.values():
            for trial in trials if self._rate(trials[0]) is None else ():
                if trial.id in there:
                    (cell_folder(workdir, trial) / "failed.json").unlink(missing_ok=True)

    def unsettled(self, workdir: Path, cells: Iterable[Cell]) -> list[Cell]:
        """The cells without the trials and repeats that diverged and whose choice is made: to try
        them again would change nothing, so they are no failures of the study."""
        found = []
        for cell in cells:
            is_chosen = is_trial(self._config, cell) and self._rate(cell) is not None
            ended = _validation(workdir, cell) if is_chosen else None
            if ended is None or ended.outcome != DIVERGED:
                found.append(cell)
        return found

    def blocked(self, workdir: Path) -> list[str]:
        """A line per choice that no trial can decide any more: why, and what to do."""
        lines = []
        for trials in self._trials.values():
            if self._rate(trials[0]) is not None:
                continue
            found = {trial.id: _validation(workdir, trial) for trial in trials}
            failed = [name for name, one in found.items() if one and one.outcome == FAILED]
            start = f"{without_rate(trials[0])}: no learning rate is chosen, since"
            if failed:
                lines.append(f"{start} {', '.join(failed)} failed; --retry-failed tries it again")
            elif all(found.values()):
                lines.append(f"{start} all that were tried diverged")
        return lines

    def write_table(self, workdir: Path) -> None:
        """Write rates.parquet, where the study has something to choose."""
        written = None
        # Another worker may end a trial, and write this file, while we do.
        while (rows := self._table(workdir)) and rows != written:
            table = pd.concat(frame([cell]).assign(**values)[COLUMNS] for cell, values in rows)
            with fresh_file(workdir / "rates.parquet") as fresh:
                table.to_parquet(fresh, index=False)
            written = rows

    def _table(self, workdir: Path) -> list[tuple[Cell, dict[str, object]]]:
        """The trials and repeats that are over, with the columns that no grid has."""
        rows = []
        for cell in self._cells:
            if is_trial(self._config, cell) and (found := _validation(workdir, cell)):
                made = not cell.repeat and self._rate(cell) == cell.learning_rate
                rows.append((cell, {"repeat": cell.repeat, "chosen": made, **found._asdict()}))
        return rows


def without_rate(cell: Cell) -> str:
    """The name of a cell without its learning rate."""
    return cell.id.replace(f"-lr{cell.learning_rate:g}", "")


def _choose(workdir: Path, trials: Sequence[Cell]) -> float | None:
    """The rate that was chosen, or that is chosen and written down now; None: not known yet."""
    rate, losses = _decision(workdir, trials)
    if losses is not None:
        write_json_once(
            _file(workdir, trials), {"learning_rate": rate, "validation_losses": losses}
        )
        return _decision(workdir, trials)[0]  # another worker may have been first
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
        found = _validation(workdir, trial)
        if found is None or found.outcome == FAILED:
            return None, None
        losses[trial.id] = found.validation_loss if found.outcome == VALIDATED else None
    finite = [(x, t.learning_rate) for t in trials if (x := losses[t.id]) is not None]
    return (min(finite)[1], losses) if finite else (None, None)


def _validation(workdir: Path, cell: Cell) -> Trial | None:
    """How a trial or a repeat came out; None: it is not over."""
    folder = cell_folder(workdir, cell)
    for name in (DONE, TRIED):
        if (path := folder / f"{name}.json").is_file():
            saved = read_json(path, dict).get("validation")
            if not isinstance(saved, dict):
                raise DataError(f"{path}: found no validation, expected that of a trial")
            loss = saved["validation_loss"]
            loss = math.nan if loss is None or not math.isfinite(loss) else float(loss)
            outcome = DIVERGED if math.isnan(loss) else VALIDATED
            return Trial(saved["step"], loss, saved["validation_tokens"], outcome)
    try:
        diverged = read_json(folder / "failed.json", dict).get("diverged", False)
    except FileNotFoundError:
        return None
    except DataError:  # a damaged file, which says that it failed and not why
        diverged = False
    return Trial(0, math.nan, 0, DIVERGED if diverged else FAILED)
