"""A run on a quantized base: trained, resumed, scored, checked, merged; and what is refused."""

from __future__ import annotations

import gc
import logging
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora
from jax_lora.errors import ConfigError, DataError
from jax_lora.files import read_json
from jax_lora.model import lora
from jax_lora.run import folder, prepare, scoring
from jax_lora.run.convert import convert
from jax_lora.weights import base, hf, origin, peft
from tests import quantized
from tests.weights import builders


@pytest.fixture(scope="module")
def gguf_model(tmp_path_factory):
    """As `tiny_model`, its matrices in blocks of Q8_0."""
    vocabulary = builders.tiny_bpe("gpt-2")
    weights = builders.hf_weights(len(vocabulary["tokens"]))
    small = {k: v if v.ndim == 1 else 0.1 * v for k, v in weights.items()}
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    builders.write_gguf(path, small, builders.GGMLQuantizationType.Q8_0, tokenizer=vocabulary)
    return path


@pytest.fixture(scope="module")
def config(tiny_run, gguf_model):
    def changed(**changes):
        return tiny_run(**{"model": str(gguf_model), "max_steps": 2, **changes})

    return changed


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    made = jax_lora.Run.open(config(model_quantization="gguf"), tmp_path_factory.mktemp("q") / "r")
    made.train()
    return made


def test_gguf_blocks_train_as_their_weights(run, config, tmp_path):
    plain = jax_lora.Run.open(config(), tmp_path / "plain")
    plain.train()
    np.testing.assert_allclose(run.metrics().loss, plain.metrics().loss, rtol=1e-5)
    assert read_json(run.workdir / "parameters.json") == read_json(
        plain.workdir / "parameters.json"
    )
    (trained, expected) = (peft.load(one.workdir).adapters for one in (run, plain))
    for x, y in zip(jax.tree.leaves(trained), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_quantization": "int8", "lora.variant": "dora", "remat": "none"},
        {"model_quantization": "gguf", "lora.init": "pissa", "data.packed": True},
        {"model_quantization": "int8", "trainable": (r"lora/.*/[ab]", r"params/norm/.*")},
        {"model_quantization": "gguf", "lora.targets": ("q_proj", "lm_head"), "loss_chunk": 64},
    ],
)
def test_variants_train_and_are_scored(config, tmp_path, changes):
    made = jax_lora.Run.open(config(**changes), tmp_path / "r")
    assert np.isfinite(made.train().loss).all()
    scores = made.score(["seen"])
    assert len(scores) > 0


def test_scores_and_checks(run, monkeypatch):
    assert len(run.score(["seen"])) > 0
    said, held, load, read = [], [], scoring.load, base.load

    def loaded(*arguments):
        scored = load(*arguments)
        held.append([weakref.ref(x) for x in jax.tree.leaves(scored.variables["params"])])
        return scored

    def read_alone(*arguments):
        gc.collect()
        assert all(leaf() is None for leaves in held for leaf in leaves)  # one base at a time
        return read(*arguments)

    monkeypatch.setattr(scoring, "load", loaded)
    monkeypatch.setattr(base, "load", read_alone)
    again = jax_lora.Run.open(None, run.workdir, say=said.append)
    again.check(prompts=8)  # what it returns depends on the compiler's flags, too
    moved = [text for text in said if " gradient " in text]
    assert moved and all(float(text.split()[-2].rstrip(",")) < 1e-5 for text in moved)
    (line,) = [text for text in said if "moves a logit" in text]
    assert "the base in none in place of gguf moves a logit by up to" in line
    assert len(held) == 2


def test_products_of_integers_are_an_option(config, tmp_path):
    made = jax_lora.Run.open(config(model_quantization="int8"), tmp_path / "r")
    made.train()
    made.score(["seen"])
    settings = made.workdir / "eval" / "seen" / "settings.json"
    assert "int8_products" not in read_json(settings)
    made.score(["seen"], int8_products=True)  # other settings: all answers are made again
    assert read_json(settings)["int8_products"] is True
    said = []
    jax_lora.Run.open(None, made.workdir, say=said.append).check(prompts=8, int8_products=True)
    moved = [text.strip() for text in said if "moves a logit" in text]
    assert moved[0].startswith("multiplying integers moves a logit by up to ")
    assert moved[1].startswith("the base in none in place of int8 moves a logit by up to ")
    assert all(float(text.split("up to ")[1].split()[0]) > 0 for text in moved)
    assert sum("answers to 8 prompts that change" in text for text in said) == 2
    updates = [text for text in said if " gradient " in text]  # training multiplies no integers
    assert updates and all(float(text.split()[-2].rstrip(",")) < 1e-5 for text in updates)
    for changes in ({"model_quantization": "nf4"}, {"lora.init": "pissa"}):
        with pytest.raises(ConfigError, match="eval.int8_products"):
            config(**{"model_quantization": "int8", "eval.int8_products": True} | changes)


def test_the_form_decides_results(run):
    other = run.config.replace(model_quantization="none")
    digests = {name: read_json(run.workdir / "config.json")[name] for name in ("base_digest",)}
    with pytest.raises(ConfigError, match="model_quantization"):
        folder.check_same_run(run.workdir, other, digests)


def test_the_adapter_and_the_merged_folder_name_the_form(run, tmp_path, caplog):
    adapter, model = run.workdir / "adapter", run.config.model
    assert origin.read(adapter) == {
        "base": model,
        "base_digest": base.digest(model),
        "quantization": "gguf",
    }
    convert(model, str(tmp_path / "merged"), "float32", adapter=str(adapter))
    assert origin.read(tmp_path / "merged")["quantization"] == "gguf"
    assert origin.read(tmp_path / "merged")["base_digest"] == base.digest(model)
    _, merged = hf.load(tmp_path / "merged", "float32")
    tokens = np.arange(12).reshape(2, 6)
    with caplog.at_level(logging.WARNING):
        loaded = jax_lora.load(model, adapter, "float32", quantization="gguf")
    assert not caplog.records
    plain = jax_lora.load(tmp_path / "merged", dtype="float32")
    np.testing.assert_allclose(plain.logits(tokens), loaded.logits(tokens), rtol=0, atol=1e-4)
    assert jax.tree.structure(merged) == jax.tree.structure(plain.base)
    jax_lora.load(model, adapter, "float32")
    (record,) = caplog.records
    assert "trained on a base with model_quantization=gguf and used on one with none" in (
        record.getMessage()
    )


def test_int8_merges_into_the_dequantized_weights(config, tmp_path):
    made = jax_lora.Run.open(config(model_quantization="int8"), tmp_path / "r")
    made.train()
    model, out = made.config.model, tmp_path / "merged"
    convert(model, str(out), "float32", adapter=str(made.workdir / "adapter"))
    found = hf.load(out, "float32")[1]["layers"]["self_attn"]["q_proj"]["kernel"]
    stored = base.load(model, "float32", quantization="int8")[1]
    dense = quantized.dequantized(stored)["layers"]["self_attn"]["q_proj"]["kernel"]
    leaf = peft.load(made.workdir).adapters["layers"]["self_attn"]["q_proj"]
    expected = np.asarray(dense) + leaf["scale"][:, None, None] * (leaf["a"] @ leaf["b"])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_generation_and_the_table_of_a_loaded_model(gguf_model):
    plain, ours = (
        jax_lora.load(gguf_model, dtype="float32", quantization=form) for form in ("none", "gguf")
    )
    prompts = ["Hello world", "the 123"]
    assert ours.generate(prompts, 8) == plain.generate(prompts, 8)
    assert ours.parameters().equals(plain.parameters())


def test_what_cannot_be_is_one_line_before_compute(config, tiny_model, tmp_path, gguf_model):
    def refused(**changes):
        with pytest.raises((ConfigError, DataError)) as caught:
            prepare.read_inputs(config(**changes), tmp_path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "down_proj.weight has 96 inputs, expected a multiple of 64" in refused(
        model_quantization="nf4"
    )
    assert "blk.0.attn_q.weight is F32, expected one of Q4_0," in refused(
        model=str(tiny_model), model_quantization="gguf"
    )
    hf_folder = tmp_path / "hf"
    convert(str(gguf_model), str(hf_folder))
    assert "found gguf for" in refused(model=str(hf_folder), model_quantization="gguf")
    assert "found gguf and params/layers/mlp/up_proj/kernel, which trains" in refused(
        model_quantization="gguf", trainable=(r"lora/.*/[abm]", r"params/layers/mlp/up.*")
    )
    assert "config.model_quantization: found nf4 with method=full" in refused(
        model_quantization="nf4", method="full"
    )
    assert "config.model_quantization: found 'fp4', expected one of none, int8" in refused(
        model_quantization="fp4"
    )


def test_an_adapter_that_names_no_form_is_taken_without_a_warning(tmp_path, gguf_model, caplog):
    shape = base.read_config(gguf_model)
    tree = lora.init(jax.random.key(0), shape, 2, alpha=4.0)
    for leaf in tree["layers"]["self_attn"].values():
        leaf["b"] = jnp.ones_like(leaf["b"])
    peft.save(tmp_path / "a", jax.device_get(tree), rank=2, alpha=4.0)
    jax_lora.load(gguf_model, tmp_path / "a", "float32")
    assert not caplog.records
