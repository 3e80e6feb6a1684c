"""Labels, options and the majority baseline, on small lists and on real tasks."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_lora.evaluation.behaviour import (
    MAX_LABELS,
    answer_entropy,
    closed_label,
    copy_share,
    describe,
    empty_share,
    exact_match_given_valid,
    label_counts,
    majority_baseline,
    majority_label,
    options,
    out_of_options_share,
    top_answer_share,
)
from jax_lora.evaluation.metrics import aggregate, exact_match, normalize

answers = st.lists(st.text("abAB. ", max_size=3), min_size=1, max_size=3)
tasks = st.lists(answers, min_size=1, max_size=30)
steady = settings(deadline=None, derandomize=True)


def test_labels_are_normalized_and_counted_once_an_instance():
    counts = label_counts([["Yes."], ["yes", "YES!"], ["No", "yes"], [" no "]])
    assert counts == {"no": 2, "yes": 3}
    assert list(counts) == ["no", "yes"]
    assert options(counts) == {"yes", "no"}


def test_closed_label_ends_after_twenty():
    twenty = label_counts([[f"label {i}"] for i in range(MAX_LABELS)] * 3)
    assert len(twenty) == 20
    assert closed_label(twenty)
    assert not closed_label(twenty | {"one more": 1})
    assert not closed_label(twenty, max_labels=19)


def test_out_of_options_counts_empty_and_missing_predictions():
    predictions = ["Yes.", "no", "maybe", "", None, "yes because", "  NO\n", "...", "yes", "no!"]
    assert out_of_options_share(predictions, {"yes", "no"}) == 0.5
    assert out_of_options_share(predictions, ["Yes", "No."]) == 0.5


def test_an_empty_answer_of_the_task_itself_is_an_option():
    counts = label_counts([[""], ["yes"]])
    assert out_of_options_share(["", "no"], options(counts)) == 0.5


@steady
@given(tasks)
def test_a_task_never_leaves_its_own_options(outputs):
    counts = label_counts(outputs)
    golds = [answer for accepted in outputs for answer in accepted]
    assert out_of_options_share(golds, options(counts)) == 0.0
    assert out_of_options_share(["unheard of"], options(counts)) == 1.0
    assert sum(counts.values()) >= len(outputs)


@steady
@given(tasks)
def test_majority_over_all_instances_is_its_count_and_the_best_constant(outputs):
    counts = label_counts(outputs)
    label = majority_label(counts)
    baseline = majority_baseline(counts, outputs)
    assert baseline == pytest.approx(counts[label] / len(outputs))
    for other in counts:
        constant = sum(exact_match(other, accepted) for accepted in outputs) / len(outputs)
        assert constant <= baseline


def test_ties_go_to_the_first_label_in_sorted_order():
    assert majority_label({"no": 2, "yes": 2, "maybe": 1}) == "no"
    assert majority_label({"yes": 2, "no": 2}) == "no"


def test_majority_is_of_the_task_but_scored_on_the_given_rows():
    counts = label_counts([["b"]] * 3 + [["a"]] * 2)
    assert majority_baseline(counts, [["A"], ["a"], ["B."], ["a", "b"]]) == 0.5


def test_the_most_frequent_answer_is_counted_as_exact_match_would():
    predictions = ["Yes.", "yes", " YES!", "no", None, "", "maybe", "no"]
    assert top_answer_share(predictions) == 3 / 8
    assert top_answer_share(["a"] * 7) == 1.0


@pytest.mark.parametrize(
    ("predictions", "bits"),
    [
        (["a", "A.", "a"], 0.0),
        (["a", "b"], 1.0),
        (["a", "b", "c", "d"], 2.0),
        (["a", "a", "b", None], 1.5),  # 1/2 · 1 + 2 · 1/4 · 2
        (["a", "a", "a", "b"], 0.8112781244591328),  # 3/4 · log2(4/3) + 1/4 · 2
    ],
)
def test_entropy_in_bits(predictions, bits):
    assert answer_entropy(predictions) == pytest.approx(bits, abs=1e-12)


def test_exact_match_given_valid_leaves_the_rest_out():
    predictions = ["Yes.", "no", "yes", "maybe", None]
    references = [["yes"], ["yes"], ["no", "yes"], ["yes"], ["no"]]
    assert exact_match_given_valid(predictions, references, {"yes", "no"}) == 2 / 3
    assert exact_match_given_valid(["maybe", ""], [["yes"]] * 2, {"yes", "no"}) is None


def test_empty_and_copied_answers():
    predictions = ["", None, " \n", "...", "Name[X], food[Chinese].", "name", "name x"]
    inputs = ["", "a", "b", "?", "name[x], food[chinese]", "name[x]", "name[x]"]
    assert empty_share(predictions) == 3 / 7  # "..." says something, if little
    assert copy_share(predictions, inputs) == 1 / 7  # all of it, punctuation and case aside
    assert copy_share(["name[X]"], ["name[x]"]) == 1.0


def test_describing_a_task_by_hand():
    counts = label_counts([["yes"]] * 3 + [["no"]])
    rows = [
        dict(input="Is it?", references=["yes"], prediction="Yes.", finished=True),
        dict(input="Was it?", references=["no"], prediction="yes", finished=True),
        dict(input="So?", references=["yes"], prediction="so", finished=True),
        dict(input="Why?", references=["no"], prediction=None, finished=False),
    ]
    assert describe(rows, counts) == {
        "closed_label": True,
        "majority_baseline": 50.0,
        "out_of_options": 50.0,
        "top_answer_share": 50.0,
        "answer_entropy": 1.5,
        "exact_match_given_valid": 50.0,
        "empty": 25.0,
        "copies": 25.0,
        "unfinished": 25.0,
    }
    many = {f"label {i}": 1 for i in range(MAX_LABELS + 1)}
    for labels in (None, many):
        open_ended = describe(rows, labels)
        assert not open_ended["closed_label"]
        assert open_ended["majority_baseline"] is open_ended["out_of_options"] is None
        assert open_ended["exact_match_given_valid"] is None
        assert open_ended["top_answer_share"] == 50.0
    assert describe(rows[2:3], counts)["exact_match_given_valid"] is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: label_counts([]), "found no instances"),
        (lambda: label_counts([["a"], []]), r"instance 1: found \[\]"),
        (lambda: label_counts(["yes"]), "instance 0: found 'yes'"),
        (lambda: out_of_options_share([], {"a"}), "predictions: found none"),
        (lambda: out_of_options_share(["a"], set()), "options: found"),
        (lambda: out_of_options_share(["a"], "ab"), "options: found 'ab'"),
        (lambda: majority_label({}), "label counts: found none"),
        (lambda: majority_baseline({"a": 1}, []), "references: found no instances"),
        (lambda: majority_baseline({"a": 1}, [[]]), "references: found an empty list"),
        (lambda: top_answer_share([]), "predictions: found none"),
        (lambda: answer_entropy([]), "predictions: found none"),
        (lambda: empty_share([]), "predictions: found none"),
        (lambda: copy_share([], []), "predictions: found none"),
        (lambda: copy_share(["a", "b"], ["a"]), "argument 2 is shorter"),
        (lambda: exact_match_given_valid(["a"], [], {"a"}), "found 1 with 0 references"),
        (lambda: exact_match_given_valid(["a"], [["a"]], "ab"), "options: found 'ab'"),
        (lambda: describe([], {"a": 1}), "found no instances"),
        (lambda: describe([]), "predictions: found none"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def real_outputs(shared, task: str) -> list[list[str]]:
    path = shared / "data" / "niv2-slice" / "tasks" / f"{task}.json"
    found = [instance["output"] for instance in json.loads(path.read_text("utf-8"))["Instances"]]
    return [[output] if isinstance(output, str) else output for output in found]


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        ("task363_sst2_polarity_classification", {"pos", "neg"}),
        ("task9002_copa_cause_effect_classification", {"a", "b"}),
        ("task9001_cb_textual_entailment", {"entailment", "contradiction", "neutral"}),
        ("task1572_samsum_summary", None),
    ],
)
def test_real_tasks(shared, task, labels):
    outputs = real_outputs(shared, task)
    counts = label_counts(outputs)
    assert closed_label(counts) == (labels is not None)
    if labels is not None:
        assert options(counts) == labels
        label, scored = majority_label(counts), outputs[:100]
        rows = [
            dict(prediction=label, references=accepted, task=task, category="c")
            for accepted in scored
        ]
        by_metrics = aggregate(rows)["exact_match"]
        assert 100 * majority_baseline(counts, scored) == pytest.approx(by_metrics)
        by_hand = sum(label in [normalize(one) for one in accepted] for accepted in scored)
        assert by_metrics == by_hand
