"""study.py as a user runs it: a whole study, broken off three times; its refusals; its launcher."""

import json
import os
import pty
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from jax_lora.study import MEASURES
from tests import scripts
from tests.conftest import REPOSITORY, SMOKE, many_cpus
from tests.processes import free_address


def command(workdir: Path, *arguments: str) -> list[str]:
    return scripts.command("study.py", f"--workdir={workdir}", *arguments)


def study(workdir: Path, *arguments: str) -> scripts.Finished:
    """study.py in this process."""
    return scripts.run("study.py", f"--workdir={workdir}", *arguments)


def killed_at(arguments: list[str], marks: list[str]) -> bool:
    """Run, and SIGKILL when stderr has shown these marks one after the other; False: too late."""
    with subprocess.Popen(
        arguments,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    ) as process:
        assert process.stderr
        seen = ""
        for mark in marks:
            while mark not in seen:
                letter = process.stderr.read(1)
                if not letter:
                    return False
                seen += letter
            seen = seen.partition(mark)[2]
        process.kill()
        return True


@pytest.mark.slow
def test_a_study_that_was_killed_three_times_has_the_results_of_an_unbroken_one(
    smoke_study, tmp_path
):
    workdir = tmp_path / "broken"
    arguments = command(workdir, *SMOKE)
    for marks in (
        [" 14/17"],  # the base's training, behind a checkpoint
        ["r2-T2-round0 begins", " 14/30"],  # a cell's training
        ["full-T2-round0 begins", " 30/30", "unseen:"],  # its scoring
    ):
        assert killed_at(arguments, marks), marks
    done = study(workdir, *SMOKE)
    assert done.returncode == 0, done.stderr
    results = (workdir / "results.parquet").read_bytes()
    assert results == (smoke_study / "results.parquet").read_bytes()
    times = [set(pd.read_parquet(w / "timings.parquet")["pid"]) for w in (workdir, smoke_study)]
    assert len(times[0]) == 2 and len(times[1]) == 1  # the broken one's cells are of two processes


@pytest.mark.slow
def test_two_processes_are_one_worker(smoke_study, tmp_path, promise):
    """A cell that fails in both, then one of the smoke study, on 2 × 2 devices."""
    workdir, cell = tmp_path / "s", "r2-T2-round0-lr0.01"
    many = [f"--coordinator={free_address()}", "--processes=2"]
    axes = [flag for flag in SMOKE if "ranks" not in flag]
    axes += ["--config.ranks=(2,)", "--config.learning_rates.lora=(1e30,1e-2)"]
    axes += ["--config.run.validate_every=99", "--config.run.data.validation_per_task=2"]
    axes += ["--config.run.epochs=3"]  # of 10
    both = [
        subprocess.Popen(
            command(workdir, *axes, *many, f"--process={i}"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=os.environ | many_cpus(2),
        )
        for i in (0, 1)
    ]
    output = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], output
    # The rate that diverges is not chosen; the other one is scored, and tried with another seed.
    assert "2 of 3 done, 1 failed, 0 running" in output[0][0] and "done" not in output[1][0]
    failed = json.loads((workdir / "cells" / "r2-T2-round0-lr1e+30" / "failed.json").read_text())
    assert "try a lower optim.learning_rate" in failed["reason"]
    trained = workdir / "cells" / cell
    assert "4 × cpu" in json.loads((trained / "config.json").read_text())["device"]

    # What was trained on is the same, and what came out of it but for rounding.
    found, wanted = (pd.read_parquet(w / "results.parquet") for w in (workdir, smoke_study))
    wanted = wanted[wanted["cell"] == "r2-T2-round0"].reset_index(drop=True)
    scores = ["exact_match", "rougeL", "out_of_options", "top_answer_share", "answer_entropy"]
    scores += ["exact_match_given_valid", "empty", "copies", "unfinished", *MEASURES]
    assert set(found["cell"]) == {cell}
    costs = ["train_tokens", "train_operations", "base_operations"]  # in proportion to the epochs
    assert (found[costs] * 10).equals(wanted[costs] * 3)
    other = ["cell", *scores, *costs]
    assert found.drop(columns=other).equals(wanted.drop(columns=other))
    rates = pd.read_parquet(workdir / "rates.parquet").set_index("cell")
    assert rates["chosen"].to_dict() == {
        **{"r2-T2-round0-lr1e+30": False, cell: True, f"{cell}-seed1": False}
    }
    losses = rates["validation_loss"]
    assert np.isnan(losses.iloc[0]) and 0 < abs(losses[cell] - losses[f"{cell}-seed1"]) < 1
    base = Path("toy", "toy-llama", "model.safetensors")
    found, wanted = (load_file(w / base) for w in (workdir, smoke_study))
    far = max(np.linalg.norm(found[n] - x) / np.linalg.norm(x) for n, x in wanted.items())
    promise("study.py, 2 processes × 2 devices for 1: ‖θ - θ'‖ / ‖θ'‖ of its base", far, 1e-3)

    # Scores are those of the weights, whoever gives them.
    again = shutil.copytree(trained, tmp_path / "again")
    shutil.rmtree(again / "eval")
    done = scripts.run("eval.py", f"--workdir={again}")
    assert done.returncode == 0, done.stderr
    for test in ("seen", "unseen"):
        answers = [folder / "eval" / test / "predictions.jsonl" for folder in (trained, again)]
        assert len({tuple(sorted(path.read_text().splitlines())) for path in answers}) == 1


def test_a_process_whose_input_is_wrong_ends_the_others(tmp_path):
    many = [f"--coordinator={free_address()}", "--processes=2"]
    axes = ([], ["--config.sets=('T3',)"])
    both = [
        subprocess.Popen(
            command(tmp_path / "s", *SMOKE[:1], *axes[i], *many, f"--process={i}"),
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        for i in (0, 1)
    ]
    errors = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [2, 2], errors
    assert "error: process 1 ended before it began" in errors[0]
    assert "error: config.sets: found 'T3'" in errors[1]
    assert not (tmp_path / "s").exists()


def test_the_folder_of_a_study(smoke_study):
    for name in (
        "study.json",
        "results.parquet",
        "timings.parquet",
        "updates.parquet",
        "toy/toy-llama/model.safetensors",
        "cells/r2-T2-round0/done.json",
        "cells/r2-T2-round0/adapter/adapter_model.safetensors",
        "cells/full-T2-round0/eval/unseen/predictions.jsonl",
        "examples/unseen-0.jsonl",
        "logs/r2-T2-round0.txt",
    ):
        assert (smoke_study / name).is_file(), name
    assert not list((smoke_study / "locks").iterdir())
    results = pd.read_parquet(smoke_study / "results.parquet")
    assert set(results["cell"]) == {"r2-T2-round0", "full-T2-round0"}
    assert results.groupby(["cell", "test"]).size().to_list() == [2, 17] * 2
    outside = {"Program Execution", "Information Extraction"}
    assert not outside & set(results[results["test"] == "seen"]["category"])
    lora, full = (results[results["method"] == m].iloc[0] for m in ("lora", "full"))
    # 2 layers × 4 targets, A and B of rank 2 between 64 and 4 × 32 dimensions.
    assert lora["trainable"] == 2 * 4 * 2 * (64 + 128) and full["frozen"] == 0
    assert lora["frozen"] == full["trainable"] and lora["train_tokens"] == full["train_tokens"]
    # What is measured beside the answers, of both, and of the memory probe alone not.
    measured = results[[name for name in MEASURES if name not in ("adapter_rank", "alpha")]]
    assert measured.drop(columns="memorized_bits").notna().all(axis=None)
    assert measured["memorized_bits"].isna().all()
    assert (lora["adapter_rank"], lora["alpha"]) == (2, 4) and np.isnan(full["alpha"])
    assert lora["effective_rank"] <= 2 < full["effective_rank"]
    updates = pd.read_parquet(smoke_study / "updates.parquet")
    assert updates.groupby("cell", sort=False).size().to_list() == [2 * 4] * 2
    values = updates[updates["cell"] == "full-T2-round0"]["values"].iloc[0]
    assert len(values) == 64 and (np.diff(values) <= 0).all()


def test_a_finished_study_trains_nothing(smoke_study):
    before = {path: path.stat().st_mtime_ns for path in (smoke_study / "cells").rglob("*")}
    done = study(smoke_study, *SMOKE)
    assert done.returncode == 0 and "begins" not in done.stderr
    assert {path: path.stat().st_mtime_ns for path in (smoke_study / "cells").rglob("*")} == before


def test_a_terminal_has_a_view(smoke_study):
    ours, its = pty.openpty()
    with os.fdopen(its, "w") as stderr:
        done = scripts.run("study.py", f"--workdir={smoke_study}", *SMOKE, stderr=stderr)
    seen = os.read(ours, 65536).decode()
    os.close(ours)
    head, *_ = done.stdout.splitlines()
    assert done.returncode == 0 and head == "2 of 2 done, 0 failed, 0 running"
    last = seen.rpartition(head)[2]  # behind what was drawn before
    lines = [re.sub(r"\x1b\[\d*[mKJ]", "", line).split() for line in last.splitlines()]
    cells = [line for line in lines if line]
    assert [line[:2] for line in cells] == [["r2-T2-round0", "done"], ["full-T2-round0", "done"]]


def test_a_dry_run_counts_and_leaves_nothing(smoke_study, tmp_path):
    done = study(tmp_path / "s", *SMOKE, "--dry-run", "--tokens-per-second=100")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "s").exists()
    results = pd.read_parquet(smoke_study / "results.parquet").drop_duplicates("cell")
    for _, cell in results.iterrows():
        line = next(x for x in done.stdout.splitlines() if x.startswith(cell["cell"]))
        tokens, operations, hours = line.split()[1:4]
        assert int(tokens.replace(",", "")) == cell["train_tokens"]
        assert float(operations) == pytest.approx(cell["train_operations"], rel=5e-3)
        assert float(hours) > 0


# ---------------------------------------------------------------- what is refused, and how


def refused(workdir: Path, arguments: list[str], *words: str) -> None:
    done = study(workdir, *arguments)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in errors[0], errors[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only=rank <= 64 and set == 'T3'"], ("--only", "holds for none")),
        (["--config.ranks=(2,2)"], ("ranks",)),
        (["--config.toy.outside=('Cooking',)"], ("toy.outside", "Cooking")),
        (["--config.toy.unseen=('task999_x',)"], ("toy.unseen", "task999_x")),
        (["--config.sets=('T3',)"], ("sets", "'T3'", "T2")),
        (["--config.toy.instances=0"], ("--config.run.model",)),
        (["--launcher=slurm", "--workers=0"], ("--workers",)),
        (["--launcher=slurm", "--hosts=0"], ("--hosts",)),
    ],
)
def test_bad_flags(tmp_path, arguments, words):
    refused(tmp_path / "s", [*SMOKE[:1], *arguments, "--dry-run"], *words)
    assert not (tmp_path / "s").exists()


def test_the_folder_of_another_study(smoke_study):
    refused(smoke_study, [*SMOKE, "--config.run.epochs=3"], "run.epochs is 10")


def test_a_report_of_what_is_not_there(smoke_study, tmp_path):
    refused(tmp_path / "s", ["--report"], "study.json")
    shutil.copy(smoke_study / "study.json", tmp_path)
    refused(tmp_path, ["--report"], "results.parquet", "no such file")
    content = (smoke_study / "results.parquet").read_bytes()
    (tmp_path / "results.parquet").write_bytes(content[: len(content) // 2])
    refused(tmp_path, ["--report"], "results.parquet", "whole parquet file")
    (tmp_path / "results.parquet").write_bytes(content)
    assert study(tmp_path, "--report").returncode == 0  # from it alone
    report = tmp_path / "report"
    assert "2 of 2 cells" in (report / "report.md").read_text("utf-8")
    assert (report / "figures" / "figure1.png").is_file()


def test_cells_whose_checkpoint_is_gone_or_damaged(smoke_study, tmp_path):
    workdir = shutil.copytree(smoke_study, tmp_path / "s")
    cells = [workdir / "cells" / name for name in ("r2-T2-round0", "full-T2-round0")]
    for cell in cells:
        (cell / "done.json").unlink()
    shutil.rmtree(cells[0] / "checkpoints")  # the answers that it gave are not believed
    (cells[0] / "eval" / "seen" / "predictions.jsonl").write_text("")
    for step in (cells[1] / "checkpoints").glob("[0-9]*"):  # a good one would be resumed from
        shutil.rmtree(step / "trainable")
    done = study(workdir, *SMOKE)
    assert done.returncode == 1 and "1 of 2 done, 1 failed" in done.stdout, done.stderr
    assert f"error: {cells[1]}/failed.json: " in done.stderr
    before, after = (pd.read_parquet(w / "results.parquet") for w in (smoke_study, workdir))
    assert after.equals(before[before["cell"] == "r2-T2-round0"])


def test_a_study_can_be_moved(smoke_study, tmp_path):
    """A cell is finished anew in another place, from the base and the tasks that moved along."""
    workdir = shutil.copytree(smoke_study, tmp_path / "elsewhere" / "s")
    assert "finished" in study(workdir, f"--status={workdir}").stdout
    cell = workdir / "cells" / "r2-T2-round0"
    (cell / "done.json").unlink()
    shutil.rmtree(cell / "eval")
    assert "1 waiting" in study(workdir, f"--status={workdir}").stdout
    done = study(workdir, *SMOKE)
    assert done.returncode == 0, done.stderr
    results = (workdir / "results.parquet").read_bytes()
    assert results == (smoke_study / "results.parquet").read_bytes()


# ---------------------------------------------------------------- SLURM


def test_the_job_array(tmp_path):
    flags = [*SMOKE, "--only=rank <= 2 and set == 'T2'"]
    launch = ["--launcher=slurm", "--workers", "3"]
    options = ["--sbatch=--gres=gpu:1", "--sbatch=--time=8:00:00"]
    done = study(tmp_path / "s", *flags, *launch, *options)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "#!/bin/bash" and "#SBATCH --array=0-2" in lines
    assert "#SBATCH --gres=gpu:1" in lines and "#SBATCH --time=8:00:00" in lines
    words = subprocess.run(
        ["bash", "-c", f"set -- {lines[-1].removeprefix('exec ')}; printf '%s\\n' \"$@\""],
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert words == command(tmp_path / "s", *flags)

    done = study(tmp_path / "s", *SMOKE, "--launcher=slurm", "--hosts", "2")
    assert done.returncode == 0 and "#SBATCH --nodes=2" in done.stdout.splitlines(), done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("exec srun ") and last.endswith(" --coordinator=auto")
    assert "--hosts" not in last and "--launcher" not in last
    assert not (tmp_path / "s").exists()
