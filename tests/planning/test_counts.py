"""Parameter counts against the published totals and the shares in the paper's tables."""

import jax
import pytest
from safetensors import safe_open

from jax_lora.model.families import CONFIGS
from jax_lora.planning.counts import base_shapes, parameter_table
from jax_lora.weights.hf_config import parse_config
from tests import reference

TOTALS = {  # what transformers' num_parameters() and the model cards give
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008,
    "mistral-7b-v0.1": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
}
# Tables 1 and 2 of the paper, LLaMA-7B; ranks 32 and 1024 are rounded twice there.
PERCENT = {
    4: 0.062,
    8: 0.124,
    16: 0.248,
    32: 0.496,
    64: 0.986,
    128: 1.953,
    256: 3.831,
    512: 7.379,
    1024: 13.745,
    2048: 24.167,
    4096: 38.927,
}


@pytest.mark.parametrize("name", TOTALS)
def test_totals_of_known_models(name):
    table = parameter_table(CONFIGS[name], rank=None)
    assert table.trainable.sum() == TOTALS[name] and table.frozen.sum() == 0


@pytest.mark.parametrize("case", ["gqa", *reference.FAMILIES])
def test_the_parameters_of_every_family_are_those_of_its_files(case, tmp_path):
    """And its adapters those that PEFT has: r · (in + out) per linear layer."""
    with safe_open(reference.write(tmp_path, case) / "model.safetensors", "np") as file:
        sizes = [file.get_tensor(name).size for name in file.keys()]  # noqa: SIM118
    rank, targets = reference.RANK, reference.TARGETS
    counted = parameter_table(parse_config(reference.config(case)), rank, targets)
    assert counted.frozen.sum() == sum(sizes)
    layers = reference.config(case)["num_hidden_layers"]
    shapes = reference.linear_shapes(case).values()
    assert counted.trainable.sum() == layers * sum(rank * sum(shape) for shape in shapes)


@pytest.mark.parametrize("rank", PERCENT)
def test_the_papers_trainable_shares(rank):
    table = parameter_table(CONFIGS["llama-7b"], rank)
    frozen, trainable = table.frozen.sum(), table.trainable.sum()
    assert frozen == TOTALS["llama-7b"]
    assert abs(100 * trainable / (frozen + trainable) - PERCENT[rank]) < 0.00101


def test_counting_loads_nothing():
    assert all(
        isinstance(x, jax.ShapeDtypeStruct)
        for x in jax.tree.leaves(base_shapes(CONFIGS["llama-65b"]))
    )


def test_modules_and_shapes():
    table = parameter_table(CONFIGS["llama-7b"], 16, targets=("q_proj", "down_proj"))
    rows = {row.module: row for row in table.itertuples()}
    assert rows["lora.layers.self_attn.q_proj.a"].shape == (32, 4096, 16)
    assert rows["lora.layers.mlp.down_proj.a"].trainable == 32 * 11008 * 16
    assert rows["layers.self_attn.q_proj.kernel"].frozen == 32 * 4096 * 4096
    assert "lora.layers.self_attn.k_proj.a" not in rows
    with pytest.raises(ValueError, match="lora rank: found 0"):
        parameter_table(CONFIGS["llama-7b"], 0)
