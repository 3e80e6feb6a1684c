"""What the pictures of a study share: sizes, colours, panels, lines over ranks, axes, legends."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from pathlib import Path
from typing import Literal, ParamSpec, Required, TypedDict, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator
from matplotlib.transforms import Transform
from matplotlib.typing import ColorType, LineStyleType

from jax_lora.study import METRICS, TESTS, Frame, set_order
from jax_lora.study.tables import tex_set
from jax_lora.text import printable

P = ParamSpec("P")
T = TypeVar("T")
TEXT, COLUMN = 7.0, 3.4
# Okabe and Ito's colours, distinct with any colour vision; markers are distinct without colour.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
MARKERS = ("o", "s", "^", "D", "v", "P")
TITLES = {"seen": "Seen tasks", "unseen": "Unseen tasks"}
NAMES = {"exact_match": "Exact match (%)", "rougeL": "Rouge-L (%)"}
FEW = "_few rounds"  # the label of hollow markers; an underscore keeps it out of legends
STYLE: dict = {
    "font.size": 7.5, "axes.titlesize": 8, "axes.labelsize": 7.5, "legend.fontsize": 7.5,
    "xtick.labelsize": 7, "ytick.labelsize": 7, "axes.spines.top": False, "axes.grid": True,
    "axes.spines.right": False, "grid.color": "#E5E5E5", "grid.linewidth": 0.5,
    "axes.axisbelow": True, "axes.linewidth": 0.6, "lines.linewidth": 1.2, "lines.markersize": 3.2,
    "legend.frameon": False, "legend.columnspacing": 1.2, "pdf.fonttype": 42, "savefig.dpi": 200,
}  # fmt: skip


class Look(TypedDict, total=False):
    """How a line looks, in matplotlib's words."""

    color: Required[ColorType]
    marker: Required[str]
    label: str
    ls: LineStyleType
    ms: float


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Draw with STYLE, whatever the caller's matplotlib is set to."""

    @wraps(draw)
    def draw_styled(*args: P.args, **kwargs: P.kwargs) -> T:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return draw_styled


@styled
def save(figure: Figure, path: Path) -> None:
    """Write PATH.png and PATH.pdf, the same bytes for the same picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_name(path.name + ".png"), metadata={"Software": None})
    figure.set_layout_engine("none")  # it is laid out: not again
    figure.savefig(path.with_name(path.name + ".pdf"), metadata={"CreationDate": None})


def panels(
    width: float, rows: int, columns: int, height: float, sharex: bool | Literal["col"]
) -> tuple[Figure, np.ndarray]:
    """A figure with rows of panels, each `height` inches high, and room for a legend above."""
    figure = Figure(figsize=(width, rows * height + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, sharex=sharex, squeeze=False)


def score_panels(width: float) -> tuple[Figure, list[tuple[Axes, str, str]]]:
    """Two by two panels, (axis, test set, metric) each."""
    figure, axes = panels(width, 2, 2, 2.0 if width > 5 else 1.45, sharex=True)
    for axis, test in zip(axes[0], TESTS, strict=True):
        axis.set_title(TITLES[test])
    for axis, metric in zip(axes[:, 0], METRICS, strict=True):
        axis.set_ylabel(NAMES[metric])
    kinds = [(test, metric) for metric in METRICS for test in TESTS]
    return figure, [(axis, *kind) for axis, kind in zip(axes.flat, kinds, strict=True)]


def main_rates(numbers: Frame, test: str, name: str, variant: str | None = "") -> Frame:
    """The rows of one set and test set at the main learning rates; None takes all variants."""
    rows = numbers[(numbers["test"] == test) & (numbers["set"] == name) & numbers["main"]]
    return rows if variant is None else rows[rows["variant"] == variant]


def mean_line(axis: Axes, rows: Frame, x: str, metric: str, look: Look, band: bool = True) -> None:
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
    hollow_markers(axis, at, rows, metric, look)


def hollow_markers(
    axis: Axes,
    at: np.ndarray,
    rows: Frame,
    metric: str,
    look: Look,
    transform: Transform | None = None,
    ms: float | None = None,
) -> None:
    """Hollow markers over the means of fewer rounds than the grid plans."""
    few = ((rows["rounds"] < rows["expected_rounds"]) & rows[metric].notna()).to_numpy()
    if few.any():
        axis.plot(at[few], rows[metric][few], ls="", marker=look["marker"], mfc="white",
                  mec=look["color"], label=FEW, ms=ms,
                  transform=transform or axis.transData)  # fmt: skip


def lines_over_ranks(axis: Axes, rows: Frame, metric: str, look: Look) -> None:
    """LoRA's line over the ranks; full fine-tuning as a dashed line; spreads over rounds."""
    mean_line(axis, rows[rows["method"] == "lora"], "rank", metric, look)
    full = rows[(rows["method"] == "full") & rows[metric].notna()]
    for mean, spread in zip(full[metric], full[f"{metric}_std"], strict=True):
        axis.axhline(mean, color=look["color"], ls="--", lw=1, label="_full")
        if not np.isnan(spread):
            low, high = max(mean - spread, 0), min(mean + spread, 100)
            axis.axhspan(low, high, color=look["color"], alpha=0.08, lw=0)
    at_right = np.full(len(full), 0.98)
    hollow_markers(axis, at_right, full, metric, look, transform=axis.get_yaxis_transform())


def rank_axis(axis: Axes, ranks: Iterable[int], width: float) -> None:
    """log2 ranks, labelled as far as `width` inches have room."""
    found = sorted({int(rank) for rank in ranks})
    axis.set_xscale("log", base=2)
    step = math.ceil(len(found) / max(2, int(2.2 * width)))
    axis.set_xticks(found[::step], [str(rank) for rank in found[::step]])
    axis.set_xticks(found, minor=True)
    axis.xaxis.set_minor_formatter(lambda value, _: "")
    if found:
        axis.set_xlim(found[0] / 1.3, found[-1] * 1.3)


def at_least_a_point(axis: Axes) -> None:
    """At least a point of scores, so that a flat line looks flat."""
    low, high = axis.get_ylim()
    if high - low < 1:
        start = max((low + high) / 2 - 0.5, -0.05)
        axis.set_ylim(start, start + 1)


def powers_of_ten(axis: Axes, form: Callable[[float, object], str]) -> None:
    """Ticks at powers of ten, and between them where there are few; an axis of a decade at least,
    since ticks that are closer would have the same labels."""
    low, high = np.log10(axis.get_xlim())
    spare = max(0.0, 1.0 - (high - low)) / 2
    axis.set_xlim(10 ** (low - spare), 10 ** (high + spare))
    decades = max(1.0, high - low)
    between = (1.0,) if decades > 2 else (1.0, 3.0) if decades > 1 else (1.0, 2.0, 5.0)
    axis.xaxis.set_major_locator(LogLocator(subs=between))
    axis.xaxis.set_major_formatter(form)
    axis.xaxis.set_minor_formatter(lambda value, _: "")


def power(value: float, _: object) -> str:
    """3 · 10¹⁷ as matplotlib writes it."""
    exponent = math.floor(math.log10(value) + 1e-9)
    factor = f"{value / 10**exponent:.0f}"
    return f"$10^{{{exponent}}}$" if factor == "1" else f"${factor}\\cdot10^{{{exponent}}}$"


def legend(figure: Figure, handles: list[Line2D], width: float) -> None:
    """Above the panels, in as few rows as about 13 letters per inch allow."""
    if any(line.get_label() == FEW for axis in figure.axes for line in axis.lines):
        handles = [*handles, legend_handle("black", "", "o", "rounds missing")]
        handles[-1].set_markerfacecolor("white")
    lengths = [len(re.sub(r"\\\w+|\W", "", str(handle.get_label()))) + 6 for handle in handles]
    for columns in range(len(handles), 0, -1):
        parts = np.array_split(lengths, columns)  # as a legend fills its columns
        if sum(part.max() for part in parts) <= 13 * width or columns == 1:
            figure.set_figheight(figure.get_figheight() + 0.16 * len(parts[0]))
            figure.legend(handles=handles, loc="outside upper center", ncols=columns)
            return


def legend_handle(colour: ColorType, style: LineStyleType, marker: str, label: str) -> Line2D:
    """One entry of a legend."""
    size = 8 if marker == "*" and not style else None
    return Line2D([], [], color=colour, ls=style, marker=marker, label=label, markersize=size)


def set_handles(sets: Sequence[str], drawn: Frame) -> list[Line2D]:
    """An entry of a legend per set that has a line, in the colours and markers of the sets' lines.

    Args:
      sets: all, in the order of their colours.
      drawn: the rows that are drawn.
    """
    there = {*drawn["set"]}
    return [
        legend_handle(COLOURS[i % 6], "-", MARKERS[i % 6], set_label(name))
        for i, name in enumerate(sets)
        if name in there
    ]


def full_handles(drawn: Frame, style: LineStyleType = "--", marker: str = "") -> list[Line2D]:
    """The entry of full fine-tuning, where it is drawn."""
    there = (drawn["method"] == "full").any()
    return [legend_handle("black", style, marker, "full fine-tuning")] if there else []


def set_label(name: str) -> str:
    """The name of a set as matplotlib sets it: T*100 as mathematics."""
    return tex_set(name) if set_order(name)[1] < np.inf or name == "Tall" else without_math(name)


def without_math(text: str) -> str:
    """A text of which matplotlib sets nothing as mathematics, without control characters, which no
    SVG may hold."""
    return printable(text).replace("$", r"\$")
