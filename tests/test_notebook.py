"""The notebook face: `jax_lora.load`, `LoadedModel`, `parameter_table`."""

import dataclasses
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora
from jax_lora.generation import greedy, scheduler
from jax_lora.model import lora
from jax_lora.weights import base, peft
from tests import reference


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model):
    """A Hugging Face folder, made by the library from the tiny GGUF."""
    from jax_lora.weights import gguf, hf
    from jax_lora.weights.tokenizers import load_tokenizer

    target = tmp_path_factory.mktemp("hf") / "model"
    config, base = gguf.load(tiny_model, "float32")
    hf.save(target, config, base, load_tokenizer(tiny_model), "float32")
    return target


def test_folder_and_gguf_give_the_same_logits(folder, tiny_model):
    ids = np.asarray([[5, 6, 7, 8]])
    one, two = (jax_lora.load(source, dtype="float32") for source in (folder, tiny_model))
    assert one.config == two.config
    logits = one.logits(ids)
    assert logits.shape == (1, 4, one.config.vocab_size) and logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits, two.logits(ids))


def test_generate_unstacks_the_layers_once(tiny_model, monkeypatch):
    calls, unstack = [], greedy.unstack_layers

    def counted(*args):
        calls.append(args)
        return unstack(*args)

    monkeypatch.setattr(greedy, "unstack_layers", counted)
    model = jax_lora.load(tiny_model, dtype="float32")
    assert not calls
    first, second = (model.generate("some words", max_new_tokens=2) for _ in range(2))
    assert first == second and len(calls) == 1


def test_generate_continues_each_prompt_alone(tiny_model):
    model = jax_lora.load(tiny_model, dtype="float32")
    prompts = ["Hello world", "a", "the 123 the 456 the"]
    together = model.generate(prompts, max_new_tokens=5)
    assert together == [model.generate(p, max_new_tokens=5)[0] for p in prompts]
    text = model.tokenizer(prompts[0]).input_ids
    for _ in range(5):
        text.append(int(model.logits([text])[0, -1].argmax()))
    assert together[0] == model.tokenizer.decode(text[-5:], skip_special_tokens=True).strip()
    ends = dataclasses.replace(model, end_ids=(0, text[-3]))  # as a model's files may name several
    end = text[-5:].index(text[-3]) + 1
    expected = model.tokenizer.decode(text[-5:][:end], skip_special_tokens=True).strip()
    assert ends.generate(prompts[0], max_new_tokens=5) == [expected]


def test_an_adapter_is_applied_and_counted(tiny_model, tmp_path):
    plain = jax_lora.load(tiny_model, dtype="float32")
    adapters = lora.init(jax.random.key(0), plain.config, 4, alpha=8.0)
    peft.save(tmp_path / "zero", adapters, rank=4, alpha=8.0)
    with pytest.raises(ValueError, match="zero: every B is zero"):
        jax_lora.load(tiny_model, adapter=tmp_path / "zero")
    for leaf in adapters["layers"]["self_attn"].values():
        leaf["b"] = jnp.ones_like(leaf["b"])
    peft.save(tmp_path / "one", adapters, rank=4, alpha=8.0)
    adapted = jax_lora.load(tiny_model, adapter=tmp_path / "one", dtype="float32")
    ids = [[5, 6, 7]]
    assert np.abs(adapted.logits(ids) - plain.logits(ids)).max() > 1e-2
    table = adapted.parameters()
    assert list(table.columns) == ["module", "shape", "frozen", "trainable"]
    assert table.trainable.sum() == 4 * 2 * ((64 + 64) * 2 + (64 + 32) * 2)
    assert table.frozen.sum() == plain.parameters().trainable.sum()


def test_an_adapter_that_names_another_base_is_refused(tiny_model, tmp_path):
    config = jax_lora.load(tiny_model).config
    adapters = lora.init(jax.random.key(0), config, 4, alpha=8.0)
    for leaf in adapters["layers"]["self_attn"].values():
        leaf["b"] = jnp.ones_like(leaf["b"])
    digests = {"own": base.digest(tiny_model), "other": "0" * 64}
    for name, digest in digests.items():
        peft.save(tmp_path / name, adapters, rank=4, alpha=8.0, base_digest=digest)
    jax_lora.load(tiny_model, adapter=tmp_path / "own")
    with pytest.raises(ValueError, match="other: found .* digest 000000000000, .*any_base=True"):
        jax_lora.load(tiny_model, adapter=tmp_path / "other")
    assert jax_lora.load(tiny_model, adapter=tmp_path / "other", any_base=True).adapters


def test_an_adapter_of_another_model_is_refused(tiny_model, tmp_path):
    peft.save(tmp_path / "other", reference.adapters(), rank=reference.RANK, alpha=reference.ALPHA)
    with pytest.raises(ValueError, match="adapter leaf .*: found .*, expected"):
        jax_lora.load(tiny_model, adapter=tmp_path / "other")


@pytest.mark.parametrize("ids", [[1, 2], [[1.5]], [[100000]], [[-1]]])
def test_bad_tokens_are_refused(tiny_model, ids):
    with pytest.raises(ValueError, match="tokens: found"):
        jax_lora.load(tiny_model).logits(ids)


def test_tables_by_name_folder_and_file(folder, tiny_model):
    assert jax_lora.parameter_table("llama-7b", rank=16).trainable.sum() == 16_777_216
    by_folder, by_file = (jax_lora.parameter_table(x, rank=2) for x in (folder, tiny_model))
    assert by_folder.equals(by_file)
    with pytest.raises(FileNotFoundError, match="llama-8b"):
        jax_lora.parameter_table("llama-8b", rank=16)


def test_importing_the_package_imports_no_jax():
    code = "import jax_lora, sys; dir(jax_lora); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_logits_need_no_tokenizer_and_texts_say_that_they_do(tmp_path, folder):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("*token*"))
    ids = np.asarray([[5, 6, 7, 8]])
    model = jax_lora.load(bare, dtype="float32")
    wanted = jax_lora.load(folder, dtype="float32").logits(ids)
    np.testing.assert_array_equal(model.logits(ids), wanted)
    with pytest.raises(ValueError, match="found a base without a tokenizer"):
        model.generate("Hello")


def test_generate_refuses_tokens_without_an_embedding(tiny_model):
    model = jax_lora.load(tiny_model, dtype="float32")
    model.tokenizer.add_tokens(["<extra>"])
    with pytest.raises(ValueError, match=rf"prompts: found ids \d+ to {model.config.vocab_size}"):
        model.generate(["Hello", "Hello <extra>"], max_new_tokens=2)
    assert model.generate([], max_new_tokens=2) == []


def test_a_prompt_may_end_in_the_end_token(tiny_model):
    """Which only a tokenizer that puts one behind every text has put there."""
    model = jax_lora.load(tiny_model, dtype="float32")
    ended = f"Hello{model.tokenizer.eos_token}"
    seen = []
    generated = scheduler.answers

    def watched(module, weights, rows, **options):
        seen.append([list(row) for row in rows])
        return generated(module, weights, rows, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "answers", watched)
        model.generate([ended], max_new_tokens=2)
    assert seen == [[model.tokenizer(ended).input_ids]]
    assert seen[0][0][-1] == model.tokenizer.eos_token_id


def test_without_an_end_token_answers_have_all_tokens(tiny_model):
    model = dataclasses.replace(jax_lora.load(tiny_model, dtype="float32"), end_ids=())
    model.tokenizer.eos_token = None
    text = model.tokenizer("Hello").input_ids
    for _ in range(3):
        text.append(int(model.logits([text])[0, -1].argmax()))
    expected = model.tokenizer.decode(text[-3:], skip_special_tokens=True).strip()
    assert model.generate("Hello", max_new_tokens=3) == [expected]


def test_a_prompt_that_fits_the_window_is_not_rounded_out_of_it(tiny_model):
    plain = jax_lora.load(tiny_model, dtype="float32")
    prompt = "the " * 20
    length = len(plain.tokenizer(prompt).input_ids)
    windowed = dataclasses.replace(plain.config, sliding_window=length + 4)
    model = dataclasses.replace(plain, config=windowed)
    assert 1 << (length - 1).bit_length() > length + 4
    assert model.generate(prompt, max_new_tokens=4) == plain.generate(prompt, max_new_tokens=4)
    with pytest.raises(ValueError, match=f"expected at most {length + 4}"):
        model.generate(prompt, max_new_tokens=5)
