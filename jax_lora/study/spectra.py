"""What an adapter has learned: singular values and directions of ΔW = s·A·B, ΔW never formed.

With thin QR decompositions A = P·S and Bᵀ = Q·T, ΔW = P (s·S·Tᵀ) Qᵀ: the small core in the middle
has ΔW's singular values, and P and Q carry its singular vectors to the model's dimensions. A layer
costs O((in + out)·r²) in place of O(in·out·min(in, out)).

An adapter of unequal ranks is padded with zeros (see `jax_lora.weights.peft`): beyond a layer's own
rank its values are zero and their directions mean nothing. DoRA's magnitudes are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Spectrum(NamedTuple):
    """ΔW of one module in every layer, as inputs · values · outputsᵀ; K = min(in, R, out).

    Attributes:
      inputs: (L, in, K) orthonormal columns, the directions that ΔW reads.
      values: (L, K) singular values, falling.
      outputs: (L, out, K) orthonormal columns, the directions that it writes.
    """

    inputs: np.ndarray
    values: np.ndarray
    outputs: np.ndarray


def spectra(adapters: Mapping[str, Mapping]) -> dict[str, Spectrum]:
    """The spectrum of every adapted module, by its name.

    Args:
      adapters: the tree of `jax_lora.weights.peft`; leaves a (L, in, R), b (L, R, out), scale (L,).
    """
    groups = adapters["layers"].values()
    return {
        name: spectrum(leaf["a"], leaf["b"], leaf["scale"])
        for group in groups
        for name, leaf in group.items()
    }


def spectrum(a: np.ndarray, b: np.ndarray, scale: np.ndarray) -> Spectrum:
    """The thin singular value decomposition of scale · a · b.

    Args:
      a: (L, in, R).
      b: (L, R, out).
      scale: (L,), not negative.
    """
    left, s = np.linalg.qr(a)
    right, t = np.linalg.qr(b.mT)
    u, values, vt = np.linalg.svd(scale[:, None, None] * (s @ t.mT), full_matrices=False)
    return Spectrum(left @ u, values, right @ vt.mT)


def effective_rank(values: np.ndarray) -> np.ndarray:
    """How many directions the singular values are spread over: exp of the entropy of their shares.

    K where all are equal, 1 where one is all; 0 for a ΔW of zero.

    Args:
      values: (..., K).

    Returns:
      (...,).

    Source: Roy and Vetterli (2007), "The effective rank", section 2.
    """
    shares = values / np.maximum(values.sum(-1, keepdims=True), np.finfo(values.dtype).tiny)
    entropy = -(shares * np.log(np.where(shares > 0, shares, 1))).sum(-1)
    return np.exp(entropy) * (values[..., 0] > 0)


def stable_rank(values: np.ndarray) -> np.ndarray:
    """‖ΔW‖_F² / ‖ΔW‖₂², which small singular values hardly move; 0 for a ΔW of zero.

    Args:
      values: (..., K), falling.

    Returns:
      (...,).

    Source: Rudelson and Vershynin (2007), "Sampling from large matrices", section 1.
    """
    shares = values / np.maximum(values[..., :1], np.finfo(values.dtype).tiny)
    return (shares**2).sum(-1)


def overlap(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """φ(i, j) = ‖UᵢᵀVⱼ‖_F² / min(i, j): how far the leading i and j directions span one subspace.

    1 where the smaller of the two lies in the larger, 0 where they are orthogonal. Hu et al. look
    at the singular vectors of A; those of ΔW also know which directions B makes use of.

    Args:
      first: (..., D, I) orthonormal columns U, the leading ones first.
      second: (..., D, J) orthonormal columns V.

    Returns:
      (..., I, J), φ(i, j) at [..., i - 1, j - 1].

    Source: Hu et al. (2021), "LoRA", section 7.2.
    """
    sums = ((first.mT @ second) ** 2).cumsum(-2).cumsum(-1)
    return sums / np.minimum(*_counts(sums.shape))


def random_overlap(dimension: int, first: int, second: int) -> np.ndarray:
    """The mean of `overlap` where the directions are random: max(i, j) / dimension.

    A squared cosine of independent random directions is 1 / D on average, and i·j of them are
    summed. It is near 1 wherever a rank is near the dimension.

    Args:
      dimension: D.
      first: I.
      second: J.

    Returns:
      (I, J).
    """
    return np.maximum(*_counts((first, second))) / dimension


def agreement(
    first: Mapping[str, Spectrum], second: Mapping[str, Spectrum], side: str
) -> tuple[np.ndarray, np.ndarray]:
    """How far the leading k directions of two adapters agree: φ(k, k), and that of random ones.

    Args:
      first, second: `spectra` of the same modules of the same model.
      side: "inputs" or "outputs".

    Returns:
      (K,) and (K,), means over modules and layers; K is the fewest directions that a module has.
    """
    found = []
    for name in first:
        u, v = getattr(first[name], side), getattr(second[name], side)
        phi = overlap(u, v)
        random = random_overlap(u.shape[1], *phi.shape[1:])
        found.append((np.diagonal(phi.mean(0)), np.diagonal(random)))
    shortest = min(len(phi) for phi, _ in found)
    phi, random = np.mean([[line[:shortest] for line in pair] for pair in found], axis=0)
    return phi, random


def _counts(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(I, 1) and (1, J), the numbers from 1."""
    return np.arange(1, shape[-2] + 1)[:, None], np.arange(1, shape[-1] + 1)[None]
