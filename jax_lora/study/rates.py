"""What a study says of its learning rates: which were chosen, how clearly, and what hangs on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd

from jax_lora.study import GRID, Frame, set_order
from jax_lora.study.tables import MISSING, Table

_GROUP = [name for name in GRID if name not in ("cell", "round", "learning_rate")]


def choices(rates: Frame) -> Frame:
    """One row per choice, from the trials and repeats of `choice.COLUMNS`.

    Returns:
      config, set and round; learning_rate that was chosen, its validation_loss, runner_up and
      runner_up_distance (its loss less the chosen one's), seed_distance (of the chosen rate with
      another seed), end ("lowest" or "highest" of the rates, else ""), and how many were tried and
      failed. What is not there is NaN.
    """
    found = []
    for _, group in rates.groupby(_GROUP, dropna=False, sort=False):
        first = group.iloc[0]
        trials = group[group["repeat"] == 0].sort_values(["validation_loss", "learning_rate"])
        made = trials[trials["chosen"]]
        row: dict[str, object] = {
            "config": ("full" if first["method"] == "full" else f"rank {first['rank']}")
            + (f", {first['variant']}" if first["variant"] else ""),
            "set": first["set"],
            "round": first["round"],
            "tried": len(trials),
            "failed": int(trials["validation_loss"].isna().sum()),
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
                row["seed_distance"] = _distance(again, best)
        found.append(row)
    names = ["config", "set", "round", "learning_rate", "validation_loss", "runner_up"]
    names += ["runner_up_distance", "seed_distance", "end", "tried", "failed"]
    frame = pd.DataFrame(found, columns=names)
    return frame.astype({name: float for name in names[3:8]}).fillna({"end": ""})


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
        tried = f"{row['tried']}" + (f" ({row['failed']} failed)" if row["failed"] else "")
        seed = _text(row["seed_distance"], "+.4f")
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
    known = made.dropna(subset=["runner_up_distance", "seed_distance"])
    close = known[known["runner_up_distance"] <= known["seed_distance"].abs()]
    if len(known):
        which = ", ".join(f"{r['config']} on {r['set']}" for r in close.to_dict("records"))
        yield (
            f"In {len(close)} of {len(known)} choices the runner-up's loss is no farther away than "
            f"another seed moves it{f': {which}' if which else ''}."
        )
    if len(at_end := made[made["end"] != ""]):
        which = ", ".join(
            f"{r['config']} on {r['set']} (the {r['end']})" for r in at_end.to_dict("records")
        )
        yield f"At the end of the rates that were tried, so a better one may lie beyond: {which}."
    for name in sorted(rates["set"].unique(), key=set_order):
        if text := _rank_or_rate(rates[rates["set"] == name], made[made["set"] == name]):
            yield f"{name}: {text}"


def _rank_or_rate(rates: Frame, made: Frame) -> str:
    """How the loss changes with LoRA's rank, at one rate for all ranks and at the chosen ones."""
    plain = rates[(rates["method"] == "lora") & (rates["variant"] == "") & (rates["repeat"] == 0)]
    losses = plain.pivot(index="rank", columns="learning_rate", values="validation_loss")
    common = losses.dropna(axis="columns")
    if len(losses) < 2 or common.empty or losses.isna().all(axis=1).any():
        return ""
    rate = common.mean().idxmin()
    low, high = losses.index[0], losses.index[-1]
    best = losses.min(axis=1)
    seed = made["seed_distance"].abs().max()
    return (
        f"from rank {low} to rank {high} the validation loss changes by "
        f"{_text(common.loc[high, rate] - common.loc[low, rate], '+.4f')} at one learning rate for "
        f"all ranks, {rate:g}, and by {_text(best[high] - best[low], '+.4f')} where each rank has "
        f"its own; a second seed moves a loss by up to {_text(seed, '.4f')}."
    )
