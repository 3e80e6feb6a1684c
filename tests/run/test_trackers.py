"""The trackers of a run: TensorBoard, Weights & Biases offline, and none."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest

from jax_lora.config import RunConfig
from jax_lora.errors import ConfigError
from jax_lora.files import read_json, read_jsonl
from jax_lora.run import trackers
from jax_lora.run.folder import MetricsLog

CONFIG = RunConfig()
VALUES = {"loss": 2.5, "gradient_norm": float("nan")}


def write(workdir, config, start=0, steps=(1, 2)):
    log = MetricsLog(workdir, start, trackers.open_tracker(workdir, start, config))
    for step in steps:
        log.write(step, VALUES | {"loss": float(step)})
    log.close()


def test_tensorboard_is_the_default_and_none_writes_metrics_alone(tmp_path):
    write(tmp_path, CONFIG.replace(tracker="none"))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    write(tmp_path, CONFIG)
    assert list((tmp_path / "tensorboard").iterdir())
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"], row["gradient_norm"]) for row in rows] == [
        (1, 1.0, None),
        (2, 2.0, None),
    ]


def test_a_tracker_changes_no_result_and_a_resumed_run_may_have_another():
    assert CONFIG.replace(tracker="wandb").identity() == CONFIG.identity()
    with pytest.raises(ConfigError, match="config.tracker: found 'mlflow', expected one of"):
        CONFIG.replace(tracker="mlflow")


def test_what_is_not_installed_is_one_line_before_any_work(monkeypatch, tmp_path):
    from jax_lora.run import prepare

    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    config = CONFIG.replace(tracker="wandb", model="org/none", **{"data.path": "nowhere"})
    with pytest.raises(ConfigError, match=r"pip install 'jax-lora\[wandb\]'"):
        prepare.read_inputs(config, tmp_path / "run")


class FakeRun:
    def __init__(self):
        self.rows, self.finished = [], False

    def log(self, values, step):
        self.rows.append((step, values))

    def finish(self):
        self.finished = True


def fake_wandb(calls, fails=False):
    """The calls of wandb that are made, kept."""

    class Error(Exception):
        pass

    def init(**options):
        if fails:
            raise Error("no API key\nconfigured")
        calls.append((options, FakeRun()))
        return calls[-1][1]

    return SimpleNamespace(
        init=init,
        Settings=lambda **options: options,
        errors=SimpleNamespace(Error=Error),
        __spec__=object(),
    )


def test_a_resumed_run_goes_on_with_its_run_of_wandb(monkeypatch, tmp_path):
    calls: list = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(calls))
    config = CONFIG.replace(tracker="wandb", seed=7)
    write(tmp_path / "r7", config)
    write(tmp_path / "r7", config, start=1, steps=(2, 3))
    (first, one), (second, two) = calls
    assert first["id"] == second["id"] and second["resume"] == "allow"
    assert first["name"] == "r7" and first["config"]["seed"] == 7
    assert [step for step, _ in one.rows + two.rows] == [1, 2, 2, 3]
    assert one.rows[0][1]["loss"] == 1.0 and one.finished and two.finished
    assert not (tmp_path / "r7" / "tensorboard").exists()


def test_a_missing_login_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb([], fails=True))
    with pytest.raises(ConfigError, match="no API key configured; expected a login, or WANDB_MOD"):
        trackers.open_tracker(tmp_path, 0, CONFIG.replace(tracker="wandb"))


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs the extra wandb")
@pytest.mark.filterwarnings("ignore")  # wandb's own
def test_weights_and_biases_offline(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = CONFIG.replace(tracker="wandb")
    write(tmp_path, config)
    write(tmp_path, config, start=1, steps=(2, 3))
    importlib.import_module("wandb").teardown()  # its process writes until then
    known = read_json(tmp_path / "wandb_run.json")["id"]
    runs = sorted((tmp_path / "wandb").glob(f"offline-run-*-{known}/run-{known}.wandb"))
    assert runs and all(path.stat().st_size for path in runs)
    assert b"learning_rate" in b"".join(path.read_bytes() for path in runs)  # of the config
