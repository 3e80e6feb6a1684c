"""Pictures of a study; Figures 1, 4 and 5 are the paper's.

Each function returns a matplotlib `Figure` that needs no display and no pyplot.
TEXT and COLUMN are the widths, in inches, that they are made to be read at. Lines are means over
rounds, bands and bars their standard deviations; a gap is a missing cell; a hollow marker, or in
the grid of learning rates a star, is a mean of fewer rounds than the grid plans.
"""

from __future__ import annotations

import itertools
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator

from jax_lora.study import METRICS, TESTS, Frame, Study, set_order
from jax_lora.study.statistics import behaviour
from jax_lora.study.tables import tex_set

TEXT, COLUMN = 7.0, 3.4
# Okabe and Ito's colours, told apart with any colour vision; markers tell them apart without.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
MARKERS = ("o", "s", "^", "D", "v", "P")
TITLES = {"seen": "Seen tasks", "unseen": "Unseen tasks"}
NAMES = {"exact_match": "Exact match (%)", "rougeL": "Rouge-L (%)"}
FEW = "_few rounds"  # the label of hollow markers; an underscore keeps it out of legends
STYLE: dict[Any, Any] = {
    "font.size": 7.5, "axes.titlesize": 8, "axes.labelsize": 7.5, "legend.fontsize": 7.5,
    "xtick.labelsize": 7, "ytick.labelsize": 7, "axes.spines.top": False, "axes.grid": True,
    "axes.spines.right": False, "grid.color": "#E5E5E5", "grid.linewidth": 0.5,
    "axes.axisbelow": True, "axes.linewidth": 0.6, "lines.linewidth": 1.2, "lines.markersize": 3.2,
    "legend.frameon": False, "legend.columnspacing": 1.2, "pdf.fonttype": 42, "savefig.dpi": 200,
}  # fmt: skip


def _styled(draw: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> Any:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


@_styled
def save(figure: Figure, path: Path) -> None:
    """Write PATH.png and PATH.pdf, the same bytes for the same picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_name(path.name + ".png"), metadata={"Software": None})
    figure.set_layout_engine("none")  # it is laid out: not again
    figure.savefig(path.with_name(path.name + ".pdf"), metadata={"CreationDate": None})


@_styled
def scaling(study: Study, numbers: Frame, width: float = TEXT) -> Figure:
    """Figure 1: scores against the rank, one line per set, full fine-tuning dashed.

    Args:
      study: checked rows and grid.
      numbers: `statistics.summary`.
      width: of the picture in inches.
    """
    sets = [name for name in study.sets if "*" not in name]
    figure, panels = _score_panels(width)
    for axis, test, metric in panels:
        for i, name in enumerate(sets):
            own = _cells(numbers, test, name)
            look = {"color": COLOURS[i % 6], "marker": MARKERS[i % 6], "label": name}
            _against_rank(axis, own, metric, look)
        _rank_axis(axis, numbers["rank"], width / 2)
        _wide_enough(axis)
    figure.supxlabel("LoRA rank", fontsize=STYLE["axes.labelsize"])
    _legend(figure, [*_set_handles(sets), _handle("black", "--", "", "full fine-tuning")], width)
    return figure


@_styled
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
    rows = study.rows[study.rows["closed_label"] & (study.rows["test"] == test)]
    tasks = rows[rows["set"] == name].groupby("category")["task"].nunique()
    largest = tasks.sort_values(ascending=False, kind="stable").index[:9]
    columns, height = (3, 1.7) if width > 5 else (2, 1.5)
    figure, axes = _panels(width, math.ceil(len(largest) / columns), columns, height, sharex=True)
    looks = {
        "exact_match": {"color": COLOURS[0], "marker": "o", "label": "exact match"},
        "out_of_options": {"color": COLOURS[5], "marker": "s", "label": "out of options"},
    }
    for axis, category in zip(axes.flat, largest, strict=False):
        own = numbers[numbers["category"] == category].set_index("config")
        own = grid.join(own).reset_index()
        own["rounds"] = own["rounds"].fillna(0)
        for metric, look in looks.items():
            _against_rank(axis, own, metric, look)
        axis.axhline(own["majority_baseline"].mean(), color="#666666", ls=":", lw=1)
        title = f"{category} ({tasks[category]})"
        axis.set_title(_plain(textwrap.fill(title, int(13 * width / columns))))
        axis.set_ylim(bottom=0)
        _rank_axis(axis, grid["rank"], width / columns)
    for i in range(len(largest), axes.size):
        axes.flat[i].set_visible(False)
        axes.flat[i - columns].tick_params(labelbottom=True)
    figure.supxlabel("LoRA rank", fontsize=STYLE["axes.labelsize"])
    figure.supylabel("% of answers", fontsize=STYLE["axes.labelsize"])
    handles = [_handle(k["color"], "-", k["marker"], k["label"]) for k in looks.values()]
    handles += [_handle("black", "--", "", "full fine-tuning")]
    _legend(figure, [*handles, _handle("#666666", ":", "", "majority label")], width)
    return figure


@_styled
def fixed_size(study: Study, numbers: Frame, sets: Sequence[str], width: float = TEXT) -> Figure:
    """Figure 5: as many examples from more and more tasks.

    Args:
      study: checked rows and grid.
      numbers: `statistics.summary`.
      sets: of one size, by rising number of tasks.
      width: of the picture in inches.
    """
    figure, panels = _score_panels(width)
    starred = study.grid["set"].isin([name for name in sets if "*" in name])
    planned = set(study.grid[starred]["config"])
    configs = [name for name in study.configs(variant="") if name in planned]
    lora = [name for name in configs if name != "full"]
    shades = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.8, max(len(lora), 2)))
    marked = zip(lora, shades, itertools.cycle(MARKERS), strict=False)
    looks = {name: dict(color=colour, marker=mark, label=name) for name, colour, mark in marked}
    looks["full"] = dict(color="black", marker="*", ls="--", label="full", ms=6)
    places = {name: i for i, name in enumerate(sets)}
    for axis, test, metric in panels:
        own = numbers[(numbers["test"] == test) & numbers["set"].isin(sets) & numbers["main"]]
        for i, config in enumerate(configs):
            line = own[own["config"] == config]
            dodge = 0.2 * (i / max(len(configs) - 1, 1) - 0.5)  # keeps the bars apart
            line = line.assign(place=line["set"].map(places) + dodge).sort_values("place")
            _line(axis, line, "place", metric, looks[config], band=False)
        axis.set_xticks(range(len(sets)), [_set_label(name) for name in sets])
        axis.set_xlim(-0.3, len(sets) - 0.7)
        _wide_enough(axis)
    handles = [
        _handle(looks[c]["color"], looks[c].get("ls", "-"), looks[c]["marker"], c) for c in configs
    ]
    _legend(figure, handles, width)
    return figure


@_styled
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
    styles = {"": "-"} | {name: (":", "-.", (0, (1, 3)))[i % 3] for i, name in enumerate(variants)}
    figure, axes = _panels(width, 2, 2, 2.0 if width > 5 else 1.45, sharex="col")
    for row, test in enumerate(TESTS):
        for column, cost in enumerate(("trainable_percent", "train_operations")):
            axis = axes[row, column]
            axis.set_xscale("log")
            for i, name in enumerate(sets):
                own = _cells(numbers, test, name, variant=None)
                look = {"color": COLOURS[i % 6], "marker": MARKERS[i % 6]}
                for variant, style in styles.items():
                    line = own[(own["variant"] == variant) & (own["method"] == "lora")]
                    label = f"{name}, {variant}" if variant else name
                    _line(axis, line, cost, metric, {**look, "ls": style, "label": label})
                full = own[own["method"] == "full"]
                axis.plot(full[cost], full[metric], ls="", marker="*", ms=8, color=look["color"],
                          mec="black", mew=0.5, label=f"{name}, full")  # fmt: skip
                _hollow(axis, full[cost].to_numpy(), full, metric, {**look, "marker": "*"}, ms=8)
            axis.set_title(TITLES[test])
            if column == 0:
                axis.set_ylabel(NAMES[metric])
            if row == 1:
                axis.set_xlabel(("Trainable share (%)", "Training operations")[column])
            _wide_enough(axis)
            _power_axis(axis, _power if column else lambda value, _: f"{value:g}")
    handles = [*_set_handles(sets), _handle("black", "", "*", "full fine-tuning")]
    handles += [_handle("black", styles[name], "", _plain(name)) for name in variants]
    _legend(figure, handles, width)
    return figure


@_styled
def learning_rates(
    study: Study, numbers: Frame, name: str, metric: str = "exact_match", width: float = TEXT
) -> Figure:
    """A score by rank and learning rate, the best rate of each rank joined by a line.

    Rates that tie are all framed, and the line has a gap there. The best is the best on the test
    set shown: it says where the optimum lies, and is no fair estimate of the score there.

    Args:
      study: checked rows and grid.
      numbers: `statistics.summary`.
      name: the set that was trained on.
      metric: "exact_match" or "rougeL".
      width: of the picture in inches.
    """
    own = numbers[(numbers["set"] == name) & (numbers["variant"] == "")]
    lora = sorted(own["rank"].dropna().unique())
    columns = [*lora, *(["full"] if (own["method"] == "full").any() else [])]
    rates = sorted(own["learning_rate"].unique())
    shape, size = (1, 2) if width > 5 else (2, 1), 6 if len(columns) < 9 else 5
    figure, axes = _panels(width, *shape, 0.2 * len(rates) + 0.75, sharex=True)
    for axis, test in zip(axes.flat, TESTS, strict=True):
        values = np.full((len(rates), len(columns)), np.nan)
        words = {}
        for row in own[own["test"] == test].to_dict("records"):
            column = columns.index("full" if row["method"] == "full" else row["rank"])
            at = rates.index(row["learning_rate"]), column
            values[at] = row[metric]
            few = "*" if row["rounds"] < row["expected_rounds"] else ""
            words[at] = "–" if np.isnan(row[metric]) else f"{row[metric]:.1f}{few}"
        axis.grid(False)
        known = [j for j in range(len(columns)) if np.isfinite(values[:, j]).any()]
        best = [np.flatnonzero(values[:, j] > np.nanmax(values[:, j]) - 1e-9) for j in known]
        ranks = [j for j in known if columns[j] != "full"]
        line = [at[0] if len(at) == 1 else np.nan for at in best[: len(ranks)]]
        axis.plot(ranks, line, color=COLOURS[5], lw=1.5, label="best rate")
        for j, i in ((j, i) for j, at in zip(known, best, strict=True) for i in at):
            axis.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fc="none", ec=COLOURS[5], lw=1.5))
        shades = axis.imshow(values, cmap="cividis", aspect="auto", origin="lower")
        for (i, j), text in words.items():
            value, bare = values[i, j], text == "–"
            axis.text(j, i, text, ha="center", va="center", fontsize=size,
                      color="white" if not bare and shades.norm(value) < 0.5 else "black",
                      bbox={"fc": "white" if bare else shades.to_rgba(value), "ec": "none",
                            "pad": 0.8})  # fmt: skip
        axis.set_xticks(range(len(columns)), map(str, columns), fontsize=size + 0.5)
        axis.set_yticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        axis.set_title(f"{TITLES[test]}, {_set_label(name)}: {NAMES[metric].lower()}")
    axes[0, 0].set_ylabel("Learning rate")
    for axis in axes[-1]:
        axis.set_xlabel("LoRA rank")
    return figure


def _panels(
    width: float, rows: int, columns: int, height: float, sharex: Any
) -> tuple[Figure, Any]:
    """A figure with rows of panels, each `height` inches high, and room for a legend above."""
    figure = Figure(figsize=(width, rows * height + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, sharex=sharex, squeeze=False)


def _score_panels(width: float) -> tuple[Figure, list[tuple[Axes, str, str]]]:
    """Two by two panels, (axis, test set, metric) each."""
    figure, axes = _panels(width, 2, 2, 2.0 if width > 5 else 1.45, sharex=True)
    for axis, test in zip(axes[0], TESTS, strict=True):
        axis.set_title(TITLES[test])
    for axis, metric in zip(axes[:, 0], METRICS, strict=True):
        axis.set_ylabel(NAMES[metric])
    kinds = [(test, metric) for metric in METRICS for test in TESTS]
    return figure, [(axis, *kind) for axis, kind in zip(axes.flat, kinds, strict=True)]


def _cells(numbers: Frame, test: str, name: str, variant: str | None = "") -> Frame:
    own = numbers[(numbers["test"] == test) & (numbers["set"] == name) & numbers["main"]]
    return own if variant is None else own[own["variant"] == variant]


def _line(
    axis: Axes, rows: Frame, x: str, metric: str, look: Mapping[str, Any], band: bool = True
) -> None:
    """A line through means, its spread over rounds, hollow where rounds are missing."""
    if rows.empty:
        return
    at, mean = rows[x].to_numpy(float), rows[metric].to_numpy(float)
    spread = rows[f"{metric}_std"].to_numpy(float)
    axis.plot(at, mean, **look)
    if band:
        low, high = np.clip((mean - spread, mean + spread), 0, 100)  # percentages
        axis.fill_between(at, low, high, color=look["color"], alpha=0.13, lw=0)
    else:
        axis.errorbar(at, mean, spread, ls="", elinewidth=0.8, capsize=1.5, color=look["color"])
    _hollow(axis, at, rows, metric, look)


def _hollow(
    axis: Axes, at: np.ndarray, rows: Frame, metric: str, look: Mapping[str, Any], **place: Any
) -> None:
    """Hollow markers over the means of fewer rounds than the grid plans."""
    few = ((rows["rounds"] < rows["expected_rounds"]) & rows[metric].notna()).to_numpy()
    if few.any():
        axis.plot(at[few], rows[metric][few], ls="", marker=look["marker"], mfc="white",
                  mec=look["color"], label=FEW, **place)  # fmt: skip


def _against_rank(axis: Axes, rows: Frame, metric: str, look: Mapping[str, Any]) -> None:
    """LoRA's line over the ranks; full fine-tuning dashed across, with its spread over rounds."""
    _line(axis, rows[rows["method"] == "lora"], "rank", metric, look)
    full = rows[(rows["method"] == "full") & rows[metric].notna()]
    for mean, spread in zip(full[metric], full[f"{metric}_std"], strict=True):
        axis.axhline(mean, color=look["color"], ls="--", lw=1, label="_full")
        if not np.isnan(spread):
            low, high = max(mean - spread, 0), min(mean + spread, 100)
            axis.axhspan(low, high, color=look["color"], alpha=0.08, lw=0)
    at_right = np.full(len(full), 0.98)
    _hollow(axis, at_right, full, metric, look, transform=axis.get_yaxis_transform())


def _rank_axis(axis: Axes, ranks: Any, width: float) -> None:
    """log2 ranks, labelled as far as `width` inches have room."""
    found = sorted({int(rank) for rank in ranks.dropna()})
    axis.set_xscale("log", base=2)
    step = math.ceil(len(found) / max(2, int(2.2 * width)))
    axis.set_xticks(found[::step], [str(rank) for rank in found[::step]])
    axis.set_xticks(found, minor=True)
    axis.xaxis.set_minor_formatter(lambda value, _: "")
    if found:
        axis.set_xlim(found[0] / 1.3, found[-1] * 1.3)


def _wide_enough(axis: Axes) -> None:
    """At least a point of scores, so that a flat line looks flat."""
    low, high = axis.get_ylim()
    if high - low < 1:
        start = max((low + high) / 2 - 0.5, -0.05)
        axis.set_ylim(start, start + 1)


def _power_axis(axis: Axes, form: Callable[[float, Any], str]) -> None:
    """Ticks at powers of ten, and between them where there are few."""
    decades = np.ptp(np.log10(axis.get_xlim()))
    between = (1.0,) if decades > 2 else (1.0, 3.0) if decades > 0.8 else (1.0, 2.0, 5.0)
    axis.xaxis.set_major_locator(LogLocator(subs=between))
    axis.xaxis.set_major_formatter(form)
    axis.xaxis.set_minor_formatter(lambda value, _: "")


def _power(value: float, _: Any) -> str:
    """3 · 10¹⁷ as matplotlib writes it."""
    exponent = math.floor(math.log10(value) + 1e-9)
    factor = f"{value / 10**exponent:.0f}"
    return f"$10^{{{exponent}}}$" if factor == "1" else f"${factor}\\cdot10^{{{exponent}}}$"


def _legend(figure: Figure, handles: list[Line2D], width: float) -> None:
    """Above the panels, in as few rows as about 13 letters an inch allow."""
    if any(line.get_label() == FEW for axis in figure.axes for line in axis.lines):
        handles = [*handles, _handle("black", "", "o", "rounds missing")]
        handles[-1].set_markerfacecolor("white")
    lengths = [len(re.sub(r"\\\w+|\W", "", str(handle.get_label()))) + 6 for handle in handles]
    for columns in range(len(handles), 0, -1):
        parts = np.array_split(lengths, columns)  # as a legend fills its columns
        if sum(part.max() for part in parts) <= 13 * width or columns == 1:
            figure.set_figheight(figure.get_figheight() + 0.16 * len(parts[0]))
            figure.legend(handles=handles, loc="outside upper center", ncols=columns)
            return


def _handle(colour: Any, style: Any, marker: str, label: str) -> Line2D:
    size = 8 if marker == "*" and not style else None
    return Line2D([], [], color=colour, ls=style, marker=marker, label=label, markersize=size)


def _set_handles(sets: Sequence[str]) -> list[Line2D]:
    labels = enumerate(map(_set_label, sets))
    return [_handle(COLOURS[i % 6], "-", MARKERS[i % 6], label) for i, label in labels]


def _set_label(name: str) -> str:
    return tex_set(name) if set_order(name)[1] < np.inf or name == "Tall" else _plain(name)


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # no mathematics
