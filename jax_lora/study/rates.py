"""What a study says of its learning rates: which were chosen, how clearly, and what hangs on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd

from jax_lora.study import GRID, Frame, paper, set_order
from jax_lora.study.choice import DIVERGED, FAILED, VALIDATED
from jax_lora.study.sections import Finding
from jax_lora.study.tables import MISSING, Table

_GROUP = [name for name in GRID if name not in ("cell", "round", "learning_rate")]


def choices(rates: Frame) -> Frame:
    """One row per choice, from the trials and repeats of `choice.COLUMNS`.

    Returns:
      config, set and round; learning_rate that was chosen, its validation_loss, runner_up and
      runner_up_distance (its loss less the chosen one's), seed_distance (of the chosen rate with
      another seed; infinite where that diverged), end ("lowest" or "highest" of the rates, else
      ""), and how many were tried, diverged and failed for another reason. What is not there is
      NaN.
    """
    found, rates = [], with_outcomes(rates)
    for _, group in rates.groupby(_GROUP, dropna=False, sort=False):
        first = group.iloc[0]
        trials = group[group["repeat"] == 0].sort_values(["validation_loss", "learning_rate"])
        made = trials[trials["chosen"]]
        row: dict[str, object] = {
            "config": ("full" if first["method"] == "full" else f"rank {first['rank']}")
            + (f", {first['variant']}" if first["variant"] else ""),
            "set": first["set"],
            "round": first["round"],
            "end": "",
            "tried": len(trials),
            "diverged": int((trials["outcome"] == DIVERGED).sum()),
            "failed": int((trials["outcome"] == FAILED).sum()),
        }
        if len(made):
            best = made.iloc[0]
            others = trials[~trials["chosen"] & trials["validation_loss"].notna()]
            again = group[(group["repeat"] > 0) & (group["learning_rate"] == best["learning_rate"])]
            row |= {"learning_rate": best["learning_rate"], "end": _end(trials, best)}
            row["validation_loss"] = best["validation_loss"]
            if len(others):
                row["runner_up"] = others.iloc[0]["learning_rate"]
                row["runner_up_distance"] = _distance(others, best)
            if len(again):
                diverged = again.iloc[0]["outcome"] == DIVERGED
                row["seed_distance"] = np.inf if diverged else _distance(again, best)
        found.append(row)
    names = ["config", "set", "round", "learning_rate", "validation_loss", "runner_up"]
    names += ["runner_up_distance", "seed_distance", "end", "tried", "diverged", "failed"]
    frame = pd.DataFrame(found, columns=names)
    return frame.astype({name: float for name in names[3:8]})


def with_outcomes(rates: Frame) -> Frame:
    """The table with a column `outcome`, which older versions did not write: they did not tell a
    rate that diverged from a trial that failed otherwise."""
    if "outcome" in rates:
        return rates
    known = np.where(rates["validation_loss"].notna(), VALIDATED, FAILED)
    return rates.assign(outcome=known)


def _distance(rows: Frame, best: Mapping) -> float:
    return rows.iloc[0]["validation_loss"] - best["validation_loss"]


def _end(trials: Frame, best: Mapping) -> str:
    rates = trials["learning_rate"]
    ends = {rates.min(): "lowest", rates.max(): "highest"}
    return ends.get(best["learning_rate"], "") if len(rates) > 1 else ""


def choices_table(made: Frame, model: str) -> Table:
    """The choices of a study as a table.

    Args:
      made: `choices`.
      model: the base model's name.
    """
    rows = []
    for row in made.to_dict("records"):
        runner_up = _text(row["runner_up"], "g")
        if not np.isnan(row["runner_up_distance"]):
            runner_up += f" ({_text(row['runner_up_distance'], '+.4f')})"
        rate = _text(row["learning_rate"], "g") + (f", the {row['end']}" if row["end"] else "")
        lost = [f"{row[kind]} {kind}" for kind in (DIVERGED, FAILED) if row[kind]]
        tried = f"{row['tried']}" + (f" ({', '.join(lost)})" if lost else "")
        seed = row["seed_distance"]
        seed = DIVERGED if np.isinf(seed) else _text(seed, "+.4f")
        loss = _text(row["validation_loss"], ".4f")
        rows.append([row["config"], row["set"], rate, loss, runner_up, seed, tried])
    names = ("Model", "Set", "Chosen", "Validation loss", "Runner-up", "Second seed", "Tried")
    caption = (
        f"Learning rates chosen by the validation loss, {model}: mean cross-entropy per token of "
        "the answers, on examples of the set's tasks that are neither trained nor tested on, after "
        "the last step. In brackets how much higher the runner-up's loss is; second seed: the "
        "same of the chosen rate with another seed. The lowest, the highest: of those tried."
    )
    return Table("learning_rates", caption, [("", name) for name in names], rows, made)


def _text(value: float, form: str) -> str:
    text = f"{value:{form}}"
    return MISSING if np.isnan(value) else text.replace("-", "−", text.startswith("-"))


def statements(rates: Frame, made: Frame) -> Iterator[str]:
    """What the choices come to, in sentences.

    Args:
      rates: `choice.COLUMNS`.
      made: `choices` of them.
    """
    known = made.dropna(subset=["runner_up_distance"])
    distances = made["seed_distance"].abs()
    # One pair of seeds says little, so a choice is held against the largest distance of all pairs.
    moved = distances[np.isfinite(distances)].max()
    close = known[known["runner_up_distance"] <= moved]
    if len(known) and np.isfinite(moved):
        yield (
            f"In {len(close)} of {len(known)} choices the runner-up's loss is no farther away than "
            f"another seed moves a loss, by up to {_text(moved, '.4f')}{_which(close)}."
        )
    if len(lost := made[np.isinf(made["seed_distance"])]):
        yield f"With another seed the chosen rate diverged{_which(lost)}."
    yield from _not_chosen(made)
    if len(at_end := made[made["end"] != ""]):
        which = ", ".join(
            f"{r['config']} on {r['set']} (the {r['end']})" for r in at_end.to_dict("records")
        )
        yield f"At the end of the rates that were tried, so a better one may lie beyond: {which}."


def _which(made: Frame) -> str:
    which = ", ".join(f"{row['config']} on {row['set']}" for row in made.to_dict("records"))
    return f": {which}" if which else ""


def _not_chosen(made: Frame) -> Iterator[str]:
    """Why some have no learning rate yet."""
    reasons: dict[str, list[str]] = {}
    for row in made[made["learning_rate"].isna()].to_dict("records"):
        if row["failed"]:
            why = "a trial failed without having diverged; --retry-failed tries it again"
        elif row["diverged"] == row["tried"]:
            why = "every rate that was tried diverged"
        else:
            why = "not all rates are tried"
        reasons.setdefault(why, []).append(f"{row['config']} on {row['set']}")
    for why, which in reasons.items():
        yield f"No learning rate is chosen yet, since {why}: {', '.join(which)}."


def rank_or_rate(rates: Frame) -> Finding:
    """Whether the ranks differ where each has its own learning rate.

    Args:
      rates: `choice.COLUMNS`.
    """
    lines, rates = [], with_outcomes(rates)
    for name in chosen_on(rates):
        if text := _rank_or_rate(rates[rates["set"] == name]):
            lines.append(f"{name}: {text}")
    where = f"{', '.join(chosen_on(rates))}, round {rates['round'].min()}"
    lines.append(
        "Scores: all in this report are of rates that were chosen by the loss on tasks that are "
        f"trained on ({where}). For unseen tasks, for forgetting and for other sets and rounds "
        "none was chosen, so a difference between ranks there may be one of rates."
    )
    known = paper()["learning_rate"]
    of_paper = (
        f"Not asked: all ranks were trained at one learning rate, {known['lora']:g}, and full "
        f"fine-tuning at {known['full']:g}.",
    )
    return Finding("Is it the rank or the learning rate?", lines, of_paper)


def chosen_on(rates: Frame) -> list[str]:
    """The sets on which rates were tried."""
    return sorted(rates["set"].unique(), key=set_order)


def _rank_or_rate(rates: Frame) -> str:
    """How the loss changes with LoRA's rank, at one rate for all ranks and at the chosen ones."""
    plain = rates[(rates["method"] == "lora") & (rates["variant"] == "")]
    trials = plain[plain["repeat"] == 0]
    ranks, made = sorted(trials["rank"].unique()), trials[trials["chosen"]].set_index("rank")
    if len(ranks) < 2:
        return ""
    if lacking := [f"rank {rank}" for rank in ranks if rank not in made.index]:
        return f"cannot be said, no learning rate is chosen for {', '.join(lacking)}."
    low, high = ranks[0], ranks[-1]
    best = made["validation_loss"]
    change = float(best[high] - best[low])
    again = plain[plain["repeat"] > 0].set_index("rank")
    again = again[again["learning_rate"] == again.index.map(made["learning_rate"])]
    moved = (again["validation_loss"] - best).abs()
    seed = np.inf if (again["outcome"] == DIVERGED).any() else float(moved.max())
    common = trials.pivot(index="rank", columns="learning_rate", values="validation_loss")
    common = common.dropna(axis="columns")
    one, at_one = np.nan, "no learning rate was validated at all ranks"
    if len(common.columns):
        rate = common.mean().idxmin()
        one = float(common.loc[high, rate] - common.loc[low, rate])
        at_one = f"{_text(one, '+.4f')} at one learning rate for all ranks, {rate:g}"
    which = ", ".join(f"rank {rank} {made['learning_rate'][rank]:g}" for rank in ranks)
    tried = {rank: trials[trials["rank"] == rank] for rank in ranks}
    ends = [f"rank {rank}" for rank in ranks if _end(tried[rank], made.loc[rank])]
    beyond = f" A better rate may lie beyond those tried for {', '.join(ends)}." if ends else ""
    chance = f"a second seed moves a loss by up to {_text(moved.max(), '.4f')}, which is all that"
    return (
        f"{_answer(best, one, seed)}. From rank {low} to rank {high} the validation loss changes "
        f"by {_text(change, '+.4f')} where each rank has its own learning rate ({which}); "
        f"{at_one}; {chance} is known of chance here.{beyond}"
    )


def _answer(best: pd.Series, one: float, seed: float) -> str:
    """The answer by how the loss changes from the lowest rank to the highest.

    Args:
      best: the loss of each rank at its own learning rate.
      one: the change at one learning rate for all, NaN where there is none.
      seed: how far another seed moves a loss, infinite where one diverged, NaN where that is not
        known.
    """
    best = best.sort_index()
    chosen, lowest, highest = best.iloc[-1] - best.iloc[0], best.idxmin(), best.idxmax()
    if np.isnan(seed):
        return "undecided, no second seed is there to compare with"
    if np.isinf(seed):
        return "undecided, a chosen learning rate diverged with a second seed"
    if chosen > seed:
        return "not the rank, whose highest value has the higher loss at its own learning rate"
    if chosen < -seed:
        partly = ", and in part the learning rate" if one < chosen - seed else ""
        return f"the rank{partly}"
    if (spread := float(best.max() - best.min())) > seed:
        return (
            "undecided, the lowest and the highest rank differ no more than seeds do, but the "
            f"loss of rank {lowest} is {spread:.4f} below that of rank {highest}"
        )
    if abs(one) > seed:
        return "the learning rate: where each rank has its own, ranks differ no more than seeds do"
    return "undecided, ranks differ no more than seeds do"
