"""A run that is killed again and again ends as if nothing had happened."""

import json
import subprocess
import sys

import pytest

from jax_lora.data.toy import write_checkout
from tests.conftest import REPOSITORY

KILLS, STEPS = 4, 24


def curve(workdir):
    """(step, loss, gradient norm) of every logged step."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["gradient_norm"]) for line in lines]


@pytest.mark.slow  # as long as many other tests together
def test_kills_leave_no_trace(tiny_model, tmp_path):
    toy = write_checkout(tmp_path / "toy", instances_per_task=12)
    arguments = [
        f"--config={REPOSITORY}/configs/lora.py:rank=2",
        f"--config.model={tiny_model}",
        f"--config.data.path={toy}",
        f"--config.max_steps={STEPS}",
        "--config.batch_size=2",
        "--config.checkpoint_every=3",
        "--config.optim.warmup_steps=1",
        "--config.optim.learning_rate=1e-3",
        "--config.data.test_per_task=2",
        "--config.data.train_per_task=4",
        "--config.data.buckets=(384,)",
        "--config.data.source_length=384",
        "--config.eval.buckets=(384,)",
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = subprocess.run(
        [
            sys.executable,
            str(REPOSITORY / "tests/training/killed.py"),
            *map(str, (whole, killed, KILLS)),
            "--",
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    moments = list(map(int, done.stdout.split("\n")[-2].split()))
    assert len(moments) == KILLS and len(set(moments)) > 2, moments
    assert curve(killed) == curve(whole) and len(curve(whole)) == STEPS
    name = "adapter/adapter_model.safetensors"
    assert (killed / name).read_bytes() == (whole / name).read_bytes()
