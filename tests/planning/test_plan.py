"""plan.py: the verdicts it prints, and its one-line errors."""

import importlib
import re
import subprocess

import pytest

from jax_lora.config import RunConfig
from jax_lora.errors import ConfigError
from jax_lora.planning import report
from jax_lora.weights import base as base_weights
from tests import scripts
from tests.conftest import REPOSITORY


def config(name, argument=None, **keys):
    found = importlib.import_module(f"configs.{name}").get_config(argument)
    found.update_from_flattened_dict({key.replace("__", "."): x for key, x in keys.items()})
    return found


def lora(rank, **keys):
    return config("lora_7b_a100", f"rank={rank}", **keys)


def full(**keys):
    return config("full_7b_8xa100", **keys)


def printed(made, target, tokens=None):
    typed = RunConfig.from_config_dict(made)
    model = typed.model or "llama-7b"
    shape = base_weights.known_or_read_config(model)
    return "\n".join(report.plan(typed, shape, model, target, tokens))


def test_the_papers_claim_and_what_a_run_needs():
    text = printed(lora(2048), "a100-80gb")
    assert "2,147,483,648 trainable (24.167%)" in text
    assert re.search(r"by formula it fits: [\d.]+ GiB of 75\.3 usable", text)
    assert re.search(r"^base +12\.55$", text, re.M)
    assert re.search(r"^optimizer +16\.00$", text, re.M)
    assert re.search(r"ceiling: 6,962 tokens/s at 312 TFLOP/s", text)
    assert re.search(r"T100, 474 steps: 0\.12 days", text)
    assert re.search(r"largest micro-batch that fits: (\d+) × 1152 tokens", text)


@pytest.mark.parametrize(
    ("made", "target", "line"),
    [
        (
            lora(4096),
            "a100-80gb",
            "2 devices would do, --target=a100-80gb-2 --config.mesh.fsdp=2",
        ),
        (lora(4096, mesh__fsdp=2), "a100-80gb", "it fits"),
        (lora(4096), "a100-80gb-2", "it fits"),
        (lora(16), "a100-80gb", "it fits"),
        (full(mesh__fsdp=-1), "a100-80gb-1", "it does not fit"),
        (full(), "a100-80gb-8", "GiB of 75.3 usable on each of 8, "),
        (full(), "a100-80gb", "8 × a100-80gb"),  # as many as the config's mesh
        (config("full"), "v5e-8", "it does not fit"),
        (config("lora", model="llama-3-70b"), "v5p-8", "4 × v5p"),
        (config("lora", model="smollm2-135m"), "cpu", "it fits"),
    ],
)
def test_verdicts(made, target, line):
    assert line in printed(made, target)


def test_shorter_examples_take_less_time():
    def days(tokens):
        return float(re.search(r"([\d.]+) days", printed(lora(16), "h100", tokens))[1])

    assert days(288) < 0.3 * days(1152)
    with pytest.raises(ConfigError, match="--tokens: found 1153, expected 1 to 1152"):
        printed(lora(16), "h100", 1153)


@pytest.mark.parametrize(
    ("made", "target", "line"),
    [
        (lora(16), "a101", "--target: found 'a101', expected one of"),
        (full(), "a100-80gb-6", "config.mesh: found 1 × 8 × 1 on 6 devices"),
        (lora(0), "h100", "config.lora.rank: found 0"),
        (lora(16, data__set="T7"), "h100", "config.data.set: found 'T7'"),
        (lora(16, lora__targets=("q",)), "h100", "lora targets: found q, expected some of q_proj"),
        (lora(16, attention="cudnn"), "v5e-8", "attention: 'cudnn' needs"),
        (lora(16, remat="fully"), "h100", "config.remat: found 'fully', expected one of"),
        (lora(16, batch_size=0), "h100", "config.batch_size: found 0, expected at least 1"),
    ],
)
def test_wrong_input_is_refused(made, target, line):
    with pytest.raises(ConfigError, match=re.escape(line)):
        printed(made, target)


NOWHERE = ("--target=h100", "--config.model=nowhere")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--target=h100"], "--config: found none"),
        ([f"--config={REPOSITORY}/configs/lora.py", *NOWHERE], "nowhere"),
    ],
)
def test_an_error_is_a_line_and_exit_code_2(arguments, line):
    done = scripts.run("plan.py", *arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and line in done.stderr


def test_a_plan_in_a_process_of_its_own():
    arguments = ("--config=configs/lora_7b_a100.py:rank=2048", "--target=a100-80gb")
    command = scripts.command("plan.py", *arguments)
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.rstrip("\n") == printed(lora(2048), "a100-80gb")
