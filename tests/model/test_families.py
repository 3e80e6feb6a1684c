"""Mistral, Qwen2 and Qwen3 against transformers and PEFT (values recorded by tests/record.py)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGUFWriter

from jax_lora.data.loader import MicroBatch
from jax_lora.errors import ConfigError, DataError
from jax_lora.generation import greedy
from jax_lora.model.arch import LINEAR_NAMES, LINEARS
from jax_lora.model.families import FAMILIES
from jax_lora.model.transformer import Llama
from jax_lora.training.loss import loss_sum
from jax_lora.weights import base, gguf, hf
from tests import reference
from tests.weights.builders import flat, gguf_name, refusal


@pytest.fixture(scope="module")
def recorded():
    with np.load(reference.RECORDED) as file:
        return dict(file)


@pytest.fixture(scope="module", params=reference.FAMILIES)
def toy(request, tmp_path_factory):
    folder = reference.write(tmp_path_factory.mktemp("model"), request.param)
    config, params = hf.load(folder, "float32")
    return request.param, Llama(config, dtype=jnp.float32), params


def test_adapted_logits_loss_and_gradients_equal_peft(toy, recorded):
    case, model, params = toy
    adapters, ids = reference.adapters(case=case), jnp.asarray(reference.tokens())
    logits = model.apply({"params": params, "lora": adapters}, ids)
    np.testing.assert_allclose(logits, recorded[f"{case}/lora/logits"], rtol=0, atol=1e-4)
    mask = reference.loss_mask()
    micro = MicroBatch(ids, jnp.asarray(mask, jnp.float32), jnp.zeros_like(ids))

    def loss(adapters):
        variables = {"params": params, "lora": adapters}
        return loss_sum(model, variables, micro, chunk=16) / mask.sum()

    value, gradients = jax.value_and_grad(loss)(adapters)
    np.testing.assert_allclose(value, recorded[f"{case}/lora/loss"], rtol=1e-5)
    for linear in LINEARS:
        ours = gradients["layers"][linear.group][linear.name]
        for layer in range(2):
            for leaf, theirs in (("a", "lora_A"), ("b", "lora_B")):
                name = f"layers.{layer}.{'.'.join(linear.path)}.{theirs}"
                expected = recorded[f"{case}/lora/gradient/{name}"].T
                error = np.linalg.norm(ours[leaf][layer] - expected) / np.linalg.norm(expected)
                assert error <= 1e-5, name


def test_greedy_answers_equal_transformers(toy, recorded):
    case, model, params = toy
    weights = greedy.unstack_layers({"params": params})
    for i, prompt in enumerate(reference.PROMPTS):
        rows = greedy.empty_rows(model, 1, 32, reference.NEW_TOKENS)
        tokens = np.zeros((1, 16), np.int32)
        tokens[0, : len(prompt)] = prompt
        one, zero = np.asarray([len(prompt)]), np.zeros(1, int)
        ends = (reference.END,)
        chunks = greedy.Chunks(zero, zero, tokens, one, one)
        rows = greedy.prefill(model, weights, rows, chunks, end_ids=ends)
        rows = greedy.decode(model, weights, rows, jnp.asarray(0), end_ids=ends)
        answer = np.asarray(rows.new)[0, : int(rows.count[0])]
        np.testing.assert_array_equal(answer, recorded[f"{case}/greedy/{i}"])


# ---------------------------------------------------------------- files

# llama.cpp's names beside those of the builders, spelled out a second time on purpose.
NORMS = {"q_norm": "attn_q_norm", "k_norm": "attn_k_norm"}


def write_gguf(path, case, architecture):
    """A case as a GGUF file: rows of q and k as they are, which is how llama.cpp keeps Qwen's."""
    c = reference.config(case)
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_rope_freq_base(c["rope_theta"])
    writer.add_vocab_size(c["vocab_size"])
    if "head_dim" in c:
        writer.add_key_length(c["head_dim"])
        writer.add_value_length(c["head_dim"])
    for name, array in reference.state(case).items():
        part = name.split(".")[-2]
        theirs = f"blk.{name.split('.')[2]}.{NORMS[part]}.weight" if part in NORMS else None
        writer.add_tensor(theirs or gguf_name(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("case", ["Qwen2", "Qwen3"])
def test_a_gguf_file_holds_the_folder_it_was_made_from(tmp_path, case):
    folder = reference.write(tmp_path / "hf", case)
    write_gguf(tmp_path / "m.gguf", case, case.lower())
    config, params = gguf.load(tmp_path / "m.gguf", "float32")
    expected_config, expected = hf.load(folder, "float32")
    # GGUF keeps the epsilon of the norms in float32.
    assert config.rms_norm_eps == pytest.approx(expected_config.rms_norm_eps)
    assert {**vars(config), "rms_norm_eps": 0} == {**vars(expected_config), "rms_norm_eps": 0}
    found, wanted = dict(flat(params)), dict(flat(expected))
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[path], wanted[path]) for path in wanted)


@pytest.mark.parametrize(
    "case", [c for c in reference.CASES if reference.config(c)["model_type"] != "llama"]
)
def test_a_saved_folder_is_the_one_that_was_read(tmp_path, case):
    config, params = hf.load(reference.write(tmp_path / "a", case), "float32")
    hf.save(tmp_path / "b", config, params, dtype="float32")
    again, same = hf.load(tmp_path / "b", "float32")
    assert again == config
    assert all(
        np.array_equal(x, y) for (_, x), (_, y) in zip(flat(params), flat(same), strict=True)
    )


def test_rows_beyond_a_sliding_window_are_refused(tmp_path):
    config, params = hf.load(reference.write(tmp_path, "Mistral"), "float32")
    model, ids = Llama(config, dtype=jnp.float32), jnp.zeros((1, 25), jnp.int32)
    with pytest.raises(ConfigError, match="25 tokens: expected at most 24"):
        model.apply({"params": params}, ids)
    with pytest.raises(ConfigError, match="32 tokens: expected at most 24"):
        greedy.empty_rows(model, 1, 32, 8)


@pytest.mark.parametrize(
    ("case", "keys", "told"),
    [
        ("Qwen2", {"use_sliding_window": True}, "use_sliding_window: found true"),
        ("Qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: found"),
        ("Mistral", {"sliding_window": "24"}, "sliding_window: found '24'"),
        ("Qwen2", {"architectures": ["Qwen2ForSequenceClassification"]}, "architectures: found"),
        *(
            ("gqa", {"model_type": name}, f"model_type: found '{name}', expected one of llama")
            for name in ("gemma2", "phi3", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_neox")
        ),
    ],
)
def test_what_is_not_computed_is_refused_by_name(case, keys, told):
    from jax_lora.weights.hf_config import parse_config

    assert told in refusal(parse_config, reference.config(case) | keys)


def test_biases_that_a_family_has_no_key_for_are_not_written(tmp_path):
    config, params = hf.load(reference.write(tmp_path / "a", "Qwen2"), "float32")
    other = type(config)(**{**vars(config), "family": "llama"})
    with pytest.raises(ConfigError, match="config.json of llama cannot say"):
        hf.save(tmp_path / "b", other, params)


def test_a_gguf_file_without_its_familys_biases_is_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf", "gqa", "qwen2")
    with pytest.raises(DataError, match="missing tensors blk.0.attn_q.bias"):
        base.load(tmp_path / "m.gguf")


def test_every_row_names_only_layers_that_exist():
    for family in FAMILIES.values():
        named = {*family.biases, *(n for names in family.bias_keys.values() for n in names)}
        assert named <= set(LINEAR_NAMES)
