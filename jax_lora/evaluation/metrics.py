"""Exact match and Rouge-L as Natural Instructions defines them; needs neither a model nor JAX."""

import string
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower-case a text, delete ASCII punctuation (leaving no space) and collapse white space.

    Articles and Unicode punctuation stay. Source: Super-NaturalInstructions' own evaluation code.

    Args:
        text: any text.

    Returns:
        The form in which exact match and the option sets compare texts.
    """
    return " ".join(text.lower().translate(_DELETE_PUNCTUATION).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Whether a prediction equals one of the references once all are normalized.

    Args:
        prediction: the decoded answer.
        references: every accepted answer, at least one.

    Returns:
        1.0 or 0.0.

    Raises:
        ValueError: no references, one bare string for the list, or something that is no text.
    """
    _check(prediction, references)
    found = normalize(prediction)
    return float(any(found == normalize(reference) for reference in references))


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Rouge-L F-measure of the stemmed words, the best over the references.

    Nothing is normalized before it: the scorer lower-cases and keeps only a-z and 0-9 itself.

    Args:
        prediction: the decoded answer.
        references: every accepted answer, at least one.

    Returns:
        A number in [0, 1]; 0 where either side has no word, even when both are empty.

    Raises:
        ValueError: as `exact_match`.
    """
    _check(prediction, references)
    scorer = _scorer()
    return max(
        float(scorer.score(target=reference, prediction=prediction)["rougeL"].fmeasure)
        for reference in references
    )


def aggregate(rows: Iterable[Any]) -> dict[str, float]:
    """The official report over scored instances: both metrics, overall and by group.

    Args:
        rows: mappings or objects with `prediction` (None where it is missing, which counts as the
            empty text), `references`, `task` and `category`.

    Returns:
        Percentages rounded to 4 places: `exact_match` and `rougeL`, means over instances;
        `exact_match_over_tasks` and `rougeL_over_tasks`, means of the tasks' means; then
        `{metric}_for_{task}` and `{metric}_for_{category}`, the category lower-cased with
        underscores for its white space.

    Raises:
        ValueError: no rows, a row that lacks a field or has a bad one, or a task whose name equals
            a category's, so that their keys could not be told apart.
    """
    everything: list[tuple[float, float]] = []
    tasks: dict[str, list[tuple[float, float]]] = {}
    categories: dict[str, list[tuple[float, float]]] = {}
    for index, row in enumerate(rows):
        try:
            prediction, references = _field(row, "prediction"), _field(row, "references")
            task, category = _field(row, "task"), _field(row, "category")
            prediction = "" if prediction is None else prediction
            pair = exact_match(prediction, references), rouge_l(prediction, references)
        except ValueError as error:
            raise ValueError(f"row {index}: {error}") from None
        everything.append(pair)
        tasks.setdefault(task, []).append(pair)
        categories.setdefault("_".join(category.lower().split()), []).append(pair)
    if not everything:
        raise ValueError("no rows to score: expected at least one prediction with its references")
    if both := sorted(tasks.keys() & categories.keys()):
        raise ValueError(
            f"{both[0]!r} names both a task and a category, so exact_match_for_{both[0]} would "
            "mean two things: expected tasks and categories with different names"
        )
    groups = sorted(tasks.items()) + sorted(categories.items())
    means = [(_mean(em for em, _ in rows), _mean(rl for _, rl in rows)) for rows in tasks.values()]
    return (
        _percentages(everything, "")
        | _percentages(means, "_over_tasks")
        | {
            key: value
            for name, pairs in groups
            for key, value in _percentages(pairs, f"_for_{name}").items()
        }
    )


@cache
def _scorer() -> "RougeScorer":
    # Made at the first use: its import reads a good part of nltk.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def _check(prediction: object, references: object) -> None:
    if not isinstance(prediction, str):
        raise ValueError(f"prediction: found {prediction!r}, expected a str")
    if isinstance(references, str) or not isinstance(references, Collection):
        # A bare string would be taken apart into characters, each of them a reference.
        raise ValueError(f"references: found {references!r}, expected a list of str")
    if len(references) == 0:
        raise ValueError("references: found an empty list, expected at least one answer")
    for reference in references:
        if not isinstance(reference, str):
            raise ValueError(f"references: found {reference!r} in the list, expected a str")


def _field(row: Any, name: str) -> Any:
    try:
        value = row[name] if isinstance(row, Mapping) else getattr(row, name)
    except (KeyError, AttributeError):
        raise ValueError(
            f"no {name!r}: expected prediction, references, task and category"
        ) from None
    if name in ("task", "category") and not isinstance(value, str):
        raise ValueError(f"{name}: found {value!r}, expected a str")
    return value


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _percentages(pairs: list[tuple[float, float]], suffix: str) -> dict[str, float]:
    return {
        f"exact_match{suffix}": round(100 * _mean(em for em, _ in pairs), 4),
        f"rougeL{suffix}": round(100 * _mean(rl for _, rl in pairs), 4),
    }
