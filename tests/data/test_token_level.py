"""What a model is shown and taught, token by token, over all tasks of a real slice."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from jax_lora.data.instructions import read_checkout
from jax_lora.data.loader import Batches
from jax_lora.data.prompts import TEMPLATES, Encoder
from jax_lora.weights.gguf_file import open_gguf
from jax_lora.weights.tokenizers import load_tokenizer

EXAMPLES = 20  # of each task, spread over its file
ROW = 1152


@pytest.fixture(scope="module")
def examples(shared):
    checkout = read_checkout(shared / "data" / "niv2-slice")
    return [
        task.example(instance)
        for task in (*checkout.train, *checkout.test)
        for instance in task.instances()[:: -(-task.count // EXAMPLES)]
    ]


@pytest.fixture(scope="module", params=["llama", "smollm2"])
def family(request, shared):
    """A tokenizer and what its own file says: does a text begin with BOS, and which ids."""
    if request.param == "llama":
        # sentencepiece's numbers in LLaMA's tokenizer.model; LLaMA begins every text with BOS.
        tokenizer = load_tokenizer(shared / "tokenizers" / "llama")
        return SimpleNamespace(tokenizer=tokenizer, begins=True, bos=1, eos=2, pad=None)
    path = request.getfixturevalue("smollm2")
    said = open_gguf(path).metadata
    return SimpleNamespace(
        tokenizer=load_tokenizer(path),
        begins=said["tokenizer.ggml.add_bos_token"],
        bos=said["tokenizer.ggml.bos_token_id"],
        eos=said["tokenizer.ggml.eos_token_id"],
        pad=said["tokenizer.ggml.padding_token_id"],
    )


@pytest.fixture(scope="module", params=sorted(TEMPLATES))
def encoded(request, family, examples):
    encoder = Encoder(family.tokenizer, request.param, source_length=1024, target_length=ROW - 1024)
    rows = [encoder.training_row(example) for example in examples]
    return SimpleNamespace(encoder=encoder, rows=rows)


def test_special_tokens_are_where_the_files_say(family, examples, encoded):
    tokenizer = family.tokenizer
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (family.bos, family.eos)
    assert tokenizer.pad_token_id == family.pad
    for row in encoded.rows:
        ids = row.ids.tolist()
        assert ids[-1] == family.eos and ids.count(family.eos) == 1
        assert ids.count(family.bos) == family.begins
        assert not family.begins or ids[0] == family.bos
    for example in examples[::10]:  # where decoding starts, nothing has ended
        assert family.eos not in encoded.encoder.prompt_row(example).ids


def test_prompt_and_answer_meet_without_loss(family, examples, encoded):
    decode = family.tokenizer.decode
    for example, row in zip(examples, encoded.rows, strict=True):
        prompt, answer = row.ids[: row.prompt_length], row.ids[row.prompt_length : -1]
        assert decode(prompt, skip_special_tokens=True) == row.prompt
        # Decoded behind its prompt: a tokenizer takes away the space that a text begins with.
        whole = decode(row.ids[:-1], skip_special_tokens=True)
        assert whole == row.prompt + example.references[0]
        assert len(answer) or not example.references[0]
        if not row.truncated:
            np.testing.assert_array_equal(encoded.encoder.prompt_row(example).ids, prompt)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_the_answer_and_its_end_are_the_loss_tokens(family, encoded, packed):
    # Padded with the end token itself: were padding a loss token, the end would be taught on
    # forever; were the end masked with the padding, it would never be learnt.
    batches = Batches(
        encoded.rows,
        batch_size=32,
        seed=0,
        buckets=(256, 512, ROW),
        micro_tokens=8 * ROW,
        answer_only=True,
        pad_id=family.eos,
        packed=packed,
    )
    found = set()
    for step in range(batches.steps_per_epoch):
        for batch in batches.at(step):
            padding = batch.segment_ids < 0
            assert (batch.tokens[padding] == family.eos).all()
            assert not batch.loss_weights[padding].any()
            for example in np.unique(batch.segment_ids[~padding]):
                own = batch.segment_ids == example
                ids, taught = batch.tokens[own].tolist(), batch.loss_weights[own]
                start = int(taught.argmax())
                assert taught[start:].all() and ids[start:].count(family.eos) == 1
                found.add((tuple(ids[:start]), tuple(ids[start:])))
    ends = [row.prompt_length for row in encoded.rows]
    ids = [row.ids.tolist() for row in encoded.rows]
    assert found == {(tuple(i[:n]), tuple(i[n:])) for i, n in zip(ids, ends, strict=True)}


def test_only_the_input_is_cut_and_every_cut_is_told(family, examples, encoded):
    short = Encoder(
        family.tokenizer, encoded.encoder.template, source_length=320, target_length=900
    )
    fill = TEMPLATES[short.template]
    cut = 0
    for example, whole in zip(examples, encoded.rows, strict=True):
        row = short.training_row(example)
        assert row.truncated == (whole.truncated or whole.prompt_length > short.source_length)
        if row.truncated:
            cut += 1
            assert short.source_length - 3 < row.prompt_length <= short.source_length
            beginnings = (
                replace(example, input=example.input[:k]) for k in range(len(example.input))
            )
            assert row.prompt in (fill(cut) for cut in beginnings)
        np.testing.assert_array_equal(
            row.ids[row.prompt_length :], whole.ids[whole.prompt_length :]
        )
    assert 0 < cut < len(examples)
