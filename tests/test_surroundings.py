"""The scripts where the surroundings are poor: an ASCII terminal, a platform that is not there."""

from __future__ import annotations

import os
import subprocess

import pytest

from jax_lora.data.toy import write_checkout
from tests.scripts import REPOSITORY, command


def started(script, *arguments, **environment):
    return subprocess.run(
        command(script, *arguments),
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


def test_what_an_ascii_stdout_has_no_letter_for_is_replaced(tmp_path, tiny_model):
    toy = write_checkout(tmp_path / "toy", instances_per_task=6)
    done = started(
        "train.py",
        f"--config={REPOSITORY}/configs/lora.py:rank=2",
        f"--config.model={tiny_model}",
        f"--config.data.path={toy}",
        "--config.data.test_per_task=2",
        "--config.data.train_per_task=2",
        "--show=2",
        PYTHONIOENCODING="ascii",
        LC_ALL="C",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and "?" in done.stdout


@pytest.mark.parametrize("script", ["train.py", "convert.py"])
def test_a_platform_that_is_not_there_is_one_line(tmp_path, tiny_model, script):
    arguments = {
        "train.py": [
            f"--config={REPOSITORY}/configs/lora.py:rank=2",
            f"--workdir={tmp_path / 'run'}",
        ],
        "convert.py": [str(tiny_model), str(tmp_path / "out")],
    }[script]
    done = started(script, *arguments, JAX_PLATFORMS="cuda")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: JAX_PLATFORMS: found 'cuda', expected platforms of this machine")
    assert sorted(path.name for path in tmp_path.iterdir()) == []
