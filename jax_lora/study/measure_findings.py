"""What the measurements of cells say of the rank, in sentences: forgetting and weight updates.

A cell has one value of each, so that there are no tasks to give an interval over. What is compared
are pairs of cells of the same set and round, and the answer is one only where all pairs agree.
"""

from __future__ import annotations

from collections.abc import Sequence

from jax_lora.study import Frame, Study
from jax_lora.study.sections import Finding

_QUESTIONS = {  # measure → question, unit and format
    "forgetting": ("Do higher ranks forget more?", " nats per token of other text", ".3f"),
    "intruder_dimensions": (
        "Do higher ranks bring more intruder dimensions?",
        " of ten per matrix",
        ".2f",
    ),
    "effective_rank": ("Does ΔW of a higher rank have a higher effective rank?", "", ".1f"),
}


def measure_findings(study: Study) -> list[Finding]:
    """A finding per measure that the study has: the ranks, and full fine-tuning beside them.

    Args:
      study: checked rows and grid.
    """
    grid = study.grid[study.grid["main"] & (study.grid["variant"] == "")]
    cells = study.rows.drop_duplicates("cell")
    cells = cells[cells["cell"].isin(grid["cell"])]
    found = []
    for name, (question, unit, form) in _QUESTIONS.items():
        known = cells[cells[name].notna()]
        if known.empty:
            continue
        values = known.pivot(index=["set", "round"], columns="config", values=name)
        lora = [config for config in study.configs("lora", "") if config in values]
        pairs = [(lora[0], lora[-1])] if len(lora) > 1 else []
        if lora and "full" in values:
            pairs.append((lora[-1], "full"))
        lines = [_compared(values, pair, form, unit) for pair in pairs]
        shown = [*lora, *(["full"] if "full" in values else [])]
        levels = ", ".join(f"{c} {_text(values[c].mean(), form)}" for c in shown)
        found.append(Finding(question, [*lines, f"Means over sets and rounds: {levels}{unit}."]))
    return found


def _compared(values: Frame, pair: Sequence[str], form: str, unit: str) -> str:
    """The second of two models less the first, over the sets and rounds that both have."""
    one, other = pair
    differences = (values[other] - values[one]).dropna()
    start, count = f"{one} to {other}:", len(differences)
    if not count:
        return f"{start} cannot be said, no set and round has both."
    rounds = differences.index.get_level_values("round").nunique()
    if count < 2:
        answer = "undecided, one pair of models alone"
    elif (differences > 0).all():
        answer = "yes"
    elif (differences <= 0).all():
        answer = "no"
    else:
        answer = "undecided"
    low, mean, high = (
        _text(x, f"+{form}") for x in (differences.min(), differences.mean(), differences.max())
    )
    return (
        f"{start} {answer}. {mean}{unit} on average, {low} to {high} in {count} "
        f"pair{'s' * (count > 1)} of a set and round ({rounds} round{'s' * (rounds > 1)}; a range, "
        "no interval)."
    )


def _text(value: float, form: str) -> str:
    return f"{value:{form}}".replace("-", "−")
