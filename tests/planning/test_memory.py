"""The memory formula: exact where it counts, near the compilers where it estimates."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import jax
import pytest

from benchmarks import scale
from jax_lora.model.arch import ATTENTION
from jax_lora.model.families import CONFIGS
from jax_lora.planning import counts, steps
from jax_lora.planning import memory as planning_memory
from jax_lora.planning.compile import need
from jax_lora.planning.memory import fewest, largest, memory
from jax_lora.planning.targets import DEVICES
from jax_lora.training.optimizers import OPTIMIZERS
from tests.conftest import REPOSITORY, many_cpus

A100 = DEVICES["a100-80gb"]
GROUPS = scale.groups()
ROWS = GROUPS["fitted"]  # the coefficients were read off these
HELD_OUT = scale.read_record(scale.HELD_OUT)


def label(row):
    return "-".join(str(value) for value in row["setup"].values())


def seven(rank, **fields):
    return scale.step("llama-7b", rank, "a100-80gb", **fields)


@pytest.mark.parametrize("row", ROWS, ids=label)
def test_the_formula_agrees_with_the_rows_that_it_was_fitted_to(row):
    agrees(row)


@pytest.mark.parametrize("row", GROUPS["held out, 7B and above"], ids=label)
def test_the_formula_agrees_with_rows_that_it_was_not_fitted_to(row):
    agrees(row)


@pytest.mark.parametrize("row", GROUPS["quantized bases"], ids=label)
def test_a_step_on_a_quantized_base_dequantizes_no_more_than_a_layer(row):
    # What the formula counts besides the stored base: the kernels of one layer in bfloat16.
    agrees(row)


def test_a_7b_step_in_nf4_fits_16_gib_by_the_compilers_word():
    found = {
        row["setup"]["kind"]: scale.compiled_peak(row)
        for row in GROUPS["quantized bases"]
        if (row["setup"]["model"], row["setup"]["rank"]) == ("llama-7b", 16)
        and row["setup"]["quantization"] == "nf4"
    }
    assert found.keys() == {"rtx4090", "v5e"} and max(found.values()) < 5 * scale.GIB


@pytest.mark.parametrize("row", GROUPS["held out, below 7B"], ids=label)
def test_the_formula_is_within_two_gib_on_small_models(row):
    assert abs(memory(scale.from_record(row)).peak - scale.compiled_peak(row)) < 2 * scale.GIB


def test_no_held_out_row_was_fitted():
    ranks = {row["setup"]["rank"] for row in ROWS} - {None}
    full = {row["setup"]["model"] for row in ROWS if row["setup"]["rank"] is None}
    listed = json.loads(json.dumps([*scale.held_out()]))
    assert [row["setup"] for row in HELD_OUT if row["setup"] not in listed] == []
    assert len(HELD_OUT) == len(listed)
    for one in listed:
        assert one["rank"] not in ranks and (one["rank"] or one["model"] not in full)


@pytest.mark.parametrize("name", GROUPS)
def test_the_formulas_docstring_states_its_error(name):
    assert scale.judged(name, GROUPS[name]) in " ".join((planning_memory.__doc__ or "").split())


def agrees(row):
    planned, usable = memory(scale.from_record(row)).peak, DEVICES[row["setup"]["kind"]].usable
    assert abs(planned / scale.compiled_peak(row) - 1) < 0.1
    assert (planned <= usable) == (scale.compiled_peak(row) <= usable)


def test_the_state_of_every_optimizer_is_counted():
    held = {}
    for name in OPTIMIZERS:
        config = scale.step("llama-7b", 1024, "a100-80gb").config.replace(**{"optim.name": name})
        held[name] = memory(steps.planned(config, "llama-7b", "cuda"))
    trained = held["adamw"].adapters - 4 * 32 * len(ATTENTION)  # the scales are frozen
    numbers = {name: 4 * count for name, count in dict(adamw=3, adam=3, sgd=2, lion=3).items()}
    for name, scalars in numbers.items():
        copies = {"sgd": 0, "lion": 1}.get(name, 2)
        assert held[name].optimizer == copies * trained + scalars, name
    assert held["sgd"].optimizer < held["adafactor"].optimizer < trained / 100


def test_a_tpus_refusal_says_what_it_needs():
    class Refused:
        def compile(self, options):
            assert options == {"xla_tpu_max_hbm_size_mib": "1"}
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
                "temporaries (16.60G) exceeds available HBM (1.00M)."
            )

    assert need(Refused()) == int(16.6 * 2**30)  # pyright: ignore[reportArgumentType]


def test_the_papers_claim():
    # "When the rank of LoRA is set to 2048, the model can still be fine-tuned on a single
    # A100-80GB GPU" (section 3.1); full fine-tuning cannot, and rank 4096 takes two.
    assert fewest(seven(2048), A100) == 1
    assert fewest(seven(4096), A100) == 2
    assert fewest(seven(None), A100) not in (None, 1)
    compiled = {
        (row["setup"]["rank"], tuple(row["setup"].get("mesh", (1, 1, 1)))): scale.compiled_peak(row)
        for row in ROWS
        if row["setup"].keys() <= {"model", "kind", "rank", "mesh"}
        and (row["setup"]["model"], row["setup"]["kind"]) == ("llama-7b", "a100-80gb")
    }
    one, two, eight = (1, 1, 1), (1, 2, 1), (1, 8, 1)
    fits = [(16, one), (2048, one), (4096, two), (None, eight)]
    assert all(compiled[row] < A100.usable for row in fits)
    assert all(compiled[row] > A100.bytes for row in [(4096, one), (None, one)])


def test_what_is_held_is_counted_from_the_parameters():
    found = memory(seven(16))
    table = counts.parameter_table(CONFIGS["llama-7b"], 16)
    scales = 4 * 32 * len(ATTENTION)  # float32, one per layer and target
    trainable = 4 * table.trainable.sum()
    assert found.base == 2 * table.frozen.sum()
    assert found.adapters == trainable + scales
    assert found.gradients == found.micro_gradients == trainable
    assert 2 * trainable <= found.optimizer < 2 * trainable + 16  # and the step's number
    cut = memory(seven(16, mesh=(1, 8, 1)))
    assert cut.gradients * 8 == found.gradients


def test_the_largest_micro_batch_is_the_last_that_fits():
    step = seven(2048)
    rows = largest(step, A100)
    assert memory(replace(step, rows=rows)).peak <= A100.usable
    assert memory(replace(step, rows=rows + 1)).peak > A100.usable
    assert largest(seven(None), A100) == 0


def arguments(model, kind, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "tests.planning.arguments", model, kind],
        cwd=REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("model", ["tiny", pytest.param("llama-7b", marks=pytest.mark.slow)])
def test_arguments_on_eight_devices_are_the_plans_to_the_byte(model):
    found = arguments(model, "cpu", **many_cpus(8))
    for label, compiled, planned in found:
        assert compiled == planned, label
    if model == "tiny":
        families = ("llama", "qwen2", "qwen3")
        assert all(any(f", {name}," in label for label, *_ in found) for name in families)


@pytest.mark.skipif(not find_spec("jax_cuda12_plugin"), reason="the extra cuda12 is not installed")
def test_a_card_that_is_not_here_compiles():
    for label, compiled, planned in arguments("tiny", "a100-80gb"):
        assert compiled == planned, label


@pytest.mark.slow
def test_the_page_is_what_the_command_writes():
    assert scale.DOCUMENT.read_text("utf-8") == scale.document(scale.read_record())
