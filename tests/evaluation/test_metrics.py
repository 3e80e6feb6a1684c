"""The metrics against what the official code gave and the protocol's table, and the report."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jax_lora.errors import ConfigError
from jax_lora.evaluation import metrics
from jax_lora.evaluation.metrics import (
    METRICS,
    aggregate,
    exact_match,
    normalize,
    rouge_l,
    score_all,
    token_f1,
)

REPOSITORY = Path(__file__).resolve().parents[2]
GOLDENS = json.loads((REPOSITORY / "tests/recorded/metric_goldens.json").read_text("utf-8"))
CASES = GOLDENS["cases"]


def row(prediction: str | None, references: list[str], task: str, category: str) -> dict[str, Any]:
    return dict(prediction=prediction, references=references, task=task, category=category)


def test_all_recorded_cases_are_here():
    assert len(CASES) == 47


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_recorded_case(case):
    assert normalize(case["prediction"]) == case["norm_prediction"]
    assert exact_match(case["prediction"], case["references"]) == case["em"]
    found = rouge_l(case["prediction"], case["references"])
    assert found == pytest.approx(case["rougeL"], rel=0, abs=1e-9)


def test_recorded_aggregate_and_groups():
    rows = [
        row(case["prediction"], case["references"], "task1_all", group.replace("_", " ").title())
        for case, group in zip(CASES, GOLDENS["groups"], strict=True)
    ]
    scores = aggregate(rows)
    for key, value in (GOLDENS["aggregate"] | GOLDENS["grouped"]).items():
        assert scores[key] == value, key
    assert scores["exact_match_for_task1_all"] == GOLDENS["aggregate"]["exact_match"]


@pytest.mark.parametrize(
    ("prediction", "accepted", "em", "rouge"),
    [
        ("Positive.", ["positive"], 1, 1),
        ("the cat", ["cat"], 0, 0.6667),
        ("B", ["A", "B"], 1, 1),
        ("", [""], 1, 0),
        ("well-known fact", ["well known fact"], 0, 1),
        ("3.5", ["35"], 1, 0),
        ("“yes”", ["yes"], 0, 1),
        ("police killed the gunman", ["the gunman killed police"], 0, 0.5),
    ],
)
def test_table_of_the_protocol(prediction, accepted, em, rouge):
    assert exact_match(prediction, accepted) == em
    assert round(rouge_l(prediction, accepted), 4) == rouge


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
@pytest.mark.parametrize(
    ("prediction", "accepted", "found"),
    [
        ("yes", [], "empty list"),
        ("yes", "yes", "'yes'"),
        ("yes", None, "None"),
        ("yes", ["no", 3], "3"),
        (None, ["yes"], "None"),
    ],
)
def test_bad_input_is_refused_in_one_line(metric, prediction, accepted, found):
    with pytest.raises(ValueError, match="expected") as caught:
        metric(prediction, accepted)
    assert found in str(caught.value)
    assert "\n" not in str(caught.value)


def test_aggregate_averages_over_instances_and_over_tasks():
    rows = [
        row("yes", ["yes"], "task1", "Word  Analogy"),
        row("no", ["yes"], "task1", "Word  Analogy"),
        row("no", ["yes"], "task1", "Word  Analogy"),
        row("the cat", ["cat"], "task2", "Title Generation"),
    ]
    scores = aggregate(rows)
    assert scores == {
        "exact_match": 25.0,
        "rougeL": round(100 * (1 + 2 / 3) / 4, 4),
        "exact_match_over_tasks": round(100 / 6, 4),
        "rougeL_over_tasks": 50.0,
        "exact_match_for_task1": 33.3333,
        "rougeL_for_task1": 33.3333,
        "exact_match_for_task2": 0.0,
        "rougeL_for_task2": 66.6667,
        "exact_match_for_word_analogy": 33.3333,
        "rougeL_for_word_analogy": 33.3333,
        "exact_match_for_title_generation": 0.0,
        "rougeL_for_title_generation": 66.6667,
    }
    assert aggregate(SimpleNamespace(**one) for one in rows) == scores
    assert aggregate(reversed(rows)) == scores
    assert aggregate(rows, score_all(rows)) == scores
    assert aggregate(rows, [(1.0, 0.5)] * 4)["rougeL_for_task2"] == 50.0


def test_ties_are_rounded_as_the_official_code_rounds_them():
    # It multiplies by 100 before it divides: 100 * (23 / 640) is a little less than 3.59375.
    rows = [row("yes" if i < 23 else "no", ["yes"], "t", "c") for i in range(640)]
    assert aggregate(rows)["exact_match"] == round(100.0 * 23 / 640, 4) == 3.5938
    assert aggregate(rows)["exact_match"] != round(100 * (23 / 640), 4)


def test_missing_prediction_counts_as_empty():
    present, missing = (
        aggregate([row(prediction, ["yes"], "t", "c"), row("yes", ["yes"], "t", "c")])
        for prediction in ("", None)
    )
    assert present == missing
    assert missing["exact_match"] == 50.0
    assert aggregate([row(None, [""], "t", "c")])["exact_match"] == 100.0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([row("a", ["a"], "t", "c"), row("a", [], "t", "c")], "row 1: references: .*empty"),
        ([row("a", "a", "t", "c")], "row 0: references: found 'a'"),  # type: ignore[arg-type]
        ([{"references": ["a"], "task": "t", "category": "c"}], "row 0: no 'prediction'"),
        ([row("a", ["a"], "t", ["c"])], "row 0: category"),  # type: ignore[arg-type]
        ([row(float("nan"), ["a"], "t", "c")], "row 0: prediction: found nan"),  # type: ignore[arg-type]
        ([row("a", ["a"], "t", "c"), {"prediction": "a", "references": ["a"]}], "row 1: no 'task'"),
    ],
)
def test_aggregate_refuses(rows, message):
    with pytest.raises(ValueError, match=message) as caught:
        aggregate(rows)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prediction", "accepted", "f1"),
    [
        ("the cat sat", ["cat"], 0.5),  # one word of three, one of one
        ("gunman the police killed the", ["The gunman killed the police."], 1.0),  # in any order
        ("a a a", ["a b"], 0.4),  # a word counts as often as the other side has it
        ("well-known", ["well known"], 0.0),  # normalized as exact match has it
        ("3.5", ["no", "35"], 1.0),
        ("", [""], 1.0),
        ("", ["yes"], 0.0),
        ("yes", ["..."], 0.0),
    ],
)
def test_token_f1_by_hand(prediction, accepted, f1):
    assert token_f1(prediction, accepted) == pytest.approx(f1, rel=0, abs=1e-12)


def test_a_metric_is_a_function_and_its_name(monkeypatch):
    monkeypatch.setitem(METRICS, "length", lambda prediction, references: len(prediction) / 10)
    rows = [row("abcd", ["x"], "t1", "Word Analogy"), row(None, ["x"], "t2", "c")]
    assert score_all(rows, ("length", "exact_match")) == [(0.4, 0.0), (0.0, 0.0)]
    report = aggregate(rows, names=("length",))
    assert report == {
        "length": 20.0,
        "length_over_tasks": 20.0,
        "length_for_t1": 40.0,
        "length_for_t2": 0.0,
        "length_for_word_analogy": 40.0,
        "length_for_c": 0.0,
    }
    # The official keys are the same beside it.
    both = aggregate(rows, names=("exact_match", "length", "rougeL"))
    official = aggregate(rows)
    assert {key: both[key] for key in official} == official and len(both) == 18


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_metric_outside_of_its_range_is_named(monkeypatch, value):
    monkeypatch.setitem(METRICS, "odd", lambda prediction, references: value)
    with pytest.raises(ValueError, match="metric odd: found .*, expected a number in"):
        score_all([row("a", ["a"], "t", "c")], ("odd",))


@pytest.mark.parametrize("names", [(), ("rouge1",), ("rougeL", "rougeL")])
def test_unknown_metrics_are_refused_by_name(names):
    with pytest.raises(ConfigError, match="config.eval.metrics: .* expected some of exact_match"):
        metrics.check_names(names)


def test_scores_of_other_rows_are_refused():
    rows = [row("a", ["a"], "t", "c")] * 2
    with pytest.raises(ValueError, match="found 3 of 2 rows"):
        aggregate(rows, [(1.0, 1.0)] * 3)


def test_a_category_that_is_named_like_a_task_or_another_category_has_a_key_of_its_own():
    rows = [
        row("a", ["a"], "translation", "Translation"),
        row("b", ["a"], "t2", "Translation"),
        row("a", ["a"], "t3", "QA"),
        row("b", ["a"], "t4", "qa"),
        row("a", ["a"], "category_word", "Word"),
        row("b", ["a"], "word", "Word"),
    ]
    report = metrics.aggregate(rows)
    wanted = {"translation": 100, "category_translation": 50, "QA": 100, "qa": 0}
    wanted |= {"word": 0, "category_word": 100, "category_category_word": 50}
    assert {key: report[f"exact_match_for_{key}"] for key in wanted} == wanted
    names = [key for key in report if key.startswith("exact_match_for_")]
    assert len(names) == 6 + 4
