"""The short form of tests/reliability.py: a few tries of every promise."""

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.parity  # minutes, most of which scripts start
@pytest.mark.parametrize("trial", ["damage", "kills", "locks", "signals"])
def test_no_try_breaks_a_promise(trial):
    done = subprocess.run(
        [sys.executable, "tests/reliability.py", "--short", trial],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
