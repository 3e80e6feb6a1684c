"""What the paper's own figures, LLaMA-7B on paper.json's ranks and sets, say to its questions.

The lines are worked out of Tables 1 and 2 as `findings` works them out of a study, means alone:
the paper gives no deviations. Its Figures 4 and 5 are pictures without numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

from jax_lora.study import METRICS, TESTS, paper
from jax_lora.study.estimates import signed, slope

SETS = ("T100", "T250", "T500", "Tall")
FORM_FIRST = (
    "Yes, from a picture without numbers (Figure 4, section 3.3): low ranks keep to the options, "
    "often with one answer for all inputs, and are right only at high ranks; full fine-tuning is "
    "out of options more often than LoRA on most tasks.",
)
DIVERSITY = (
    "From a picture without numbers (Figure 5, section 3.4; ranks 16 and 2048, 25,000 examples): "
    "from T*100 to T*500 scores on seen tasks fall for LoRA and for full fine-tuning; on unseen "
    "tasks rank 2048 is ahead of full fine-tuning.",
)
Curve = dict[int, float]  # score by rank


def rank_helps() -> list[str]:
    """Scores on seen tasks from the lowest rank to the highest."""
    lines = []
    for i, label in enumerate(METRICS.values()):
        curves = {name: _curve("seen", name, i) for name in SETS}
        low, high = min(curves["T100"]), max(curves["T100"])
        gain = _by_set(curves, _gain)
        steps = _by_set(curves, _slope)
        rises = [b > a for curve in curves.values() for a, b in pairwise(curve.values())]
        lines.append(
            f"{label} from rank {low} to rank {high}: {gain}; per doubling: {steps}; up in "
            f"{sum(rises)} of {len(rises)} steps."
        )
    return ["Yes.", *lines]


def capacity() -> list[str]:
    """Slopes of exact match on both kinds of tasks, below and above the middle rank."""
    lines = []
    for test in reversed(TESTS):
        curves = {name: _curve(test, name, 0) for name in SETS}
        middle = _middle(curves["T100"])
        low, high = _by_set(curves, _lower_slope), _by_set(curves, _upper_slope)
        lines.append(f"EM on {test} tasks per doubling up to rank {middle}: {low}; above: {high}.")
    return ["Yes, the larger ranks bring more on unseen tasks.", *lines]


def reaches() -> list[str]:
    """The highest rank less full fine-tuning, and the ranks that are ahead of it."""
    lines = []
    for test in TESTS:
        parts = []
        for i, label in enumerate(METRICS.values()):
            curves = {name: _curve(test, name, i) for name in SETS}
            full = {name: _scores(test, name, i)[None] for name in SETS}
            high = max(curves["T100"])
            less = ", ".join(f"{signed(curves[s][high] - full[s])} ({s})" for s in SETS)
            first = (
                next((f"{rank}" for rank, score in curves[s].items() if score >= full[s]), "none")
                for s in SETS
            )
            ahead = ", ".join(f"{rank} ({s})" for rank, s in zip(first, SETS, strict=True))
            parts.append(
                f"rank {high} less full {label} {less}, the first rank as good as full: {ahead}"
            )
        lines.append(f"{test}: {'; '.join(parts)}.")
    return ["About the same on seen tasks, ahead on unseen ones.", *lines]


def _scores(test: str, name: str, metric: int) -> dict[int | None, float]:
    return {row["rank"]: row[name][metric] for row in paper()["rows"] if row["test"] == test}


def _curve(test: str, name: str, metric: int) -> Curve:
    found = _scores(test, name, metric)
    return {rank: score for rank, score in found.items() if rank is not None}


def _gain(curve: Curve) -> float:
    return curve[max(curve)] - curve[min(curve)]


def _middle(curve: Curve) -> int:
    return sorted(curve)[len(curve) // 2]


def _lower_slope(curve: Curve) -> float:
    return _slope({rank: score for rank, score in curve.items() if rank <= _middle(curve)})


def _upper_slope(curve: Curve) -> float:
    return _slope({rank: score for rank, score in curve.items() if rank >= _middle(curve)})


def _slope(curve: Curve) -> float:
    weights = slope({str(rank): rank for rank in curve})
    return sum(weight * curve[int(rank)] for rank, weight in weights.items())


def _by_set(curves: Mapping[str, Curve], value: Callable[[Curve], float]) -> str:
    return ", ".join(f"{signed(value(curve))} ({name})" for name, curve in curves.items())
