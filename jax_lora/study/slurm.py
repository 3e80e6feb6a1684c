"""A SLURM job array whose tasks are the workers of a study."""

from __future__ import annotations

import errno
import shlex
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from jax_lora.errors import ConfigError, MissingFileError


def script(
    command: Sequence[str], workers: int, options: Sequence[str], folder: Path, hosts: int = 1
) -> str:
    """A batch script; every task of its array runs `command`, whose workers share the cells.

    Args:
      command: what a worker runs.
      workers: tasks of the array.
      options: further options of sbatch, such as "--gres=gpu:1".
      folder: of the study; what workers print goes below it.
      hosts: nodes of a worker; on several, srun starts its processes.

    Raises:
      ConfigError: fewer than one worker or host, an option that is none, or a name of two lines:
        the second one would be a line of the script.
    """
    for name, value in (("workers", workers), ("hosts", hosts)):
        if value < 1:
            raise ConfigError(f"--{name}: found {value}, expected at least 1")
    for option in options:
        if not option.startswith("-"):
            raise ConfigError(
                f"--sbatch: found {option!r}, expected an option such as --gres=gpu:1"
            )
    for text in (*options, *command, str(folder)):
        if set(text) & set("\n\r\0"):
            raise ConfigError(f"--launcher: found {text!r}, expected options and paths of one line")
    named = [f"--job-name={folder.name}", f"--array=0-{workers - 1}", "--open-mode=append"]
    named += [f"--output={folder.absolute()}/slurm/%A_%a.txt"]
    named += [f"--nodes={hosts}"] if hosts > 1 else []
    lines = [f"#SBATCH {shlex.quote(option)}" for option in [*named, *options]]
    start = ["srun", *command] if hosts > 1 else command
    # exec: the signals of SLURM reach the worker itself.
    return "\n".join(["#!/bin/bash", *lines, f"exec {shlex.join(start)}", ""])


def submit(text: str, folder: Path) -> str:
    """Hand a batch script to SLURM; the array's job number.

    Raises:
      MissingFileError: there is no sbatch here.
      ConfigError: sbatch refuses the script.
    """
    (folder / "slurm").mkdir(parents=True, exist_ok=True)  # SLURM does not make it
    try:
        done = subprocess.run(["sbatch", "--parsable"], input=text, text=True, capture_output=True)
    except FileNotFoundError:
        text = "no such program here, expected SLURM"
        raise MissingFileError(errno.ENOENT, text, "sbatch") from None
    if done.returncode:
        raise ConfigError(f"sbatch: {done.stderr.strip()}")
    return done.stdout.strip()


def worker_arguments(arguments: Iterable[str]) -> Iterator[str]:
    """The arguments of study.py without those that describe the job array."""
    words = iter(arguments)
    for word in words:
        name, equals, _ = word.lstrip("-").partition("=")
        if name in ("launcher", "workers", "hosts", "sbatch"):
            _ = equals or next(words)
        elif name != "submit":
            yield word
