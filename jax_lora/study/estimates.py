"""Means and differences with intervals over tasks, and paired tests of them.

Scores are percentages, differences are in points, means are over examples, as the official
evaluation and the paper have them. Intervals and p-values are over tasks, rounds of a
task together, for the models as they were trained.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import pandas as pd

from jax_lora.study import Frame

K = TypeVar("K", bound=Hashable)
DRAWS = 10_000  # of the bootstrap and of the sign flips
LEVEL = 0.95
MARGIN = 1.0  # points within which two scores are called equal
FEWEST_TASKS = 6  # below, no p-value of a sign-flip test can fall under 1 - LEVEL


@dataclass(frozen=True)
class Estimate:
    """A mean over the examples of some tasks, with its 95% interval over tasks.

    `p` tests that it is zero, two-sided; `tasks` and `rounds` say from how many.
    """

    value: float
    low: float
    high: float
    p: float
    tasks: int
    rounds: int

    @property
    def points(self) -> str:
        """+0.30 [−0.10, +0.70]"""
        return f"{signed(self.value)} [{signed(self.low)}, {signed(self.high)}]"

    @property
    def count(self) -> str:
        """(119 tasks, 3 rounds)"""
        return f"({self.tasks} tasks, {self.rounds} round{'s' * (self.rounds > 1)})"

    def __str__(self) -> str:
        """+0.30 [−0.10, +0.70], p = 0.120 (119 tasks, 3 rounds)"""
        p = f"p = {self.p:.3f}" if self.p >= 0.001 else "p < 0.001"
        return f"{self.points}, {p} {self.count}"


def signed(value: float) -> str:
    """+0.30, −1.20 or, for what rounds to nothing, +0.00."""
    return f"{round(value, 2) + 0.0:+.2f}".replace("-", "−")


def contrasts(
    scores: Frame, wanted: Mapping[K, Mapping[str, float]], *, seed: int = 0, draws: int = DRAWS
) -> dict[K, Estimate]:
    """Weighted sums of configurations' scores, paired over tasks and rounds.

    {"rank 8": 1, "full": -1} is their difference, {"full": 1} a mean. Tasks weigh as many
    examples as they have and rounds weigh the same. The interval is a bootstrap over tasks, the
    p-value that of flipping the signs of tasks; the rounds of a task stay together in both, since
    they are not independent.

    Args:
      scores: `Study.scores`.
      wanted: coefficients by configuration, for each sum.
      seed: of both random draws.
      draws: how many of each.

    Returns:
      One estimate per sum, over the tasks and rounds that all of its configurations have, if any.
    """
    table, codes = scores.to_numpy(float), _codes(scores)
    at = {config: i for i, config in enumerate(scores.columns)}
    parts: dict[int, list[tuple[K, np.ndarray, np.ndarray, int]]] = {}
    for key, coefficients in wanted.items():
        if set(coefficients) <= at.keys():
            columns = table[:, [at[config] for config in coefficients]]
            values = columns @ np.array(list(coefficients.values()))
            sums, weights, rounds = _by_task(codes, values[:, None])
            if rounds:
                parts.setdefault(len(sums), []).append((key, sums[:, 0], weights, rounds))
    found = {}
    for group in parts.values():  # all sums over as many tasks at once
        sums = np.stack([part[1] for part in group], axis=1)
        weights = np.stack([part[2] for part in group], axis=1)
        if (weights == weights[:, :1]).all():
            weights = weights[:, :1]
        means = resampled_means(sums, weights, seed, draws)
        lows, highs = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
        ps = sign_flip_p(sums, seed, draws)
        for i, (key, *_, rounds) in enumerate(group):
            low, high, p = float(lows[i]), float(highs[i]), float(ps[i])
            found[key] = Estimate(float(sums[:, i].sum()), low, high, p, len(sums), rounds)
    return {key: found[key] for key in wanted if key in found}


def contrast(
    scores: Frame, coefficients: Mapping[str, float], *, seed: int = 0, draws: int = DRAWS
) -> Estimate | None:
    """One of `contrasts`, None where there is none."""
    return contrasts(scores, {0: coefficients}, seed=seed, draws=draws).get(0)


def resampled_means(
    sums: np.ndarray, weights: np.ndarray, seed: int = 0, draws: int = DRAWS
) -> np.ndarray:
    """Bootstrap of weighted means over tasks.

    Args:
      sums: (T, K) weighted sums of K quantities by task.
      weights: (T, K) or (T, 1), the weights' sums by task.
      seed: of the resampling; the same tasks are drawn for every quantity.
      draws: number of resamples.

    Returns:
      (draws, K) means.
    """
    counts = _counts(len(weights), seed, draws)
    return counts @ sums / (counts @ weights)


def sign_flip_p(sums: np.ndarray, seed: int = 0, draws: int = DRAWS) -> np.ndarray:
    """Two-sided p-value of a mean being zero: how often do random signs give as large a sum?

    Args:
      sums: (T, K) weighted differences by task, of K means.
      seed: of the signs.
      draws: number of sign vectors; all of them are tried where there are no more than that.

    Returns:
      (K,) numbers in (0, 1].
    """
    observed = np.abs(sums.sum(axis=0)) - 1e-9 * np.abs(sums).sum(axis=0)  # rounding counts not
    if 2 ** len(sums) <= draws:
        signs = (np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums)) & 1) * 2 - 1
        return (np.abs(signs @ sums) >= observed).mean(axis=0)
    as_large = np.abs(_signs(len(sums), seed, draws) @ sums) >= observed
    return (1 + as_large.sum(axis=0)) / (1 + draws)


def slope(configs: Mapping[str, int]) -> dict[str, float]:
    """Coefficients that make `contrast` the least-squares slope in points per doubling of rank.

    Args:
      configs: rank by configuration, at least two different ones.
    """
    doublings = np.log2(list(configs.values()))
    centred = doublings - doublings.mean()
    return dict(zip(configs, (centred / (centred**2).sum()).tolist(), strict=True))


def lead(first: Frame, second: Frame, configs: Sequence[str], *, seed: int = 0) -> Estimate | None:
    """How far one quantity is ahead of another on their ways from the first to the last rank.

    A quantity's progress at a rank is the share of its change that is done by then. The
    lead is the mean over the inner ranks of the first's progress less the second's: near 1 where
    the first has changed at once and the second only at the end.

    Args:
      first: `Study.scores` of one metric.
      second: of another, of the same tasks.
      configs: by rising rank, at least three.
      seed: of the bootstrap.

    Returns:
      The lead with its interval over tasks (its p is not tested: NaN); None where a configuration
      is missing, or where either change may be zero, so that progress means nothing.
    """
    if not set(configs) <= set(first.columns) & set(second.columns):
        return None
    for scores in (first, second):
        change = contrast(scores, {configs[0]: -1, configs[-1]: 1}, seed=seed)
        if change is None or change.low <= 0 <= change.high:
            return None
    both = pd.concat([first[list(configs)], second[list(configs)]], axis=1)
    sums, weights, rounds = _by_task(_codes(both), both.to_numpy(float))
    if not rounds:
        return None

    def leads(means: np.ndarray) -> np.ndarray:
        curves = means.reshape(len(means), 2, len(configs))
        progress = curves[..., 1:-1] - curves[..., :1]
        change = curves[..., -1:] - curves[..., :1]
        progress /= np.where(change == 0, np.nan, change)
        return (progress[:, 0] - progress[:, 1]).mean(axis=-1)

    drawn = leads(resampled_means(sums, weights[:, None], seed))
    # The few resamples in which one of the two does not change at all have no progress.
    low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    value = float(leads(sums.sum(axis=0, keepdims=True))[0])
    return Estimate(value, float(low), float(high), np.nan, len(weights), rounds)


def verdict(difference: Estimate, margin: float = MARGIN) -> str:
    """What a difference allows to say: no proof of a difference is not yet one of equality.

    Returns:
      "higher" or "lower" (p < 0.05 and zero outside the interval), "equal within … points" (the
      interval inside the margin), "undecided", or "too few tasks".
    """
    if difference.tasks < FEWEST_TASKS:
        return "too few tasks"
    if difference.p < 1 - LEVEL and not difference.low <= 0 <= difference.high:
        return "higher" if difference.value > 0 else "lower"
    if -margin <= difference.low and difference.high <= margin:
        return f"equal within {margin:g} point{'s' * (margin != 1)}"
    return "undecided"


def yes_or_no(difference: Estimate) -> str:
    """Whether something helps, by the verdict of what it changes."""
    found = verdict(difference)
    if found.startswith("equal"):
        return f"no, {found}"
    kinds = {"higher": "yes", "lower": "no, it harms", "too few tasks": "too few tasks to tell"}
    return kinds.get(found, found)


def _codes(scores: Frame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The round and the task of each row as numbers, and its examples."""
    levels = [scores.index.get_level_values(name) for name in ("round", "task", "examples")]
    return pd.factorize(levels[0])[0], pd.factorize(levels[1])[0], levels[2].to_numpy(float)


def _by_task(
    codes: tuple[np.ndarray, np.ndarray, np.ndarray], values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """(T, K) weighted sums of values (n, K), (T,) weights and the number of rounds.

    Rows with NaN are left out; the weights of a round add up to one over the number of rounds.
    """
    complete = np.isfinite(values).all(axis=1)
    rounds, tasks, examples = (array[complete] for array in codes)
    names, rounds = np.unique(rounds, return_inverse=True)
    found, tasks = np.unique(tasks, return_inverse=True)
    weights = examples / np.bincount(rounds, examples)[rounds] / max(len(names), 1)
    sums = np.zeros((len(found), values.shape[1]))
    np.add.at(sums, tasks, weights[:, None] * values[complete])
    return sums, np.bincount(tasks, weights), len(names)


@lru_cache(maxsize=4)
def _counts(tasks: int, seed: int, draws: int) -> np.ndarray:
    """(draws, T): how often each task is in each resample."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(tasks, np.full(tasks, 1 / tasks), size=draws).astype(float)


@lru_cache(maxsize=4)
def _signs(tasks: int, seed: int, draws: int) -> np.ndarray:
    """(draws, T) of -1 and 1."""
    return np.random.default_rng(seed).choice([-1.0, 1.0], size=(draws, tasks))
