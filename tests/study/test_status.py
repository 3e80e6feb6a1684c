"""study.py --status: how far a study is, from files that may be damaged."""

import pytest

from jax_lora.errors import DataError
from jax_lora.files import write_json
from jax_lora.study import runner
from jax_lora.study.config import StudyConfig
from jax_lora.study.grid import cells_of
from jax_lora.study.status import status
from tests import scripts
from tests.study.test_runner import fake, foreign

AXES = {"ranks": [4, 16], "sets": ["T2"], "rounds": [0, 1], "learning_rates": {"lora": [1e-4]}}
CELLS = cells_of(StudyConfig.from_config_dict(AXES))


@pytest.fixture
def folder(tmp_path):
    write_json(tmp_path / "study.json", {"config": AXES, "data_fingerprint": "d"})
    return tmp_path


def done(folder, cells):
    for cell in cells:
        found = fake(cell, runner.cell_folder(folder, cell))
        found["timings"] |= {"training": 80.0, "scoring": 40.0}
        runner.cell_folder(folder, cell).mkdir(parents=True)
        write_json(runner.cell_folder(folder, cell) / "done.json", found)


def told(folder):
    return {
        name: text for name, text in (line.split(":", 1) for line in status(folder).splitlines())
    }


def test_of_a_new_and_of_a_finished_study(folder):
    assert told(folder)["state"].strip() == "stopped; rerun the same command to resume"
    assert told(folder)["cells"].strip() == "0 done, 0 failed, 0 running, 4 waiting, of 4"
    (folder / "cells").mkdir()
    done(folder, CELLS)
    assert told(folder)["state"].strip() == "finished"
    assert told(folder)["speed"].strip() == "2 min per cell" and "time left" not in told(folder)


def test_of_a_study_at_work(folder):
    (folder / "cells").mkdir()
    done(folder, CELLS[:1])
    runner.fail(runner.cell_folder(folder, CELLS[1]), "out of\x1b[2J memory")
    foreign(folder / "locks", CELLS[2].id, 0.0)
    cell = runner.cell_folder(folder, CELLS[2])
    cell.mkdir()
    write_json(cell / "config.json", {"steps": 30})
    (cell / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    found = told(folder)
    assert found["state"].strip() == "running"
    assert found["cells"].strip() == "1 done, 1 failed, 1 running, 1 waiting, of 4"
    assert CELLS[2].id in found["running"] and "step 2 of 30" in found["running"]
    assert "on far, process 1" in found["running"]
    assert found["time left"].strip() == "about 4 min"
    assert f"{CELLS[1].id}: out of" in found["failed"]
    shown = scripts.run("study.py", f"--status={folder}")
    assert shown.returncode == 0 and r"out of\x1b[2J memory" in shown.stdout, shown.stderr
    # Damage in a file costs what that file says.
    for name in ("done.json", "failed.json", "config.json", "metrics.jsonl"):
        for path in folder.glob(f"cells/*/{name}"):
            path.write_text('{"half')
    found = told(folder)
    assert found["cells"].strip() == "1 done, 1 failed, 1 running, 1 waiting, of 4"
    assert "failed.json is damaged" in found["failed"] and "speed" not in found


def test_of_the_base_that_is_made_first(folder):
    foreign(folder / "locks", "toy", 0.0)
    assert told(folder)["state"].strip() == "running" and "toy on far" in told(folder)["running"]


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"config": 5}', '{"config": {"ranks": "x"}}'),
        '{"config": {"sets": ["../x"]}}',
    ],
)
def test_of_what_is_no_study(tmp_path, text):
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(DataError, match="study.json"):
        status(tmp_path)
