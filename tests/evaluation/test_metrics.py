"""The metrics against what the official code gave, the protocol's table, and their invariances."""

import json
import string
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_lora.evaluation.metrics import aggregate, exact_match, normalize, rouge_l

REPOSITORY = Path(__file__).resolve().parents[2]
GOLDENS = json.loads((REPOSITORY / "tests/recorded/metric_goldens.json").read_text("utf-8"))
CASES = GOLDENS["cases"]

texts = st.text(max_size=40) | st.text("ab .,-!'\t\n", max_size=30)
references = st.lists(texts, min_size=1, max_size=4)
words = st.lists(st.text(string.ascii_letters, min_size=1, max_size=8), min_size=1, max_size=6)
steady = settings(deadline=None, derandomize=True)


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


@steady
@given(texts)
def test_normalize_is_idempotent_and_leaves_single_spaces(text):
    once = normalize(text)
    assert normalize(once) == once
    assert not set(string.punctuation) & set(once)
    assert once == " ".join(once.split())


@steady
@given(words, st.data())
def test_case_punctuation_and_white_space_do_not_count(parts, data):
    gap = st.text(" \t\n\r", min_size=1, max_size=3)
    mark = st.text(string.punctuation, max_size=2)
    noisy = data.draw(gap)
    for part in parts:
        noisy += data.draw(mark) + data.draw(st.sampled_from([part.upper(), part.lower()]))
        noisy += data.draw(mark) + data.draw(gap)
    assert normalize(noisy) == " ".join(parts).lower()
    assert exact_match(noisy, [" ".join(parts)]) == 1.0
    assert rouge_l(noisy, [" ".join(parts)]) == pytest.approx(1.0, rel=0, abs=1e-12)


@steady
@given(texts, references, st.randoms(use_true_random=False))
def test_order_and_repetition_of_references_do_not_count(prediction, accepted, random):
    shuffled = accepted + [random.choice(accepted)]
    random.shuffle(shuffled)
    for metric in (exact_match, rouge_l):
        best = max(metric(prediction, [reference]) for reference in accepted)
        assert metric(prediction, accepted) == metric(prediction, shuffled) == best
        assert 0.0 <= best <= 1.0


@steady
@given(texts, references)
def test_one_more_reference_never_hurts(prediction, accepted):
    assert exact_match(prediction, [*accepted, prediction]) == 1.0
    assert rouge_l(prediction, [*accepted, "b"]) >= rouge_l(prediction, accepted)


@steady
@given(references)
def test_empty_prediction_matches_only_an_empty_reference(accepted):
    assert exact_match("", accepted) == float("" in map(normalize, accepted))
    assert rouge_l("", accepted) == 0.0


@pytest.mark.parametrize("metric", [exact_match, rouge_l])
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
        row("no", ["yes"], "task1", "Word Analogy"),
        row("no", ["yes"], "task1", "word analogy"),
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
        ([row("a", ["a"], "word_sorting", "Word Sorting")], "'word_sorting' names both"),
    ],
)
def test_aggregate_refuses(rows, message):
    with pytest.raises(ValueError, match=message) as caught:
        aggregate(rows)
    assert "\n" not in str(caught.value)
