"""Losses per token against numpy's of the whole rows, one at a time; a text's windows."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora
from jax_lora.data.example import Example, Message
from jax_lora.data.prompts import Encoder
from jax_lora.errors import ConfigError, DataError
from jax_lora.model.transformer import Llama
from jax_lora.run import inputs, losses, scoring
from tests.data import chats

TEXT = "Twenty years from now, é, you will be more disappointed. " * 20


@pytest.fixture(scope="module", params=["lora", "full"])
def run(request, tiny_run, tmp_path_factory):
    """A run that trained enough for its losses to differ from the base's."""
    changes = (
        {"optim.learning_rate": 3e-2}
        if request.param == "lora"
        else {
            "method": "full",
            "trainable": ("params/.*",),
            "frozen": (),
            "optim.learning_rate": 1e-3,
        }
    )
    config = tiny_run(max_steps=3, **changes)
    made = jax_lora.Run.open(config, tmp_path_factory.mktemp("runs") / request.param)
    made.train()
    return made


@functools.cache
def model_of(run: jax_lora.Run, adapter: str):
    """One row of ids, padded → its logits; compiled once, since no token sees one behind it."""
    scored = scoring.load(run.workdir, run.config, adapter)
    apply = jax.jit(Llama(scored.shape, dtype=jnp.float32).apply)

    def logits(ids: np.ndarray) -> np.ndarray:
        padded = np.pad(ids, (0, max(run.config.data.buckets) - len(ids)))
        return np.asarray(apply(scored.variables, padded[None]), float)[0, : len(ids)]

    return logits


def by_numpy(run: jax_lora.Run, adapter: str, ids: np.ndarray) -> np.ndarray:
    """The losses of tokens 1, 2, … of one row, in float64 from the logits on."""
    logits = model_of(run, adapter)(ids)[:-1]
    highest = logits.max(-1, keepdims=True)
    log_sum = highest[:, 0] + np.log(np.exp(logits - highest).sum(-1))
    return log_sum - logits[np.arange(len(logits)), ids[1:]]


@pytest.mark.parametrize("adapter", ["last", "none"])
def test_the_loss_of_references_is_that_of_numpy(run, adapter):
    taskset = inputs.test_sets(run.config, ["seen"])["seen"]
    found = run.losses(adapter).references(taskset, per_task=1)
    encoder = inputs.encoder(run.config)
    firsts = {example.task: example for example in reversed(taskset.examples)}
    assert found["task"].to_list() == list(dict.fromkeys(e.task for e in taskset.examples))
    for row in found.iloc[::9].to_dict("records"):
        example = firsts[row["task"]]
        encoded = encoder.training_row(example)
        expected = by_numpy(run, adapter, encoded.ids)[encoded.prompt_length - 1 :]
        assert row["id"] == example.id and row["tokens"] == len(expected)
        assert encoded.ids[-1] == encoder.eos_id  # which is one of the tokens
        assert row["loss"] == pytest.approx(expected.mean(), rel=1e-6)
    assert len(run.losses(adapter).references(taskset)) == len(taskset.examples)


def test_earlier_answers_of_a_conversation_are_no_reference(tmp_path):
    tokenizer = chats.tokenizer("qwen2.5")
    turns = (Message("user", "Hi"), Message("assistant", "Hello there"))
    asked = Example("Bye", "", ("So long",), "all", "all", "1", messages=turns)
    row = Encoder(tokenizer, "chat", 256, 64).training_row(asked)
    mask = losses._reference_mask(row)
    assert tokenizer.decode(row.ids[mask]) == "So long<|im_end|>"
    assert "Hello there" in tokenizer.decode(row.ids[row.loss_mask(answer_only=True)])


def test_losses_of_another_run_or_base_are_refused(run, tmp_path):
    other = run.config.replace(**{"lora.alpha_per_rank": 1.0})
    if run.config.method == "full":
        other = run.config.replace(seed=7)
    with pytest.raises(ConfigError, match="belongs to another run"):
        jax_lora.Run.open(other, run.workdir).losses()
    base = shutil.copy(run.config.model, tmp_path / "other.gguf")
    with open(base, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"?")
    there = jax_lora.Run.open(run.config.replace(model=str(base)), run.workdir)
    for use in (there.losses, there.check):
        with pytest.raises(ConfigError, match="belongs to another run: base_digest"):
            use()


def test_the_loss_of_a_text_is_that_of_numpy_and_training_changes_it(run):
    rows = losses.windows(TEXT, inputs.encoder(run.config), max(run.config.data.buckets))
    assert len(rows) > 2 and len({*map(len, rows)}) == 2
    found = {}
    for adapter in ("last", "none"):
        expected = np.concatenate([by_numpy(run, adapter, ids) for ids in rows]).mean()
        found[adapter] = run.losses(adapter).text(TEXT)
        assert found[adapter] == pytest.approx(expected, rel=1e-6)
    assert abs(found["last"] - found["none"]) > 1e-3


def test_the_loss_is_of_the_next_token(run):
    """Unshifted, each token would be predicted from itself (peft#3419)."""
    encoder = inputs.encoder(run.config)
    model = run.losses("none")
    (ids,) = losses.windows(TEXT[:40], encoder, 384)
    unshifted = by_numpy(run, "none", np.concatenate([ids[:1], ids]))[1:]
    assert model.text(TEXT[:40]) != pytest.approx(unshifted.mean(), rel=1e-3)


def test_windows_are_the_text(run):
    encoder = inputs.encoder(run.config)
    ids = encoder.tokenizer(TEXT, add_special_tokens=False).input_ids
    rows = losses.windows(TEXT, encoder, 100)
    assert np.concatenate(rows).tolist() == ids and {len(row) for row in rows[:-1]} == {100}
    with pytest.raises(DataError, match="text: found 'a', expected one of at least two tokens"):
        losses.windows("a", encoder, 100)
