"""What training changed: singular values and directions of ΔW, and new directions of W + ΔW.

An adapter's ΔW = s·A·B is never formed.

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

from jax_lora.model import lora

LEADING = 10  # the paper's k, and PEFT's top_k
EPSILON = 0.5  # of the largest absolute cosine


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
    return {
        name: spectrum(leaf["a"], leaf["b"], leaf["scale"])
        for name, leaf in lora.by_target(adapters).items()
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


def variance_rank(values: np.ndarray, share: float = 0.9) -> np.ndarray:
    """The fewest directions that hold a share of ‖ΔW‖_F²; 0 for a ΔW of zero.

    Args:
      values: (..., K), falling.
      share: above 0, at most 1.

    Returns:
      (...,).

    Source: Biderman et al. (2024), "LoRA Learns Less and Forgets Less", arXiv:2405.09673, who ask
    it of full fine-tuning's ΔW.
    """
    squares = values**2
    left = squares[..., ::-1].cumsum(-1)  # of the last 1, 2, … directions
    dropped = (left <= (1 - share) * left[..., -1:]).sum(-1)
    return (values.shape[-1] - dropped) * (values[..., 0] > 0)


def output_directions(kernel: np.ndarray) -> np.ndarray:
    """The singular vectors of kernels on the side of their outputs, the leading ones first.

    These are the left singular vectors of Hugging Face's W, which is (out, in).

    Args:
      kernel: (..., in, out).

    Returns:
      (..., out, K) orthonormal columns, K = min(in, out).
    """
    return np.linalg.svd(kernel, full_matrices=False)[2].mT


def leading_output_directions(kernel: np.ndarray, count: int) -> np.ndarray:
    """The first `count` of `output_directions`, by the eigenvectors of the smaller of W Wᵀ and WᵀW.

    A quarter of the time of the decomposition, and as exact for leading vectors.

    Args:
      kernel: (..., in, out).
      count: at most K.

    Returns:
      (..., out, count) orthonormal columns.
    """
    if kernel.shape[-2] >= kernel.shape[-1]:
        return np.linalg.eigh(kernel.mT @ kernel)[1][..., : -count - 1 : -1]
    vectors = kernel.mT @ np.linalg.eigh(kernel @ kernel.mT)[1][..., : -count - 1 : -1]
    norms = np.linalg.norm(vectors, axis=-2, keepdims=True)
    return vectors / np.maximum(norms, np.finfo(kernel.dtype).tiny)


def intruder_dimensions(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """How many leading directions of trained kernels are no direction of the base's.

    A singular vector of W + ΔW is an intruder where its absolute cosine with every singular vector
    of W is below EPSILON; the LEADING ones by singular value are looked at, and the vectors are
    those on the side of the outputs, as in the paper's program and PEFT's
    `reduce_intruder_dimension`.

    Args:
      before: (..., out, K) `output_directions` of W.
      after: (..., in, out) W + ΔW.

    Returns:
      (...,) counts of 0 to LEADING.

    Source: Shuttleworth et al. (2024), "LoRA vs Full Fine-tuning: An Illusion of Equivalence",
    arXiv:2410.21228, Definition 1.
    """
    leading = leading_output_directions(after, min(LEADING, before.shape[-1]))
    return (abs(leading.mT @ before).max(-1) < EPSILON).sum(-1)


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
