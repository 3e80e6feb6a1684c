"""What a model does beyond its score: does it stay inside a task's options, does it beat one label?

Everything here is a function of the data and the predictions; percentages are the reader's.
"""

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
    if isinstance(options, str) or not options:
        raise ValueError(f"options: found {options!r}, expected a set of labels")
    inside = {normalize(option) for option in options}
    outs = [normalize(prediction or "") not in inside for prediction in predictions]
    if not outs:
        raise ValueError("predictions: found none, expected at least one")
    return sum(outs) / len(outs)


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
