"""Exact match, Rouge-L and further metrics by name; needs neither a model nor JAX.

Exact match and Rouge-L are those of Super-NaturalInstructions. A new metric is one function from a
prediction and its references to [0, 1], one row of METRICS, and its name in `config.eval.metrics`.
"""

import math
import string
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, TypeVar

from jax_lora.errors import ConfigError, first_line

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

T = TypeVar("T")
Metric = Callable[[str, Sequence[str]], float]
Score = tuple[float, ...]  # of one prediction, by metric, each in [0, 1]

OFFICIAL = ("exact_match", "rougeL")  # of Super-NaturalInstructions' evaluation code
_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PROGRESS_EVERY = 500  # rows


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
    return _best_rouge_l(_scorer, prediction, references)


def rouge_l_xlingual(prediction: str, references: Sequence[str]) -> float:
    """Rouge-L F-measure of GPT-2's tokens, in any script, the best over the references.

    Source: the official script's cross-lingual track, whose tokens lose the space before them.

    Args:
        prediction: the decoded answer.
        references: every accepted answer, at least one.

    Returns:
        A number in [0, 1]; 0 where either side is empty.

    Raises:
        ConfigError: GPT-2's tokenizer cannot be had from the hub.
        ValueError: as `exact_match`.
    """
    return _best_rouge_l(_xlingual_scorer, prediction, references)


def _best_rouge_l(
    make: Callable[[], "RougeScorer"], prediction: str, references: Sequence[str]
) -> float:
    _check(prediction, references)
    scorer = make()
    return max(
        float(scorer.score(target=reference, prediction=prediction)["rougeL"].fmeasure)
        for reference in references
    )


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """F1 of the normalized words, in any order, the best over the references.

    Source: SQuAD's evaluation code, with the normalization of `exact_match`, which keeps articles.

    Args:
        prediction: the decoded answer.
        references: every accepted answer, at least one.

    Returns:
        A number in [0, 1]; 1 where both sides have no word, 0 where one has none.

    Raises:
        ValueError: as `exact_match`.
    """
    _check(prediction, references)
    found = Counter(normalize(prediction).split())

    def f1(reference: str) -> float:
        wanted = Counter(normalize(reference).split())
        words = found.total() + wanted.total()
        return 2 * (found & wanted).total() / words if words else 1.0

    return max(map(f1, references))


METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "rougeL": rouge_l,
    "rougeL_xlingual": rouge_l_xlingual,
    "token_f1": token_f1,
}


def check_names(names: Sequence[str]) -> None:
    """Make sure that METRICS has every name.

    Args:
        names: `config.eval.metrics`.

    Raises:
        ConfigError: none, one twice, one that is unknown, or one that lacks its tokenizer.
    """
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names or len(set(names)) < len(names):
        raise ConfigError(
            f"config.eval.metrics: found {', '.join(names) or 'none'}, expected some of "
            f"{', '.join(METRICS)}, none twice"
        )
    if "rougeL_xlingual" in names:
        _xlingual_scorer()


def score_all(
    rows: Iterable[object],
    names: Sequence[str] = OFFICIAL,
    progress: Callable[[int], object] | None = None,
) -> list[Score]:
    """Score many predictions.

    Args:
        rows: mappings or objects with `prediction` (None where it is missing, which counts as the
            empty text) and `references`.
        names: of METRICS.
        progress: called with the number of newly scored rows, time and again.

    Returns:
        Of each row, in order, what each metric returns.

    Raises:
        ConfigError: see `check_names`.
        ValueError: a row that lacks a field or has a bad one, or a metric outside of [0, 1].
    """
    check_names(names)
    pairs = _each(rows, _pair)
    scores: list[Score] = []
    for start in range(0, len(pairs), _PROGRESS_EVERY):
        chunk = pairs[start : start + _PROGRESS_EVERY]
        scores += [tuple(_score(name, *pair) for name in names) for pair in chunk]
        if progress is not None:
            progress(len(chunk))
    return scores


def aggregate(
    rows: Iterable[object],
    scores: Sequence[Score] | None = None,
    names: Sequence[str] = OFFICIAL,
) -> dict[str, float]:
    """The official report over scored instances: every metric, overall and by group.

    Args:
        rows: as of `score_all`, with `task` and `category` besides.
        scores: what `score_all` returns for the rows; None scores them here.
        names: of METRICS, those that were scored.

    Returns:
        Percentages rounded to 4 places, by metric: `{metric}`, the mean over instances;
        `{metric}_over_tasks`, the mean of the tasks' means; then `{metric}_for_{task}` and
        `{metric}_for_{category}`, the category under its key of `category_keys`.

    Raises:
        ConfigError: see `check_names`.
        ValueError: no rows, a row that lacks a field or has a bad one, more or fewer scores than
            rows.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("no rows to score: expected at least one prediction with its references")
    groups = _each(rows, lambda row: (_text(row, "task"), _text(row, "category")))
    scores = score_all(rows, names) if scores is None else scores
    if len(scores) != len(rows):
        raise ValueError(f"scores: found {len(scores)} of {len(rows)} rows, expected one per row")
    keys = category_keys([category for _, category in groups], [task for task, _ in groups])
    tasks: dict[str, list[Score]] = {}
    categories: dict[str, list[Score]] = {}
    for (task, category), score in zip(groups, scores, strict=True):
        tasks.setdefault(task, []).append(score)
        categories.setdefault(keys[category], []).append(score)
    report = _percentages(scores, names, "")
    report |= _percentages([_means(group) for group in tasks.values()], names, "_over_tasks")
    for name, group in sorted(tasks.items()) + sorted(categories.items()):
        report |= _percentages(group, names, f"_for_{name}")
    return report


def category_keys(categories: Iterable[str], tasks: Iterable[str]) -> dict[str, str]:
    """Categories as the keys of the report have them, each its own.

    "Word Analogy" is "word_analogy", as the official script has it. Where two categories would be
    the same then ("QA" and "qa"), both keep their names; one that would be a task's is
    "category_" and its key.

    Args:
        categories: names, as often as they come.
        tasks: names of the tasks in the same report.

    Returns:
        Category → key.
    """
    plain = {category: "_".join(category.lower().split()) for category in categories}
    count = Counter(plain.values())
    taken, keys = set(tasks), {}
    for category in sorted(plain):
        key = plain[category] if count[plain[category]] == 1 else category
        while key in taken:
            key = f"category_{key}"
        taken.add(key)
        keys[category] = key
    return keys


@cache
def _scorer() -> "RougeScorer":
    """rouge_score's own scorer and stemmer, which is slow, asked once for each word."""
    # Imported at the first use: it reads a good part of nltk.
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    words = DefaultTokenizer(use_stemmer=False).tokenize
    # A word's stem in a list, which is empty where the tokenizer drops it.
    stems = lru_cache(maxsize=2**17)(DefaultTokenizer(use_stemmer=True).tokenize)

    # A prediction meets each of its references, a label the predictions of many rows.
    @lru_cache(maxsize=2**12)
    def tokenize(text: str) -> tuple[str, ...]:
        return tuple(stem for word in words(text) for stem in stems(word))

    return RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=tokenize))


@cache
def _xlingual_scorer() -> "RougeScorer":
    from huggingface_hub import hf_hub_download
    from rouge_score.rouge_scorer import RougeScorer
    from tokenizers import Tokenizer

    source = "openai-community/gpt2"
    try:
        words = Tokenizer.from_file(hf_hub_download(source, "tokenizer.json"))
    except Exception as error:  # the hub's client has many kinds; the user needs one line
        reason = first_line(error)
        raise ConfigError(
            f"config.eval.metrics: found rougeL_xlingual, expected the tokenizer of {source} from "
            f"the hub: {reason}"
        ) from None

    @lru_cache(maxsize=2**12)
    def tokenize(text: str) -> tuple[str, ...]:
        tokens = words.encode(text, add_special_tokens=False).tokens
        return tuple(token.lstrip("Ġ") for token in tokens)

    return RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=tokenize))


def _score(name: str, prediction: str, references: Sequence[str]) -> float:
    value = METRICS[name](prediction, references)
    if not 0 <= value <= 1:  # NaN too
        raise ValueError(f"metric {name}: found {value!r}, expected a number in [0, 1]")
    return value


def _check(prediction: object, references: object) -> tuple[str, list[str]]:
    """The same two, as a text and a list of texts."""
    if not isinstance(prediction, str):
        raise ValueError(f"prediction: found {prediction!r}, expected a str")
    if isinstance(references, str) or not isinstance(references, Collection):
        # A bare string would be split into characters, each of them a reference.
        raise ValueError(f"references: found {references!r}, expected a list of str")
    if len(references) == 0:
        raise ValueError("references: found an empty list, expected at least one answer")
    for reference in references:
        if not isinstance(reference, str):
            raise ValueError(f"references: found {reference!r} in the list, expected a str")
    return prediction, list(references)


def _each(rows: Iterable[object], read: Callable[[object], T]) -> list[T]:
    found = []
    for index, row in enumerate(rows):
        try:
            found.append(read(row))
        except ValueError as error:
            raise ValueError(f"row {index}: {error}") from None
    return found


def _pair(row: object) -> tuple[str, list[str]]:
    prediction, references = _field(row, "prediction"), _field(row, "references")
    prediction = "" if prediction is None else prediction
    return _check(prediction, references)


def _field(row: object, name: str) -> object:
    try:
        return row[name] if isinstance(row, Mapping) else getattr(row, name)
    except (KeyError, AttributeError):
        raise ValueError(
            f"no {name!r}: expected prediction, references, task and category"
        ) from None


def _text(row: object, name: str) -> str:
    value = _field(row, name)
    if not isinstance(value, str):
        raise ValueError(f"{name}: found {value!r}, expected a str")
    return value


def _means(scores: Sequence[Score], of: float = 1.0) -> Score:
    # fsum: the same in any order and every version of Python, which sum is not. The official code
    # multiplies first, which decides some ties of the rounding.
    return tuple(of * math.fsum(values) / len(scores) for values in zip(*scores, strict=True))


def _percentages(scores: Sequence[Score], names: Sequence[str], suffix: str) -> dict[str, float]:
    means = zip(names, _means(scores, of=100.0), strict=True)
    return {f"{name}{suffix}": round(mean, 4) for name, mean in means}
