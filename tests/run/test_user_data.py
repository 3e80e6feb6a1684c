"""Data of one's own through `Run`: from an Alpaca JSONL to scores, ends of answers, samples."""

import itertools
import json
import logging
import re
import shlex
import types
from collections import Counter

import pytest

import jax_lora
from jax_lora.errors import ConfigError, DataError
from jax_lora.files import read_json, read_jsonl
from jax_lora.generation import scheduler
from jax_lora.run import inputs
from jax_lora.run.show import samples
from tests import scripts
from tests.conftest import REPOSITORY
from tests.data import alpaca as alpaca_file

KEYS = {
    "lora.rank": 2,
    "optim.warmup_steps": 1,
    "optim.learning_rate": 1e-3,
    "data.test": 0.1,
    "data.validation": 0.02,
    "data.answer_only": True,
    "data.buckets": (256, 384),
    "data.source_length": 320,
    "data.target_length": 64,
    "eval.buckets": (384,),
    "eval.max_new_tokens": 4,
}


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "alpaca.jsonl"
    rows = [
        {
            "instruction": f"Write the {word} number.",
            "input": f"{i}" if i % 2 else "",
            "output": str(i + step),
            "task": word,
            "category": "counting",
        }
        for i, (word, step) in itertools.product(range(150), [("next", 1), ("previous", -1)])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def config(tiny_model, alpaca):
    return jax_lora.RunConfig().replace(
        model=str(tiny_model),
        dtype="float32",
        max_steps=2,
        batch_size=8,
        micro_tokens=1024,
        **KEYS,
        **{"data.path": str(alpaca)},
    )


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    made = jax_lora.Run.open(config, tmp_path_factory.mktemp("runs") / "r")
    made.train()
    return made


def test_from_an_alpaca_file_to_scores(run, config):
    scores = run.score()  # every test set there is
    sets = inputs.examples(config)
    assert list(sets) == ["train", "validation", "test"]
    assert set(scores.set) == {"test"} and set(scores.task) == {"next", "previous"}
    # 152 distinct questions: those without an input are asked 75 times each.
    questions = {name: {e.key for e in one.examples} for name, one in sets.items()}
    assert {name: len(keys) for name, keys in questions.items()} == {
        "train": 134, "validation": 3, "test": 15,
    }  # fmt: skip
    assert scores.examples.sum() == len(sets["test"].examples)
    folder = run.workdir / "eval" / "test"
    assert len(read_jsonl(folder / "predictions.jsonl")) == len(sets["test"].examples)
    assert "exact_match_for_counting" in read_json(folder / "scores.json")["metrics"]
    assert run.score(adapter="none").equals(run.score(["test"], adapter="none"))
    with pytest.raises(ConfigError, match="--sets: found 'seen', expected some of test"):
        run.score(["seen"])


def test_another_draw_is_another_run(run, config):
    for key, value in (("data.test", 0.2), ("data.template", "plain")):
        with pytest.raises(ConfigError, match="belongs to another run"):
            jax_lora.Run.open(config.replace(**{key: value}), run.workdir).train()


def test_the_content_of_a_template_file_belongs_to_the_data(config, tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text("{{ instruction }}\n")
    mine = config.replace(**{"data.template": str(path)})
    before = inputs.fingerprint(mine)
    assert before != inputs.fingerprint(config) == inputs.data(config).fingerprint
    train = inputs.training_set(config)
    rows = inputs.training_rows(inputs.encoder(mine), train, "first", 0)
    path.write_text("{{ instruction }}: \n")
    assert inputs.fingerprint(mine) != before
    again = inputs.training_rows(inputs.encoder(mine), train, "first", 0)  # nothing stale
    assert again[0][1].prompt == rows[0][1].prompt[:-1] + ": \n"


def test_an_edited_file_is_read_again(config, tmp_path):
    path = tmp_path / "a.json"
    mine = config.replace(**{"data.path": str(path), "data.test": 0.0, "data.validation": 0.0})
    for answer in ("a", "bb"):
        path.write_text(json.dumps([{"prompt": "p", "completion": answer}]))
        assert inputs.training_set(mine).examples[0].references == (answer,)


def test_rows_that_do_not_fit_are_left_out_or_refused(config, tmp_path, caplog):
    path = tmp_path / "long.jsonl"
    rows = [{"instruction": "word " * n, "output": str(n)} for n in (1, 2, 3, 400)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine = config.replace(**{"data.path": str(path), "data.test": 0.0, "data.validation": 0.0})
    encoder, train = inputs.encoder(mine), inputs.examples(mine)["train"]
    with caplog.at_level(logging.WARNING, logger="jax_lora"):
        assert len(inputs.training_rows(encoder, train, "first", 0, strict=False)) == 3
    assert (
        "train: 1 rows left out that are longer than a row; the first is all row 4" in caplog.text
    )
    strict = mine.replace(**{"data.strict": True})
    with pytest.raises(ConfigError, match="all row 4: the prompt has .* raise source_length"):
        jax_lora.Run.open(strict, tmp_path / "r").train()
    with pytest.raises(ConfigError, match="all row 4: the prompt has"):
        samples(strict, 4)
    shown = samples(mine, 4)
    assert "all row 3: " in shown and "all row 4" not in shown
    assert not (tmp_path / "r").exists()


def test_samples_show_tokens_masks_and_lengths(config, tiny_model):
    text = samples(config, 3)
    encoder = inputs.encoder(config)
    train = inputs.training_set(config).examples
    shown = train[:: -(-len(train) // 3)]
    assert len(shown) == 3
    for example in shown:
        row = encoder.training_row(example)
        mask = row.loss_mask(True)
        head = f"{example.name}: {len(row.ids)} tokens, {mask.sum()} in the loss; a prompt of "
        assert f"{head}{row.prompt_length}" in text
        answer = " ".join(
            f"{i}:{token}"
            for i, token in zip(
                row.ids[mask].tolist(),
                encoder.tokenizer.convert_ids_to_tokens(row.ids[mask].tolist()),
                strict=True,
            )
        )
        assert f"[{row.prompt_length}, {len(row.ids)}) in the loss\n    {answer}" in text
    with pytest.raises(ConfigError, match="config.data.path: found none"):
        samples(config.replace(**{"data.path": ""}), 3)


@pytest.mark.slow
def test_the_five_lines_of_the_readme(tiny_model, tmp_path, monkeypatch):
    """2,000 rows of Alpaca to scores, by what the README types, but for the sizes of a toy."""
    blocks = (REPOSITORY / "README.md").read_text().split("```\n")
    (block,) = [block for block in blocks if block.startswith("head -1 alpaca.jsonl")]
    head, data, *commands = block.replace("huggyllama/llama-7b", str(tiny_model)).splitlines()
    name, _, value = data.partition("=")
    assert name == "DATA" and len(commands) == 3
    file = alpaca_file.write(tmp_path / "alpaca.jsonl")
    first = json.loads(file.read_text().partition("\n")[0])
    assert json.loads(head.partition("# ")[2]).keys() == first.keys()
    sizes = {key: KEYS[key] for key in ("data.source_length", "data.buckets", "eval.buckets")}
    sizes |= {"dtype": "float32", "max_steps": 2, "batch_size": 8, "micro_tokens": 1024}
    sizes |= {"optim.warmup_steps": 1, "eval.max_new_tokens": 4}
    monkeypatch.chdir(tmp_path)
    said = []
    for command in commands:
        _, script, *typed = shlex.split(command.replace("$DATA", value.strip('"')), comments=True)
        typed = [one.replace("configs/", f"{REPOSITORY}/configs/") for one in typed]
        if script == "train.py":
            typed += [f"--config.{key}={value}" for key, value in sizes.items()]
        done = scripts.run(script, *typed)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said[0].startswith("train: ") and said[0].count(" in the loss; a prompt of ") == 3
    assert "2 steps of 8" in said[1] and "\ntest: " in said[2]
    tested = read_jsonl(tmp_path / "runs" / "alpaca" / "eval" / "test" / "predictions.jsonl")
    total = int(re.findall(r"train: (\d+) examples", said[0])[0]) + len(tested)
    assert total == 2000 and 180 <= len(tested) <= 220


# ---------------------------------------------------------------- ends


def answers(run, **options):
    run.score(["test"], adapter="none", **options)
    rows = read_jsonl(run.workdir / "eval-none" / "test" / "predictions.jsonl")
    return {row["id"]: row for row in rows}


def test_every_end_id_ends_an_answer(run, config, monkeypatch):
    seen = {}
    real = scheduler.answers

    def spy(model, weights, prompts, groups=None, **options):
        for ended in real(model, weights, prompts, groups, **options):
            seen.update({tuple(prompts[i]): ids.tolist() for i, ids in ended})
            yield ended

    monkeypatch.setattr(scheduler, "answers", spy)
    answers(run, max_new_tokens=8)
    free = dict(seen)
    encoder = inputs.encoder(config)
    known = inputs.base_end_ids(encoder.tokenizer, encoder.vocab_size, config.model)

    def lengths(ends):
        """Of each answer, and how often each id ends one."""
        cut = {p: next((n for n, i in enumerate(a, 1) if i in ends), 8) for p, a in free.items()}
        return cut, Counter(free[p][n - 1] for p, n in cut.items())

    pairs = itertools.combinations(sorted(set(itertools.chain(*free.values())) - {*known}), 2)
    first, second = max(pairs, key=lambda pair: min(lengths(pair)[1][i] for i in pair))
    cut, counts = lengths((*known, first, second))
    assert counts[first] and counts[second]
    monkeypatch.setattr(inputs, "base_end_ids", lambda *_: (*known, first, second))
    rows = answers(run, max_new_tokens=8)
    assert seen == {prompt: free[prompt][:n] for prompt, n in cut.items()}
    assert sum(row["finished"] for row in rows.values()) >= counts[first] + counts[second]


def test_an_answer_ends_at_a_stop_text(run, config):
    free = answers(run, max_new_tokens=8)
    text = next(r["prediction"] for r in free.values() if len(r["prediction"]) > 4)
    stop = text[2:4]
    ended = answers(run, max_new_tokens=8, stop=(stop,))
    changed = 0
    for k, row in ended.items():
        whole = free[k]["prediction"]
        assert whole.startswith(row["prediction"])
        if stop in whole:
            assert stop in row["prediction"] and row["finished"]
            changed += row["new_tokens"] < free[k]["new_tokens"]
    assert changed
    with pytest.raises(ConfigError, match="config.eval.stop: found an empty text"):
        config.replace(**{"eval.stop": ("",)})


def test_a_tokenizer_without_an_end_of_its_own_is_refused(config, tmp_path):
    from jax_lora.weights import tokenizers

    tokenizer = inputs.encoder(config).tokenizer
    tokenizer.save_pretrained(tmp_path / "t")
    settings = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())
    settings["eos_token"] = ""
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = tokenizers.load_tokenizer(tmp_path / "t")
    with pytest.raises(DataError, match="eos token: found '', expected a token of its own"):
        tokenizers.check_vocabulary(loaded, 10**6, tmp_path)


@pytest.mark.parametrize(
    ("template", "text", "is_dated"),
    [("chat", "{{ strftime_now('%d %b %Y') }}", True), ("chat", "{{ x }}", False)]
    + [("alpaca", "{{ strftime_now('%d %b %Y') }}", False)],
)
def test_rows_of_a_template_with_a_date_are_not_compared(monkeypatch, template, text, is_dated):
    tokenizer = types.SimpleNamespace(chat_template=text)
    monkeypatch.setattr(inputs, "encoder", lambda _: types.SimpleNamespace(tokenizer=tokenizer))
    assert inputs.is_dated(jax_lora.RunConfig().replace(**{"data.template": template})) == is_dated
