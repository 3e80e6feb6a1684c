"""train.py and eval.py on 8 devices, of one process or of two, do what they do on one."""

import json
import os
import re
import shutil
import signal
import subprocess

import pytest
from safetensors.numpy import load_file

from jax_lora.data.toy import write_checkout
from jax_lora.run import Run, initial_weights
from jax_lora.weights import base as base_weights
from tests.conftest import REPOSITORY, many_cpus
from tests.parity.training import adapter_tensors, worst_error
from tests.processes import free_address
from tests.scripts import command
from tests.test_scripts import lines, training

pytestmark = pytest.mark.slow  # minutes
STEPS = 12
SHORT = [
    "--config.data.buckets=(384,)",
    "--config.data.source_length=384",
    "--config.eval.buckets=(384,)",
]


def start(arguments, devices=1):
    return subprocess.Popen(
        arguments,
        cwd=REPOSITORY,
        env=os.environ | many_cpus(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """What it printed, on stdout and stderr."""
    output = process.communicate()
    assert process.returncode == 0, output[1]
    return output


@pytest.fixture(scope="module")
def train(tiny_model, tmp_path_factory):
    """(folder, flags) → the command."""
    toy = write_checkout(tmp_path_factory.mktemp("toy"), instances_per_task=12)

    def arguments(workdir, *more):
        steps = f"--config.max_steps={STEPS}"
        replaced = {flag.split("=")[0] for flag in SHORT}  # lists may be given once only
        flags = training(tiny_model, toy, workdir, steps)
        flags = [flag for flag in flags if flag.split("=")[0] not in replaced]
        return command("train.py", *flags, *SHORT, *more)

    return arguments


@pytest.fixture(scope="module")
def one(train, tmp_path_factory):
    """The folder of a run on one device."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    finish(start(train(workdir)))
    return workdir


@pytest.fixture(scope="module")
def start_of_one(one):
    """The adapter that the run on one device began with, drawn again from its seed."""
    config = Run.open(None, one).config
    shape = base_weights.read_config(config.model)
    return adapter_tensors(initial_weights.adapters_of(config, shape))


def adapter(workdir):
    """The adapter that a run wrote, by the names of `adapter_tensors`."""
    tensors = load_file(workdir / "adapter" / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model.model."): x for name, x in tensors.items()}


def same(promise, what, workdir, one, start):
    """The losses and the adapter of two runs from this start are equal but for rounding."""
    found, wanted = lines(workdir), lines(one)
    assert [m["step"] for m in found] == list(range(1, STEPS + 1))
    worst = max(abs(x["loss"] - y["loss"]) for x, y in zip(found, wanted, strict=True))
    promise(f"train.py {what} instead of 1: losses of {STEPS} steps", worst, 1e-5)
    worst = worst_error(adapter(workdir), adapter(one), start)
    promise(f"train.py {what} instead of 1: ‖θ − θ'‖ / ‖θ' − θ₀‖ of every A and B", worst, 1e-3)


def test_eight_devices(train, one, start_of_one, tmp_path, promise):
    # All other meshes of eight: training/test_many_devices.py.
    workdir, mesh = tmp_path / "run", (2, 2, 2)
    axes = zip(("data", "fsdp", "tensor"), mesh, strict=True)
    finish(start(train(workdir, *(f"--config.mesh.{axis}={n}" for axis, n in axes)), devices=8))
    assert "8 × cpu" in json.loads((workdir / "config.json").read_text())["device"]
    same(promise, f"on 8 devices, mesh {mesh}", workdir, one, start_of_one)


def test_two_processes_stop_together_and_one_device_goes_on(
    train, one, start_of_one, tmp_path, promise
):
    workdir = tmp_path / "run"
    address = free_address()
    many = (f"--coordinator={address}", "--processes=2")
    both = [start(train(workdir, *many, f"--process={i}"), devices=4) for i in (0, 1)]
    seen = ""
    while f" 2/{STEPS} " not in seen:  # its bar
        letter = both[0].stderr.read(1)
        assert letter, seen
        seen += letter
    both[1].send_signal(signal.SIGTERM)
    output = [process.communicate() for process in both]
    stops = []
    for (_, stderr), process in zip(output, both, strict=True):
        assert process.returncode == 75, stderr
        stops.append(re.search(rf"stopped at step (\d+) of {STEPS}; rerun the same", stderr)[1])
    assert stops[0] == stops[1]
    assert "trainable" in output[0][0] and "trainable" not in output[1][0]
    stdout, _ = finish(start(train(workdir)))
    assert "resuming from step" in stdout
    same(promise, "in 2 processes of 4 devices, then on 1,", workdir, one, start_of_one)


def test_answers_of_eight_devices(one, tmp_path):
    answers = []
    for devices, share in ((1, 1), (8, 2)):  # four copies of the weights
        workdir = tmp_path / f"{devices}-{share}"
        shutil.copytree(one, workdir)
        flags = (f"--workdir={workdir}", "--sets=unseen", f"--devices_per_copy={share}")
        finish(start(command("eval.py", *flags), devices))
        output = (workdir / "eval" / "unseen" / "predictions.jsonl").read_text()
        answers.append(sorted(output.splitlines()))
    assert answers[0] == answers[1]


def test_nothing_depends_on_how_work_is_cut(one):
    check = command("eval.py", f"--workdir={one}", "--check", "--check_prompts=16")
    stdout, _ = finish(start(check, devices=8))
    for name in ("the same again", "one at a time", "shuffled", "packed", "4 × 1"):
        assert stdout.count(f"  {name} ") == 1, stdout
    assert stdout.count("  on 8 devices ") == 2, stdout
