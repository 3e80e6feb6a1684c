"""The validation loss: what it sums, what it leaves alone, and on many devices."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_lora.data.loader import Batches
from jax_lora.data.prompts import Row
from jax_lora.training import trainable_mask
from jax_lora.training.step import State, make_step
from jax_lora.training.validation import Best, ValidationData, validate
from tests.processes import finish, start, start_two
from tests.training.test_step import MODEL, variables


def rows(count=11):
    rng = np.random.default_rng(0)
    for _ in range(count):
        prompt, answer = rng.integers(2, 8, 2)
        ids = rng.integers(1, 61, prompt + answer).astype(np.int32)
        yield Row(ids, int(prompt), "", False)


def validated(*, dropout=0.5, packed=False, materialized=(), size=4, tokens=64):
    tree = variables()
    tree["lora"] = jax.tree.map(lambda x: x + 0.1, tree["lora"])  # B is zero at the start
    trainable, frozen = trainable_mask.partition(
        tree, trainable_mask.mask(tree, *trainable_mask.LORA)
    )
    batches = Batches(
        list(rows()), size, 0, (8, 16), tokens, answer_only=True, pad_id=0, packed=packed
    )
    functions = make_step(
        MODEL, optax.identity(), seed=3, dropout_rate=dropout, packed=packed,
        materialized=materialized, loss_chunk=8,
    )  # fmt: skip
    state = State(jnp.zeros((), jnp.int32), trainable, None)
    before = jax.tree.map(np.array, (trainable, frozen))
    found = validate(state, frozen, ValidationData(batches, 50), functions)
    jax.tree.map(np.testing.assert_array_equal, (trainable, frozen), before)
    assert functions.accumulate._cache_size() == functions.update._cache_size() == 0
    return found, tree, functions.loss._cache_size()


@pytest.fixture(scope="module")
def expected():
    """Row after row, from the logits in float64: (loss, bits per byte, tokens)."""
    _, tree, _ = validated()
    total, tokens = 0.0, 0
    apply = jax.jit(MODEL.apply)
    for row in rows():
        padded = np.zeros((1, 16), np.int32)  # compiled once; a token sees none behind it
        padded[0, : len(row.ids)] = row.ids
        logits = np.asarray(apply(tree, padded))[0].astype(np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        for t in range(row.prompt_length, len(row.ids)):
            total -= logits[t - 1, row.ids[t]]
            tokens += 1
    return total / tokens, total / math.log(2) / 50, tokens


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"dropout": 0.0},
        {"packed": True},
        {"materialized": ("q_proj", "down_proj")},
        {"size": 11, "tokens": 16},
        {"size": 1},
    ],
    ids=str,
)
def test_the_loss_is_the_mean_over_the_answers_tokens_however_it_is_cut(how, expected):
    found, _, programs = validated(**how)
    assert found.tokens == expected[2]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert programs <= 2  # one per bucket
    assert validated(**how)[0] == found


def test_answers_without_a_byte_have_no_bits_per_byte():
    found = validated()[0]
    assert found.values() == {
        "validation_loss": found.loss,
        "validation_bits_per_byte": found.bits_per_byte,
        "validation_tokens": found.tokens,
    }
    one = Row(np.asarray([1, 2, 3], np.int32), 2, "", False)
    batches = Batches([one], 1, 0, (8,), 8, answer_only=True, pad_id=0)
    tree = variables()
    halves = trainable_mask.partition(tree, trainable_mask.mask(tree, *trainable_mask.LORA))
    functions = make_step(MODEL, optax.identity(), seed=0, dropout_rate=0.0)
    state = State(jnp.zeros((), jnp.int32), halves[0], None)
    found = validate(state, halves[1], ValidationData(batches, 0), functions)
    assert math.isnan(found.bits_per_byte) and found.loss > 0 and found.tokens == 1


def test_the_best_is_the_first_of_the_lowest():
    best, seen = Best(), []
    for step, loss in enumerate([math.nan, 3.0, 2.0, 2.0, math.inf, 2.5, 1.0], 1):
        best = best.after(step, loss)
        assert Best.from_json(json.loads(json.dumps(best.to_json()))) == best
        seen.append((best.step, best.since, best.ends(2), best.ends(0)))
    assert seen == [
        (None, 1, False, False),
        (2, 0, False, False),
        (3, 0, False, False),
        (3, 1, False, False),
        (3, 2, True, False),
        (3, 3, True, False),
        (7, 0, False, False),
    ]


# ---------------------------------------------------------------- many devices


DRIVER = "tests.training.validated"


def equal(folder, processes):
    """The losses that each of the processes found, on one device and on the mesh, are equal."""
    finish(*processes)
    for i in range(len(processes)):
        one, many = json.loads((folder / f"{i}.json").read_text())
        assert one[2] == many[2]
        np.testing.assert_allclose(many, one, rtol=1e-5)


def test_eight_devices_validate_as_one(tmp_path):
    equal(tmp_path, [start(DRIVER, 8, tmp_path, "2,2,2")])


@pytest.mark.slow
def test_two_processes_validate_as_one_device(tmp_path):
    equal(tmp_path, start_two(DRIVER, tmp_path, "1,2,4"))
