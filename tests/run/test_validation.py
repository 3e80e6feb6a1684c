"""Validation of a run: its numbers, that it changes nothing, the best checkpoint, an early end."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora
from jax_lora.data.toy import write_checkout
from jax_lora.errors import ConfigError, DataError, Stopped
from jax_lora.files import read_jsonl
from jax_lora.model.transformer import Llama
from jax_lora.run import inputs, prepare, scoring, validation
from jax_lora.run.status import status
from jax_lora.training.checkpoints import Checkpoints, best_in, steps_in

NAMES = ["validation_loss", "validation_bits_per_byte", "validation_tokens"]
WORDS = "red blue green black white small large round flat warm cold dry wet old new".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Answers that have nothing to do with their questions: what is learned by heart is wrong."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, count in (("train", 8), ("held_out", 12), ("test", 4)):
        rows = [
            {"instruction": f"{name} {i}", "output": " ".join(rng.choice(WORDS, 3)) + " é"}
            for i in range(count)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def config(tiny_model, data):
    """A planted overfit: the validation loss falls for some steps, then rises."""
    return jax_lora.RunConfig().replace(
        model=str(tiny_model),
        dtype="float32",
        epochs=24,
        batch_size=8,
        micro_tokens=1024,
        checkpoint_every=8,
        validate_every=2,
        keep="best",
        **{
            "lora.rank": 8,
            "lora.dropout": 0.1,
            "optim.warmup_steps": 1,
            "optim.learning_rate": 3e-2,
            "optim.schedule": "constant",
            "data.path": str(data / "train.jsonl"),
            "data.validation_path": str(data / "held_out.jsonl"),
            "data.test_path": str(data / "test.jsonl"),
            "data.template": "plain",
            "data.answer_only": True,
            "data.buckets": (64, 128),
            "data.source_length": 96,
            "data.target_length": 32,
            "eval.buckets": (128,),
            "eval.max_new_tokens": 4,
        },
    )


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    made = jax_lora.Run.open(config, tmp_path_factory.mktemp("runs") / "r")
    made.train()
    return made


def stored(workdir):
    """What a run leaves of its validations and its training: all that must not depend on luck."""
    rows = [[row["step"], row["loss"], row.get(NAMES[0])] for row in lines(workdir)]
    adapter = (workdir / "adapter" / "adapter_model.safetensors").read_bytes()
    return best_in(workdir / "checkpoints"), steps_in(workdir / "checkpoints"), rows, adapter


def lines(workdir):
    return read_jsonl(workdir / "metrics.jsonl")


# ---------------------------------------------------------------- the numbers


def test_the_loss_is_that_of_the_definition(run, config, data):
    """Mean over the answers' tokens, row after row, in float64 from the logits."""
    scored = scoring.load(run.workdir, config, "last")
    model, encoder = Llama(scored.shape, dtype=jnp.float32), inputs.encoder(config)
    total, tokens, size = 0.0, 0, 0
    for line in read_jsonl(data / "held_out.jsonl"):
        prompt = encoder.tokenizer(line["instruction"]).input_ids
        answer = encoder._answer_ids(line["output"])
        ids = np.asarray([*prompt, *answer])
        logits = np.asarray(model.apply(scored.variables, jnp.asarray(ids[None, :-1])))[0]
        logits = logits.astype(np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        at = np.arange(len(ids) - 1)
        total -= logits[at, ids[1:]][-len(answer) :].sum()
        tokens += len(answer)
        size += len(line["output"].encode())
    found = run.validate()
    assert found["validation_tokens"] == tokens and found["step"] == 24
    assert found["validation_loss"] == pytest.approx(total / tokens, rel=1e-5)
    bits = total / math.log(2) / size
    assert found["validation_bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_validating_twice_gives_the_same_number(run):
    found = run.validate()
    assert found == run.validate()
    last, best = run.metrics().iloc[-1], run.metrics().validation_loss.min()
    assert [found[name] for name in NAMES] == [last[name] for name in NAMES]
    assert run.validate("best")["validation_loss"] == best


def test_metrics_have_a_row_per_step_and_the_events_the_same_values(run):
    metrics = run.metrics()
    assert list(metrics.step) == [*range(1, 25)]
    assert list(metrics.step[metrics.validation_loss.notna()]) == [*range(2, 25, 2)]
    events = b"".join(path.read_bytes() for path in (run.workdir / "tensorboard").iterdir())
    assert all(name.encode() in events for name in NAMES)


def test_validation_changes_no_bit_of_the_training(run, config, tmp_path):
    without = config.replace(validate_every=0, keep="last")
    other = jax_lora.Run.open(without, tmp_path / "r")
    assert other.train().loss.tolist() == run.metrics().loss.tolist()
    assert stored(other.workdir)[3] == stored(run.workdir)[3]
    again = jax_lora.Run.open(config, other.workdir)  # may be switched on for a run that is there
    assert again.validate() == run.validate()


def test_all_of_the_assistants_turns_count_as_answers():
    from jax_lora.data.example import Example, Message

    turns = (Message("user", "a"), Message("assistant", "é"), Message("user", "b"))
    example = Example("b", "", ("xyz", "other"), "t", "c", "1", turns[:2])

    class Templated:
        template = "chat"

    assert validation._answer_bytes(example, Templated()) == 2 + 3
    Templated.template = "alpaca"
    assert validation._answer_bytes(example, Templated()) == 3


# ---------------------------------------------------------------- the best checkpoint


def test_a_planted_overfit_has_its_best_before_its_last(run):
    metrics = run.metrics()
    best, steps = best_in(run.workdir / "checkpoints"), steps_in(run.workdir / "checkpoints")
    row = metrics.validation_loss.idxmin()
    assert (best.step, best.loss) == (metrics.step[row], metrics.validation_loss[row])
    assert best.step < 24 and metrics.validation_loss.iloc[-1] > best.loss
    assert metrics.loss.iloc[-1] < metrics.loss[row]  # so it is learned by heart
    assert steps[0] == 24 and best.step in steps and len(steps) <= 3
    text = status(run.workdir)
    assert f"best checkpoint: step {best.step}, validation loss {best.loss:.4f}\n" in text
    assert f"validation:      loss {metrics.validation_loss.iloc[-1]:.4f} at step 24" in text


def test_any_checkpoint_is_scored_into_a_folder_of_its_own(run):
    folder = run.workdir / "checkpoints"
    best, steps = best_in(folder).step, steps_in(folder)
    said = {}
    for name in ("last", "best", str(steps[1])):
        run.score(["test"], checkpoint=name)
        where = {"last": "eval", "best": "eval-best"}.get(name, f"eval-step-{name}")
        said[name] = json.loads((run.workdir / where / "test" / "settings.json").read_text())
    assert said["last"]["origin"].endswith("after step 24")
    assert said["best"]["origin"].endswith(f"after step {best}")
    assert said[str(steps[1])]["origin"].endswith(f"after step {steps[1]}")
    assert said["last"]["weights_digest"] != said["best"]["weights_digest"]


def test_checkpoints_that_are_not_there_are_named(run, tmp_path):
    there = ", ".join(map(str, sorted(steps_in(run.workdir / "checkpoints"))))
    for name in ("7", "first", "-1", "²"):
        message = f"--checkpoint: found '{name}'; expected last, best or one of {there}"
        for ask in (lambda: run.score(checkpoint=name), lambda: run.validate(name)):  # noqa: B023
            with pytest.raises(ConfigError) as caught:
                ask()
            assert str(caught.value) == message
    with pytest.raises(ConfigError, match="'best' with --adapter=none, expected one of them"):
        run.score(adapter="none", checkpoint="best")
    moved = shutil.copytree(run.workdir, tmp_path / "r")
    best = best_in(moved / "checkpoints").step
    shutil.rmtree(moved / "checkpoints" / str(best))
    with pytest.raises(ConfigError, match=f"best, which was step {best} and is not kept; train"):
        jax_lora.Run.open(None, moved).score(checkpoint="best")
    assert f"step {best}, validation loss" in status(moved) and ", not kept" in status(moved)
    with pytest.raises(FileNotFoundError):
        jax_lora.Run.open(run.config, tmp_path / "none").validate()


@pytest.mark.filterwarnings("ignore")  # of Orbax, about what it is made to read
def test_a_damaged_checkpoint_that_is_asked_for_is_not_passed_over(run, tmp_path):
    moved = shutil.copytree(run.workdir, tmp_path / "r")
    best = best_in(moved / "checkpoints").step
    path = moved / "checkpoints" / str(best) / "digests" / "metadata"
    said = json.loads(path.read_text())
    said["arrays"] = dict.fromkeys(said["arrays"], "0" * 16)
    path.write_text(json.dumps(said))
    with pytest.raises(DataError, match=f"{best}: .*other values than were saved; expected a whol"):
        jax_lora.Run.open(None, moved).score(checkpoint="best")
    assert best in steps_in(moved / "checkpoints")


# ---------------------------------------------------------------- interrupted runs


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize(("method", "number"), [("save", 1), ("save", 4), ("_finish", 2)])
def test_killed_between_a_validation_and_its_checkpoint(
    run, config, tmp_path, monkeypatch, method, number
):
    calls, original = [], getattr(Checkpoints, method)

    def killed(self, *args):
        calls.append(method)
        if len(calls) == number:
            self._writer.wait_until_finished()  # of the step before: what is written is written
            raise Killed
        return original(self, *args)

    workdir = tmp_path / "r"
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, method, killed)
        with pytest.raises(Killed):
            jax_lora.Run.open(config, workdir).train()
    before = lines(workdir)
    assert before and NAMES[0] in before[-1]  # it was validated
    jax_lora.Run.open(config, workdir).train()
    assert stored(workdir) == stored(run.workdir)


def test_a_stopped_run_goes_on_with_its_choice(run, config, tmp_path):
    workdir = tmp_path / "r"
    mine = jax_lora.Run.open(config, workdir)
    for until in (3, 12):
        with pytest.raises(Stopped):
            mine.train(asked_to_stop=lambda: len(mine.metrics()) >= until)  # noqa: B023
    mine.train()
    best, _, rows, adapter = stored(workdir)
    assert (best, rows, adapter) == (stored(run.workdir)[0], *stored(run.workdir)[2:])


# ---------------------------------------------------------------- an early end


def test_a_run_ends_after_validations_without_an_improvement(run, config, tmp_path):
    said = []
    early = config.replace(stop_after=3)
    mine = jax_lora.Run.open(early, tmp_path / "r", say=said.append)
    metrics = mine.train()
    last, losses = int(metrics.step.iloc[-1]), metrics.validation_loss.dropna().tolist()
    assert last < 24 and min(losses) == losses[-4] and len(losses) >= 4
    assert metrics.loss.tolist() == run.metrics().loss.tolist()[:last]
    reason = "3 validations in a row brought no lower loss"
    assert f"finished at step {last} of 24: {reason}" in said
    assert (mine.workdir / "adapter" / "adapter_model.safetensors").is_file()
    text = status(mine.workdir)
    assert f"state:           finished: {reason}" in text and "time left" not in text
    assert f"last checkpoint: step {last}" in text
    before = stored(mine.workdir)
    assert mine.train().equals(metrics)  # the same command does not go on
    assert stored(mine.workdir) == before
    for key, value in (("stop_after", 4), ("validate_every", 1)):
        with pytest.raises(ConfigError, match=f"config.{key} is"):
            jax_lora.Run.open(early.replace(**{key: value}), mine.workdir).train()


def test_what_decides_results_is_what_ends_a_run(config):
    for key, value in (("validate_every", 3), ("keep", "last")):
        assert config.replace(**{key: value}).identity() == config.identity()
    ends = config.replace(stop_after=3)
    assert ends.identity() != config.identity()
    assert ends.replace(validate_every=3).identity() != ends.identity()
    assert ends.replace(keep="last").identity() == ends.identity()


# ---------------------------------------------------------------- what it validates on


@pytest.fixture(scope="module")
def natural(config, tmp_path_factory):
    toy = write_checkout(tmp_path_factory.mktemp("toy"), instances_per_task=12)
    own = dict.fromkeys(("data.validation_path", "data.test_path"), "")
    return config.replace(
        **own,
        **{
            "data.path": str(toy),
            "data.template": "alpaca",
            "data.set": "T4",
            "data.sizes": (4, 6, 8),
            "data.train_per_task": 4,
            "data.test_per_task": 2,
            "data.validation_per_task": 3,
            "data.buckets": (384,),
            "data.source_length": 320,
            "eval.buckets": (384,),
        },
    )


def test_natural_instructions_validate_on_more_examples_of_the_train_tasks(natural, tmp_path):
    given = prepare.read_inputs(natural, tmp_path)
    without = {"data.validation_per_task": 0, "validate_every": 0, "keep": "last"}
    other = prepare.read_inputs(natural.replace(**without), tmp_path)
    assert other.validation is None and len(given.validation.batches.rows) == 4 * 3
    assert [row.prompt for row in given.rows] == [row.prompt for row in other.rows]
    for step in range(given.total):
        for here, there in zip(given.batches.at(step), other.batches.at(step), strict=True):
            jax.tree.map(np.testing.assert_array_equal, here, there)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.validation_path": ""}, "config.validate_every: found 2 and no validation data"),
        ({"data.validation_per_task": 5}, "validation_per_task: found 5 with data of one's own"),
        ({"validate_every": 0}, "config.validate_every: found 0 with keep=best and stop_after=0"),
        (
            {"validate_every": 0, "keep": "last", "stop_after": 2},
            "found 0 with keep=last and stop_after=2, which choose by validation",
        ),
        ({"keep": "all"}, "config.keep: found 'all', expected one of last, best"),
        ({"stop_after": -1}, "config.stop_after: found -1, expected 0 or more"),
    ],
)
def test_wrong_keys_are_told_before_training(config, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        jax_lora.Run.open(config.replace(**change), tmp_path / "r").train()
    assert not (tmp_path / "r").exists()


def test_a_run_without_validation_data_is_not_validated(config, run, tmp_path):
    none = {"data.validation_path": "", "validate_every": 0, "keep": "last", "max_steps": 2}
    mine = jax_lora.Run.open(config.replace(**none), tmp_path / "r")
    mine.train()
    with pytest.raises(ConfigError, match="config.data: found no validation data"):
        mine.validate()
