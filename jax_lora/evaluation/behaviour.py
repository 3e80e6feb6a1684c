"""What a model does beyond its score: does it stay inside a task's options, does it beat one label?

Everything here is a function of the data and the predictions; percentages are the reader's.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from jax_lora.evaluation.metrics import exact_match, normalize

MAX_LABELS = 20  # a task with more distinct answers than this is no choice between options


def label_counts(outputs: Iterable[Sequence[str]]) -> dict[str, int]:
    """Count a task's labels: in how many of its instances is each one an accepted answer?

    Args:
        outputs: the accepted answers of every instance of the task, not of its first 100 only.

    Returns:
        Normalized label -> number of instances that accept it, the labels sorted.

    Raises:
        ValueError: no instances, an instance without answers, or a bare string for a list.
    """
    counts: dict[str, int] = {}
    instances = 0
    for index, answers in enumerate(outputs):
        if isinstance(answers, str) or not answers:
            raise ValueError(
                f"outputs of instance {index}: found {answers!r}, expected a list with at least "
                "one answer"
            )
        instances += 1
        for label in {normalize(answer) for answer in answers}:
            counts[label] = counts.get(label, 0) + 1
    if not instances:
        raise ValueError("outputs: found no instances, expected all instances of a task")
    return dict(sorted(counts.items()))


def closed_label(counts: Mapping[str, int], max_labels: int = MAX_LABELS) -> bool:
    """Whether a task is a choice between few labels.

    Args:
        counts: what `label_counts` returns.
        max_labels: the most distinct labels that still make a choice.

    Returns:
        True for at most `max_labels` labels.
    """
    return len(counts) <= max_labels


def options(counts: Mapping[str, int]) -> frozenset[str]:
    """The option set of a task: its distinct normalized answers.

    Args:
        counts: what `label_counts` returns.

    Returns:
        The labels; see `closed_label` for whether leaving them means anything.
    """
    return frozenset(counts)


def out_of_options_share(
    predictions: Iterable[str | None],
    options: Collection[str],
) -> float:
    """The share of predictions that are none of the options (Figure 4 of the paper).

    An empty or missing prediction (None) is out, unless the task itself has an empty answer.

    Args:
        predictions: decoded answers of one closed-label task.
        options: its labels, normalized or not.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: no predictions, no options, or a bare string for the options.
    """
    inside = _normalized(options)
    return _share(normalize(prediction or "") not in inside for prediction in predictions)


def exact_match_given_valid(
    predictions: Sequence[str | None],
    references: Sequence[Sequence[str]],
    options: Collection[str],
) -> float | None:
    """Exact match of those predictions that are one of the options: content without form.

    Args:
        predictions: decoded answers of one closed-label task.
        references: the accepted answers of each.
        options: its labels, normalized or not.

    Returns:
        A number in [0, 1]; None where no prediction is an option.

    Raises:
        ValueError: no predictions, not as many references, or as `out_of_options_share`.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"predictions: found {len(predictions)} with {len(references)} references, "
            "expected at least one and as many of both"
        )
    inside = _normalized(options)
    valid = [
        exact_match(prediction or "", accepted)
        for prediction, accepted in zip(predictions, references, strict=True)
        if normalize(prediction or "") in inside
    ]
    return sum(valid) / len(valid) if valid else None


def top_answer_share(predictions: Iterable[str | None]) -> float:
    """The share of the most frequent answer, 1 for a model that always says the same.

    Args:
        predictions: decoded answers of one task, compared as exact match compares them.

    Returns:
        A number in (0, 1].

    Raises:
        ValueError: no predictions.
    """
    counts = _answer_counts(predictions)
    return max(counts.values()) / counts.total()


def answer_entropy(predictions: Iterable[str | None]) -> float:
    """The entropy of the answers of one task, 0 for a model that always says the same.

    Args:
        predictions: decoded answers of one task, compared as exact match compares them.

    Returns:
        Bits, at most log2 of the number of predictions.

    Raises:
        ValueError: no predictions.
    """
    counts = _answer_counts(predictions)
    shares = [count / counts.total() for count in counts.values()]
    return sum(-share * math.log2(share) for share in shares)


def empty_share(predictions: Iterable[str | None]) -> float:
    """The share of predictions that are missing or nothing but white space.

    Args:
        predictions: decoded answers.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: no predictions.
    """
    return _share(not (prediction or "").strip() for prediction in predictions)


def copy_share(predictions: Iterable[str | None], inputs: Iterable[str]) -> float:
    """The share of predictions that repeat the complete input, normalized; empty ones do not count.

    Args:
        predictions: decoded answers.
        inputs: the input of each.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: no predictions, or not as many inputs.
    """
    answers = (normalize(prediction or "") for prediction in predictions)
    return _share(
        bool(answer) and answer == normalize(text)
        for answer, text in zip(answers, inputs, strict=True)
    )


def majority_label(counts: Mapping[str, int]) -> str:
    """The most frequent label; of several, the first in sorted order.

    Args:
        counts: what `label_counts` returns.

    Returns:
        A normalized label.

    Raises:
        ValueError: no labels.
    """
    if not counts:
        raise ValueError("label counts: found none, expected at least one label")
    return min(counts, key=lambda label: (-counts[label], label))


def majority_baseline(counts: Mapping[str, int], references: Iterable[Sequence[str]]) -> float:
    """Exact match of always answering the majority label, the least a model should reach.

    Args:
        counts: what `label_counts` returns for the task.
        references: the accepted answers of the instances that are scored, each a list.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: no labels, no instances, or an instance without answers.
    """
    label = majority_label(counts)
    scores = [exact_match(label, accepted) for accepted in references]
    if not scores:
        raise ValueError("references: found no instances, expected at least one")
    return sum(scores) / len(scores)


def describe(
    rows: Sequence[Mapping], counts: Mapping[str, int] | None = None
) -> dict[str, bool | float | None]:
    """What the answers to one task are like beyond their score.

    Args:
        rows: one per example: `prediction` (None where it is missing), `references`, `input` and
            `finished`.
        counts: what `label_counts` returns for the task; None where it has too many labels.

    Returns:
        `closed_label`; `majority_baseline`, `out_of_options` and `exact_match_given_valid` (None
        where the task is not closed-label, the last also where no answer is an option);
        `top_answer_share`, `answer_entropy` (bits), `empty`, `copies` and `unfinished`. All but
        the first and the entropy are percentages.

    Raises:
        ValueError: no rows, or an example without references.
    """
    predictions = [row["prediction"] for row in rows]
    references = [row["references"] for row in rows]
    closed = counts is not None and closed_label(counts)
    baseline = out = valid = None
    if counts is not None and closed:
        baseline = 100 * majority_baseline(counts, references)
        out = 100 * out_of_options_share(predictions, options(counts))
        valid = exact_match_given_valid(predictions, references, options(counts))
    return {
        "closed_label": closed,
        "majority_baseline": baseline,
        "out_of_options": out,
        "top_answer_share": 100 * top_answer_share(predictions),
        "answer_entropy": answer_entropy(predictions),
        "exact_match_given_valid": None if valid is None else 100 * valid,
        "empty": 100 * empty_share(predictions),
        "copies": 100 * copy_share(predictions, [row["input"] for row in rows]),
        "unfinished": 100 * _share(not row["finished"] for row in rows),
    }


def _normalized(options: Collection[str]) -> set[str]:
    if isinstance(options, str) or not options:
        raise ValueError(f"options: found {options!r}, expected a set of labels")
    return {normalize(option) for option in options}


def _answer_counts(predictions: Iterable[str | None]) -> Counter[str]:
    counts = Counter(normalize(prediction or "") for prediction in predictions)
    if not counts:
        raise ValueError("predictions: found none, expected at least one")
    return counts


def _share(flags: Iterable[bool]) -> float:
    flags = list(flags)
    if not flags:
        raise ValueError("predictions: found none, expected at least one")
    return sum(flags) / len(flags)
