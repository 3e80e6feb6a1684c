"""Cells pulled from a folder: by one process, by several, after deaths, failures and damage.

The cells are fakes that write down that they ran; only `tests/test_study.py` trains.
"""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pandas as pd
import pytest

from jax_lora import cli, locks, study
from jax_lora.errors import RunFailed, Stopped
from jax_lora.evaluation import evaluate
from jax_lora.files import jsonl_line, read_json, write_json, write_text
from jax_lora.run.training import running
from jax_lora.study import grid, results, runner
from jax_lora.study.worker import _faults
from tests.conftest import REPOSITORY

CELLS = grid.cells((4, 16, "full"), ("T2", "T4"), (0, 1), {"lora": (1e-4,), "full": (1e-5,)}, {})
FAR_AWAY = {"host": "far", "pid": 1, "machine": "far away"}


def rows_of(cell: grid.Cell) -> list[dict]:
    """Rows that differ by cell, with a null in every other one."""
    score = 10.0 * cell.round + (cell.rank or 64)
    return [
        {
            "cell": cell.id, "model": "toy", "method": cell.method, "variant": "",
            "rank": cell.rank, "set": cell.set, "set_tasks": 2, "train_examples": 20,
            "round": cell.round, "learning_rate": cell.learning_rate, "test": test,
            "task": f"{test}{i}", "category": "c", "examples": 10, "exact_match": score,
            "rougeL": score, "closed_label": i == 0, "majority_baseline": 50.0 if i == 0 else None,
            "out_of_options": 10.0 if i == 0 else None, "top_answer_share": 50.0,
            "answer_entropy": 1.0, "exact_match_given_valid": None, "empty": 0.0, "copies": 0.0,
            "unfinished": 0.0, "trainable": 100, "frozen": 1000, "train_tokens": 200,
            "train_operations": 1e6, "base_operations": 1e5,
        }
        for test in study.TESTS
        for i in range(2)
    ]  # fmt: skip


def fake(cell: grid.Cell, folder: Path) -> dict:
    """A cell that appends its name to a file of the study, in one write."""
    with (folder.parents[1] / "ran.txt").open("a") as file:
        file.write(f"{cell.id}\n")
    timings = {"host": "here", "pid": os.getpid(), "training": float(os.getpid()), "scoring": 1.0}
    return {"timings": timings, "rows": rows_of(cell)}


def ran(folder: Path) -> list[str]:
    path = folder / "ran.txt"
    return path.read_text().split() if path.is_file() else []


def names(cells=CELLS) -> list[str]:
    return [cell.id for cell in cells]


def never(seconds: float) -> None:
    raise AssertionError("waited for nobody")


# ---------------------------------------------------------------- one process


def test_every_cell_runs_once_in_order(tmp_path):
    said = []
    runner.run_cells(
        CELLS, tmp_path, fake, on_change=lambda c, what: said.append((c.id, what)), sleep=never
    )
    assert ran(tmp_path) == names()
    assert said == [(name, what) for name in names() for what in ("begins", "done")]
    assert set(runner.states(tmp_path, CELLS).values()) == {"done"}
    assert not list((tmp_path / "locks").iterdir())
    runner.run_cells(CELLS, tmp_path, fake, sleep=never)  # nothing is left
    assert ran(tmp_path) == names()


def test_a_failure_is_written_down_and_stops_nothing(tmp_path):
    broken = {CELLS[1].id}

    def sometimes(cell, folder):
        found = fake(cell, folder)
        if cell.id in broken:
            raise RuntimeError("out of\nmemory")
        return found

    runner.run_cells(CELLS, tmp_path, sometimes, sleep=never)
    assert ran(tmp_path) == names()
    failed = json.loads((runner.cell_folder(tmp_path, CELLS[1]) / "failed.json").read_text())
    assert failed["reason"] == "out of memory" and "sometimes" in failed["traceback"]
    states = runner.states(tmp_path, CELLS)
    assert states.pop(CELLS[1].id) == "failed" and set(states.values()) == {"done"}

    runner.run_cells(CELLS, tmp_path, sometimes, sleep=never)  # it is not tried again unasked
    assert len(ran(tmp_path)) == len(CELLS)
    runner.run_cells(CELLS, tmp_path, sometimes, retry_failed=True, sleep=never)  # and then once
    assert ran(tmp_path)[len(CELLS) :] == [CELLS[1].id]
    broken.clear()
    runner.run_cells(CELLS, tmp_path, sometimes, retry_failed=True, sleep=never)
    assert set(runner.states(tmp_path, CELLS).values()) == {"done"}
    assert not (runner.cell_folder(tmp_path, CELLS[1]) / "failed.json").exists()


@pytest.mark.parametrize(
    "end", [KeyboardInterrupt(), SystemExit("stopped at step 3"), Stopped("stopped at step 3")]
)
def test_a_stop_gives_the_lock_back(tmp_path, end):
    def stops(cell, folder):
        raise end

    with pytest.raises(type(end)):
        runner.run_cells(CELLS, tmp_path, stops)
    assert set(runner.states(tmp_path, CELLS).values()) == {"waiting"}
    assert not list((tmp_path / "locks").iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.ESTALE, errno.EIO])
def test_a_lost_disk_ends_the_worker_and_fails_no_cell(tmp_path, number):
    def run(cell, folder):
        raise RunFailed("the disk") from OSError(number, os.strerror(number), "f")

    with pytest.raises(RunFailed, match="the disk"):
        runner.run_cells(CELLS, tmp_path, run, sleep=never)
    assert set(runner.states(tmp_path, CELLS).values()) == {"waiting"}
    runner.run_cells(CELLS, tmp_path, fake, sleep=never)
    assert set(runner.states(tmp_path, CELLS).values()) == {"done"}


def test_cells_on_a_file_system_of_their_own_keep_their_examples(tmp_path, monkeypatch):
    own = tmp_path / "cells" / "a" / "eval" / "seen" / "examples.jsonl"
    for test in study.TESTS:
        path = own.parents[1] / test / "examples.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("{}\n")

    def link(source, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link", str(source), None, str(target))

    monkeypatch.setattr(os, "link", link)
    results.share_examples(CELLS[0], own.parents[2], tmp_path / "examples")
    assert own.read_text() == "{}\n" and not list((tmp_path / "examples").iterdir())


# ---------------------------------------------------------------- locks


def hold(folder: Path, name: str) -> subprocess.Popen:
    """A process that holds a lock until it is killed."""
    program = (
        "import sys; from pathlib import Path; from jax_lora import locks\n"
        "lock = locks.take(Path(sys.argv[1]), sys.argv[2])\n"
        "print(lock is not None, flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(folder), name],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stdout.readline() == "True\n"
    return process


def foreign(folder: Path, name: str, age: float) -> Path:
    """A lock of another machine, whose owner gave its last sign of life `age` seconds ago."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.1"
    path.write_text(json.dumps(FAR_AWAY))
    sign = path.stat().st_mtime - age
    os.utime(path, (sign, sign))
    return path


def test_a_lock_is_one_processs_until_it_dies(tmp_path):
    name = CELLS[0].id
    with hold(tmp_path / "locks", name) as process:
        # However long ago its last sign of life: on one machine the kernel knows.
        os.utime(tmp_path / "locks" / f"{name}.1", (0, 0))
        assert locks.take(tmp_path / "locks", name) is None
        assert runner.states(tmp_path, CELLS)[name] == "running"
        runner.run_cells(CELLS, tmp_path, fake, sleep=never)  # the others; it does not wait
        assert ran(tmp_path) == names(CELLS[1:])
        process.kill()
    assert runner.states(tmp_path, CELLS)[name] == "waiting"
    runner.run_cells(CELLS, tmp_path, fake, sleep=never)  # at once
    assert ran(tmp_path) == names([*CELLS[1:], CELLS[0]])
    assert not list((tmp_path / "locks").iterdir())


def test_a_dead_owners_lock_goes_to_one_of_many(tmp_path):
    foreign(tmp_path, "cell", 1000.0)
    with ThreadPoolExecutor(8) as pool, ExitStack() as held:
        taken = [
            lock for lock in pool.map(lambda _: locks.take(tmp_path, "cell"), range(8)) if lock
        ]
        assert [lock.path.name for lock in taken] == ["cell.2"]
        held.enter_context(taken[0])
        assert locks.take(tmp_path, "cell") is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("age", "free"), [(0.0, False), (290.0, False), (310.0, True)])
def test_an_owner_elsewhere_is_dead_when_it_is_silent(tmp_path, age, free):
    foreign(tmp_path, "cell", age)
    lock = locks.take(tmp_path, "cell")
    assert (lock is not None) == free
    if lock:
        lock.release()


def test_locks_are_signs_of_life(tmp_path):
    assert locks.last_heartbeat(tmp_path, "cell") == -math.inf
    with locks.take(tmp_path, "cell") as lock:
        assert locks.last_heartbeat(tmp_path, "cell") == math.inf
        os.utime(lock.path, (0, 0))
        lock.renew()
        assert lock.path.stat().st_mtime > 0
    assert locks.last_heartbeat(tmp_path, "cell") == -math.inf


@pytest.mark.parametrize("skew", [-1e6, 0.0, 1e6])
def test_what_runs_is_known_whatever_this_machines_clock_says(tmp_path, monkeypatch, skew):
    foreign(tmp_path / "locks", CELLS[0].id, 20.0)
    foreign(tmp_path / "locks", CELLS[1].id, 310.0)
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + skew)
    states = runner.states(tmp_path, CELLS)
    assert states.pop(CELLS[0].id) == "running" and set(states.values()) == {"waiting"}
    assert len(list((tmp_path / "locks").iterdir())) == 2


def test_a_lock_that_another_took_over_ends_its_owner(tmp_path):
    said = []
    with locks.take(tmp_path, "cell", lost=said.append) as lock:
        (tmp_path / "cell.2").write_text(json.dumps(FAR_AWAY))
        before = lock.path.stat().st_mtime_ns
        lock.renew()
        assert len(said) == 1 and "took this lock over" in said[0]
        assert lock.path.stat().st_mtime_ns == before
    # It deletes nothing any more, not even its own file: the name may be the next owner's by now.
    assert (tmp_path / "cell.2").read_text() == json.dumps(FAR_AWAY)


def test_the_last_worker_waits_until_others_show_that_they_live(tmp_path):
    lock, waited = foreign(tmp_path / "locks", CELLS[0].id, 20.0), []

    def beat(seconds):
        waited.append(seconds)
        lock.touch()

    runner.run_cells(CELLS, tmp_path, fake, sleep=beat)
    assert len(waited) == 1 and ran(tmp_path) == names(CELLS[1:])


def test_the_last_worker_takes_over_from_one_that_died_meanwhile(tmp_path):
    lock, waited = foreign(tmp_path / "locks", CELLS[0].id, 20.0), []

    def silence(seconds):
        waited.append(seconds)
        sign = lock.stat().st_mtime - 100.0
        os.utime(lock, (sign, sign))

    runner.run_cells(CELLS, tmp_path, fake, sleep=silence)
    assert len(waited) == 3 and ran(tmp_path) == names([*CELLS[1:], CELLS[0]])


def test_what_all_need_is_made_once(tmp_path):
    made = tmp_path / "base"
    foreign(tmp_path / "locks", "base", 0.0)
    runner.once(tmp_path, "base", made.exists, never, sleep=lambda _: made.touch())
    made.unlink()
    (tmp_path / "locks" / "base.1").unlink()
    runner.once(tmp_path, "base", made.exists, made.touch, sleep=never)
    assert made.exists()


# ---------------------------------------------------------------- several processes


WORKER = """
import sys
from pathlib import Path
from jax_lora.study import results, runner
from tests.study.test_runner import CELLS, fake

folder = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
runner.run_cells(CELLS, folder, fake, on_change=lambda *_: results.gather(CELLS, folder))
"""


def test_processes_share_the_cells_and_do_none_twice(tmp_path):
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path)],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for worker in workers:
        assert worker.stdout and worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.communicate("go\n")
    assert [worker.returncode for worker in workers] == [0, 0]
    assert sorted(ran(tmp_path)) == sorted(names())
    assert set(study.read(tmp_path / "results.parquet")["cell"]) == set(names())


def test_killed_workers_leave_what_the_next_one_finishes(tmp_path):
    dies = f"""
import os, signal, sys
from pathlib import Path
from jax_lora.study import runner
from tests.study.test_runner import CELLS, fake

def run(cell, folder):
    if cell.id == sys.argv[2]:
        os.kill(os.getpid(), {int(signal.SIGKILL)})
    return fake(cell, folder)

runner.run_cells(CELLS, Path(sys.argv[1]), run)
"""
    for place in (0, len(CELLS) - 1):
        done = subprocess.run(
            [sys.executable, "-c", dies, str(tmp_path), CELLS[place].id], cwd=REPOSITORY
        )
        assert done.returncode == -signal.SIGKILL
    runner.run_cells(CELLS, tmp_path, fake, sleep=never)
    assert ran(tmp_path) == names()


# ---------------------------------------------------------------- results


def finish(folder: Path, cells) -> Path:
    runner.run_cells(cells, folder, fake)
    results.gather(CELLS, folder)
    return folder / "results.parquet"


def test_results_are_a_function_of_the_cells_alone(tmp_path):
    for folder in (tmp_path / "one", tmp_path / "other"):
        folder.mkdir()
    finish(tmp_path / "other", CELLS[3:5])
    one, other = finish(tmp_path / "one", CELLS), finish(tmp_path / "other", CELLS[::-1])
    assert one.read_bytes() == other.read_bytes()
    found = study.read(one)
    study.check(found, grid.frame(CELLS))
    assert list(found["cell"].unique()) == names()
    assert found["majority_baseline"].isna().sum() == len(found) / 2
    timings = pd.read_parquet(tmp_path / "one" / "timings.parquet")
    assert list(timings.columns) == ["cell", "host", "pid", "training", "scoring"]
    assert not {"training", "pid"} & set(found.columns)
    assert not list((tmp_path / "one").glob(".*"))  # nothing half-written is left


def test_the_base_may_have_another_file_name_where_a_study_goes_on(tmp_path):
    path = finish(tmp_path, CELLS)
    ended = runner.cell_folder(tmp_path, CELLS[1]) / "done.json"
    saved = read_json(ended)
    rows = [row | {"model": "renamed.gguf"} for row in saved["rows"]]
    write_json(ended, saved | {"rows": rows})
    (name,) = study.read(path)["model"].unique()
    results.gather(CELLS, tmp_path)
    assert study.read(path)["model"].unique().tolist() == [name]


def test_missing_cells_are_missing(tmp_path):
    results.gather(CELLS, tmp_path)
    assert not (tmp_path / "results.parquet").exists()
    found = study.read(finish(tmp_path, CELLS[:2]))
    assert set(found["cell"]) == set(names(CELLS[:2]))
    study.check(found, grid.frame(CELLS))


def test_a_damaged_cell_is_finished_anew(tmp_path, caplog):
    path = finish(tmp_path, CELLS)
    whole = path.read_bytes()
    done = runner.cell_folder(tmp_path, CELLS[2]) / "done.json"
    done.write_bytes(done.read_bytes()[:-100])
    path.write_bytes(whole[:1000])
    with pytest.raises(ValueError, match=r"results.parquet: .*expected a whole parquet file"):
        study.read(path)
    finish(tmp_path, CELLS)
    assert str(done) in caplog.text
    assert ran(tmp_path) == [*names(), CELLS[2].id]
    assert path.read_bytes() == whole


def test_cells_of_a_round_share_their_examples(tmp_path):
    place = {}
    for cell in CELLS[:4]:
        place[cell.id] = runner.cell_folder(tmp_path, cell)
        for test in study.TESTS:
            (place[cell.id] / "eval" / test).mkdir(parents=True)
            text = f"{test} of round {cell.round}\n" * 3
            (place[cell.id] / "eval" / test / "examples.jsonl").write_text(text)
        results.share_examples(cell, place[cell.id], tmp_path / "examples")
    files = {
        cell.id: (place[cell.id] / "eval" / "seen" / "examples.jsonl").stat().st_ino
        for cell in CELLS[:4]
    }
    assert [cell.round for cell in CELLS[:4]] == [0, 1, 0, 1]
    inodes = list(files.values())
    assert inodes[0] == inodes[2] != inodes[1] == inodes[3]
    shared = sorted(path.name for path in (tmp_path / "examples").iterdir())
    assert shared == ["seen-0.jsonl", "seen-1.jsonl", "unseen-0.jsonl", "unseen-1.jsonl"]

    other = place[CELLS[0].id] / "eval" / "seen" / "examples.jsonl"  # asked with another template
    other.unlink()
    other.write_text("other\n")
    results.share_examples(CELLS[0], place[CELLS[0].id], tmp_path / "examples")
    assert other.read_text() == "other\n"
    assert (tmp_path / "examples" / "seen-0.jsonl").read_text() == "seen of round 0\n" * 3


def test_cases_are_what_models_answer_differently(tmp_path, caplog):
    answers = {  # task a: all alike but for a capital; then r4 differs; then r16 does
        "r4-T4-round0": ["Yes", "no", "yes", "x"],
        "r16-T4-round0": ["yes", "yes", "no", "x"],
        "full-T4-round0": ["yes", "yes", "yes", "x"],
        "r4-T2-round0": ["of", "another", "set", "!"],
        "r4-T4-round1": ["of", "another", "round", "!"],
    }
    asked = [("a", "1"), ("a", "2"), ("a", "3"), ("b", "1")]
    for cell in CELLS:
        own = runner.cell_folder(tmp_path, cell)
        for test in study.TESTS if cell.id in answers else ():
            (own / "eval" / test).mkdir(parents=True)
            for name, keys in (
                ("examples", {"input": "?", "references": ["yes"]}),
                ("predictions", {"prediction": None}),
            ):
                lines = [{"task": task, "id": number} | keys for task, number in asked]
                if name == "predictions":
                    for line, text in zip(lines, answers[cell.id], strict=True):
                        line["prediction"] = text
                text = "".join(json.dumps(line) + "\n" for line in lines)
                (own / "eval" / test / f"{name}.jsonl").write_text(text)
            (own / "done.json").write_text("{}")
    results.write_cases(CELLS, tmp_path)
    found = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    assert [case["task"] for case in found] == [
        f"a, {test}: trained on T4, round 0" for test in study.TESTS
    ]
    assert found[0]["answers"] == {"rank 4": "no", "rank 16": "yes", "full": "yes"}

    # A line that a disk cut costs the example that it answers, and is named.
    damaged = tmp_path / "cells" / "r4-T4-round0" / "eval" / "seen" / "predictions.jsonl"
    lines = damaged.read_text().splitlines(keepends=True)
    damaged.write_text("".join([lines[0], lines[1][:9] + "\n", *lines[2:]]))
    results.write_cases(CELLS, tmp_path)
    found = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    assert found[0]["answers"] == {"rank 4": "yes", "rank 16": "no", "full": "yes"}
    assert f"{damaged}: line 2 is not valid JSON" in caplog.text

    # Cells that came without their prompts have cases once any cell of the round brings them.
    prompts = [*tmp_path.glob("cells/*-T4-round0/eval/seen/examples.jsonl")]
    text = prompts[0].read_text()
    for path in prompts:
        path.unlink()
    results.write_cases(CELLS, tmp_path)
    found = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    assert [case["task"] for case in found] == ["a, unseen: trained on T4, round 0"]
    write_text(tmp_path / "examples" / "seen-0.jsonl", text)
    results.write_cases(CELLS, tmp_path)
    assert len((tmp_path / "cases.jsonl").read_text().splitlines()) == 2


def test_a_further_metric_has_a_column(tmp_path):
    example = {"task": "t", "id": "1", "category": "c", "input": "?", "references": ["a b"]}
    answer = {"task": "t", "id": "1", "prediction": "a", "truncated": False, "finished": True}
    whole = {name: rows_of(CELLS[0])[0][name] for name in study.OF_A_CELL}
    scored = ("exact_match", "rougeL", "token_f1")
    for cell in CELLS[:2]:
        own = runner.cell_folder(tmp_path, cell)
        for test in study.TESTS:
            folder = own / "eval" / test
            write_text(folder / "examples.jsonl", jsonl_line(example))
            write_text(folder / "predictions.jsonl", jsonl_line(answer))
            write_json(folder / "labels.json", {})
            write_json(folder / "scores.json", evaluate.score(folder, scored))
        same = whole | {"round": cell.round, "rank": cell.rank, "set": cell.set}
        found = results.rows(cell, own, same, scored, {("seen", "t"): 1.5})
        write_json(own / "done.json", {"rows": found, "timings": {}})
    results.gather(CELLS[:2], tmp_path)
    found = study.read(tmp_path / "results.parquet")
    assert [*found.columns] == [*study.COLUMNS, *study.MEASURES, "token_f1"]
    assert found["reference_loss"].to_list()[0] == 1.5 and found["forgetting"].isna().all()
    own = study.Study.of(found, grid.frame(CELLS))
    assert own.scores("T2", "seen", "token_f1")["rank 4"].to_list() == pytest.approx([200 / 3] * 2)


def test_time_left_follows_operations_and_what_is_scored():
    """Training takes 5 s per operation and scoring 30 s, of whatever is scored."""
    operations = {"a": 1.0, "b": 3.0, "c": 10.0, "trial": 10.0}
    assert results.seconds(operations, {"c"}, {}) == {}
    took = {"a": results.Took(8.0, 40.0), "b": results.Took(12.0, 20.0)}
    found = results.seconds(operations, {"a", "b", "c"}, took)
    assert found == {"a": 35.0, "b": 45.0, "c": 80.0, "trial": 50.0}


def test_a_cell_took_what_its_file_says():
    took = results.Took.of({"host": "h", "training": 1.0, "scoring": 2.0, "measuring": 4.0})
    assert took == (1.0, 6.0) and results.Took.of({}) == (0.0, 0.0)


# ---------------------------------------------------------------- what a failure was


@pytest.mark.parametrize(
    ("error", "diverged"),
    [
        (FloatingPointError("step 3: not finite: loss"), True),
        (MemoryError("too little memory"), False),
        (OSError(errno.ENOENT, "no such file", "f"), False),
        (ValueError("a fault of ours"), False),
    ],
)
def test_a_divergence_is_told_from_other_failures(tmp_path, error, diverged):
    """Through all that stands between a step of training and the runner."""

    def run(cell, folder):
        with _faults(), cli.exit_codes(), running(lambda _: "nothing is lost"):
            raise error

    runner.run_cells(CELLS[:1], tmp_path, run, sleep=never)
    saved = json.loads((runner.cell_folder(tmp_path, CELLS[0]) / "failed.json").read_text())
    assert saved["diverged"] is diverged and str(error) in saved["reason"]


def test_processes_that_do_not_agree_have_not_diverged(tmp_path):
    def run(cell, folder):
        raise OSError("not all processes of this worker failed alike") from FloatingPointError()

    runner.run_cells(CELLS[:1], tmp_path, run, sleep=never)
    path = runner.cell_folder(tmp_path, CELLS[0]) / "failed.json"
    assert json.loads(path.read_text())["diverged"] is False
