"""The short form of tests/reliability.py: a few tries of every promise but that of kills."""

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.parity  # minutes, most of which scripts start


def try_shortly(trial: str) -> None:
    """A few tries of one trial of tests/reliability.py, none of which breaks its promise."""
    done = subprocess.run(
        [sys.executable, "tests/reliability.py", "--short", trial],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("trial", ["damage", "locks", "signals"])
def test_no_try_breaks_a_promise(trial):
    try_shortly(trial)
