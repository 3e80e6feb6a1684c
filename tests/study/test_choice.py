"""Learning rates chosen by validation losses, with cells that are fakes, as in test_runner.py."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from jax_lora.errors import ConfigError, DataError, RunFailed
from jax_lora.files import read_json, write_json
from jax_lora.study import Study, choice, grid, read, results, runner
from jax_lora.study.choice import COLUMNS, Choices
from jax_lora.study.config import StudyConfig
from jax_lora.study.status import status
from tests.conftest import REPOSITORY
from tests.study.test_runner import foreign, never, ran, rows_of

BEST = {4: 1e-2, 16: 1e-4, None: 1e-5}  # by rank, on T2; on T4 it is 1e-3 for LoRA


def study(**changes) -> StudyConfig:
    axes = {
        "run": {"validate_every": 1, "data": {"validation_per_task": 1}},
        "ranks": (4, 16, "full"),
        "sets": ("T2", "T4"),
        "rounds": (3, 5),
        "learning_rates": {"lora": (1e-4, 1e-3, 1e-2), "full": (1e-5,)},
        "choose_on": "T2",
    }
    return StudyConfig.from_config_dict(axes | changes)


def loss(cell: grid.Cell) -> float:
    best = 1e-3 if cell.set == "T4" and cell.rank else BEST[cell.rank]
    return 2.0 + abs(math.log10(cell.learning_rate / best)) / 10 + cell.repeat / 100


class Fakes:
    """Cells that write down that they ran; the higher the loss, the better their test scores."""

    def __init__(self, config: StudyConfig, folder: Path, diverging=(), loss=loss, broken=()):
        self.config, self.folder, self.loss = config, folder, loss
        self.diverging, self.broken = set(diverging), set(broken)
        self.choices = Choices.in_folder(config, folder)

    def run(self, **options) -> list[str]:
        """Run all cells to their end; the names of those that ran, as `id end`."""
        cells = grid.cells_of(self.config)
        options = {"sleep": never} | options
        if options.get("retry_failed"):
            self.choices.forget_failures(self.folder, cells)
        cells = self.choices.unsettled(self.folder, cells)
        runner.run_cells(cells, self.folder, self.one, stage=self.choices.stage, **options)
        self.choices.write_table(self.folder)
        results.gather(self.choices.scored(), self.folder)
        return [line.replace(":", " ") for line in ran(self.folder)]

    def one(self, cell: grid.Cell, folder: Path) -> dict:
        end = self.choices.stage(cell)
        with (self.folder / "ran.txt").open("a") as file:
            file.write(f"{cell.id}:{end}\n")
        if cell.id in self.diverging:
            raise RunFailed("loss is not finite") from FloatingPointError("loss")
        if cell.id in self.broken:
            raise RunFailed("out of memory") from MemoryError("memory")
        found = {"timings": {"host": "here", "pid": 1, "training": 1.0, "scoring": 1.0}}
        value = self.loss(cell)
        found["validation"] = {"step": 7, "validation_loss": value, "validation_tokens": 9}
        scored = [r | {"exact_match": 10 * value, "rougeL": 10 * value} for r in rows_of(cell)]
        return found | ({"rows": scored} if end == runner.DONE else {})

    def ends(self, name: str) -> set[str]:
        return {path.parent.name for path in (self.folder / "cells").glob(f"*/{name}.json")}


CARRIED = {
    *(f"r4-{s}-round{r}-lr0.01" for s in ("T2", "T4") for r in (3, 5)),
    *(f"r16-{s}-round{r}-lr0.0001" for s in ("T2", "T4") for r in (3, 5)),
    *(f"full-{s}-round{r}" for s in ("T2", "T4") for r in (3, 5)),
}
TRIALS = {f"r{rank}-T2-round3-lr{rate}" for rank in (4, 16) for rate in ("0.0001", "0.001", "0.01")}
REPEATS = {"r4-T2-round3-lr0.01-seed1", "r16-T2-round3-lr0.0001-seed1"}


def test_one_set_chooses_for_all_and_only_the_chosen_rate_is_scored(tmp_path):
    fakes = Fakes(study(), tmp_path)
    happened = fakes.run()
    assert fakes.ends("done") == CARRIED and fakes.ends("tried") == TRIALS | REPEATS
    assert len(happened) == len(set(happened)) == len(CARRIED) + len(TRIALS) + len(REPEATS)
    # A trial is trained before it is scored, and what waits for a choice comes behind its trials.
    order = {line: i for i, line in enumerate(happened)}
    last = max(order[f"{name} tried"] for name in TRIALS if name.startswith("r4"))
    assert all(order[f"{name} done"] > last for name in CARRIED if name.startswith("r4"))
    assert fakes.run() == happened  # nothing is left


def test_what_was_scored_before_the_grid_grew_is_not_in_the_results(tmp_path):
    # A rate beyond those of an unfinished study is the better one: of the cells that were scored
    # at the other rate the report knows nothing.
    few = study(ranks=(4,), learning_rates={"lora": (1e-4, 1e-3), "full": (1e-5,)})
    before = Fakes(few, tmp_path)
    before.run()
    old = {f"r4-{s}-round{r}-lr0.001" for s in ("T2", "T4") for r in (3, 5)}
    assert before.ends("done") == old
    shutil.rmtree(tmp_path / "choices")
    after = Fakes(study(ranks=(4,)), tmp_path)
    after.run()
    wanted = {name for name in CARRIED if name.startswith("r4")}
    assert after.ends("done") == old | wanted
    for table in ("results", "timings"):
        assert set(pd.read_parquet(tmp_path / f"{table}.parquet")["cell"]) == wanted
    found = pd.read_parquet(tmp_path / "rates.parquet")
    assert {c.id for c in Choices.in_table(after.config, found).scored()} == wanted


def test_only_the_failures_among_the_cells_are_forgotten(tmp_path):
    names = ["r4-T2-round3-lr0.001", "r16-T2-round3-lr0.001"]
    fakes = Fakes(study(), tmp_path, broken=names)
    fakes.run()
    assert fakes.ends("failed") == set(names)
    chosen = [cell for cell in grid.cells_of(fakes.config) if cell.rank == 4]
    fakes.choices.forget_failures(tmp_path, chosen)
    assert fakes.ends("failed") == {names[1]}


def test_the_status_counts_the_cells_that_are_to_be_run(tmp_path):
    fakes = Fakes(study(), tmp_path)
    write_json(tmp_path / "study.json", {"config": fakes.config.to_dict()})
    before = sorted(tmp_path.rglob("*"))
    assert "stopped; rerun the same command to resume" in status(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before  # it only looks
    fakes.run()
    count = len(CARRIED | TRIALS | REPEATS)
    assert "finished" in status(tmp_path)
    assert f"{count} done, 0 failed, 0 running, 0 waiting, of {count}" in status(tmp_path)


def test_a_cell_without_its_validation_is_named(tmp_path):
    fakes = Fakes(study(), tmp_path)
    fakes.run()
    path = tmp_path / "cells" / min(REPEATS) / "tried.json"
    write_json(path, read_json(path) | {"validation": None})
    with pytest.raises(DataError, match="tried.json: found no validation"):
        fakes.run()


def test_each_set_chooses_for_itself(tmp_path):
    fakes = Fakes(study(choose_on="each"), tmp_path)
    fakes.run()
    lora = {name for name in fakes.ends("done") if name.startswith("r")}
    assert lora == {
        *(f"r4-T2-round{r}-lr0.01" for r in (3, 5)),
        *(f"r16-T2-round{r}-lr0.0001" for r in (3, 5)),
        *(f"r{rank}-T4-round{r}-lr0.001" for r in (3, 5) for rank in (4, 16)),
    }
    assert {name for name in fakes.ends("tried") if "round5" in name} == set()
    found = read(tmp_path / "results.parquet")
    rates = pd.read_parquet(tmp_path / "rates.parquet")
    cells = grid.frame(Choices.in_table(fakes.config, rates).scored())
    checked = Study.of(found, cells)  # whatever its rate, rank 4 is one configuration
    assert checked.configs() == ["rank 4", "rank 16", "full"] and checked.grid["main"].all()


def test_with_one_rate_there_is_nothing_to_choose(tmp_path):
    config = StudyConfig.from_config_dict({"ranks": (4, "full"), "sets": ("T2",), "rounds": (0,)})
    fakes = Fakes(config, tmp_path)
    assert fakes.run() == ["r4-T2-round0 done", "full-T2-round0 done"]
    assert not (tmp_path / "rates.parquet").exists() and not (tmp_path / "choices").exists()


def test_a_rate_that_diverges_is_not_chosen(tmp_path):
    fakes = Fakes(study(ranks=(4,)), tmp_path, diverging=["r4-T2-round3-lr0.01"])
    fakes.run()
    assert {name[-5:] for name in fakes.ends("done")} == {"0.001"}
    rates = pd.read_parquet(tmp_path / "rates.parquet").set_index("cell")
    assert list(rates.columns) == COLUMNS[1:]
    assert math.isnan(rates["validation_loss"]["r4-T2-round3-lr0.01"])
    assert rates.index[rates["chosen"]].to_list() == ["r4-T2-round3-lr0.001"]

    # A choice stays as it was made, so it is not tried again, and the study has not failed.
    write_json(tmp_path / "study.json", {"config": fakes.config.to_dict()})
    assert status(tmp_path).splitlines()[0].split(maxsplit=1)[1] == "finished"
    again = Fakes(fakes.config, tmp_path)
    before = fakes.ends("done"), fakes.ends("tried")
    again.run(retry_failed=True)
    assert (again.ends("done"), again.ends("tried")) == before


@pytest.mark.parametrize("kind", ["validated", "diverged"])
@pytest.mark.parametrize("how", ["raised", "lost", "damaged", "older"])
def test_a_trial_that_failed_without_diverging_blocks_its_choice(tmp_path, kind, how):
    """Whatever the others came to, and however it was written down."""
    name, other = "r4-T2-round3-lr0.001", "r4-T2-round3-lr0.01"
    fakes = Fakes(study(ranks=(4,)), tmp_path, [other] if kind == "diverged" else [], broken=[name])
    write_json(tmp_path / "study.json", {"config": fakes.config.to_dict()})
    happened, path = fakes.run(), tmp_path / "cells" / name / "failed.json"
    if how == "lost":
        runner.fail(path.parent, "not all processes of this worker failed alike")
    elif how == "damaged":
        path.write_text('{"half')
    elif how == "older":
        write_json(path, {k: v for k, v in read_json(path).items() if k != "diverged"})
    assert Fakes(fakes.config, tmp_path).run() == happened  # nothing follows
    assert not fakes.ends("done") and not (tmp_path / "choices").exists()
    said = status(tmp_path)
    line = f"r4-T2-round3: no learning rate is chosen, since {name} failed; --retry-failed"
    assert "stopped; rerun the same command with --retry-failed to resume" in said
    assert line in said and fakes.choices.blocked(tmp_path) == [f"{line} tries it again"]
    table = pd.read_parquet(tmp_path / "rates.parquet").set_index("cell")
    assert table["outcome"][name] == "failed" and table["outcome"][other] == kind
    assert not table["chosen"].any()

    again = Fakes(fakes.config, tmp_path)
    again.run(retry_failed=True)
    assert again.ends("done") == {i for i in CARRIED if i.startswith("r4")}
    assert again.choices.blocked(tmp_path) == [] and "finished" in status(tmp_path)


def test_a_chosen_rate_whose_scoring_failed_stays_chosen(tmp_path):
    fakes = Fakes(study(ranks=(4,)), tmp_path)
    fakes.run()
    folder = tmp_path / "cells" / "r4-T2-round3-lr0.01"
    (folder / "done.json").unlink()
    runner.fail(folder, "out of memory")
    choices = Choices.in_folder(fakes.config, tmp_path)
    choices.write_table(tmp_path)
    table = pd.read_parquet(tmp_path / "rates.parquet").set_index("cell")
    assert table["chosen"]["r4-T2-round3-lr0.01"] and choices.blocked(tmp_path) == []


def test_where_all_rates_diverge_nothing_follows_until_they_are_tried_again(tmp_path):
    names = {name for name in TRIALS if name.startswith("r4")}
    fakes = Fakes(study(ranks=(4,)), tmp_path, diverging=names)
    fakes.run()
    assert fakes.ends("failed") == names and not fakes.ends("done")
    assert fakes.choices.blocked(tmp_path) == [
        "r4-T2-round3: no learning rate is chosen, since all that were tried diverged"
    ]
    Fakes(fakes.config, tmp_path).run(retry_failed=True)
    assert fakes.ends("done") == {name for name in CARRIED if name.startswith("r4")}


def test_a_worker_waits_for_a_trial_that_decides_what_it_does_next(tmp_path):
    """Another machine has the last trial; when it ends, this worker goes on with the rest."""
    fakes, name = Fakes(study(ranks=(4,)), tmp_path), "r4-T2-round3-lr0.01"
    lock, waited = foreign(tmp_path / "locks", name, 20.0), []

    def beat(seconds):
        waited.append(seconds)
        lock.touch()
        if len(waited) == 3:
            (trial,) = (c for c in grid.cells_of(fakes.config) if c.id == name)
            (tmp_path / "cells" / name).mkdir(parents=True)
            write_json(tmp_path / "cells" / name / "tried.json", fakes.one(trial, tmp_path))
            lock.unlink()

    fakes.run(sleep=beat)
    assert len(waited) == 3
    assert fakes.ends("done") == {name for name in CARRIED if name.startswith("r4")}


WORKER = """
import os, signal, sys
from pathlib import Path
from jax_lora.study import runner
from tests.study.test_choice import Fakes, study

class Dies(Fakes):
    def one(self, cell, folder):
        if f"{cell.id} {self.choices.stage(cell)}" == sys.argv[2]:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().one(cell, folder)

Dies(study(), Path(sys.argv[1])).run()
"""


def test_killed_workers_leave_what_the_next_one_finishes(tmp_path):
    for moment in (
        "r4-T2-round3-lr0.01 tried",
        "r16-T2-round3-lr0.0001 done",  # between the choice and its scoring
        "r16-T2-round3-lr0.0001-seed1 tried",
    ):
        command = [sys.executable, "-c", WORKER, str(tmp_path), moment]
        died = subprocess.run(command, cwd=REPOSITORY, env=os.environ)
        assert died.returncode == -signal.SIGKILL, moment
    fakes = Fakes(study(), tmp_path)
    happened = fakes.run()
    assert fakes.ends("done") == CARRIED and len(happened) == len(set(happened))
    whole = Fakes(study(), tmp_path / "whole")
    whole.folder.mkdir()
    whole.run()
    for name in ("results.parquet", "rates.parquet"):
        assert (tmp_path / name).read_bytes() == (whole.folder / name).read_bytes()


def test_what_is_planned_before_and_after_the_choice(tmp_path):
    config = study(ranks=(4,), rounds=(3,))
    fakes = Fakes(config, tmp_path)
    trials = {name for name in TRIALS if name.startswith("r4")}
    planned = fakes.choices.planned(grid.cells_of(config))
    assert {cell.id for cell in planned} == trials | {"r4-T4-round3", "r4-T2-round3-seed1"}
    assert [cell.id for cell in fakes.choices.scored()] == ["r4-T2-round3", "r4-T4-round3"]
    states = runner.states(tmp_path, planned, fakes.choices.stage)
    assert set(states.values()) == {"waiting"}
    fakes.run()
    planned = fakes.choices.planned(grid.cells_of(config))
    chosen = {"r4-T4-round3-lr0.01", "r4-T2-round3-lr0.01-seed1"}
    assert {cell.id for cell in planned} == trials | chosen
    states = runner.states(tmp_path, planned, fakes.choices.stage)
    assert set(states.values()) == {"done"}


def test_a_part_of_the_grid_needs_its_trials(tmp_path):
    fakes = Fakes(study(ranks=(4,)), tmp_path)
    some = grid.choose(grid.cells_of(fakes.config), "set == 'T4'")
    with pytest.raises(ConfigError, match="r4-T4-round3 waits .*: r4-T2-round3-lr0.0001, "):
        fakes.choices.check_only(some)
    fakes.choices.check_only(grid.choose(grid.cells_of(fakes.config), "round == 3"))
    fakes.run()
    fakes.choices.check_only(some)


def test_a_choice_is_a_file_for_people_too(tmp_path):
    Fakes(study(ranks=(4,)), tmp_path, diverging=["r4-T2-round3-lr0.001"]).run()
    saved = json.loads((tmp_path / "choices" / "r4-T2-round3.json").read_text())
    assert saved == {
        "learning_rate": 1e-2,
        "validation_losses": {
            "r4-T2-round3-lr0.0001": 2.2,
            "r4-T2-round3-lr0.001": None,
            "r4-T2-round3-lr0.01": 2.0,
        },
    }


# ---------------------------------------------------------------- several workers at a time


def ends_of_trials(fakes: Fakes) -> list[tuple[Path, dict]]:
    """The files that end the trials of rank 4, and what they hold."""
    trials = [c for c in grid.cells_of(fakes.config) if c.id in TRIALS and c.rank == 4]
    return [
        (fakes.folder / "cells" / trial.id / "tried.json", fakes.one(trial, fakes.folder))
        for trial in trials
    ]


def test_of_two_workers_that_choose_at_once_the_first_one_decides(tmp_path, monkeypatch):
    """While one writes its choice down, the trial that diverged for it is tried again elsewhere,
    with a lower loss, and another worker sees that."""
    config = study(ranks=(4,), rounds=(3,))
    *others, (path, found) = ends_of_trials(Fakes(config, tmp_path))
    for there, content in others:
        write_json(there, content)
    runner.fail(path.parent, "loss is not finite", diverged=True)
    slow, fast = (Choices.in_folder(config, tmp_path) for _ in range(2))
    write, stages = choice.write_json_once, []

    def interrupted(fresh, value):
        monkeypatch.setattr(choice, "write_json_once", write)
        write_json(path, found)
        stages.append({c.id: fast.stage(c) for c in grid.cells_of(config)})
        write(fresh, value)

    monkeypatch.setattr(choice, "write_json_once", interrupted)
    stages.append({c.id: slow.stage(c) for c in grid.cells_of(config)})
    assert stages[0] == stages[1] and stages[0]["r4-T2-round3-lr0.01"] == "done"
    saved = (tmp_path / "choices").iterdir()  # nothing else is left there
    assert [read_json(path)["learning_rate"] for path in saved] == [1e-2]


def test_a_trial_that_ends_while_the_table_is_written_is_in_it(tmp_path, monkeypatch):
    """Two workers write rates.parquet; the slower one knew less when it began."""
    config = study(ranks=(4,))
    left = ends_of_trials(Fakes(config, tmp_path))
    slow, fast = (Choices.in_folder(config, tmp_path) for _ in range(2))
    fresh_file = choice.fresh_file

    def interrupted(path):
        if left:
            write_json(*left.pop(0))
            with monkeypatch.context() as plain:
                plain.setattr(choice, "fresh_file", fresh_file)
                fast.write_table(tmp_path)
        return fresh_file(path)

    write_json(*left.pop(0))
    monkeypatch.setattr(choice, "fresh_file", interrupted)
    slow.write_table(tmp_path)
    table = pd.read_parquet(tmp_path / "rates.parquet")
    assert set(table["cell"]) == {name for name in TRIALS if name.startswith("r4")}
    assert table["cell"][table["chosen"]].to_list() == ["r4-T2-round3-lr0.01"]


TOGETHER = """
import sys
from pathlib import Path
from tests.study.test_choice import Fakes, study

Fakes(study(), Path(sys.argv[1])).run(beat=0.03, sleep=__import__("time").sleep)
"""


def test_workers_at_the_same_time_leave_what_one_alone_leaves(tmp_path):
    together, alone = tmp_path / "together", tmp_path / "alone"
    for folder in (together, alone):
        folder.mkdir()
    command = [sys.executable, "-c", TOGETHER, str(together)]
    workers = [subprocess.Popen(command, cwd=REPOSITORY, env=os.environ) for _ in range(3)]
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    Fakes(study(), alone).run()
    choices = (f"choices/r{rank}-T2-round3.json" for rank in (4, 16))
    for path in ("results.parquet", "rates.parquet", *choices):
        assert (together / path).read_bytes() == (alone / path).read_bytes()
    assert len(ran(together)) == len(ran(alone))
