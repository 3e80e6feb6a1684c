"""The small files of a run's folder: config.json, parameters.json, metrics.jsonl."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from jax_lora.config import RunConfig
from jax_lora.errors import ConfigError, DataError
from jax_lora.files import jsonl_line, read_json, read_jsonl, write_text


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
      DataError: see `read_saved`.
    """
    path = workdir / "config.json"
    if not path.is_file():
        return
    saved_config, saved = read_saved(workdir)
    there = {f"config.{k}": v for k, v in saved_config.identity().items()}
    here = {f"config.{k}": v for k, v in config.identity().items()} | digests
    there |= {key: saved[key] for key in digests}
    for key, wanted in here.items():
        if there[key] != wanted:
            raise ConfigError(
                f"{path} belongs to another run: {key} is {there[key]!r} there and {wanted!r} "
                "here; expected the same, or an empty --workdir"
            )


@contextmanager
def all_or_nothing(folder: Path, is_primary: bool = True) -> Iterator[None]:
    """Remove a folder that the enclosed block made and could not fill (a full disk).

    `is_primary` is False in a process that leaves the making to another one.
    """
    was_there = folder.exists() or not is_primary
    try:
        yield
    except OSError:
        if not was_there:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of what decides the numbers."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    own = {"python": platform.python_version(), "jax-lora": package_version()}
    return own | {name: metadata.version(name) for name in names}


def package_version() -> str:
    """The version of this package."""
    return metadata.version("jax-lora")


class MetricsLog:
    """`metrics.jsonl` and TensorBoard events of a run.

    Args:
      workdir: the run's folder.
      step: where the run is resumed; lines of later steps, written before an interruption, go.
    """

    def __init__(self, workdir: Path, step: int):
        from tensorboardX import SummaryWriter

        path = workdir / "metrics.jsonl"
        lines = [line for line in read_jsonl(path) if line["step"] <= step] if step else []
        write_text(path, "".join(map(jsonl_line, lines)))
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add a step."""
        self._file.write(jsonl_line({"step": step, **values}))
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Finish both files."""
        self._file.close()
        self._board.close()
