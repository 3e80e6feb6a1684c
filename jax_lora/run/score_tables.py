"""The scores of a run as tables: a DataFrame, and text with the untuned base's beside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from jax_lora.evaluation import metrics
from jax_lora.files import read_json
from jax_lora.text import table


def untuned_scores(folder: Path, settings: Mapping[str, object]) -> dict | None:
    """The untuned base's scores to show beside, where they were made with the same settings."""
    if not (folder / "scores.json").is_file():
        return None
    theirs = read_json(folder / "settings.json")
    differing = ("origin", "weights_digest")
    if {k: v for k, v in theirs.items() if k not in differing} != {
        k: v for k, v in settings.items() if k not in differing
    }:
        return None
    return read_json(folder / "scores.json")


def score_frame(results: Path, names: Sequence[str]) -> pd.DataFrame:
    """The scores in a results folder: one row per test set and task, percentages."""
    return pd.DataFrame(
        {"set": name, "task": task, **values}
        for name in names
        for task, values in read_json(results / name / "scores.json")["tasks"].items()
    )


LABELS = {"exact_match": "EM", "rougeL": "Rouge-L"}  # of metrics whose name is not their label


def score_table(
    scores: Mapping, before: Mapping | None = None, names: Sequence[str] = metrics.OFFICIAL
) -> str:
    """Scores by task, by category and over all, the untuned base's beside them.

    Args:
      scores: what `evaluate.score` returns.
      before: the same of the untuned base, None where it was not scored.
      names: of the metrics.
    """
    labels = [LABELS.get(name, name) for name in names]
    header = ["task", "n", *labels, "majority EM", "out of options %"]
    header += [f"untuned {label}" for label in labels] if before else []

    def row(
        label: str, examples: int | None, find: Callable[[Mapping, str], float | None]
    ) -> list[object]:
        """A row of the table; `find` looks a key up in scores, or in `before`."""
        keys = (*names, "majority_baseline", "out_of_options")
        untuned = [find(before, name) for name in names] if before else []
        return [label, examples, *(find(scores, key) for key in keys), *untuned]

    tasks, categories, rows = scores["tasks"], scores["categories"], []
    for name, task in tasks.items():
        rows.append(row(name[:44], task["examples"], lambda s, key, n=name: s["tasks"][n].get(key)))
    for category, key in sorted(metrics.category_keys(categories, tasks).items()):
        suffix, examples = f"_for_{key}", categories[category]
        rows.append(row(f"category {category}"[:44], examples, _official(suffix)))
    examples = sum(categories.values())
    rows.append(row("mean over examples", examples, _official("")))
    rows.append(row("mean over tasks", examples, _official("_over_tasks")))
    if closed := scores.get("closed_label"):
        label = f"{closed['tasks']} closed-label tasks"
        rows.append(row(label, None, lambda s, key: s.get("closed_label", {}).get(key)))
    return table(header, rows)


def _official(suffix: str) -> Callable[[Mapping, str], float | None]:
    """Finds a metric under its official key; baselines have none."""
    return lambda scores, key: scores["metrics"].get(f"{key}{suffix}")
