"""The table of promises is written by a whole green run, and by nothing less."""

import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
TABLE = TESTS.parent / "docs" / "exactness.md"
NEEDS_TORCH = """
import pytest
pytestmark = pytest.mark.parity

@pytest.mark.parametrize("worst", [1e-7, 2.34e-6])
def test_close(promise, worst):
    promise("logits", worst, 1e-5)
"""
NEEDS_NONE = """
def test_equal(promise):
    promise("largest |bit|", 0, 0)

def test_other():
    assert False, "neither run is to take it"
"""


@pytest.fixture
def suite(tmp_path):
    tests = tmp_path / "tests"
    tests.mkdir()
    for name in ("conftest.py", "exactness.py"):
        shutil.copy(TESTS / name, tests)
    shutil.copy(TESTS.parent / "pyproject.toml", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "exactness.md").write_text("old")
    (tests / "test_b.py").write_text(NEEDS_TORCH)
    (tests / "test_a.py").write_text(NEEDS_NONE)
    return tmp_path


def run(suite: Path, *arguments: str) -> tuple[str, str]:
    """What pytest says, and the table after it."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=suite, capture_output=True, text=True, check=False)
    return done.stdout, (suite / "docs" / "exactness.md").read_text()


@pytest.mark.parametrize("workers", [[], ["-n", "2"]])
def test_a_whole_run_writes_the_table(suite, workers):
    output, table = run(suite, "tests", "-m", "promise", *workers)
    assert "3 passed" in output and "the promises of 3 tests" in output
    assert table.endswith(
        "| largest \\|bit\\| | 0 | 0 | `test_a.py::test_equal` |\n"
        "| logits | 1e-05 | 2.3e-06 | `test_b.py::test_close` |\n"
    )
    assert f"jax {version('jax')}" in table


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["tests", "-m", "promise", "-k", "close"], "tests with a promise that did not run: 1"),
        (["tests/test_b.py", "-m", "promise"], "test files that were not read: 1"),
        (["tests", "-m", "promise", "--collect-only"], "tests with a promise that did not run: 3"),
    ],
)
def test_part_of_a_run_does_not(suite, arguments, why):
    output, table = run(suite, *arguments)
    assert f"exactness.md stays as it is: {why}" in output and table == "old"


def test_a_broken_promise_does_not(suite):
    path = suite / "tests" / "test_b.py"
    path.write_text(path.read_text().replace("2.34e-6", "2.34e-5"))
    output, table = run(suite, "tests", "-m", "promise")
    assert "logits: worst 2.3e-05, tolerance 1e-05" in output and table == "old"
    assert "stays as it is: not every test passed" in output


def test_a_promise_without_torch_is_measured_without_it(suite):
    output, table = run(suite, "tests", "-m", "not parity", "-k", "not other")
    assert "1 passed, 3 deselected" in output and table == "old" and "stays" not in output


def test_every_row_is_of_a_test_that_there_is():
    rows = [row for row in TABLE.read_text("utf-8").splitlines() if "::" in row]
    for name in {row.split("`")[-2] for row in rows}:
        path, _, function = name.partition("::")
        assert f"def {function}(" in (TESTS / path).read_text("utf-8"), name
    assert len(rows) > 50
