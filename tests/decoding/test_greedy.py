"""Greedy decoding against transformers, and its independence of the batch."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_lora.decoding.greedy import greedy
from jax_lora.model.llama import Llama
from jax_lora.weights import hf
from tests import reference


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = reference.write(tmp_path_factory.mktemp("model"), reference.ADAPTED)
    config, base = hf.load(folder, "float32")
    return Llama(config, dtype=jnp.float32), {"params": base}


def decode(model, prompts, width, end_ids=(reference.END,), new=reference.NEW_TOKENS):
    module, variables = model
    tokens = np.zeros((len(prompts), width), np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)] = prompt
    lengths = np.asarray([len(p) for p in prompts], np.int32)
    out, count = greedy(
        module, variables, tokens, lengths, max_new_tokens=new, end_ids=tuple(end_ids)
    )
    return [row[:n].tolist() for row, n in zip(np.asarray(out), np.asarray(count), strict=True)]


def expected():
    with np.load(reference.RECORDED) as recorded:
        return [recorded[f"greedy/{i}"].tolist() for i in range(len(reference.PROMPTS))]


@pytest.mark.parametrize("width", [11, 32])
def test_answers_equal_transformers_in_any_bucket(model, width):
    assert decode(model, reference.PROMPTS, width) == expected()


def test_answers_do_not_depend_on_the_batch(model):
    # Alone, in another order, beside a row that only fills the batch.
    alone = [decode(model, [prompt], 16)[0] for prompt in reference.PROMPTS]
    assert alone == expected()
    assert decode(model, reference.PROMPTS[::-1], 16) == expected()[::-1]
    filled = decode(model, [*reference.PROMPTS, ()], 16)
    assert filled == [*expected(), []]


def test_the_cache_changes_nothing(model):
    # The definition of greedy decoding: the whole text through the network for every token.
    module, variables = model
    text = list(reference.PROMPTS[0])
    for _ in range(6):
        text.append(int(module.apply(variables, np.asarray([text]))[0, -1].argmax()))
    assert decode(model, [reference.PROMPTS[0]], 8, end_ids=(-1,), new=6) == [text[-6:]]


def test_adapters_answer_too(model):
    module, variables = model
    adapted = module, variables | {"lora": reference.adapters()}
    text = list(reference.PROMPTS[2])
    for _ in range(4):
        text.append(int(module.apply(adapted[1], np.asarray([text]))[0, -1].argmax()))
    found = decode(adapted, [reference.PROMPTS[2]], 16, end_ids=(-1,), new=4)
    assert found == [text[-4:]]
    assert found != decode(model, [reference.PROMPTS[2]], 16, end_ids=(-1,), new=4)


def test_an_answer_ends_with_its_first_end_token(model):
    free = decode(model, reference.PROMPTS, 16, end_ids=(-1,))
    ends = (free[0][4], free[1][2])
    for row, answer in zip(free, decode(model, reference.PROMPTS, 16, end_ids=ends), strict=True):
        stop = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
        assert answer == row[: stop + 1]
