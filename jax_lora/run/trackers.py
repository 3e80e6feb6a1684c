"""Where the numbers of a run's steps go beside metrics.jsonl: `config.tracker`."""

from __future__ import annotations

import importlib
import importlib.util
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from jax_lora.config import RunConfig
from jax_lora.errors import ConfigError, one_line
from jax_lora.files import read_json, write_json


class Tracker(Protocol):
    """What a tracker does; `open_tracker` makes one."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of a step."""

    def close(self) -> None:
        """Finish what is written."""


class TensorBoard:
    """Events in the folder `tensorboard` of a run.

    Args:
      workdir: the run's folder.
      step: where the run is resumed; later events, written before an interruption, are hidden.
    """

    def __init__(self, workdir: Path, step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases, which a resumed run goes on with.

    Its settings are wandb's own (`wandb login`, WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE=offline).
    Its files lie in the folder `wandb` of the run, and `wandb_run.json` keeps the id.

    Args:
      workdir: the run's folder; its name is the name of the run.
      config: shown with the run.

    Raises:
      ConfigError: Weights & Biases refused to start, such as for want of a login.
    """

    def __init__(self, workdir: Path, config: RunConfig):
        wandb = importlib.import_module("wandb")  # an extra, which types are not checked against
        path = workdir / "wandb_run.json"
        known = read_json(path, dict) if path.is_file() else {"id": secrets.token_hex(4)}
        try:
            self._run = wandb.init(
                id=known["id"],
                name=workdir.resolve().name,
                dir=str(workdir),
                config=config.to_dict(),
                resume="allow",
                settings=wandb.Settings(silent=True, console="off"),
            )
        except (wandb.errors.Error, OSError) as error:
            raise ConfigError(
                f"config.tracker: found wandb, which did not start: {one_line(error)}; expected a "
                "login, or WANDB_MODE=offline"
            ) from None
        write_json(path, known)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of a step; one that wandb has already is left as it is."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class NoTracker:
    """Nothing beside metrics.jsonl."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def check(config: RunConfig) -> None:
    """Make sure, before any work, that the tracker of a config is installed.

    Raises:
      ConfigError: it is not; how to install it.
    """
    if config.tracker == "wandb" and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "config.tracker: found wandb, which is not installed; expected "
            "`pip install 'jax-lora[wandb]'`, or tensorboard or none"
        )


def open_tracker(workdir: Path, step: int, config: RunConfig) -> Tracker:
    """The tracker of `config.tracker`.

    Args:
      workdir: the run's folder.
      step: where the run is resumed.
      config: of the run.

    Raises:
      ConfigError: it cannot be used.
    """
    check(config)
    if config.tracker == "wandb":
        return WandB(workdir, config)
    return TensorBoard(workdir, step) if config.tracker == "tensorboard" else NoTracker()
