"""The built wheel, outside of the checkout, holds what the checkout holds and does what it does."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pandas as pd
import pytest

import jax_lora
from jax_lora.data.toy import write_checkout
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow

PROGRAM = """
import json, sys
from importlib import resources
import jax_lora

folder, model, data = sys.argv[1:]
assert jax_lora.__file__.startswith(folder), jax_lora.__file__
config = jax_lora.RunConfig()
recipe = config.to_dict()
run = jax_lora.Run.open(config.replace(model=model, **json.loads(data)), "run")
losses = run.train().loss.to_list()
run.score(["seen"]).to_csv("scores.csv", index=False)
paper = json.loads(resources.files("jax_lora.study").joinpath("paper.json").read_text("utf-8"))
print(json.dumps({"recipe": recipe, "losses": losses, "paper": paper}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, since setuptools leaves its folders beside what it builds."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in tracked("jax_lora", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, source / name)
    pip("wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={out}", str(source))
    (path,) = out.glob("jax_lora-*.whl")
    return path


def tracked(*names: str) -> list[str]:
    command = ["git", "ls-files", "--", *names]
    return subprocess.check_output(command, cwd=REPOSITORY, text=True).splitlines()


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_file_of_the_package_is_in_it(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    assert names == set(tracked("jax_lora"))


def test_it_trains_and_scores_as_the_checkout_does(wheel, tiny_model, tmp_path):
    # What it needs is in this environment; that all of it is declared is a test of test_house.py.
    package, elsewhere = tmp_path / "package", tmp_path / "elsewhere"
    pip("install", "--no-deps", f"--target={package}", str(wheel))
    elsewhere.mkdir()
    keys = {
        "max_steps": 2,
        "batch_size": 4,
        "micro_tokens": 768,
        "optim.warmup_steps": 1,
        "data.path": str(write_checkout(tmp_path / "toy", instances_per_task=12)),
        "data.test_per_task": 1,
        "data.train_per_task": 2,
        "data.buckets": [384],
        "data.source_length": 320,
        "eval.buckets": [384],
        "eval.max_new_tokens": 3,
    }
    command = [sys.executable, "-c", PROGRAM, str(package), str(tiny_model), json.dumps(keys)]
    environment = os.environ | {"PYTHONPATH": str(package)}
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])

    config = jax_lora.RunConfig()
    assert found["recipe"] == config.to_dict() and found["paper"]
    run = jax_lora.Run.open(config.replace(model=str(tiny_model), **keys), tmp_path / "run")
    assert found["losses"] == run.train().loss.to_list() and np.isfinite(found["losses"]).all()
    scores = run.score(["seen"])
    ours = pd.read_csv(elsewhere / "scores.csv")
    pd.testing.assert_frame_equal(ours, scores.reset_index(drop=True), check_dtype=False)
