"""The scripts, run in the tests' own process: a new Python that imports jax costs seconds.

What only a new process shows (signals, exit codes of a shell, an import that is missing) is tested
once per script with `command`.
"""

from __future__ import annotations

import io
import logging
import os
import runpy
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple, TextIO
from unittest import mock

import jax
from absl import flags

from jax_lora import cli

REPOSITORY = Path(__file__).resolve().parents[1]
# Settings of jax that a script may change.
SETTINGS = ("jax_platforms", "jax_enable_compilation_cache", "jax_compilation_cache_dir")
STOPS = (signal.SIGINT, signal.SIGTERM)


class Finished(NamedTuple):
    """What a script did, under the names of `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str


def command(script: str, *arguments: str) -> list[str]:
    """The command line that starts a script in a process of its own."""
    return [sys.executable, str(REPOSITORY / script), *arguments]


def run(script: str, *arguments: str, stderr: TextIO | None = None) -> Finished:
    """Call the `main` of a script as `absl.app.run` does, and put back all that it changed.

    Args:
      script: its file name, such as "train.py".
      arguments: its flags.
      stderr: written to in place of the text that is returned.
    """
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = [str(REPOSITORY / script), *arguments]
    with (
        _restored(),
        mock.patch.object(sys, "argv", argv),  # where ml_collections looks for --config.KEY
        redirect_stdout(out),
        redirect_stderr(stderr or err),
    ):
        try:
            main = runpy.run_path(argv[0], run_name=script)["main"]
            with warnings.catch_warnings():
                # How ml_collections loads a config file.
                warnings.filterwarnings("ignore", r"the load_module\(\) method", DeprecationWarning)
                is_absl = script != "convert.py"
                rest = cli.parse_flags(flags.FLAGS, argv) if is_absl else arguments
            main(rest)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Finished(code, out.getvalue(), err.getvalue())


@contextmanager
def _restored() -> Iterator[None]:
    """Flags are defined once per process, and loggers, settings and the environment are shared."""
    known, root = set(flags.FLAGS), sys.path[:]
    before = {name: jax.config.values[name] for name in SETTINGS}
    loggers = [logging.getLogger(name) for name in (None, "absl", "jax_lora")]
    handlers_of_signals = {number: signal.getsignal(number) for number in STOPS}
    states = [(one.level, one.handlers[:], one.propagate) for one in loggers]
    try:
        # What it sets holds for the rest of the process.
        with mock.patch.dict(os.environ), mock.patch.object(cli, "keep_memory"):
            yield
    finally:
        flags.FLAGS.unparse_flags()
        for name in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, name)
        sys.path[:] = root
        for number, handler in handlers_of_signals.items():
            signal.signal(number, handler)
        for name, value in before.items():
            if jax.config.values[name] != value:
                jax.config.update(name, value)
        for one, (level, handlers, propagate) in zip(loggers, states, strict=True):
            one.setLevel(level)
            one.handlers, one.propagate = handlers, propagate
