"""How far a study is, from the files of its folder alone; nothing is locked or started."""

from __future__ import annotations

import statistics
from pathlib import Path

from jax_lora import locks
from jax_lora.errors import ConfigError, DataError
from jax_lora.files import Json, read_json
from jax_lora.study import grid, results, runner, spec, view
from jax_lora.study.choice import Choices
from jax_lora.study.config import read_axes


def status(workdir: str | Path) -> str:
    """What a study's folder says of it, a line each.

    Args:
      workdir: the study's folder.

    Returns:
      Its state (running, finished, stopped), how many cells are done, failed, running and
      waiting, what each worker does and how far it is, the time per cell, the time left, the
      failures and the choices of a learning rate that wait for one; what is not known is left
      out. The time left takes all cells for equal.

    Raises:
      DataError, OSError: no study's folder; names the file.
    """
    path = Path(workdir)
    saved = read_json(path / "study.json", dict)
    try:
        if not isinstance(saved["config"], dict):
            raise TypeError(f"found {saved['config']!r:.60}")
        config = read_axes(saved["config"])
        choices = Choices.seen_in_folder(config, path)
        cells = choices.planned(grid.cells_of(config))
        states = runner.states(path, cells, choices.stage)
    except (ConfigError, KeyError, TypeError) as error:
        raise DataError(f"{path / 'study.json'}: found no study's config: {error}") from None
    by_state = {kind: [n for n in states if states[n] == kind] for kind in runner.STATES}
    names = by_state["running"]
    if locks.is_held(path / "locks", spec.TOY):
        names = [spec.TOY, *names]
    counts = ", ".join(f"{len(by_state[kind])} {kind}" for kind in runner.STATES)
    blocked = choices.blocked(path)
    failed = [c.id for c in choices.unsettled(path, cells) if c.id in by_state["failed"]]
    state = _state(names, by_state["waiting"], failed, blocked)
    lines = [("state", state), ("cells", f"{counts}, of {len(cells)}")]
    lines += [("running", f"{name} {_progress(path, name)}") for name in names]
    if took := [x for name in by_state["done"] if (x := _seconds(path / "cells" / name))]:
        each = statistics.median(took)
        lines.append(("speed", f"{view.span(each)} per cell"))
        left = len(by_state["running"]) + len(by_state["waiting"])
        if left and names:
            lines.append(("time left", f"about {view.span(each * left / len(names))}"))
    for name in by_state["failed"]:
        found = _read(path / "cells" / name / "failed.json")
        where = f" (on {found['host']})" if found.get("host") else ""
        lines.append(
            ("failed", f"{name}: {found.get('reason', 'its failed.json is damaged')}{where}")
        )
    lines += [("blocked", line) for line in blocked]
    return "\n".join(f"{f'{name}:':<17}{text}" for name, text in lines)


def _state(running: list[str], waiting: list[str], failed: list[str], blocked: list[str]) -> str:
    if running:
        return "running"
    if waiting and blocked:
        return "stopped; rerun the same command with --retry-failed to resume"
    if waiting:
        return "stopped; rerun the same command to resume"
    return "finished" + ("; --retry-failed takes what failed again" if failed else "")


def _progress(path: Path, name: str) -> str:
    """Who is at work on what is trained under a name, and at which step."""
    owner = locks.holder(path / "locks", name)
    folder = path / "toy" / "run" if name == spec.TOY else path / "cells" / name
    total = _read(folder / "config.json").get("steps")
    step = view.last_step(folder / "metrics.jsonl")
    parts = [f"on {owner.get('host')}, process {owner.get('pid')}, since {owner.get('since')}"]
    if step:
        parts.append(f"step {step} of {total}" if total else f"step {step}")
    return ", ".join(parts)


def _seconds(cell: Path) -> float:
    """That a cell took, 0 where its files do not say."""
    timings = _read(cell / "done.json").get("timings") or {}
    try:
        return float(sum(results.Took.of(timings)))
    except (TypeError, AttributeError):
        return 0.0


def _read(path: Path) -> dict[str, Json]:
    """A file that may be damaged, or not there yet."""
    try:
        return read_json(path, dict)
    except (DataError, OSError):
        return {}
