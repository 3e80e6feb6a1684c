"""config.json, in the dialects of transformers 4 and 5."""

from __future__ import annotations

import json

import pytest

from jax_lora.model.config import LlamaConfig, RopeScaling
from jax_lora.model.families import CONFIGS
from jax_lora.weights import hf
from tests.weights.builders import CONFIG, LLAMA3, refusal


def test_defaults_of_a_sparse_config_are_those_of_transformers():
    raw = {k: v for k, v in CONFIG.items() if k not in ("num_key_value_heads", "rms_norm_eps")}
    del raw["rope_theta"], raw["max_position_embeddings"], raw["architectures"]
    config = hf.parse_config(raw)
    assert config == LlamaConfig(40, 64, 96, 2, 4, 4, 16, rms_norm_eps=1e-6)
    assert hf.parse_config(CONFIG | {"head_dim": 32}).head_dim == 32


@pytest.mark.parametrize(
    ("keys", "theta", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_scaling": None, "rope_theta": 500000}, 5e5, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}, 2e4, None),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            1e4,
            RopeScaling("linear", 2.0),
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "rope_theta": 3e4},
            3e4,
            RopeScaling("dynamic", 4.0),
        ),
        (
            {"rope_scaling": LLAMA3, "rope_theta": 5e5},
            5e5,
            RopeScaling("llama3", 8.0, 8192, 1.0, 4.0),
        ),
        (
            {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
            5e5,
            RopeScaling("llama3", 8.0, 8192, 1.0, 4.0),
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16}},
            1e4,
            RopeScaling("yarn", 4.0, 512, beta_fast=16.0),
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "original_max_position_embeddings": 128,
                    "truncate": False,
                    "mscale": 1.0,
                    "mscale_all_dim": 0.5,
                }
            },
            1e4,
            RopeScaling("yarn", 4.0, 128, mscale=1.0, mscale_all_dim=0.5, truncate=False),
        ),
    ],
)
def test_rope_under_the_old_and_the_new_keys(keys, theta, scaling):
    raw = {k: v for k, v in CONFIG.items() if k != "rope_theta"} | keys
    config = hf.parse_config(raw)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_survives_the_way_to_json_and_back(name):
    config = CONFIGS[name]
    raw = json.loads(json.dumps(hf.config_to_hf(config)))
    assert hf.parse_config(raw) == config
    for unknown in ("rope_scaling", "rope_parameters"):  # each alone is enough, but for θ
        assert hf.parse_config({k: v for k, v in raw.items() if k != unknown}) == config


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_the_original_length_at_the_top_wins_over_the_tables(kind, key):
    table = LLAMA3 if kind == "llama3" else {"rope_type": "yarn", "factor": 8.0}
    raw = CONFIG | {key: table, "original_max_position_embeddings": 128}
    scaling = hf.parse_config(raw).rope_scaling
    assert scaling is not None and scaling.original_max_position_embeddings == 128


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_against_hf_the_original_length_at_the_top_is_read_alike(kind):
    pytest.importorskip("torch")
    from transformers.models.llama import modeling_llama

    table = LLAMA3 if kind == "llama3" else {"rope_type": "yarn", "factor": 8.0}
    for more in ({}, {"original_max_position_embeddings": 64}):
        raw = CONFIG | {"rope_scaling": table | more, "original_max_position_embeddings": 128}
        found = hf.parse_config(raw).rope_scaling
        # The config has another value until the model is made.
        theirs = modeling_llama.LlamaRotaryEmbedding(modeling_llama.LlamaConfig(**raw)).config
        wanted = theirs.rope_parameters["original_max_position_embeddings"]
        assert found is not None and found.original_max_position_embeddings == wanted, more


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "gemma2"}, "model_type: found 'gemma2', expected one of llama"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_act": "gelu"}, "hidden_act: found 'gelu', expected 'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: found an unknown method,"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
            "found bitsandbytes in int8, expected the weights that it was made from, loaded with "
            "model_quantization=int8",
        ),
        (
            {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}},
            "found bitsandbytes in nf4, expected the weights that it was made from, loaded with "
            "model_quantization=nf4",
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "found gptq, expected the"),
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4}},
            "found awq, expected the weights that it was made from, loaded with "
            "model_quantization=nf4, or a GGUF file of them with model_quantization=gguf",
        ),
        ({"hidden_size": None}, "hidden_size: found nothing, expected a positive integer"),
        ({"hidden_size": "64"}, "hidden_size: found '64'"),
        ({"hidden_size": 66}, "hidden_size: found 66, expected a multiple"),
        ({"num_key_value_heads": 3}, "num_key_value_heads, 3"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: found 1, expected true or false"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: found 0.5, expected 1"),
        ({"rope_scaling": {"type": "longrope"}}, "found 'longrope', expected one of default"),
        ({"rope_scaling": {"type": "linear"}}, "factor in rope_scaling: found nothing"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "found '2', expected a number"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "found 0.5, expected a number from"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs low_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one flat table"),
    ],
)
def test_what_no_llama_of_ours_can_be_is_refused(keys, message):
    found = refusal(hf.parse_config, CONFIG | keys, "here/config.json")
    assert message in found and found.startswith("here/config.json: ")


def test_keys_that_the_rope_type_does_not_read_are_told(caplog):
    hf.parse_config(CONFIG | {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 3}})
    assert "beta_fast ignored by rope type linear" in caplog.text
