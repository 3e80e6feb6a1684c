"""Pulling the cells of a study from a folder, by any number of processes.

    <folder>/cells/<id>/             a run's folder
             cells/<id>/done.json    rows of results and timings of a finished cell
             cells/<id>/tried.json   of one that is trained and validated, and not scored
             cells/<id>/failed.json  why a cell could not be finished, and whether it diverged
             locks/                  who works on what (see `locks`)

A cell is over with the file that its stage names or with failed.json; they appear complete or not
at all. What is to be done with a cell may depend on others (see `choice`).
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from jax_lora import locks
from jax_lora.errors import ConfigError, RunFailed, Stopped, is_lost_disk, one_line
from jax_lora.files import write_json
from jax_lora.study.grid import Cell

logger = logging.getLogger(__name__)

Run = Callable[[Cell, Path], dict[str, object]]
OnChange = Callable[[Cell, str], None]
Stage = Callable[[Cell], str]
DONE, TRIED = "done", "tried"  # how a cell ends, and the file that says so
LATER, NEVER = "later", "never"  # which of the two is not known yet; it is not to be run
STATES = ("done", "failed", "running", "waiting")


def cell_folder(folder: Path, cell: Cell) -> Path:
    """A cell's own folder.

    Raises:
      ConfigError: its name, in which its set's is, is a path to elsewhere.
    """
    if "/" in cell.id or "\0" in cell.id:
        raise ConfigError(f"config.sets: found {cell.set!r}, expected names of sets, and no paths")
    return folder / "cells" / cell.id


def always(_: Cell) -> str:
    """The stage of the cells of a study that has nothing to choose."""
    return DONE


def states(folder: Path, cells: Sequence[Cell], stage: Stage = always) -> dict[str, str]:
    """By cell one of STATES; what is only to be tried is done with that."""
    found = {}
    for cell in cells:
        ends = {stage(cell): "done", "failed": "failed"}
        kinds = [
            kind
            for name, kind in ends.items()
            if (cell_folder(folder, cell) / f"{name}.json").is_file()
        ]
        if not kinds:
            kinds = ["running" if locks.is_held(folder / "locks", cell.id) else "waiting"]
        found[cell.id] = kinds[0]
    return found


def run_cells(
    cells: Sequence[Cell],
    folder: Path,
    run: Run,
    *,
    stage: Stage = always,
    retry_failed: bool = False,
    on_change: OnChange = lambda cell, what: None,
    beat: float = locks.BEAT,
    silence: float = locks.SILENCE,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Run cells one after the other, the first that is free each time, until none is left.

    What `run` raises is written to the cell's failed.json, and the next cell is taken; a full or
    lost disk is raised, and the cell stays as it is. Before
    this returns, every process that still holds a cell has given a sign of life: what a dead one
    left is taken over. As long as other processes are at cells that decide what is to be done with
    the rest, it waits for them.

    Args:
      cells: in the order of preference.
      folder: of the study.
      run: (cell, its folder) → what goes into the file that ends the cell.
      stage: how a cell ends; asked anew each time.
      retry_failed: take cells that failed, once.
      on_change: called with a cell and "begins", its stage or "failed: …".
      beat, silence: see `locks.take`.
      sleep: waits so many seconds.
    """
    tried: set[str] = set()
    signs: dict[str, float] = {}
    _drop_damaged(cells, folder)

    def is_open(cell: Cell) -> bool:
        end = stage(cell)
        again = retry_failed and cell.id not in tried
        ends = (end,) if again else (end, "failed")
        is_over = any((cell_folder(folder, cell) / f"{name}.json").is_file() for name in ends)
        return end in (DONE, TRIED) and not is_over

    def attempt(cell: Cell) -> bool:
        lock = locks.take(folder / "locks", cell.id, beat=beat, silence=silence)
        if lock is None:
            return False
        with lock:
            if is_open(cell):  # nobody finished it since we looked
                tried.add(cell.id)
                _attempt(cell, cell_folder(folder, cell), run, on_change, stage(cell))
        return True

    def lives(cell: Cell) -> bool:
        sign = locks.last_heartbeat(folder / "locks", cell.id)
        return sign == math.inf or sign > signs.setdefault(cell.id, sign)

    while left := list(filter(is_open, cells)):
        if not any(map(attempt, left)):
            if all(map(lives, left)) and LATER not in map(stage, cells):
                return
            sleep(beat / 3)


def _attempt(cell: Cell, folder: Path, run: Run, on_change: OnChange, end: str) -> None:
    on_change(cell, "begins")
    try:
        found = run(cell, folder)
    except Exception as error:
        # No fault of the cell: this worker ends, and may be started again.
        if is_lost_disk(error) or isinstance(error, Stopped):
            raise
        reason = one_line(error)
        fail(folder, reason, traceback.format_exc(), _diverged(error))
        on_change(cell, f"failed: {reason}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{end}.json", found)
    (folder / "failed.json").unlink(missing_ok=True)
    on_change(cell, end)


def fail(folder: Path, reason: str, trace: str = "", diverged: bool = False) -> None:
    """Write down in a cell's folder why it could not be finished."""
    folder.mkdir(parents=True, exist_ok=True)
    found = locks.owner() | {"reason": reason, "traceback": trace, "diverged": diverged}
    write_json(folder / "failed.json", found)


def _diverged(error: Exception) -> bool:
    """Whether a loss, a gradient or an update that is not finite ended a cell, in all processes."""
    cause = error.__cause__ if isinstance(error, RunFailed) else error
    return isinstance(cause, FloatingPointError)


def _drop_damaged(cells: Sequence[Cell], folder: Path) -> None:
    # No process leaves a file in halves, but a disk may: the cell is finished anew.
    for cell, end in itertools.product(cells, (DONE, TRIED)):
        path = cell_folder(folder, cell) / f"{end}.json"
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            pass
        except ValueError:
            logger.warning("%s: damaged, the cell is finished anew", path)
            path.unlink(missing_ok=True)


def once(
    folder: Path,
    name: str,
    finished: Callable[[], bool],
    make: Callable[[], None],
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Make something that all processes need and one is to make; the others wait for it.

    Args:
      folder: of the study.
      name: of the lock, no cell's.
      finished: whether it is there.
      make: makes it, or resumes where a dead process stopped.
      sleep: waits so many seconds.
    """
    while not finished():
        lock = locks.take(folder / "locks", name)
        if lock is None:
            sleep(locks.BEAT / 3)
            continue
        with lock:
            if not finished():
                make()
