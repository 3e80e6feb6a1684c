"""What the rows of a study come to: means, spreads over rounds, comparisons with full fine-tuning.

Standard deviations are over rounds, which have other training data. They are not to be mixed up
with the intervals over tasks of `estimates`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import astuple

import numpy as np
import pandas as pd

from jax_lora.study import (
    MEASURES_OF_A_CELL,
    METRICS,
    OF_A_CELL,
    TESTS,
    Frame,
    Study,
    is_papers_model,
    paper,
)
from jax_lora.study.estimates import contrasts, verdict

CLOSED_LABEL = (
    "out_of_options", "exact_match", "exact_match_given_valid", "majority_baseline",
    "top_answer_share", "answer_entropy",
)  # fmt: skip
ALL_TASKS = ("empty", "copies", "unfinished")


def summary(study: Study, *, seed: int = 0) -> Frame:
    """Every configuration × set × test set of the grid in numbers, finished or not.

    Returns:
      config, main, method, variant, rank, learning_rate, set, test; rounds and expected_rounds;
      for both metrics the mean over examples, its standard deviation over rounds (_std), interval
      over tasks (_low, _high) and mean over tasks (_over_tasks), and where the model and recipe
      are the paper's its figure (_paper) and the difference; trainable_percent of all parameters;
      train_operations, and relative_operations to those of full fine-tuning of the same set and
      rounds; set_tasks, train_examples and train_tokens. What is missing is NaN.
    """
    rows = study.rows
    cells = rows[["cell", *OF_A_CELL]].drop_duplicates("cell").set_index("cell")
    cells = cells.drop(columns=["method", "rank", "variant", "learning_rate", "model"])
    cells["trainable_percent"] = 100 * cells["trainable"] / (cells["trainable"] + cells["frozen"])
    full = study.grid[study.grid["config"] == "full"]["cell"]
    full = cells[cells.index.isin(full)].set_index(["set", "round"])["train_operations"]
    same = pd.MultiIndex.from_frame(cells[["set", "round"]])
    cells["relative_operations"] = cells["train_operations"] / full.reindex(same).to_numpy()
    names = list(METRICS)
    means = weighted_means(rows, ["cell", "test"], names)
    over_tasks = rows.groupby(["cell", "test"])[names].mean().add_suffix("_over_tasks")
    frame = study.grid.merge(pd.DataFrame({"test": TESTS}), how="cross")
    frame = frame.merge(means.join(over_tasks).reset_index(), on=["cell", "test"], how="left")
    frame = frame.merge(cells.drop(columns=["set", "round"]), on="cell", how="left")
    by = ["config", "main", "method", "variant", "rank", "learning_rate", "set", "test"]
    groups = frame.groupby(by, dropna=False, sort=False)
    found = groups.agg(rounds=("exact_match", "count"), expected_rounds=("cell", "size"))
    counts = ["set_tasks", "train_examples", "train_tokens", "train_operations"]
    ratios = ["trainable_percent", "relative_operations"]
    measured = [*names, *(f"{name}_over_tasks" for name in names), *counts, *ratios]
    found = found.join(groups[measured].mean())
    found = found.join(groups[names].std().add_suffix("_std")).reset_index()
    _add_intervals(study, found, seed)
    _add_paper(study, found)
    order = found["set"].map({name: i for i, name in enumerate(study.sets)})
    keys = ["test", "order", "variant", "rank", "learning_rate"]
    return found.assign(order=order).sort_values(keys).drop(columns="order")


def weighted_means(rows: Frame, by: Sequence[str], names: Sequence[str]) -> Frame:
    """Means over examples: rows weigh `examples`, nulls nothing.

    What exact match is among valid answers weighs the valid answers only.
    """
    keys = [rows[name] for name in by]
    means = {}
    for name in names:
        weights = rows["examples"].where(rows[name].notna(), 0)
        if name == "exact_match_given_valid":
            weights = weights * (100 - rows["out_of_options"].fillna(100)) / 100
        total = weights.groupby(keys).sum()
        summed = (rows[name].fillna(0) * weights).groupby(keys).sum()
        means[name] = summed / total.where(total > 0)
    return pd.DataFrame(means)


def behaviour(study: Study, by_category: bool = False) -> Frame:
    """What the answers are like, one row per configuration × set × test (× category).

    Returns:
      config, set, test, (category,) rounds; CLOSED_LABEL, means over closed-label tasks, and
      out_of_options_std and exact_match_std over rounds; ALL_TASKS, means over all tasks, or with
      `by_category` over the closed-label ones.
    """
    keys = ["config", "set", "test"] + ["category"] * by_category
    closed = study.rows[study.rows["closed_label"]]
    all_tasks = closed if by_category else study.rows
    one = weighted_means(closed, [*keys, "round"], CLOSED_LABEL).join(
        weighted_means(all_tasks, [*keys, "round"], ALL_TASKS), how="outer"
    )
    groups = one.groupby(level=keys)
    spread = groups[["exact_match", "out_of_options"]].std().add_suffix("_std")
    return groups.mean().join(spread).join(groups.size().rename("rounds")).reset_index()


def measured(study: Study) -> Frame:
    """What `MEASURES` come to, one row per configuration × set of the grid, finished or not.

    Returns:
      config, main, method, variant, rank, learning_rate, set; rounds and expected_rounds; means
      over rounds, and their standard deviations (_std), of trainable, of the measures of a cell and
      of the reference losses on both test sets, reference_loss_seen and reference_loss_unseen,
      which are means over tasks weighed by their examples. What is missing is NaN.
    """
    cells = study.rows[["cell", "trainable", *MEASURES_OF_A_CELL]].drop_duplicates("cell")
    losses = weighted_means(study.rows, ["cell", "test"], ["reference_loss"])["reference_loss"]
    losses = losses.unstack("test").reindex(columns=list(TESTS)).add_prefix("reference_loss_")
    cells = cells.merge(losses, left_on="cell", right_index=True, how="left")
    frame = study.grid.merge(cells, on="cell", how="left")
    by = ["config", "main", "method", "variant", "rank", "learning_rate", "set"]
    groups = frame.groupby(by, dropna=False, sort=False)
    names = [name for name in cells.columns if name != "cell"]
    found = groups.agg(rounds=("trainable", "count"), expected_rounds=("cell", "size"))
    return (
        found.join(groups[names].mean()).join(groups[names].std().add_suffix("_std")).reset_index()
    )


def comparisons(study: Study, *, seed: int = 0) -> Frame:
    """Every LoRA configuration against full fine-tuning of the same set, paired.

    Returns:
      config, set, test, metric, the difference in points with low, high, p, tasks, rounds, the
      verdict and all of it as a statement; no row where the two have no round in common.
    """
    found = []
    for name, test, metric in itertools.product(study.sets, TESTS, METRICS):
        wanted = {config: {config: 1, "full": -1} for config in study.configs("lora")}
        estimates = contrasts(study.scores(name, test, metric), wanted, seed=seed)
        for config, one in estimates.items():
            statement = f"{config} less full {METRICS[metric]} {one}: {verdict(one)}"
            found.append((config, name, test, metric, *astuple(one), verdict(one), statement))
    names = ["config", "set", "test", "metric", "difference", "low", "high", "p", "tasks"]
    return pd.DataFrame(found, columns=[*names, "rounds", "verdict", "statement"])


def _add_intervals(study: Study, found: Frame, seed: int) -> None:
    for metric in METRICS:
        low, high = np.full(len(found), np.nan), np.full(len(found), np.nan)
        for (name, test), group in found.groupby(["set", "test"]):
            wanted = {row: {config: 1} for row, config in group["config"].items()}
            scores = study.scores(name, test, metric)
            for row, one in contrasts(scores, wanted, seed=seed).items():
                low[row], high[row] = one.low, one.high
        found[f"{metric}_low"], found[f"{metric}_high"] = low, high


def _add_paper(study: Study, found: Frame) -> None:
    known = {(row["test"], row["method"], row["rank"]): row for row in paper()["rows"]}
    for i, metric in enumerate(METRICS):
        values = []
        for row in found.to_dict("records"):
            rank = None if pd.isna(row["rank"]) else row["rank"]
            there = known.get((row["test"], row["method"], rank), {}).get(row["set"])
            ours = row["main"] and not row["variant"] and is_papers_model(study.model)
            values.append(there[i] if there and ours else np.nan)
        found[f"{metric}_paper"] = values
        found[f"{metric}_difference"] = found[metric] - found[f"{metric}_paper"]
