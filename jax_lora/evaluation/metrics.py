"""Exact match and Rouge-L as Natural Instructions defines them; needs neither a model nor JAX."""

import math
import os
import pickle
import signal
import string
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cache, lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

Pair = tuple[str, list[str]]  # a prediction and its references
Score = tuple[float, float]  # exact match and Rouge-L, each in [0, 1]

_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CHUNK = 500  # pairs that are scored between two signs of progress
_WORTH_A_PROCESS = 4.0  # seconds of scoring; starting a process, with its imports, costs one or two
_WORKER = "from jax_lora.evaluation.metrics import _work; _work()"


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


def score_all(
    rows: Iterable[Any],
    processes: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[Score]:
    """Exact match and Rouge-L of many predictions, the same numbers in any number of processes.

    Args:
        rows: mappings or objects with `prediction` (None where it is missing, which counts as the
            empty text) and `references`.
        processes: how many share the work; None takes as many as are free and pay for their
            start, which for few or short rows is this one alone.
        progress: called with the number of newly scored rows, time and again.

    Returns:
        Of each row, in order, what `exact_match` and `rouge_l` return.

    Raises:
        ValueError: a row that lacks a field or has a bad one, or no process at all.
        ChildProcessError: a process was killed.
    """
    if processes is not None and processes < 1:
        raise ValueError(f"processes: found {processes}, expected at least 1")
    pairs = _each(rows, _pair)
    if processes is None:
        processes = max(1, min(_cpus(), int(sum(map(_seconds, pairs)) / _WORTH_A_PROCESS)))
    size = max(1, min(_CHUNK, math.ceil(len(pairs) / processes)))
    chunks = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    processes = min(processes, len(chunks))
    scores: list[Score] = []
    for chunk in _in_processes(chunks, processes) if processes > 1 else map(_score, chunks):
        scores += chunk
        if progress is not None:
            progress(len(chunk))
    return scores


def aggregate(rows: Iterable[Any], scores: Sequence[Score] | None = None) -> dict[str, float]:
    """The official report over scored instances: both metrics, overall and by group.

    Args:
        rows: as of `score_all`, with `task` and `category` besides.
        scores: what `score_all` returns for the rows; None scores them here.

    Returns:
        Percentages rounded to 4 places: `exact_match` and `rougeL`, means over instances;
        `exact_match_over_tasks` and `rougeL_over_tasks`, means of the tasks' means; then
        `{metric}_for_{task}` and `{metric}_for_{category}`, the category lower-cased with
        underscores for its white space.

    Raises:
        ValueError: no rows, a row that lacks a field or has a bad one, more or fewer scores than
            rows, or a task whose name equals a category's, so that their keys could not be told
            apart.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("no rows to score: expected at least one prediction with its references")
    groups = _each(rows, lambda row: (_field(row, "task"), _field(row, "category")))
    scores = score_all(rows) if scores is None else scores
    if len(scores) != len(rows):
        raise ValueError(f"scores: found {len(scores)} of {len(rows)} rows, expected one of each")
    tasks: dict[str, list[Score]] = {}
    categories: dict[str, list[Score]] = {}
    for (task, category), score in zip(groups, scores, strict=True):
        tasks.setdefault(task, []).append(score)
        categories.setdefault("_".join(category.lower().split()), []).append(score)
    if both := sorted(tasks.keys() & categories.keys()):
        raise ValueError(
            f"{both[0]!r} names both a task and a category, so exact_match_for_{both[0]} would "
            "mean two things: expected tasks and categories with different names"
        )
    report = _percentages(scores, "")
    report |= _percentages([_means(own) for own in tasks.values()], "_over_tasks")
    for name, own in sorted(tasks.items()) + sorted(categories.items()):
        report |= _percentages(own, f"_for_{name}")
    return report


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


def _score(pairs: Sequence[Pair]) -> list[Score]:
    return [(exact_match(*pair), rouge_l(*pair)) for pair in pairs]


def _in_processes(chunks: Sequence[Sequence[Pair]], count: int) -> Iterator[list[Score]]:
    """`map(_score, chunks)` by programs of their own, each given every count-th chunk.

    Not by multiprocessing: a fork beside JAX's threads may hang, and its other ways run the
    caller's script, with JAX and all, once more in each child.
    """
    with ExitStack() as stack:
        programs: list[subprocess.Popen[bytes]] = []
        for first in range(count):
            with tempfile.TemporaryFile() as share:
                pickle.dump(chunks[first::count], share)
                share.seek(0)
                program = subprocess.Popen(
                    [sys.executable, "-P", "-c", _WORKER],
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                    stdin=share,
                    stdout=subprocess.PIPE,
                )
            programs.append(stack.enter_context(program))
            stack.callback(program.kill)
        for index in range(len(chunks)):
            program = programs[index % count]
            assert program.stdout is not None
            try:
                scores = pickle.load(program.stdout)
            except (EOFError, pickle.UnpicklingError):
                status = program.wait()
                raise ChildProcessError(
                    f"a scoring process ended with exit status {status} before its work was done"
                ) from None
            yield scores


def _work() -> None:
    """What each of those programs does: chunks of pairs from stdin, their scores to stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted parent ends it without a word
    for chunk in pickle.load(sys.stdin.buffer):
        pickle.dump(_score(chunk), sys.stdout.buffer)
        sys.stdout.buffer.flush()


def _seconds(pair: Pair) -> float:
    """About what a pair costs: a part of its own, and the table of its words against words."""
    prediction, references = pair
    return 3e-5 + 7e-9 * len(prediction) * sum(map(len, references))


def _cpus() -> int:
    # Those that this process may use, where the system tells.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def _each(rows: Iterable[Any], read: Callable[[Any], Any]) -> list[Any]:
    found = []
    for index, row in enumerate(rows):
        try:
            found.append(read(row))
        except ValueError as error:
            raise ValueError(f"row {index}: {error}") from None
    return found


def _pair(row: Any) -> Pair:
    prediction, references = _field(row, "prediction"), _field(row, "references")
    prediction = "" if prediction is None else prediction
    _check(prediction, references)
    return prediction, list(references)


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


def _means(scores: Sequence[Score], of: float = 1.0) -> Score:
    # fsum: the same in any order and every version of Python, which sum is not. The official code
    # multiplies first, which decides some ties of the rounding.
    em, rouge = (of * math.fsum(values) / len(scores) for values in zip(*scores, strict=True))
    return em, rouge


def _percentages(scores: Sequence[Score], suffix: str) -> dict[str, float]:
    em, rouge = _means(scores, of=100.0)
    return {f"exact_match{suffix}": round(em, 4), f"rougeL{suffix}": round(rouge, 4)}
