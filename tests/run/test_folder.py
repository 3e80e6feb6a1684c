"""A run's folder: one owner, steps that are not finite, damage in its files, and its status."""

import gc
import json
import math
import os
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora
from jax_lora import locks
from jax_lora.errors import ConfigError, DataError, RunFailed, Stopped
from jax_lora.files import read_json, read_jsonl
from jax_lora.run import folder, nonfinite, prepare
from jax_lora.run.status import status
from jax_lora.training.nonfinite import Cause
from jax_lora.weights import base
from tests.study.test_runner import foreign


@pytest.fixture(scope="module")
def config(tiny_run):
    return tiny_run(max_steps=6, micro_tokens=1536, checkpoint_every=2)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "r2"
    jax_lora.Run.open(config, workdir).train()
    return workdir


# ---------------------------------------------------------------- one owner


def test_a_folder_at_work_is_left_alone_and_read_freely(config, finished):
    before = sorted(finished.rglob("*"))
    with locks.take(finished, folder.LOCK, what="training"):
        run = jax_lora.Run.open(config, finished)
        for work in (run.train, lambda: run.score(["seen"])):
            with pytest.raises(ConfigError) as caught:
                work()
            assert f"{finished}: training runs here, process {os.getpid()}" in str(caught.value)
        assert len(run.metrics()) == 6
        assert f"owner:           process {os.getpid()} on" in status(finished)
    assert sorted(finished.rglob("*")) == before


def test_a_finished_adapter_names_its_base_by_digest(config, finished):
    wanted = {"base": config.model, "base_digest": base.digest(config.model)}
    assert read_json(finished / "adapter" / "jax_lora.json") == wanted


def test_wrong_input_leaves_no_folder(config, tmp_path):
    (tmp_path / "there").mkdir()
    for workdir in (tmp_path / "a" / "b" / "r", tmp_path / "there"):
        with pytest.raises(ConfigError, match="config.data.set"):
            jax_lora.Run.open(config.replace(**{"data.set": "T99"}), workdir).train()
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


@pytest.mark.parametrize("content", [b"", b'{"host": "fa', b"[]", b"\xff"])
def test_a_lock_that_no_owner_wrote_is_passed(config, finished, content):
    path = finished / f"{folder.LOCK}.1"
    path.write_bytes(content)
    jax_lora.Run.open(config, finished).train()
    assert not path.exists()


class Store:
    """The runtime's keys and values, for two threads."""

    def __init__(self):
        self._values, self._changed = {}, threading.Condition()

    def key_value_set(self, key, value):
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def blocking_key_value_get(self, key, timeout_in_ms):
        with self._changed:
            assert self._changed.wait_for(lambda: key in self._values, timeout_in_ms / 1000)
            return self._values[key]


@pytest.mark.parametrize("is_held", [False, True])
def test_all_processes_of_a_run_hear_whether_the_first_has_the_folder(
    tmp_path, monkeypatch, is_held
):
    store, outcomes = Store(), {}
    monkeypatch.setattr(folder, "_told", iter([7, 7]))  # one number in each process

    def process(is_primary):
        try:
            with folder.owned(tmp_path / "r", "training", store, is_primary):
                outcomes[is_primary] = "owns"
        except ConfigError as error:
            outcomes[is_primary] = str(error)

    if is_held:
        (tmp_path / "r").mkdir()
        lock = locks.take(tmp_path / "r", folder.LOCK, what="scoring")
    threads = [threading.Thread(target=process, args=(first,)) for first in (False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes[True] == outcomes[False]
    assert ("scoring runs here" in outcomes[True]) == is_held
    if is_held:
        lock.release()


# ---------------------------------------------------------------- steps that are not finite


def poison(monkeypatch, bad, leaf):
    """Make the `leaf` of a step's sums not finite for micro-batches with a `bad` example."""
    build = prepare.build

    def built(given, workdir):
        ready = build(given, workdir)
        accumulate = ready.step.accumulate

        def poisoned(gradients, loss, diff_params, step, frozen, micro, weight):
            gradients, loss = accumulate(gradients, loss, diff_params, step, frozen, micro, weight)
            if int(step) + 1 == bad[0] and (np.asarray(micro.segment_ids) == bad[1]).any():
                loss = loss * (math.nan if leaf == "loss" else 1)
                gradients = jax.tree.map(lambda x: x * jnp.nan, gradients)
            return gradients, loss

        ready.step = ready.step._replace(accumulate=poisoned)
        return ready

    monkeypatch.setattr(prepare, "build", built)


def ids(config, step, place):
    given = prepare.read_inputs(config, Path(config.data.path))
    number = given.batches.indices(step - 1)[place]
    (micro,) = [
        i for i, one in enumerate(given.batches.at(step - 1)) if (one.segment_ids == place).any()
    ]
    return given.taskset.examples[number].id, micro + 1


@pytest.mark.parametrize("leaf", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_named_to_the_example(
    config, finished, monkeypatch, tmp_path, leaf
):
    poison(monkeypatch, (3, 5), leaf)
    run = jax_lora.Run.open(config, tmp_path / "r")
    with pytest.raises(RunFailed) as caught:
        run.train()
    name, micro = ids(config, 3, 5)
    text = str(caught.value)
    assert f"step 3: not finite: {leaf} of micro-batch {micro} of 2" in text
    assert name in text and "the last checkpoint is step 2" in text
    assert list(run.metrics().step) == [1, 2]
    said = read_json(run.workdir / "error.json")
    assert said["reason"] == text and said["what"] == "training"
    for words in ("failed while training", "2 of 6", "last checkpoint: step 2", text):
        assert words in status(run.workdir)
    monkeypatch.undo()  # a fault of the machine: the run goes on as if nothing had been
    with pytest.raises(Stopped):
        run.train(asked_to_stop=lambda: len(run.metrics()) >= 3)
    assert "stopped; rerun the same command" in status(run.workdir)
    assert run.train().loss.equals(jax_lora.Run.open(None, finished).metrics().loss)
    assert not (run.workdir / "error.json").exists()


def test_skipped_steps_change_nothing_and_are_counted(config, monkeypatch, tmp_path):
    poison(monkeypatch, (3, 5), "gradient")
    run = jax_lora.Run.open(config.replace(on_nonfinite="skip"), tmp_path / "r")
    metrics = run.train()
    assert list(metrics.step) == [1, 2, 3, 4, 5, 6]
    assert np.isfinite(metrics.loss).tolist() == [True] * 6
    assert np.isfinite(metrics.gradient_norm).tolist() == [True, True, False, True, True, True]
    (said,) = [
        row["skipped"] for row in read_jsonl(run.workdir / "metrics.jsonl") if "skipped" in row
    ]
    name, micro = ids(config, 3, 5)
    assert f"step 3: not finite: gradient of micro-batch {micro} of 2" in said and name in said
    assert "skipped:         1 steps: 3" in status(run.workdir)


def test_a_step_is_skipped_whose_cause_is_not_found_again(config, monkeypatch, tmp_path):
    # As after a fault of the hardware, or where the sum of good micro-batches overflows.
    poison(monkeypatch, (3, 5), "gradient")
    gone = Cause("gradient of the step, though of none of its micro-batches", None)
    monkeypatch.setattr(nonfinite, "cause", lambda *args: gone)
    run = jax_lora.Run.open(config.replace(on_nonfinite="skip"), tmp_path / "r")
    assert list(run.train().step) == [1, 2, 3, 4, 5, 6]
    assert "skipped:         1 steps: 3" in status(run.workdir)


def test_examples_that_are_left_out_do_not_shift_the_others(config, tmp_path):
    long = {"instruction": "word " * 400, "output": "x"}
    rows = [long, *({"instruction": f"question {i}", "output": f"answer {i}"} for i in range(5))]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps({"instruction": "another", "output": "y"}) + "\n")
    own = {"data.path": str(path), "data.test_path": str(test), "optim.warmup_steps": 0}
    given = prepare.read_inputs(config.replace(**own), tmp_path / "r")
    assert len(given.taskset.examples) == 6 and len(given.rows) == len(given.examples) == 5
    for example, row in zip(given.examples, given.rows, strict=True):
        assert example.instruction in row.prompt


def test_where_no_row_fits_it_is_one_line(config, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"instruction": "word " * 400, "output": "x"}) + "\n")
    own = {"data.path": str(path), "optim.warmup_steps": 0}
    with pytest.raises((ConfigError, DataError), match="found n"):
        prepare.read_inputs(config.replace(**own), tmp_path / "r")


@pytest.mark.parametrize("kept", ["checkpoints", "pissa"])
def test_what_an_unknown_run_left_is_not_gone_on_with(config, tmp_path, kept):
    (tmp_path / kept / "2").mkdir(parents=True)
    with pytest.raises(DataError, match=f"config.json: not found, and .*{kept} is of an earlier"):
        folder.check_same_run(tmp_path, config, {})


def test_other_rows_are_another_run(config, finished):
    # Where the tokenizer's files or its chat template changed beside the same weights.
    saved = read_json(finished / "config.json")
    digests = {name: saved[name] for name in ("data_fingerprint", "base_digest", "rows_digest")}
    folder.check_same_run(finished, config, digests)
    folder.check_same_run(finished, config, digests | {"init_digest": "of a newer version"})
    with pytest.raises(ConfigError, match="rows_digest is .* there and 'other' here"):
        folder.check_same_run(finished, config, digests | {"rows_digest": "other"})


@pytest.mark.parametrize(("name", "stays"), [(".git", True), (".lock.3", False), ("x", True)])
def test_what_is_not_ours_stays_where_a_folder_could_not_be_filled(tmp_path, name, stays):
    (tmp_path / "r" / name).mkdir(parents=True)
    with pytest.raises(OSError, match="full"), folder.all_or_nothing(tmp_path / "r"):
        raise OSError("full")
    assert (tmp_path / "r" / name).exists() == stays


def test_a_resumed_run_holds_one_copy_of_what_trains(config, tmp_path):
    seventh = config.replace(**{"lora.rank": 7})
    jax_lora.Run.open(seventh, tmp_path / "r").train()
    gc.collect()
    given = prepare.read_inputs(seventh, tmp_path / "r")
    training = prepare.build(given, tmp_path / "r")
    shape = next(x.shape for x in jax.tree.leaves(training.state.trainable) if 7 in x.shape)
    gc.collect()
    held = [x for x in jax.live_arrays() if x.shape == shape and not x.is_deleted()]
    wanted = [x for x in jax.tree.leaves(training.state) if x.shape == shape]
    assert training.start == 6 and len(held) == len(wanted)


# ---------------------------------------------------------------- damage in metrics.jsonl


def test_a_damaged_line_of_metrics_costs_that_line(config, finished, tmp_path, caplog):
    damages = [b'{"step": 3, "lo', b"null", b"\xff", b'{"loss": 1.0}', b'"x"']
    workdir = tmp_path / "r"
    run = jax_lora.Run.open(config, workdir)
    with pytest.raises(Stopped):
        run.train(asked_to_stop=lambda: len(run.metrics()) >= 3)
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], *damages, *lines[2:]]))
    caplog.clear()
    with caplog.at_level("WARNING", "jax_lora"):
        metrics = run.train()
    assert list(metrics.step) == [1, 3, 4, 5, 6]
    said = [record.getMessage() for record in caplog.records]
    assert sum(str(path) in text and "passed over" in text for text in said) == len(damages)
    expected = jax_lora.Run.open(None, finished).metrics().loss.drop(index=1)
    assert metrics.loss.tolist() == expected.tolist()
    assert len(read_jsonl(path)) == 5  # written whole again


@pytest.mark.parametrize("damage", [b'{"task": "a", "id', b"[]", b'{"prediction": "x"}'])
def test_a_damaged_line_of_predictions_is_answered_again(finished, tmp_path, caplog, damage):
    workdir = shutil.copytree(finished, tmp_path / "r")
    run = jax_lora.Run.open(None, workdir)
    scores = run.score(["unseen"])
    path = workdir / "eval" / "unseen" / "predictions.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], damage, *lines[2:]]))
    with caplog.at_level("WARNING", "jax_lora"):
        assert run.score(["unseen"]).equals(scores)
    assert sorted(path.read_bytes().split(b"\n")) == sorted(lines)
    assert (f"{path}: line 2" in caplog.text) == (damage[:2] != b'{"' or b"}" not in damage)


# ---------------------------------------------------------------- status


def test_status_of_a_finished_run_needs_its_files_alone(finished, tmp_path):
    moved = shutil.copytree(finished, tmp_path / "moved")
    text = status(moved)
    for words in (
        "state:           finished",
        "last step:       6 of 6",
        "last checkpoint: step 6",
        "tokens/s, ",
    ):
        assert words in text, text
    assert "owner" not in text and "time left" not in text and "error" not in text


def test_status_of_an_interrupted_run(finished, tmp_path):
    moved = shutil.copytree(finished, tmp_path / "moved")
    shutil.rmtree(moved / "checkpoints" / "6")
    rows = read_jsonl(moved / "metrics.jsonl")[:4]
    for row, when in zip(rows, (0, 10, 20, 1000), strict=True):  # it was interrupted before step 4
        row["time"] = when
    (moved / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    foreign(moved, folder.LOCK, 400.0)
    text = status(moved)
    for words in (
        "state:           stopped; rerun the same command to resume",
        "last step:       4 of 6",
        "last checkpoint: step 4",
        "10 s per step",
        "time left:       20 s of training",
    ):
        assert words in text, text
    (moved / f"{folder.LOCK}.1").touch()
    assert "owner:           process 1 on far" in status(moved)


def test_status_of_what_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError):
        status(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="found no run's config"):
        status(tmp_path)
