"""What a study says of its task sets: more tasks, more examples, and which of the two."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import pandas as pd

from jax_lora.study import METRICS, TESTS, Study, paper_findings, set_order
from jax_lora.study.estimates import contrasts, yes_or_no
from jax_lora.study.sections import Finding

SAME = 0.05  # the share by which two numbers of examples may differ and be called the same


def set_findings(study: Study, seed: int, chosen_on: Collection[str] = ()) -> list[Finding]:
    """Diversity and amount, each question of a pair of sets that has both in its results.

    Args:
      study: checked rows and grid.
      seed: of the bootstrap and the sign flips.
      chosen_on: the sets on which learning rates were chosen; none where they are given.
    """
    fixed, asked = fixed_size_sets(study), []
    if pair := more_tasks(study):
        asked.append(("Do more tasks with as many examples of each help", pair, ()))
    if len(fixed) > 1:
        ends = fixed[0], fixed[-1]
        asked.append(
            ("Do more tasks with as many examples in all help", ends, paper_findings.DIVERSITY)
        )
    asked += [
        ("Do more examples of the same tasks help", pair, ()) for pair in more_examples(study)
    ]
    found = []
    for question, (few, many), of_paper in asked:
        lines = [_change(study, config, few, many, seed) for config in study.configs(variant="")]
        answers = [line for line in lines if line] or ["cannot be said, no model is there of both."]
        if (few in chosen_on) != (many in chosen_on):
            tried, other = (few, many) if few in chosen_on else (many, few)
            answers.append(
                f"The learning rates were chosen on {tried} and not on {other}, so a difference "
                "may in part be one of rates."
            )
        found.append(Finding(f"{question}, {few} to {many}?", answers, of_paper))
    return found


def plain_sets(study: Study) -> list[str]:
    """The sets without a star: T100, T250, T500, Tall."""
    return [name for name in study.sets if "*" not in name]


def fixed_size_sets(study: Study) -> list[str]:
    """T*100, T250 and T*500: the starred sets have as many examples as the one between them, or
    T*100 and T500: as the one that has as many where there is one starred set."""
    starred = sorted(set_order(name)[1:] for name in study.sets if "*" in name)
    if not starred:
        return []
    examples, plain = _examples(study), [set_order(name)[1:] for name in plain_sets(study)]
    if len(starred) > 1:
        equal = [key for key in plain if starred[0][0] < key[0] < starred[-1][0]]
    else:
        count, there = examples.get(starred[0][1], 0), [key for key in plain if key[1] in examples]
        equal = [key for key in there if abs(examples[key[1]] - count) <= SAME * count]
    return [name for _, name in sorted([*starred, *equal])]


def more_examples(study: Study) -> list[tuple[str, str]]:
    """Pairs such as T100 and T*100: the same tasks, the second with more examples of each."""
    examples = _examples(study)
    pairs = [(name.replace("*", ""), name) for name in study.sets if "*" in name]
    return [pair for pair in pairs if 0 < examples.get(pair[0], 0) < examples.get(pair[1], 0)]


def more_tasks(study: Study) -> tuple[str, str] | None:
    """The smallest and the largest set without a star that have results and as many examples of
    each task, such as T100 and T500."""
    groups = study.rows.groupby("set")
    per_task = (groups["train_examples"].mean() / groups["set_tasks"].mean()).to_dict()
    sets = [name for name in plain_sets(study) if name in per_task]
    equal = [n for n in sets if abs(per_task[n] - per_task[sets[0]]) <= SAME * per_task[sets[0]]]
    return (equal[0], equal[-1]) if len(equal) > 1 else None


def _examples(study: Study) -> dict[str, float]:
    return study.rows.groupby("set")["train_examples"].mean().to_dict()


def _change(study: Study, config: str, few: str, many: str, seed: int) -> str:
    """How one model's scores change from one set to another; "" where one of them is missing."""
    parts = []
    for test in TESTS:
        found = {}
        for metric, label in METRICS.items():
            both = {name: study.scores(name, test, metric) for name in (few, many)}
            if all(config in scores for scores in both.values()):
                pair = pd.concat({name: both[name][config] for name in both}, axis=1)
                if one := contrasts(pair, {0: {many: 1, few: -1}}, seed=seed):
                    found[label] = one[0]
        if found:
            answer = agreed({label: yes_or_no(one) for label, one in found.items()})
            values = ", ".join(f"{label} {one.points}" for label, one in found.items())
            count = next(iter(found.values())).count
            parts.append(f"on {test} tasks {answer}: {values} {count}")
    return f"{config}: {'; '.join(parts)}." if parts else ""


def agreed(answers: dict[str, str]) -> str:
    """One answer where all metrics give the same, else each with its metric."""
    if len({*answers.values()}) == 1:
        return next(iter(answers.values()))
    by_answer: dict[str, Sequence[str]] = {}
    for label, answer in answers.items():
        by_answer[answer] = [*by_answer.get(answer, []), label]
    return ", ".join(f"{answer} by {' and '.join(who)}" for answer, who in by_answer.items())
