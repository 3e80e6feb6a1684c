"""How far a run is, from the files of its folder alone; nothing is locked or started."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from jax_lora import locks
from jax_lora.files import read_json
from jax_lora.run import folder
from jax_lora.training.checkpoints import best_in, steps_in

WINDOW = 20  # logged steps that the speed is the median of


def status(workdir: str | Path) -> str:
    """What a run's folder says of it, a line each.

    Args:
      workdir: the run's folder.

    Returns:
      Its state (training, scoring, finished, failed, stopped), who is at work, the last step of
      how many, the steps that were skipped, the last and the best checkpoint, the speed, the time
      left and the last error; what is not known is left out.

    Raises:
      DataError, OSError: no run's folder; names the file.
    """
    path = Path(workdir)
    config, saved = folder.read_saved(path)
    total = saved.get("steps")
    metrics = folder.read_metrics(path)
    last = metrics[-1] if metrics else {}
    step = last.get("step", 0)
    checkpoints = steps_in(path / "checkpoints")
    failed = read_json(path / "error.json", dict) if (path / "error.json").is_file() else {}
    owner = locks.holder(path, folder.LOCK) if locks.is_held(path, folder.LOCK) else {}
    seconds = _seconds_per_step(metrics)
    best = best_in(path / "checkpoints")
    is_over = best.ends(config.stop_after) or (bool(checkpoints) and checkpoints[0] == total)
    lines = {"state": _state(owner, failed, is_over)}
    if best.ends(config.stop_after) and not owner and not failed and checkpoints[0] != total:
        lines["state"] += f": {best.since} validations in a row brought no lower loss"
    if owner:
        lines["owner"] = f"process {owner.get('pid')} on {owner.get('host')}, {owner.get('since')}"
    lines["last step"] = f"{step} of {total}" if total else str(step)
    if skipped := [row["step"] for row in metrics if row.get("skipped")]:
        lines["skipped"] = f"{len(skipped)} steps: {', '.join(map(str, skipped))}"
    lines["last checkpoint"] = f"step {checkpoints[0]}" if checkpoints else "none"
    if validated := [row for row in metrics if row.get("validation_loss") is not None]:
        row = validated[-1]
        lines["validation"] = f"loss {row['validation_loss']:.4f} at step {row['step']}"
    if best.step is not None:
        note = "" if best.step in checkpoints else ", not kept"
        lines["best checkpoint"] = f"step {best.step}, validation loss {best.loss:.4f}{note}"
    if last:
        lines["speed"] = f"{last.get('tokens_per_second', 0):,.0f} tokens/s"
    if seconds is not None:
        lines["speed"] += f", {seconds:.3g} s per step"
        if isinstance(total, int) and step < total and not is_over:
            lines["time left"] = _duration(seconds * (total - step)) + " of training"
    if failed:
        what, when = failed.get("what"), failed.get("when")
        lines["last error"] = f"{failed.get('reason')} ({what}, {when})"
    return "\n".join(f"{name + ':':<17}{text}" for name, text in lines.items())


def _state(owner: dict, failed: dict, is_over: bool) -> str:
    if owner:
        return str(owner.get("what") or "at work")
    if failed:
        return f"failed while {failed.get('what')}"
    if is_over:
        return "finished"
    return "stopped; rerun the same command to resume"


def _seconds_per_step(metrics: Sequence[dict]) -> float | None:
    """The median over the last logged steps: a pause between two parts of a run is one of them."""
    times = [(row["step"], row["time"]) for row in metrics[-WINDOW - 1 :] if "time" in row]
    each = [
        (later - earlier) / (after - before)
        for (before, earlier), (after, later) in zip(times, times[1:], strict=False)
        if after > before
    ]
    return statistics.median(each) if each else None


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if hours else f"{minutes} min"
