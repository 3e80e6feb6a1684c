"""Pictures of what cells are measured by, beside their answers; drawn as those of `figures`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jax_lora.study import Frame, Study
from jax_lora.study.plotting import (
    COLOURS,
    MARKERS,
    STYLE,
    TEXT,
    Look,
    full_handles,
    hollow_markers,
    legend,
    legend_handle,
    panels,
    rank_axis,
    set_handles,
    styled,
)

_LABELS = {
    "forgetting": "Forgetting (nats per token)",
    "effective_rank": "Effective rank of ΔW",
    "intruder_dimensions": "Intruder dimensions of 10",
}
_LOGARITHMIC = ("effective_rank", "memorized_bits")


@styled
def measures(study: Study, data: Frame, width: float = TEXT) -> Figure:
    """Forgetting, effective rank and intruder dimensions against the rank, a line per set.

    Args:
      study: checked rows and grid.
      data: `statistics.measured`.
      width: of the picture in inches.
    """
    names = [name for name in _LABELS if data[name].notna().any()]
    shape = (1, len(names)) if width > 5 else (len(names), 1)
    figure, axes = panels(width, *shape, 2.0 if width > 5 else 1.6, sharex="col")
    for axis, name in zip(axes.flat, names, strict=True):
        _over_ranks(axis, study, data, name, width / shape[1])
        axis.set_ylabel(_LABELS[name])
    figure.supxlabel("LoRA rank", fontsize=STYLE["axes.labelsize"])
    _legend(figure, study, data, names, width)
    return figure


@styled
def capacity(study: Study, data: Frame, width: float = TEXT) -> Figure:
    """Memorized bits against the rank, a line per number of pairs, on logarithmic axes.

    Args:
      study: checked rows and grid.
      data: `statistics.measured`.
      width: of the picture in inches.
    """
    figure, axes = panels(width, 1, 1, 2.4, sharex=False)
    _over_ranks(axes[0, 0], study, data, "memorized_bits", width)
    axes[0, 0].set_ylabel("Memorized bits")
    axes[0, 0].set_xlabel("LoRA rank")
    _legend(figure, study, data, ["memorized_bits"], width)
    return figure


def _legend(figure: Figure, study: Study, data: Frame, names: Sequence[str], width: float) -> None:
    """The sets that have a line in one of the panels, and full fine-tuning where it has one."""
    drawn = data[data["main"] & (data["variant"] == "") & data[names].notna().any(axis=1)]
    legend(figure, [*set_handles(study.sets, drawn), *full_handles(drawn)], width)


def _over_ranks(axis: Axes, study: Study, data: Frame, name: str, width: float) -> None:
    """The plain recipe's lines over the ranks with bars over rounds; full ones dashed."""
    main = data[data["main"] & (data["variant"] == "")]
    for i, name_of_set in enumerate(study.sets):
        rows = main[(main["set"] == name_of_set) & main[name].notna()]
        if name in _LOGARITHMIC:
            rows = rows[rows[name] > 0]
        look = Look(color=COLOURS[i % 6], marker=MARKERS[i % 6], label=name_of_set)
        lora = rows[rows["method"] == "lora"].sort_values("rank")
        at = lora["rank"].to_numpy(float)
        axis.plot(at, lora[name], **look)
        axis.errorbar(at, lora[name], lora[f"{name}_std"], ls="", elinewidth=0.8, capsize=1.5,
                      color=look["color"])  # fmt: skip
        hollow_markers(axis, at, lora, name, look)
        for value in rows[rows["method"] == "full"][name]:
            axis.axhline(value, color=look["color"], ls="--", lw=1, label="_full")
    if name in _LOGARITHMIC and axis.lines:
        axis.set_yscale("log")
    rank_axis(axis, main["rank"].dropna(), width)


@styled
def spectra(study: Study, updates: Frame, name_of_set: str, width: float = TEXT) -> Figure:
    """The singular values of ΔW relative to the first, means over matrices, one line per model.

    Args:
      study: checked rows and grid.
      updates: `update.measure` of the cells, with a column `cell`.
      name_of_set: what was trained on; the first round of it that is there is drawn.
      width: of the picture in inches.
    """
    figure, axes = panels(width, 1, 1, 2.6, sharex=False)
    axis, lines = axes[0, 0], mean_spectra(study, updates, name_of_set)
    lora = [config for config in lines if config != "full"]
    shades = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, max(len(lora), 2)))
    looks = dict(zip(lora, itertools.cycle(shades), strict=False)) | {"full": "black"}
    for config, values in lines.items():
        style = "--" if config == "full" else "-"
        axis.plot(np.arange(1, len(values) + 1), values, color=looks[config], ls=style)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylim(bottom=1e-4)
    axis.set_xlabel("Singular value of ΔW")
    axis.set_ylabel("Relative to the first")
    legend(
        figure,
        [legend_handle(looks[c], "--" if c == "full" else "-", "", c) for c in lines],
        width,
    )
    return figure


def mean_spectra(study: Study, updates: Frame, name_of_set: str) -> Mapping[str, np.ndarray]:
    """The mean of σₖ / σ₁ over matrices, by configuration.

    The matrices are those with the most singular values: a mean over k and v, too, would leap where
    theirs end.
    """
    lengths = updates["values"].map(len).groupby(updates["module"]).max()
    updates = updates[updates["module"].isin(lengths.index[lengths == lengths.max()])]
    grid = study.grid[(study.grid["set"] == name_of_set) & study.grid["main"]]
    grid = grid[grid["cell"].isin(updates["cell"])].sort_values("round").drop_duplicates("config")
    cells = dict(zip(grid["config"], grid["cell"], strict=True))
    found = {}
    for config in study.configs():
        if config in cells:
            rows = [v / v[0] for v in updates[updates["cell"] == cells[config]]["values"] if v[0]]
            longest = max(map(len, rows), default=0)
            padded = np.full((len(rows), longest), np.nan)
            for row, values in zip(padded, rows, strict=True):
                row[: len(values)] = values
            if longest:
                found[config] = np.nanmean(padded, axis=0)
    return found
