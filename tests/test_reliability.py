"""The short form of tests/reliability.py: a few tries of every promise."""

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.slow  # minutes, most of which scripts start
def test_no_try_breaks_a_promise():
    # Bad inputs, damaged files and checkpoints, and locks have tests of their own.
    done = subprocess.run(
        [sys.executable, "tests/reliability.py", "--short", "kills", "signals"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
