"""How far a study is, as text and on a terminal."""

import os
import re
import sys

import pytest

from jax_lora import locks
from jax_lora.study import runner, view
from tests.study.test_runner import CELLS, FAR_AWAY, finish, foreign, names

WORK = {cell.id: float(i + 1) for i, cell in enumerate(CELLS)}


def plain(lines):
    return [re.sub(r"\x1b\[\d*m", "", line) for line in lines]


def rows_of(*counts):
    """That many cells of every state, in the order of runner.STATES."""
    every = zip(runner.STATES, counts, strict=True)
    return [(f"{state}{i}", state, "note") for state, count in every for i in range(count)]


def seconds(operations: int) -> float:
    """Of a cell, where one of one operation trained as many seconds as its process has for a
    number, and was scored in one."""
    return operations * os.getpid() + 1.0


def test_what_a_folder_tells(tmp_path):
    head, rows = view.look(tmp_path, CELLS, WORK)
    assert head == f"0 of {len(CELLS)} done, 0 failed, 0 running"
    assert rows == [(name, "waiting", "") for name in names()]

    finish(tmp_path, CELLS[:1])
    runner.fail(runner.cell_folder(tmp_path, CELLS[1]), "out of memory")
    foreign(tmp_path / "locks", CELLS[2].id, 0.0)
    own = runner.cell_folder(tmp_path, CELLS[2])
    own.mkdir()
    (own / "metrics.jsonl").write_text('{"step": 10}\n{"step": 20}\n{"st')
    head, rows = view.look(tmp_path, CELLS, WORK)
    took, *others = (view.span(x) for x in (seconds(1), seconds(3), seconds(4)))
    left = view.span(sum(seconds(i + 1) for i in range(2, len(CELLS))))
    running = f"1 running ({CELLS[2].id})"
    assert head == f"1 of {len(CELLS)} done, 1 failed, {running}, about {left} left"
    assert rows[:4] == [
        (CELLS[0].id, "done", took),
        (CELLS[1].id, "failed", "out of memory"),
        (CELLS[2].id, "running", f"on {FAR_AWAY['host']}, step 20, about {others[0]}"),
        (CELLS[3].id, "waiting", f"about {others[1]}"),
    ]
    assert locks.holder(tmp_path / "locks", CELLS[3].id) == {}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (59, "59 s"), (61, "2 min"), (7500, "2 h 5 min")]
)
def test_spans(seconds, text):
    assert view.span(seconds) == text


def test_a_view_that_fits_shows_every_cell():
    lines = plain(view.draw("head", rows_of(1, 1, 1, 1), "now", 40, 24))
    assert lines == [
        "head",
        "  done0     done     note",
        "  failed0   failed   note",
        "  running0  running  note",
        "  waiting0  waiting  note",
        "now",
    ]


@pytest.mark.parametrize("counts", [(90, 1, 2, 123), (0, 0, 1, 30), (30, 0, 1, 0), (5, 40, 5, 5)])
def test_a_view_never_leaves_its_terminal(counts):
    width, height = 60, 16
    lines = view.draw("h" * 99, rows_of(*counts), "n" * 99, width, height)
    texts = plain(lines)
    assert all(len(text) < width for text in texts)
    shown = [text.split()[0] for text in texts[1:-1] if not text.startswith("  and ")]
    assert {f"running{i}" for i in range(counts[2])} <= set(shown)
    (left_out,) = [text for text in texts if text.startswith("  and ")]
    assert len(shown) + sum(map(int, re.findall(r"\d+", left_out))) == sum(counts)
    assert len(lines) == height - 1
    assert shown == [name for name, _, _ in rows_of(*counts) if name in shown]


class Screen:
    """A terminal as far as the view needs one: \\r, cursor up, and the two ways of clearing."""

    def __init__(self):
        self.lines, self.row, self.column = [""], 0, 0

    def write(self, text):
        for part in re.findall(r"\x1b\[\d*[A-Za-z]|[^\x1b]", text):
            if up := re.fullmatch(r"\x1b\[(\d+)F", part):
                self.row -= int(up[1])
                self.column = 0
            elif part == "\x1b[K":
                self.lines[self.row] = self.lines[self.row][: self.column]
            elif part == "\x1b[J":
                del self.lines[self.row + 1 :]
                self.lines[self.row] = self.lines[self.row][: self.column]
            elif part == "\n":
                self.row, self.column = self.row + 1, 0
                self.lines += [""] * (self.row == len(self.lines))
            elif part == "\r":
                self.column = 0
            elif not part.startswith("\x1b"):
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + part + line[self.column + 1 :]
                self.column += 1

    def flush(self):
        pass

    def fileno(self):
        return 0


def test_a_view_is_drawn_over_itself_and_takes_what_stderr_is_told(monkeypatch):
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((40, 10)))
    monkeypatch.setattr(view, "BEAT", 3600.0)
    screen, counts = Screen(), [0, 0, 2, 3]
    live = view.Live(lambda: (f"head {counts}", rows_of(*counts)), screen)
    before = sys.stderr
    with live:
        print("reading tasks", file=sys.stderr)
        sys.stderr.write("\r 1/30 [00:01<00:30]")
        live.show()
        assert screen.lines[0] == "head [0, 0, 2, 3]" and len(screen.lines) == 8
        assert screen.lines[-2:] == [" 1/30 [00:01<00:30]", ""]
        counts[:] = [2, 0, 0, 1]
    assert sys.stderr is before
    _, *cells, _ = plain(view.draw("", rows_of(*counts), "", 40, 10))
    assert screen.lines == ["head [2, 0, 0, 1]", *cells, "", ""]
