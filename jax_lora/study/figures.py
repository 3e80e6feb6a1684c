"""Pictures of a study; Figures 1, 4 and 5 are the paper's.

Each function returns a matplotlib `Figure` that needs no display and no pyplot.
TEXT and COLUMN are the widths, in inches, that they are drawn for. Lines are means over
rounds, bands and bars their standard deviations; a gap is a missing cell; a hollow marker is a
mean of fewer rounds than the grid plans.
"""

from __future__ import annotations

import itertools
import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.typing import LineStyleType

from jax_lora.study import TESTS, Frame, Study
from jax_lora.study.choice import DIVERGED
from jax_lora.study.plotting import (
    COLOURS,
    MARKERS,
    NAMES,
    STYLE,
    TEXT,
    TITLES,
    Look,
    at_least_a_point,
    full_handles,
    hollow_markers,
    legend,
    legend_handle,
    lines_over_ranks,
    main_rates,
    mean_line,
    panels,
    power,
    powers_of_ten,
    rank_axis,
    score_panels,
    set_handles,
    set_label,
    styled,
    without_math,
)
from jax_lora.study.rates import with_outcomes
from jax_lora.study.statistics import behaviour


def with_results(
    numbers: Frame, sets: Sequence[str], variants: Sequence[str] | None = None
) -> Frame:
    """The rows of `statistics.summary` that a figure of some sets, and variants, can draw."""
    rows = numbers[numbers["main"] & (numbers["rounds"] > 0) & numbers["set"].isin(sets)]
    return rows if variants is None else rows[rows["variant"].isin(variants)]


@styled
def scaling(study: Study, numbers: Frame, width: float = TEXT) -> Figure:
    """Figure 1: scores against the rank, one line per set, full fine-tuning dashed.

    Args:
      study: checked rows and grid.
      numbers: `statistics.summary`.
      width: of the picture in inches.
    """
    sets = [name for name in study.sets if "*" not in name]
    figure, panels = score_panels(width)
    for axis, test, metric in panels:
        for i, name in enumerate(sets):
            rows = main_rates(numbers, test, name)
            look = Look(color=COLOURS[i % 6], marker=MARKERS[i % 6], label=name)
            lines_over_ranks(axis, rows, metric, look)
        rank_axis(axis, numbers["rank"].dropna(), width / 2)
        at_least_a_point(axis)
    figure.supxlabel("LoRA rank", fontsize=STYLE["axes.labelsize"])
    drawn = with_results(numbers, sets, [""])
    legend(figure, [*set_handles(sets, drawn), *full_handles(drawn)], width)
    return figure


@styled
def categories(study: Study, test: str, name: str, width: float = TEXT) -> Figure:
    """Figure 4: exact match and out-of-options answers by category of closed-label tasks.

    Args:
      study: checked rows and grid.
      test: "seen" or "unseen".
      name: the set that was trained on.
      width: of the picture in inches.
    """
    numbers = behaviour(study, by_category=True)
    numbers = numbers[(numbers["test"] == test) & (numbers["set"] == name)]
    names = study.configs(variant="")
    grid = study.grid[study.grid["config"].isin(names) & (study.grid["set"] == name)]
    grid = grid.groupby("config", sort=False).agg(
        method=("method", "first"), rank=("rank", "first"), expected_rounds=("cell", "size")
    )
    closed = study.rows[study.rows["closed_label"] & (study.rows["test"] == test)]
    tasks = closed[closed["set"] == name].groupby("category")["task"].nunique()
    largest = tasks.sort_values(ascending=False, kind="stable").index[:9]
    columns, height = (3, 1.7) if width > 5 else (2, 1.5)
    figure, axes = panels(width, math.ceil(len(largest) / columns), columns, height, sharex=True)
    looks = {
        "exact_match": Look(color=COLOURS[0], marker="o", label="exact match"),
        "out_of_options": Look(color=COLOURS[5], marker="s", label="out of options"),
    }
    for axis, category in zip(axes.flat, largest, strict=False):
        rows = numbers[numbers["category"] == category].set_index("config")
        rows = grid.join(rows).reset_index()
        rows["rounds"] = rows["rounds"].fillna(0)
        for metric, look in looks.items():
            lines_over_ranks(axis, rows, metric, look)
        axis.axhline(rows["majority_baseline"].mean(), color="#666666", ls=":", lw=1)
        title = f"{category} ({tasks[category]})"
        axis.set_title(without_math(textwrap.fill(title, int(13 * width / columns))))
        axis.set_ylim(bottom=0)
        rank_axis(axis, grid["rank"].dropna(), width / columns)
    for i in range(len(largest), axes.size):
        axes.flat[i].set_visible(False)
        axes.flat[i - columns].tick_params(labelbottom=True)
    figure.supxlabel("LoRA rank", fontsize=STYLE["axes.labelsize"])
    figure.supylabel("% of answers", fontsize=STYLE["axes.labelsize"])
    handles = [
        legend_handle(look["color"], "-", look["marker"], metric.replace("_", " "))
        for metric, look in looks.items()
    ]
    handles += full_handles(grid[grid.index.isin(numbers["config"])])
    legend(figure, [*handles, legend_handle("#666666", ":", "", "majority label")], width)
    return figure


@styled
def fixed_size(study: Study, numbers: Frame, sets: Sequence[str], width: float = TEXT) -> Figure:
    """Figure 5: as many examples from more and more tasks.

    Args:
      study: checked rows and grid.
      numbers: `statistics.summary`.
      sets: of one size, by rising number of tasks.
      width: of the picture in inches.
    """
    figure, panels = score_panels(width)
    starred = study.grid["set"].isin([name for name in sets if "*" in name])
    planned = set(study.grid[starred]["config"])
    planned &= {*with_results(numbers, sets)["config"]}
    configs = [name for name in study.configs(variant="") if name in planned]
    lora = [name for name in configs if name != "full"]
    shades = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.8, max(len(lora), 2)))
    marked = zip(lora, shades, itertools.cycle(MARKERS), strict=False)
    looks = {name: Look(color=colour, marker=mark, label=name) for name, colour, mark in marked}
    looks["full"] = Look(color="black", marker="*", ls="--", label="full", ms=6)
    positions = {name: i for i, name in enumerate(sets)}
    for axis, test, metric in panels:
        rows = numbers[(numbers["test"] == test) & numbers["set"].isin(sets) & numbers["main"]]
        for i, config in enumerate(configs):
            line = rows[rows["config"] == config]
            dodge = 0.2 * (i / max(len(configs) - 1, 1) - 0.5)  # so that the bars do not overlap
            line = line.assign(position=line["set"].map(positions) + dodge).sort_values("position")
            mean_line(axis, line, "position", metric, looks[config], band=False)
        axis.set_xticks(range(len(sets)), [set_label(name) for name in sets])
        axis.set_xlim(-0.3, len(sets) - 0.7)
        at_least_a_point(axis)
    handles = [
        legend_handle(looks[c]["color"], looks[c].get("ls", "-"), looks[c]["marker"], c)
        for c in configs
    ]
    legend(figure, handles, width)
    return figure


@styled
def costs(study: Study, numbers: Frame, metric: str = "exact_match", width: float = TEXT) -> Figure:
    """A score against the share of parameters that trains and against training operations.

    Args:
      study: checked rows and grid.
      numbers: `statistics.summary`.
      metric: "exact_match" or "rougeL".
      width: of the picture in inches.
    """
    sets = [name for name in study.sets if "*" not in name]
    main = numbers[numbers["main"]]
    variants = [name for name in dict.fromkeys(main["variant"]) if name]
    patterns: tuple[LineStyleType, ...] = (":", "-.", (0, (1, 3)))
    styles: dict[str, LineStyleType] = {"": "-"}
    styles |= {name: patterns[i % 3] for i, name in enumerate(variants)}
    figure, axes = panels(width, 2, 2, 2.0 if width > 5 else 1.45, sharex="col")
    for row, test in enumerate(TESTS):
        for column, cost in enumerate(("trainable_percent", "train_operations")):
            axis = axes[row, column]
            axis.set_xscale("log")
            for i, name in enumerate(sets):
                _against_cost(
                    axis,
                    main_rates(numbers, test, name, variant=None),
                    cost,
                    metric,
                    name,
                    i,
                    styles,
                )
            axis.set_title(TITLES[test])
            if column == 0:
                axis.set_ylabel(NAMES[metric])
            if row == 1:
                axis.set_xlabel(("Trainable share (%)", "Training operations")[column])
            at_least_a_point(axis)
            powers_of_ten(axis, power if column else lambda value, _: f"{value:g}")
    drawn = with_results(numbers, sets)
    handles = [*set_handles(sets, drawn), *full_handles(drawn, "", "*")]
    variants = [name for name in variants if name in {*drawn["variant"]}]
    handles += [legend_handle("black", styles[name], "", without_math(name)) for name in variants]
    legend(figure, handles, width)
    return figure


def _against_cost(
    axis: Axes,
    rows: Frame,
    cost: str,
    metric: str,
    name: str,
    index: int,
    styles: Mapping[str, LineStyleType],
) -> None:
    """One set in one panel: a line per variant of LoRA, a star for full fine-tuning."""
    colour, marker = COLOURS[index % 6], MARKERS[index % 6]
    for variant, style in styles.items():
        line = rows[(rows["variant"] == variant) & (rows["method"] == "lora")]
        label = f"{name}, {variant}" if variant else name
        mean_line(
            axis, line, cost, metric, Look(color=colour, marker=marker, ls=style, label=label)
        )
    full = rows[rows["method"] == "full"]
    axis.plot(full[cost], full[metric], ls="", marker="*", ms=8, color=colour,
              mec="black", mew=0.5, label=f"{name}, full")  # fmt: skip
    star = Look(color=colour, marker="*")
    hollow_markers(axis, full[cost].to_numpy(), full, metric, star, ms=8)


@styled
def learning_rates(rates: Frame, name: str, width: float = TEXT) -> Figure:
    """The validation loss by rank and learning rate, the chosen rates framed and joined by a line.

    Shades are of a rank's own, from its lowest loss to its highest; a cross is a rate that
    diverged, a question mark a trial that failed for another reason.

    Args:
      rates: `choice.COLUMNS`.
      name: the set that was trained on.
      width: of the picture in inches.
    """
    rates = with_outcomes(rates)
    trials = rates[(rates["set"] == name) & (rates["variant"] == "") & (rates["repeat"] == 0)]
    lora = sorted(trials["rank"].dropna().unique())
    columns = [*lora, *(["full"] if (trials["method"] == "full").any() else [])]
    tried = sorted(trials["learning_rate"].unique())
    size = 6 if len(columns) < 9 else 5
    figure, axes = panels(width, 1, 1, 0.2 * len(tried) + 0.75, sharex=True)
    axis = axes[0, 0]
    values = np.full((len(tried), len(columns)), np.nan)
    words, chosen = {}, {}
    for row in trials.to_dict("records"):
        column = columns.index("full" if row["method"] == "full" else row["rank"])
        at = tried.index(row["learning_rate"]), column
        values[at] = row["validation_loss"]
        lost = "×" if row["outcome"] == DIVERGED else "?"
        words[at] = lost if np.isnan(values[at]) else f"{values[at]:.3f}"
        chosen |= {column: at[0]} if row["chosen"] else {}
    axis.grid(False)
    line = [chosen.get(column, np.nan) for column in range(len(lora))]
    axis.plot(range(len(lora)), line, color=COLOURS[5], lw=1.5, label="chosen rate")
    for column, i in chosen.items():
        frame = Rectangle((column - 0.5, i - 0.5), 1, 1, fc="none", ec=COLOURS[5], lw=1.5)
        axis.add_patch(frame)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a rank whose rates all failed
        above = values - np.nanmin(values, axis=0)
        above /= np.maximum(np.nanmax(above, axis=0), 1e-12)
    shades = axis.imshow(above, cmap="cividis_r", vmin=0, vmax=1, aspect="auto", origin="lower")
    for (i, j), text in words.items():
        failed = np.isnan(values[i, j])
        axis.text(j, i, text, ha="center", va="center", fontsize=size,
                  color="white" if not failed and above[i, j] > 0.5 else "black",
                  bbox={"fc": "white" if failed else shades.to_rgba(above[i, j]), "ec": "none",
                        "pad": 0.8})  # fmt: skip
    axis.set_xticks(range(len(columns)), map(str, columns), fontsize=size + 0.5)
    axis.set_yticks(range(len(tried)), [f"{rate:g}" for rate in tried])
    axis.set_title(f"{set_label(name)}: validation loss")
    axis.set_ylabel("Learning rate")
    axis.set_xlabel("LoRA rank")
    return figure
