"""Every input of the table `bad_inputs` is refused in one line, and nothing is written."""

import hashlib
from collections import Counter
from pathlib import Path

import pytest

from tests import bad_inputs
from tests.scripts import run

CASES = list(bad_inputs.cases())


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> bad_inputs.Ground:
    found = bad_inputs.Ground(tmp_path_factory.mktemp("ground"))
    done = run("train.py", *found.train(f"--workdir={found.run}"))
    assert done.returncode == 0, done.stderr
    return found


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder and what it holds."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_table_is_as_large_as_is_promised():
    names = Counter((case.kind, case.variant) for case in CASES)
    assert not [name for name, count in names.items() if count > 1]
    assert len(CASES) >= 300 and len({case.kind for case in CASES}) >= 60


@pytest.mark.filterwarnings("ignore")  # of the libraries, about what they are made to read
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}-{case.variant}"[:80])
def test_it_is_refused_in_one_line(case, ground, tmp_path):
    arguments = case.make(ground, tmp_path)
    before = contents(tmp_path), contents(ground.run)
    done = run(case.script, *arguments)
    lines = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "usage: "))]
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert len(lines[0]) < 1000 and lines[0].isprintable(), lines[0]
    for word in case.words:
        assert word.format(folder=tmp_path) in lines[0], lines[0]
    assert (contents(tmp_path), contents(ground.run)) == before
    assert not [path for path in tmp_path.iterdir() if path.name in ("r", "out", "s")]
