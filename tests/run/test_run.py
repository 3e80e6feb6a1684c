"""`Run` in Python: train, resume, score; what it refuses; what its loop waits for."""

import dataclasses
import itertools
import json
import random
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import jax_lora
from jax_lora import distributed
from jax_lora.data.toy import write_checkout
from jax_lora.errors import ConfigError, DataError, RunFailed, Stopped
from jax_lora.evaluation import metrics
from jax_lora.files import read_jsonl
from jax_lora.model import lora, xla_cpu
from jax_lora.run import folder, inputs, prepare, scoring, training
from jax_lora.training import loop
from jax_lora.training.validation import Best
from jax_lora.weights import base as base_weights
from jax_lora.weights import hf
from jax_lora.weights.tokenizers import load_tokenizer
from tests.study.test_team import Store


@pytest.fixture(scope="module")
def config(tiny_run):
    return tiny_run(max_steps=4, checkpoint_every=2)


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    made = jax_lora.Run.open(config, tmp_path_factory.mktemp("runs") / "r2")
    made.train()
    return made


def test_a_run_in_python(run, config):
    metrics = run.metrics()
    assert list(metrics.step) == [1, 2, 3, 4] and np.isfinite(metrics.loss).all()
    np.testing.assert_allclose(metrics.learning_rate, [0, 1e-3, 2e-3 / 3, 1e-3 / 3], rtol=1e-5)
    assert (metrics.tokens_per_second > 0).all()
    assert metrics.compile_seconds[0] > 0
    scores = run.score(["seen"])
    assert {"set", "task", "examples", "exact_match", "rougeL"} <= set(scores.columns)
    assert set(scores.set) == {"seen"} and scores.examples.sum() > 0
    again = jax_lora.Run.open(None, run.workdir)
    assert again.config == config
    assert again.train().equals(metrics)  # finished: nothing is trained again


def test_a_run_is_resumed_with_all_that_decides_no_result(run, config, tmp_path):
    workdir = tmp_path / "r2"
    with pytest.raises(Stopped, match="stopped at step 1 of 4; rerun the same command"):
        jax_lora.Run.open(config, workdir).train(asked_to_stop=lambda: True)
    elsewhere = tmp_path / "elsewhere.gguf"
    shutil.copy(config.model, elsewhere)
    shutil.copytree(config.data.path, tmp_path / "tasks")
    other = config.replace(
        model=str(elsewhere),
        micro_tokens=2048,
        remat="none",
        loss_chunk=64,
        unroll=2,
        log_every=2,
        **{"data.path": str(tmp_path / "tasks"), "eval.max_batch": 4},
    )
    losses = jax_lora.Run.open(other, workdir).train().loss
    expected = run.metrics().loss[[0, 1, 3]]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    with pytest.raises(ConfigError, match="config.optim.b1 is 0.9 there and 0.8 here"):
        jax_lora.Run.open(config.replace(**{"optim.b1": 0.8}), workdir).train()


def test_a_run_keeps_the_dtype_that_auto_was_where_it_began(config, tmp_path, monkeypatch):
    monkeypatch.setattr(xla_cpu, "has_bfloat16_products", lambda: True)
    config, workdir = config.replace(dtype="auto"), tmp_path / "r"
    with pytest.raises(Stopped):
        jax_lora.Run.open(config, workdir).train(asked_to_stop=lambda: True)
    assert folder.read_saved(workdir)[0].dtype == "bfloat16"
    monkeypatch.setattr(xla_cpu, "has_bfloat16_products", lambda: False)
    assert jax_lora.Run.open(config, tmp_path / "other").config.dtype == "float32"
    resumed = jax_lora.Run.open(config, workdir)
    assert resumed.config.dtype == "bfloat16" and len(resumed.train()) == 4
    with pytest.raises(ConfigError, match="config.dtype is 'bfloat16' there and 'float32' here"):
        jax_lora.Run.open(config.replace(dtype="float32"), workdir).train()


def test_another_base_is_another_run(run, config, tmp_path):
    changed = tmp_path / "changed.gguf"
    content = bytearray(Path(config.model).read_bytes())
    content[-100] ^= 1
    changed.write_bytes(content)
    with pytest.raises(ConfigError, match="base_digest is '.*' there and '.*' here"):
        jax_lora.Run.open(config.replace(model=str(changed)), run.workdir).train()


def test_a_metric_of_ones_own_is_a_function_and_a_config_line(run, config, monkeypatch):
    own = config.replace(**{"eval.metrics": ("exact_match", "rougeL", "is_empty")})
    with pytest.raises(ConfigError, match="config.eval.metrics: found .*is_empty, expected some"):
        jax_lora.Run.open(own, run.workdir)
    monkeypatch.setitem(metrics.METRICS, "is_empty", lambda answer, references: not answer)
    texts = []
    scores = jax_lora.Run.open(own, run.workdir, say=texts.append).score(["unseen"])
    folder = run.workdir / "eval" / "unseen"
    answers = [row["prediction"] for row in read_jsonl(folder / "predictions.jsonl")]
    share = 100 * sum(not answer for answer in answers) / len(answers)
    saved = json.loads((folder / "scores.json").read_text())["metrics"]
    assert saved["is_empty"] == pytest.approx(share, abs=1e-4)
    assert (scores.is_empty * scores.examples).sum() / len(answers) == pytest.approx(share)
    (header,) = (line for line in texts[-1].splitlines() if line.startswith("task "))
    assert header.split()[2:5] == ["EM", "Rouge-L", "is_empty"]
    before = (folder / "predictions.jsonl").stat().st_mtime_ns  # the answers are not made again
    again = jax_lora.Run.open(config, run.workdir).score(["unseen"])
    assert "is_empty" not in again.columns and list(again.rougeL) == list(scores.rougeL)
    assert (folder / "predictions.jsonl").stat().st_mtime_ns == before


def test_answers_of_other_weights_or_another_version_are_made_again(run, monkeypatch):
    run.score(["unseen"])
    path = run.workdir / "eval" / "unseen" / "predictions.jsonl"
    content, before = path.read_bytes(), path.stat().st_mtime_ns
    run.score(["unseen"])
    assert path.stat().st_mtime_ns == before
    run.score(["unseen"], overwrite=True)
    assert path.stat().st_mtime_ns != before and sorted(read_jsonl(path), key=str) == sorted(
        map(json.loads, content.decode().splitlines()), key=str
    )
    for place, name, value in (
        (folder, "package_version", lambda: "other"),
        (scoring, "digest", lambda tree: "other"),
    ):
        before = path.stat().st_mtime_ns
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            run.score(["unseen"])
        assert path.stat().st_mtime_ns != before, name


def test_too_little_memory_says_what_to_lower(config, monkeypatch, tmp_path):
    def train(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.")
        yield

    monkeypatch.setattr(loop, "train", train)
    with pytest.raises(RunFailed) as error:
        jax_lora.Run.open(config.replace(remat="none"), tmp_path / "r").train()
    for words in (
        "RESOURCE_EXHAUSTED",
        "no checkpoint yet",
        "micro_tokens (now 1024)",
        "remat",
        "needs 0.0 GiB",
    ):
        assert words in str(error.value)


def test_weights_that_do_not_fit_leave_the_folder_free(config, monkeypatch, tmp_path):
    def build(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.")

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "build", build)
        with pytest.raises(RunFailed) as error:
            jax_lora.Run.open(config, tmp_path / "r").train()
    for words in ("RESOURCE_EXHAUSTED", "no step was taken", "GiB", "lower config.lora.rank"):
        assert words in str(error.value)
    smaller = config.replace(**{"lora.rank": 1})
    jax_lora.Run.open(smaller, tmp_path / "r").train()  # it is nobody else's


def test_weights_that_do_not_fit_are_no_traceback_in_scoring(run, monkeypatch):
    def load(*_):
        raise MemoryError("99 bytes")

    monkeypatch.setattr(scoring, "load", load)
    with pytest.raises(RunFailed, match="99 bytes; no answer was made; .*devices_per_copy"):
        run.score(["unseen"])


def test_a_fault_of_ours_is_no_failed_run(config, monkeypatch, tmp_path):
    def train(*_):
        raise ValueError("shapes")
        yield

    monkeypatch.setattr(loop, "train", train)
    with pytest.raises(ValueError, match="shapes"):
        jax_lora.Run.open(config, tmp_path / "r").train()


# ---------------------------------------------------------------- ids


def test_ids_outside_of_the_vocabulary_are_named_before_compute(config, monkeypatch, tmp_path):
    encoder = inputs.encoder(config)
    rows = inputs.training_rows(encoder, inputs.training_set(config), "first", 0)
    size = max(int(row.ids.max()) for _, row in rows)
    shape = dataclasses.replace(base_weights.read_config(config.model), vocab_size=size)
    monkeypatch.setattr(base_weights, "read_config", lambda _: shape)
    inputs._encoder.cache_clear()
    try:
        with pytest.raises(DataError, match=f"token .* id {size}.*vocab_size {size}"):
            jax_lora.Run.open(config, tmp_path / "r").train()
    finally:
        inputs._encoder.cache_clear()
    assert not (tmp_path / "r").exists()


def test_what_scoring_would_refuse_is_told_before_training(config, tmp_path):
    toy = write_checkout(tmp_path / "toy", instances_per_task=12)
    name = (toy / "splits" / "default" / "test_tasks.txt").read_text().split()[0]
    path = toy / "tasks" / f"{name}.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"Definition": ["word " * 400]}))
    with pytest.raises(ConfigError, match=f"{name} .*: the prompt has .* without its input"):
        jax_lora.Run.open(config.replace(**{"data.path": str(toy)}), tmp_path / "r").train()
    assert not (tmp_path / "r").exists()


SCORING_REFUSES = {  # what only answers need: a file of the base, its keys, what is said
    "a sliding window": (
        "config.json",
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 385},
        "rows of 387 tokens: expected at most 385, the model's sliding_window",
    ),
    "an end id": (
        "generation_config.json",
        {"eos_token_id": "</s>"},
        "generation_config.json: eos_token_id: found '</s>', expected ids",
    ),
}


@pytest.mark.parametrize("kind", SCORING_REFUSES)
def test_what_only_scoring_needs_of_a_base_is_told_before_training(
    config, tiny_model, tmp_path, kind
):
    name, keys, message = SCORING_REFUSES[kind]
    shape, base = base_weights.load(tiny_model, "float32")
    hf.save(tmp_path / "m", shape, base, load_tokenizer(tiny_model))
    path = tmp_path / "m" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    spoilt = config.replace(model=str(tmp_path / "m"))
    with pytest.raises((ConfigError, DataError), match=message):
        jax_lora.Run.open(spoilt, tmp_path / "r").train()
    assert not (tmp_path / "r").exists()


def test_training_and_scoring_ask_by_one_function(run, config, tmp_path, monkeypatch):
    def asked(config, encoder, sets):
        raise ConfigError(f"asked for {', '.join(sets)}")

    monkeypatch.setattr(inputs, "asked", asked)
    with pytest.raises(ConfigError, match="asked for seen, unseen"):
        jax_lora.Run.open(config, tmp_path / "r").train()
    with pytest.raises(ConfigError, match="asked for seen, unseen"):
        run.score()
    with pytest.raises(ConfigError, match="asked for unseen"):
        run.score(["unseen"])


def test_a_test_set_without_examples_is_told_before_training(config, tmp_path, caplog):
    toy = write_checkout(tmp_path / "toy", instances_per_task=12)
    for path in (toy / "tasks").glob("*.json"):
        record = json.loads(path.read_text())
        for row in record["Instances"]:
            row["input"] = "the same"
        path.write_text(json.dumps(record))
    own = config.replace(**{"data.path": str(toy)})
    with caplog.at_level("WARNING", logger="jax_lora"):
        inputs.check_tests(own, inputs.encoder(own))
    assert "seen: no example is left to score; tasks of a single distinct input" in caplog.text


def test_the_draw_of_a_and_dropout_share_no_key():
    for seed in range(3):
        keys = [jax.random.key(seed), *lora.seed_keys(seed)]
        data = {tuple(jax.random.key_data(key).tolist()) for key in keys}
        assert len(data) == 3


# ---------------------------------------------------------------- what the loop waits for


class Loss:
    """A loss on its way, which notes when it is read."""

    def __init__(self, step, events):
        self.step, self.events = step, events

    def __float__(self):
        self.events.append(("read", self.step))
        return 1.0


def fake(monkeypatch, config, total, events):
    """The pieces that `fit` takes, with steps that only note that they were dispatched."""

    def train(*_):
        for step in range(1, total + 1):
            events.append(("dispatch", step))
            yield None, loop.Report(step, Loss(step, events), Loss(step, events), 8, 0, 4)

    monkeypatch.setattr(loop, "train", train)
    batches = SimpleNamespace(stream=lambda *_: [], examples_until=lambda step: 8 * step)
    given = SimpleNamespace(
        total=total,
        resolved=SimpleNamespace(config=config),
        batches=batches,
        device_put=lambda batch: batch,
    )
    checkpoints = SimpleNamespace(
        save=lambda _: events.append(("save", None)),
        check=lambda: None,
        close=lambda: None,
        latest=lambda: None,
        best=Best(),
    )
    rates = prepare.learning_rates(lambda step: 0.1 * step, total)
    assert type(rates) is np.ndarray  # reading one asks no device
    ready = SimpleNamespace(
        start=0,
        state=None,
        frozen=None,
        step=None,
        learning_rates=rates,
        checkpoints=checkpoints,
    )
    return given, ready


def test_no_step_is_waited_for_before_the_next_is_dispatched(config, monkeypatch, tmp_path):
    events = []
    given, ready = fake(monkeypatch, config.replace(checkpoint_every=4), 9, events)
    training.fit(given, ready, tmp_path, lambda: False)
    at = {event: i for i, event in reversed(list(enumerate(events)))}
    for step in range(1, 9):
        if step % 4:  # a checkpoint waits
            assert at["dispatch", step + 1] < at["read", step]
        assert at["read", step] < at["dispatch", step + 2] if step < 8 else True
    reads = [step for kind, step in events if kind == "read"]
    assert reads == sorted(reads) and set(reads) == set(range(1, 10))
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [*range(1, 10)]


@pytest.mark.parametrize("seed", range(50))
def test_all_processes_stop_after_the_same_step(seed):
    """Processes in any order that their losses allow, up to all of them asked at once."""
    chance, store, count = random.Random(seed), Store(), chance_count(seed)
    asked_at = {i: chance.randint(1, 12) for i in range(count) if chance.random() < 0.7}
    asked_at = asked_at or {0: 5}
    agreements = [distributed.StopAgreement(store, i, run=0) for i in range(count)]
    dispatched, checked, last = [0] * count, [0] * count, [None] * count
    for _ in itertools.count():
        if None not in last:
            break
        ready = []
        for i in range(count):
            if last[i] is not None:
                continue
            if dispatched[i] == checked[i]:
                ready.append((i, "dispatch"))
            # Before it checks, a process reads the loss of the step before, which needs all.
            elif min(dispatched) >= dispatched[i] - 1:
                ready.append((i, "check"))
        assert ready, (dispatched, last)  # else they would wait for each other for good
        i, what = chance.choice(ready)
        if what == "dispatch":
            dispatched[i] += 1
            continue
        checked[i] = dispatched[i]
        if agreements[i].is_last(checked[i], asked_at.get(i, 99) <= checked[i]):
            last[i] = checked[i]
    assert len(set(last)) == 1, last
    assert last[0] <= min(asked_at.values()) + 2


def chance_count(seed):
    return 1 + seed % 4


def test_speed_is_of_recent_steps_between_which_nothing_compiled():
    # The third step compiles, and so would show a time that is not its own.
    times = iter([0.0, 10.0, 12.0, 52.0, *range(53, 53 + 2 * training.WINDOW)])
    compiled = iter([0.0, 5.0, 5.0, 25.0, *[25.0] * 2 * training.WINDOW])
    speed = training.Speed(lambda: next(times), lambda: next(compiled))
    assert speed.step(100) == 5.0
    assert speed.tokens_per_second == pytest.approx(10)  # there is nothing better yet
    assert speed.step(300) == 0.0
    assert speed.tokens_per_second == pytest.approx(150)
    assert speed.step(100) == 20.0
    assert speed.tokens_per_second == pytest.approx(150)
    for _ in range(training.WINDOW):
        speed.step(50)
    assert speed.tokens_per_second == pytest.approx(50)


def test_what_is_done_between_two_steps_is_not_in_their_speed():
    times, compiled = iter([0.0, 1.0, 90.0, 91.0]), iter([0.0, 0.0, 70.0, 70.0])
    speed = training.Speed(lambda: next(times), lambda: next(compiled))
    assert speed.step(100) == 0.0
    speed.resume()  # a validation, which compiled
    assert speed.step(300) == 0.0
    assert speed.tokens_per_second == pytest.approx(200)


def test_compiling_is_counted_once():
    """Functions within functions are traced within each other; the sum is below the wall time."""
    inner = jax.jit(lambda x: sum(jax.numpy.sin(x + i) for i in range(50)))
    program = jax.jit(lambda x: inner(inner(x)))
    before, start = loop.compiled_seconds(), time.perf_counter()
    program(np.ones(3, np.float32)).block_until_ready()
    wall, counted = time.perf_counter() - start, loop.compiled_seconds() - before
    assert 0 < counted < wall
    program(np.ones(3, np.float32)).block_until_ready()
    assert loop.compiled_seconds() - before == counted
