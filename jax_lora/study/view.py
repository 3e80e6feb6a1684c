"""How far a study is: a line, and on a terminal a view of its cells that is drawn in place."""

from __future__ import annotations

import io
import json
import math
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from jax_lora import locks
from jax_lora.errors import DataError
from jax_lora.files import read_json
from jax_lora.study import results, runner
from jax_lora.study.grid import Cell
from jax_lora.text import printable

Row = tuple[str, str, str]  # a cell's id, one of runner.STATES, and what there is to say
BEAT = 1.0  # seconds between two drawings
_COLOURS = {"done": "32", "failed": "31", "running": "1", "waiting": "2"}  # of ANSI terminals


def look(
    folder: Path,
    cells: Sequence[Cell],
    operations: Mapping[str, float],
    stage: runner.Stage = runner.always,
) -> tuple[str, list[Row]]:
    """How far a study is.

    Args:
      folder: of the study.
      cells: of it, or some of them.
      operations: of each, by id; what is finished says how long they take.
      stage: how each ends.

    Returns:
      How many cells are done, failed and running, and how long the others may take; and the cells
      in their order.
    """
    states, took = runner.states(folder, cells, stage), results.finished(folder, operations)
    scored = {cell.id for cell in cells if stage(cell) in (runner.DONE, runner.LATER)}
    about = results.seconds(operations, scored, took)
    rows = []
    for name, state in states.items():
        note = f"about {span(about[name])}" if name in about else ""
        if state == "done":
            note = span(sum(took[name])) if name in took else ""
        elif state == "failed":
            note = _reason(folder / "cells" / name / "failed.json")
        elif state == "running":
            host = locks.holder(folder / "locks", name).get("host")
            step = last_step(folder / "cells" / name / "metrics.jsonl")
            parts = (f"on {host}" if host else "", f"step {step}" if step else "", note)
            note = ", ".join(filter(None, parts))
        rows.append((name, state, note))

    by_state = {kind: [name for name in states if states[name] == kind] for kind in runner.STATES}
    running, left = by_state["running"], by_state["running"] + by_state["waiting"]
    head = f"{len(by_state['done'])} of {len(cells)} done, {len(by_state['failed'])} failed, "
    head += f"{len(running)} running" + (f" ({', '.join(running)})" if running else "")
    if left and about:
        head += f", about {span(sum(about[n] for n in left) / max(1, len(running)))} left"
    return head, rows


def span(seconds: float) -> str:
    """Seconds in words: "45 s", "3 min", "2 h 5 min"."""
    if seconds < 60:
        return f"{math.ceil(seconds)} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _reason(path: Path) -> str:
    try:
        return str(read_json(path, dict).get("reason", ""))
    except FileNotFoundError:  # the cell is tried once more, and was done just now
        return ""
    except DataError as error:
        return str(error)


def last_step(path: Path) -> int | None:
    """The last step in a metrics.jsonl, None where it has none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            return json.loads(file.read().split(b"\n")[-2])["step"]
    except (OSError, ValueError, IndexError, KeyError, TypeError):  # none yet, or half a line
        return None


def draw(head: str, rows: Sequence[Row], now: str, width: int, height: int) -> list[str]:
    """The view as lines that fit a terminal.

    Args:
      head: above the cells.
      rows: the cells. Where they are too many, the first ones that are done are only counted, then
        the last ones that wait, and so on.
      now: below them, what this worker does.
      width, height: characters and lines.
    """
    shown = list(rows)
    for state in ("done", "waiting", "failed", "running"):
        # Lines are also for head, count and now, and one is where the cursor stands.
        spare = max(0, len(shown) - max(1, height - 4))
        same = [row for row in shown if row[1] == state]
        hidden = same[:spare] if state == "done" else same[max(0, len(same) - spare) :]
        shown = [row for row in shown if row not in hidden]
    name_width = max((len(name) for name, _, _ in shown), default=0)
    lines = [head[: width - 1]]
    for name, state, note in shown:
        plain = f"  {name:<{name_width}}  {state:<7}  {printable(note)}".rstrip()[: width - 1]
        lines.append(f"\x1b[{_COLOURS[state]}m{plain}\x1b[0m")
    left_out = Counter(state for _, state, _ in rows) - Counter(state for _, state, _ in shown)
    if left_out:
        counts = ", ".join(f"{left_out[k]} {k}" for k in runner.STATES if left_out[k])
        lines.append(f"  and {counts}"[: width - 1])
    return [*lines, printable(now)[: width - 1]]


class Live(io.TextIOBase):
    """Inside of a `with`, a view drawn over and over on a terminal, in the place of sys.stderr.

    What is written to stderr meanwhile, such as the bar of a training, is the view's last line.

    Args:
      look: gives the view's head and its cells.
      terminal: where to draw.
    """

    encoding = "utf-8"

    def __init__(self, look: Callable[[], tuple[str, Sequence[Row]]], terminal: TextIO):
        self._look, self._terminal = look, terminal
        self._now, self._drawn = "", 0  # the last line, and how many lines stand there
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)

    def __enter__(self) -> Live:
        self._before, sys.stderr = sys.stderr, self
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        sys.stderr = self._before
        self._over.set()
        self._thread.join()
        self._now = ""
        self.show()

    def write(self, text: str) -> int:
        """Keep its last line that says something."""
        lines = [line for line in re.split(r"[\r\n]", text) if line.strip()]
        self._now = lines[-1] if lines else self._now
        return len(text)

    def fileno(self) -> int:
        """The terminal's, whose width bars ask for."""
        return self._terminal.fileno()

    def isatty(self) -> bool:
        """It ends on one."""
        return True

    def show(self) -> None:
        """Draw over what stands there."""
        head, rows = self._look()
        width, height = os.get_terminal_size(self._terminal.fileno())
        width, height = (width, height) if width and height else (80, 24)  # it knows none
        lines = draw(head, rows, self._now, width, height)
        back = f"\x1b[{self._drawn}F" if self._drawn else "\r"
        # Line by line, each cleared behind its end: the screen is never empty in between.
        text = "".join(f"{line}\x1b[K\n" for line in lines)
        self._terminal.write(f"{back}{text}\x1b[J")
        self._terminal.flush()
        self._drawn = len(lines)

    def _live(self) -> None:
        while not self._over.is_set():
            self.show()
            self._over.wait(BEAT)
