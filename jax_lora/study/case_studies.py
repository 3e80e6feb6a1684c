"""Case studies of a study: the same inputs answered by several models, ready to be shown."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jax_lora.errors import DataError
from jax_lora.evaluation.metrics import exact_match, normalize

# What an answer can be, in the order in which a page offers them; all but the first are failures.
KINDS = {
    "exact": "exact match",
    "part": "shares words with a reference",
    "other": "shares no word with a reference",
    "copy": "repeats the input",
    "empty": "nothing",
    "missing": "no answer is there",
}


@dataclass(frozen=True)
class Answer:
    """What one model said.

    `pieces` are the text in order, each with whether its nearest reference lacks it.
    """

    model: str
    kind: str  # of KINDS
    pieces: Sequence[tuple[str, bool]]


@dataclass(frozen=True)
class Case:
    """One input, what would be right, and one answer per model."""

    task: str
    origin: str  # the test set and what the models were trained on, where the case says it
    input: str
    references: Sequence[str]
    answers: Sequence[Answer]

    @property
    def test(self) -> str:
        """The test set: what `origin` begins with."""
        return self.origin.partition(":")[0]


@dataclass(frozen=True)
class CaseStudies:
    """Figure 3: the same inputs answered by several models, a part of a section; made by `of`."""

    cases: Sequence[Case]
    models: Sequence[str]

    @classmethod
    def of(cls, cases: Sequence[Mapping]) -> CaseStudies:
        """Check cases and compare each answer with its nearest reference.

        Args:
          cases: each with `task`, `input`, `references` and `answers`, the last by model.

        Raises:
          DataError: a case without one of these, or without references.
        """
        wanted = ("task", "input", "references", "answers")
        for index, case in enumerate(cases):
            absent = sorted({*wanted} - case.keys()) or ["references"] * (not case["references"])
            if absent:
                raise DataError(
                    f"case {index}: no {', '.join(absent)}; expected {', '.join(wanted)}"
                )
        models = list(dict.fromkeys(model for case in cases for model in case["answers"]))
        return cls([_case(case, models) for case in cases], models)

    @property
    def tasks(self) -> list[str]:
        """The cases' tasks with their test sets, each once."""
        return list(dict.fromkeys(f"{case.test}: {case.task}" for case in self.cases))

    def markdown(self) -> str:
        """A link to the page that has nothing else; Markdown has no filters."""
        return "[Case studies](case_studies.html)"


def _case(case: Mapping, models: Sequence[str]) -> Case:
    task, _, origin = case["task"].partition(", ")
    answers = []
    for model in models:
        text = case["answers"].get(model)
        kind = _kind(text, case["input"], case["references"])
        pieces = [(text or "", False)] if kind in ("exact", "missing") else None
        answers.append(Answer(model, kind, pieces or _compared(text, case["references"])))
    return Case(task, origin, case["input"], case["references"], answers)


def _kind(answer: str | None, source: str, references: Sequence[str]) -> str:
    """One of KINDS, the first failure that applies: an answer that is right is never one."""
    if answer is None:
        return "missing"
    if exact_match(answer, references) == 1:
        return "exact"
    words = normalize(answer)
    if not answer.strip():
        return "empty"
    if words and words == normalize(source):
        return "copy"
    shared = {*words.split()} & {word for one in references for word in normalize(one).split()}
    return "part" if shared else "other"


def _compared(answer: str, references: Sequence[str]) -> list[tuple[str, bool]]:
    """The answer in pieces, each with whether the nearest reference lacks it, in this order."""
    pieces = re.split(r"(\s+)", answer)  # words at even places, what is between them at odd ones
    words = [normalize(word) for word in pieces[::2]]
    matchers = [
        difflib.SequenceMatcher(None, words, normalize(reference).split(), autojunk=False)
        for reference in references
    ]
    nearest = max(matchers, key=lambda matcher: matcher.ratio())
    shared = {block.a + i for block in nearest.get_matching_blocks() for i in range(block.size)}
    marked = [i % 2 == 0 and i // 2 not in shared and bool(pieces[i]) for i in range(len(pieces))]
    return list(zip(pieces, marked, strict=True))
