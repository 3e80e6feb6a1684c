"""From examples to scores through files, with a model that answers by rule."""

import functools
import json

import numpy as np
import pytest

from jax_lora.data.instructions import read_checkout
from jax_lora.data.prompts import Encoder
from jax_lora.data.tasksets import draw
from jax_lora.data.toy import write_checkout
from jax_lora.evaluation import evaluate, metrics
from jax_lora.files import LARGEST_JSON, read_jsonl
from jax_lora.run.score_tables import score_table
from jax_lora.weights.tokenizers import load_tokenizer


@pytest.fixture(scope="module")
def setting(tiny_model, tmp_path_factory):
    checkout = read_checkout(write_checkout(tmp_path_factory.mktemp("toy"), instances_per_task=12))
    sets = draw(checkout, 0, train_per_task=4, test_per_task=3)
    encoder = Encoder(load_tokenizer(tiny_model), source_length=2048)
    rows = [(example, encoder.prompt_row(example)) for example in sets["unseen"].examples]
    return checkout, sets["unseen"].tasks, encoder, rows


def oracle(encoder, rows, right=lambda example: True):
    """Generates the reference where `right`, else the word "wrong", and its end token."""
    texts = {tuple(row.ids.tolist()): e.references[0] if right(e) else "wrong" for e, row in rows}
    end = encoder.tokenizer.eos_token_id

    def generate(prompts, groups):
        assert len(groups) == len(prompts)
        for i in reversed(range(len(prompts))):
            ids = encoder.tokenizer(texts[tuple(prompts[i].tolist())], add_special_tokens=False)
            yield [(i, np.asarray([*ids.input_ids, end], np.int32))]

    return functools.partial(evaluate.predict, generate, encoder, end_ids=(end,))


def test_right_answers_score_full_marks(setting, tmp_path):
    checkout, tasks, encoder, rows = setting
    evaluate.write_examples(tmp_path, rows)
    evaluate.write_labels(tmp_path, checkout.answers, tasks)
    evaluate.write_predictions(tmp_path, rows, oracle(encoder, rows), {"model": "oracle"})
    scores = evaluate.score(tmp_path)
    assert scores["metrics"]["exact_match"] == 100.0
    assert scores["truncated"] == scores["unfinished"] == 0.0
    assert scores["closed_label"]["out_of_options"] == 0.0
    assert 0 < scores["closed_label"]["majority_baseline"] < 100
    assert len(scores["tasks"]) == len(tasks)
    line = json.loads((tmp_path / "examples.jsonl").read_text().splitlines()[0])
    assert list(line) == ["task", "category", "id", "input", "prompt", "references"]


def test_wrong_answers_are_out_of_options(setting, tmp_path):
    checkout, tasks, encoder, rows = setting
    closed = tasks[0]
    evaluate.write_examples(tmp_path, rows)
    evaluate.write_labels(tmp_path, checkout.answers, tasks)
    answer = oracle(encoder, rows, right=lambda e: e.task != closed)
    evaluate.write_predictions(tmp_path, rows, answer, {})
    scores = evaluate.score(tmp_path)
    assert scores["tasks"][closed]["exact_match"] == 0.0
    assert scores["tasks"][closed]["out_of_options"] == 100.0
    expected = 100 * (1 - 1 / len(tasks))
    assert scores["metrics"]["exact_match"] == pytest.approx(expected, abs=1e-3)


def test_nobody_answers_on_after_an_error(setting, tmp_path, monkeypatch):
    _, _, encoder, rows = setting
    left = []

    def generate(prompts, tasks):
        try:
            yield [(0, np.asarray(prompts[0]))]
        finally:
            left.append(True)

    def full(line):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluate, "jsonl_line", full)
    answer = functools.partial(evaluate.predict, generate, encoder, end_ids=(0,))
    # A notebook holds the error, and with its traceback all that was going on.
    with pytest.raises(OSError, match="No space left") as held:
        evaluate.write_predictions(tmp_path, rows, answer, {})
    assert left == [True], held


def test_answers_stay_where_there_is_no_room_to_copy_them(setting, tmp_path, monkeypatch):
    _, _, encoder, rows = setting
    answer, final = oracle(encoder, rows), tmp_path / "predictions.jsonl"
    evaluate.write_predictions(tmp_path, rows, answer, {})
    final.write_text(final.read_text().replace("{", "", 1))  # one line is damaged
    before = final.read_text()

    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluate, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        evaluate.write_predictions(tmp_path, rows, answer, {})
    assert final.read_text() == before


def test_an_interrupted_file_is_completed(setting, tmp_path):
    _, _, encoder, rows = setting
    answer, settings = oracle(encoder, rows), {"model": "oracle"}
    evaluate.write_predictions(tmp_path / "whole", rows, answer, settings)
    whole = (tmp_path / "whole" / "predictions.jsonl").read_text()

    # As a kill leaves it: two batches and a half-written line.
    folder = tmp_path / "cut"
    evaluate.write_predictions(folder, rows[:5], answer, settings)
    lines = (folder / "predictions.jsonl").read_text()
    (folder / "predictions.jsonl").unlink()
    (folder / "predictions.jsonl.partial").write_text(lines + '{"task": "tas')
    assert evaluate.write_predictions(folder, rows, answer, settings) == 5
    found = (folder / "predictions.jsonl").read_text()
    assert sorted(found.splitlines()) == sorted(whole.splitlines())
    assert not (folder / "predictions.jsonl.partial").exists()

    def never(rows):
        raise AssertionError("complete predictions were asked for again")

    assert evaluate.write_predictions(folder, rows, never, settings) == len(rows)


def test_other_settings_start_over(setting, tmp_path):
    _, _, encoder, rows = setting
    evaluate.write_predictions(tmp_path, rows, oracle(encoder, rows), {"model": "one"})
    wrong = oracle(encoder, rows, right=lambda e: False)
    assert evaluate.write_predictions(tmp_path, rows, wrong, {"model": "two"}) == 0
    answers = read_jsonl(tmp_path / "predictions.jsonl")
    assert {a["prediction"] for a in answers} == {"wrong"}


def test_other_weights_or_another_version_redo_the_answers(setting, tmp_path):
    _, _, encoder, rows = setting
    right, wrong = oracle(encoder, rows), oracle(encoder, rows, right=lambda e: False)
    settings = {"model": "m", "weights": "0123", "version": "0.1.0"}
    evaluate.write_predictions(tmp_path, rows, right, settings)
    assert evaluate.write_predictions(tmp_path, rows, wrong, settings) == len(rows)
    for key in ("weights", "version"):
        (tmp_path / "scores.json").write_text("{}")
        settings |= {key: "other"}
        assert evaluate.write_predictions(tmp_path, rows, wrong, settings) == 0
        assert not (tmp_path / "scores.json").exists()
        assert evaluate.write_predictions(tmp_path, rows, right, settings) == len(rows)
    assert evaluate.write_predictions(tmp_path, rows, right, settings, overwrite=True) == 0
    answers = read_jsonl(tmp_path / "predictions.jsonl")
    assert len(answers) == len(rows) and "wrong" not in {a["prediction"] for a in answers}


def test_every_metric_goes_by_task_by_category_and_overall(setting, tmp_path, monkeypatch):
    checkout, tasks, encoder, rows = setting
    monkeypatch.setitem(metrics.METRICS, "is_short", lambda answer, references: len(answer) < 6)
    evaluate.write_examples(tmp_path, rows)
    evaluate.write_labels(tmp_path, checkout.answers, tasks)
    wrong = oracle(encoder, rows, right=lambda e: False)  # "wrong" is short
    evaluate.write_predictions(tmp_path, rows, wrong, {})
    official = evaluate.score(tmp_path)
    scores = evaluate.score(tmp_path, (*metrics.OFFICIAL, "is_short"))
    keys = ["is_short", "is_short_over_tasks", *(f"is_short_for_{task}" for task in tasks)]
    by_name = metrics.category_keys([e.category for e, _ in rows], [e.task for e, _ in rows])
    keys += [f"is_short_for_{by_name[e.category]}" for e, _ in rows]
    assert {scores["metrics"][key] for key in keys} == {100.0}
    assert {task["is_short"] for task in scores["tasks"].values()} == {100.0}
    assert scores["closed_label"]["is_short"] == 100.0
    assert official["metrics"].items() <= scores["metrics"].items()
    assert not {"is_short"} & official["tasks"][tasks[0]].keys()


def test_a_folder_without_predictions_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected examples.jsonl and predictions.jsonl"):
        evaluate.score(tmp_path)


@pytest.mark.parametrize(("references", "told"), [(["ответ"], 2), (["ответ", "reply 1"], 0)])
def test_references_that_rouge_l_has_no_words_of_are_told_once(tmp_path, caplog, references, told):
    example = {"task": "t", "category": "c", "references": references}
    answer = {"task": "t", "prediction": references[0], "truncated": False, "finished": True}
    for name, row in (("examples", example), ("predictions", answer)):
        lines = (json.dumps(row | {"id": str(i)}) + "\n" for i in range(2))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "labels.json").write_text("{}")
    scores = evaluate.score(tmp_path)["metrics"]
    assert scores["exact_match"] == 100
    said = [record.getMessage() for record in caplog.records if "rougeL" in record.getMessage()]
    assert len(said) == bool(told)
    if told:
        assert scores["rougeL"] == 0 and "2 of 2 examples have none" in said[0]
    assert not evaluate.score(tmp_path, ("exact_match",))["metrics"].get("rougeL")
    assert len(caplog.records) == bool(told)


def test_a_task_of_several_categories_counts_in_each_of_them(tmp_path):
    """As data of one's own has it, all of one task."""
    rows = [("QA", "a", "a"), ("open", "b", "b"), ("open", "b", "x"), ("qa", "c", "x")]
    for name, keys in (("examples", ("category", "references")), ("predictions", ("prediction",))):
        lines = []
        for i, (category, gold, answer) in enumerate(rows):
            values = {"category": category, "references": [gold], "prediction": answer}
            line = {"task": "all", "id": str(i)} | {key: values[key] for key in keys}
            more = {"truncated": False, "finished": True} if name == "predictions" else {}
            lines.append(json.dumps(line | more) + "\n")
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "labels.json").write_text("{}")
    scores = evaluate.score(tmp_path)
    assert scores["categories"] == {"QA": 1, "open": 2, "qa": 1}
    assert scores["tasks"]["all"]["category"] == evaluate.MIXED
    shown = [line.split() for line in score_table(scores).splitlines()]
    found = {words[1]: words[2:4] for words in shown if words[:1] == ["category"]}
    assert found == {"QA": ["1", "100.0"], "open": ["2", "50.0"], "qa": ["1", "0.0"]}


def test_labels_may_be_larger_than_other_files(tmp_path):
    text = "x" * (LARGEST_JSON + 1)
    evaluate.write_labels(tmp_path, lambda task: [(text,), ("y",)] * 2, ["t"])
    assert evaluate.read_labels(tmp_path) == {"t": {text: 2, "y": 2}}
