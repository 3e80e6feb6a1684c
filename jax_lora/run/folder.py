"""A run's folder: who works in it, and its small files, config.json, error.json, metrics.jsonl."""

from __future__ import annotations

import itertools
import logging
import math
import platform
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

from jax_lora import locks
from jax_lora.config import RunConfig
from jax_lora.distributed import KeyValueStore
from jax_lora.errors import ConfigError, DataError, RunFailed, Stopped, one_line
from jax_lora.files import (
    Json,
    jsonl_line,
    naming,
    read_json,
    read_jsonl,
    write_json,
    write_text,
)
from jax_lora.run.trackers import Tracker

logger = logging.getLogger(__name__)
LOCK = ".lock"  # the first part of its files' names
_told = itertools.count()


def read_saved(workdir: Path) -> tuple[RunConfig, dict[str, object]]:
    """The config of a run's folder, and all of its config.json.

    Raises:
      DataError: no config.json of a run, or one of an older version.
    """
    path = workdir / "config.json"
    saved = read_json(path)
    if not isinstance(saved, dict) or "data_fingerprint" not in saved:
        raise DataError(f"{path}: found no run's config, expected train.py's")
    try:
        config = RunConfig.from_config_dict(saved["config"])
    except ConfigError as error:
        raise DataError(f"{path}: {error}") from None
    if "base_digest" not in saved:
        raise DataError(
            f"{path}: found a run of an older version, whose seeds drew other numbers; expected "
            "one of this version, or an empty --workdir"
        )
    return config, saved


def check_same_run(workdir: Path, config: RunConfig, digests: dict[str, str]) -> None:
    """Make sure that a folder is empty or belongs to a run with the same results.

    Only the keys that decide results are compared, see `RunConfig.identity`: a run may be resumed
    with another micro-batch, remat policy, mesh or path to the same base.

    Args:
      workdir: the run's folder.
      config: what it is to be resumed with.
      digests: name → digest of the data and the base.

    Raises:
      ConfigError: it belongs to another run: the first key that differs.
      DataError: see `read_saved`; or there are checkpoints and nothing says of which run.
    """
    path = workdir / "config.json"
    if not path.is_file():
        for other in (workdir / "checkpoints", workdir / "pissa"):
            if other.is_dir() and any(other.iterdir()):
                raise DataError(
                    f"{path}: not found, and {other} is of an earlier run; expected its "
                    "config.json, or an empty --workdir"
                )
        return
    saved_config, saved = read_saved(workdir)
    there = {f"config.{k}": v for k, v in saved_config.identity().items()}
    here = {f"config.{k}": v for k, v in config.identity().items()} | digests
    there |= {key: saved[key] for key in digests if key in saved}
    for key, wanted in here.items():
        if there.get(key, wanted) != wanted:  # an older version did not write all digests
            raise ConfigError(
                f"{path} belongs to another run: {key} is {there[key]!r} there and {wanted!r} "
                "here; expected the same, or an empty --workdir"
            )


@contextmanager
def owned(
    workdir: Path, what: str, store: KeyValueStore | None = None, is_primary: bool = True
) -> Iterator[None]:
    """Be the only run of a script in a folder; what fails meanwhile is written to error.json.

    A folder that was made for this and holds nothing at the end goes again.

    Args:
      workdir: the run's folder, made if need be.
      what: this process does: "training" or "scoring".
      store: see `distributed.key_value_store`, where several processes do it together; all of
        them call this.
      is_primary: this is the one among them that takes the lock.

    Raises:
      ConfigError: another one is at work there: what it does, where, and since when.
    """
    key = f"owner/{next(_told)}" if store else ""
    if store and not is_primary:
        # As long as the first one may wait for a dead owner, and start later than this one.
        if reason := store.blocking_key_value_get(key, int(4000 * locks.SILENCE)):
            raise ConfigError(reason)
        yield
        return
    made = [path for path in (workdir, *workdir.absolute().parents) if not path.exists()]
    reason = f"{workdir}: the first process could not take the folder"
    try:
        with naming(workdir):
            lock = locks.hold(workdir, LOCK, what)
        reason = ""
    except ConfigError as error:
        reason = str(error)
        raise
    finally:
        if store:
            store.key_value_set(key, reason)
    try:
        with lock:
            with _failures(workdir, what):
                yield
    finally:
        for path in made:
            with suppress(OSError):  # it holds something
                path.rmdir()


@contextmanager
def _failures(workdir: Path, what: str) -> Iterator[None]:
    path = workdir / "error.json"
    try:
        yield
    except Stopped:  # it went on past what failed before
        path.unlink(missing_ok=True)
        raise
    except (ConfigError, DataError, OSError):  # wrong input
        raise
    except Exception as error:
        reason = one_line(error)
        failure = {"what": what, "reason": reason, "when": time.strftime("%Y-%m-%d %H:%M:%S")}
        with suppress(OSError):  # a full disk has no room for it
            write_json(path, failure)
        raise
    path.unlink(missing_ok=True)


@contextmanager
def all_or_nothing(folder: Path, is_primary: bool = True) -> Iterator[None]:
    """Remove a folder that the enclosed block filled and could not finish (a full disk, too little
    memory).

    A folder with anything but our locks and unfinished files in it is left as it is.

    `is_primary` is False in a process that leaves the making to another one.
    """
    is_new = is_primary and not (folder.exists() and _holds_files(folder))
    try:
        yield
    except (OSError, RunFailed):
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


# Locks, and what locks and files are called before they are there.
_OURS = re.compile(r"\.lock\.\d+|\.[0-9a-f]{32}|\..*\.new")


def _holds_files(folder: Path) -> bool:
    return any(not _OURS.fullmatch(path.name) for path in folder.iterdir())


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of what decides the numbers."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    versions = {"python": platform.python_version(), "jax-lora": package_version()}
    return versions | {name: metadata.version(name) for name in names}


def package_version() -> str:
    """The version of this package."""
    return metadata.version("jax-lora")


def read_metrics(workdir: Path) -> list[dict[str, Json]]:
    """The steps in metrics.jsonl; a damaged line is named in a warning and left out."""
    path, rows = workdir / "metrics.jsonl", []
    for row in read_jsonl(path, pass_over_damage=True):
        if isinstance(row.get("step"), int):
            rows.append(row)
        else:
            logger.warning("%s: a line without a step; passed over", path)
    return rows


class MetricsLog:
    """`metrics.jsonl` and the tracker of a run.

    A step's line has the time at which it was written, in seconds since 1970.

    Args:
      workdir: the run's folder.
      step: where the run is resumed; lines of later steps, written before an interruption, go.
      tracker: gets the numbers as well, and is closed with this.
    """

    def __init__(self, workdir: Path, step: int, tracker: Tracker):
        path = workdir / "metrics.jsonl"
        lines = [line for line in read_metrics(workdir) if line["step"] <= step] if step else []
        write_text(path, "".join(map(jsonl_line, lines)))
        self._file = path.open("a", encoding="utf-8")
        self._tracker = tracker

    def write(self, step: int, values: dict[str, float], skipped: str = "") -> None:
        """Add a step; `skipped`: why it changed nothing."""
        row: dict[str, object] = {"step": step}
        row |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        if skipped:
            row["skipped"] = skipped
        self._file.write(jsonl_line(row | {"time": round(time.time(), 3)}))
        self._file.flush()
        self._tracker.write(step, values)

    def close(self) -> None:
        """Finish the file, and the tracker."""
        self._file.close()
        self._tracker.close()
