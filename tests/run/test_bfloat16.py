"""bfloat16 from end to end beside float32: packed rows, dropout, materialized deltas, decoding.

u = 2^-8 is what rounding to bfloat16's 8 bits of mantissa may change, relative. The same seeds give
the same adapters, rows and dropout masks, so all that differs is rounding. It is bounded thus:

- A logit of the toy (two layers) is behind about 22 roundings: the embedding, ten per layer (norm,
  q, k, v, attention, o, norm, gate, up, down) and the last norm. They are independent and uniform,
  u/√3 each: √22 · u/√3 = 2.7 u of its size. The logits have a spread of about 1 where the loss is
  5.5, so that a token's loss, the difference of two of them, is off by √2 · 2.7 u / 5.5 = 0.7 u,
  relative. Taking the tokens of an example to err alike, a step's loss is the mean of 8
  independent errors: 0.7 u / √8 = u / 4. Sums, the softmax and the loss must be float32 for that.
- A gradient goes back through as many roundings: 2 · 2.7 u = 5.4 u. AdamW divides it by its size,
  so that the error of an update is of that order, and that of 20 updates is not larger; three
  times as much is allowed, 16 u of what A and B moved. A and B themselves must be float32 for that.
- Two logits of which both are off by 2.7 u of the largest one, at three standard deviations, swap
  their order when they are less than √2 · 3 · 2.7 u = 11.5 u of it apart. The answers are equal up
  to the first token whose best two are so close.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_lora
from jax_lora.generation import greedy, scheduler
from jax_lora.model import lora
from jax_lora.model.transformer import Llama
from jax_lora.run import initial_weights, inputs
from jax_lora.weights import base as base_weights
from jax_lora.weights import peft

U = 2.0**-8
RANK, STEPS, NEW_TOKENS = 40, 20, 8


@pytest.fixture(scope="module")
def config(tiny_run):
    return tiny_run(
        max_steps=STEPS,
        micro_tokens=2048,
        **{
            "lora.rank": RANK,
            "lora.dropout": 0.1,
            "optim.learning_rate": 5e-4,
            "data.packed": True,
            "data.test_per_task": 1,
            "data.train_per_task": 8,
        },
    )


def trained(config, folder):
    """The losses of a run, and its adapters."""
    run = jax_lora.Run.open(config, folder)
    losses = run.train().loss.to_numpy()
    return losses, peft.load(folder / "adapter").adapters["layers"]["self_attn"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def in_float32(config, folder):
    return trained(config, folder / "float32")


@pytest.fixture(scope="module")
def difference(config, in_float32, tmp_path_factory):
    """Train in bfloat16: the largest relative error of a loss, and those of A and of B."""
    shape = base_weights.read_config(config.model)
    start = initial_weights.adapters_of(config, shape)["layers"]["self_attn"]

    def flat(adapters, leaf):
        return np.concatenate([np.asarray(adapters[name][leaf]).ravel() for name in start])

    def measure():
        bfloat16 = config.replace(dtype="bfloat16")
        losses, adapters = trained(bfloat16, tmp_path_factory.mktemp("bfloat16") / "run")
        expected, wanted = in_float32
        assert len(losses) == STEPS and losses[-1] < 0.9 * losses[0]
        errors = {"loss": np.abs(losses / expected - 1).max()}
        for leaf in "ab":
            moved = np.linalg.norm(flat(wanted, leaf) - flat(start, leaf))
            error = np.linalg.norm(flat(adapters, leaf) - flat(wanted, leaf))
            errors[leaf] = error / moved
        print(errors)
        return errors

    return measure


BOUNDS = {"loss": U / 4, "a": 16 * U, "b": 16 * U}


def test_training_is_float32s_but_for_rounding(config, difference):
    shape = base_weights.read_config(config.model)
    targets = config.lora.targets
    assert lora.materialized_targets(shape, RANK, targets) == targets
    found = difference()
    assert all(found[name] <= bound for name, bound in BOUNDS.items()), found
    assert found["loss"] > 0  # or nothing was in bfloat16


def rounded(tree):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), tree)


def adapters_in_bfloat16(monkeypatch):
    apply = optax.apply_updates
    monkeypatch.setattr(optax, "apply_updates", lambda *args: rounded(apply(*args)))
    return "a"


def loss_in_bfloat16(monkeypatch):
    total, head = jnp.sum, Llama.head
    monkeypatch.setattr(Llama, "head", lambda self, *args: rounded(head(self, *args)))
    monkeypatch.setattr(jnp, "sum", lambda x, *args, **keys: rounded(total(x, *args, **keys)))
    return "loss"


@pytest.mark.slow
@pytest.mark.parametrize("plant", [adapters_in_bfloat16, loss_in_bfloat16])
def test_what_must_be_float32_is_seen(difference, monkeypatch, plant):
    name = plant(monkeypatch)
    assert difference()[name] > BOUNDS[name]


def test_answers_are_equal_up_to_a_close_choice(config, folder, in_float32):
    asked, found, logits = None, [], None
    for dtype in ("float32", "bfloat16"):
        model = jax_lora.load(config.model, adapter=folder / "float32" / "adapter", dtype=dtype)
        if asked is None:
            encoder = inputs.encoder(config)
            examples = inputs.task_sets(config)["seen"].examples
            asked = [encoder.prompt_row(example).ids for example in examples]
        ended = scheduler.answers(
            model.module,
            greedy.unstack_layers(model.variables),
            asked,
            max_new_tokens=NEW_TOKENS,
            end_ids=(),
            buckets=(384,),
            batch_tokens=16 * 384,
            max_batch=16,
        )
        answers = dict(itertools.chain.from_iterable(ended))
        found.append([answers[i].tolist() for i in range(len(asked))])
        if dtype == "float32":
            texts = np.zeros((len(asked), 384 + NEW_TOKENS), np.int32)
            for row, prompt, answer in zip(texts, asked, found[0], strict=True):
                row[: len(prompt) + NEW_TOKENS] = *prompt, *answer
            logits = model.logits(texts)
    assert logits is not None
    compared = 0
    for row, prompt, one, other in zip(logits, asked, *found, strict=True):
        at = row[len(prompt) - 1 : len(prompt) - 1 + NEW_TOKENS]
        best, second = np.sort(at)[:, :-3:-1].T
        is_close = best - second <= 11.5 * U * np.abs(at).max(axis=1)
        until = int(np.argmax([*is_close, True]))
        assert one[:until] == other[:until]
        compared += until
    equal = sum(one == other for one, other in zip(*found, strict=True))
    print(f"{compared} tokens compared; {equal} of {len(asked)} answers are equal")
    assert compared >= 2 * len(asked) and equal >= len(asked) / 2
