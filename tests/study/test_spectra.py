"""Spectra of adapters against numpy's of the dense ΔW, and overlaps against their definition."""

import numpy as np
import pytest

from jax_lora.study import spectra
from jax_lora.weights import peft

LAYERS = 3


def drawn(size_in: int, rank: int, size_out: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "a": rng.normal(size=(LAYERS, size_in, rank)),
        "b": rng.normal(size=(LAYERS, rank, size_out)),
        "scale": np.array([2.0, 0.5, 16.0]),
    }


def directions(dimension: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Orthonormal columns of a random subspace."""
    return np.linalg.qr(rng.normal(size=(dimension, count)))[0]


@pytest.mark.parametrize("shape", [(12, 1, 20), (20, 4, 12), (12, 12, 20), (12, 31, 20)])
def test_the_spectrum_is_that_of_the_dense_update(shape):
    leaf = drawn(*shape)
    dense = leaf["scale"][:, None, None] * leaf["a"] @ leaf["b"]
    inputs, values, outputs = spectra.spectrum(**leaf)
    kept = min(shape)
    expected = np.linalg.svd(dense, compute_uv=False)
    np.testing.assert_allclose(values, expected[:, :kept], rtol=1e-12)
    np.testing.assert_allclose(inputs * values[:, None] @ outputs.mT, dense, atol=1e-11)
    for sides in (inputs, outputs):
        np.testing.assert_allclose(
            sides.mT @ sides, np.tile(np.eye(kept), (LAYERS, 1, 1)), atol=1e-12
        )


def test_adapters_as_they_are_read(tmp_path):
    """Unequal ranks: what pads them adds nothing but zeros."""
    leaf = {name: array.astype(np.float32) for name, array in drawn(16, 4, 24).items()}
    ranks = (4, 1, 2)
    for layer, rank in enumerate(ranks):
        leaf["a"][layer, :, rank:], leaf["b"][layer, rank:] = 0, 0
    leaf["scale"] = np.full(LAYERS, 2, np.float32)
    alphas = [2.0 * rank for rank in ranks]
    tree = {"layers": {"mlp": {"up_proj": leaf}, "self_attn": {"v_proj": leaf}}}
    both = {name: ranks for name in ("up_proj", "v_proj")}
    scales = {name: alphas for name in both}
    peft.save(tmp_path, tree, rank=4, alpha=8, ranks=both, alphas=scales)
    found = spectra.spectra(peft.load(tmp_path).adapters)
    assert set(found) == set(both)
    dense = 2 * leaf["a"] @ leaf["b"]
    expected = np.linalg.svd(dense, compute_uv=False)[:, :4]
    for module in found.values():
        np.testing.assert_allclose(module.values, expected, rtol=1e-5, atol=1e-5)
        assert (np.linalg.matrix_rank(dense) == (module.values > 1e-4).sum(-1)).all()


def test_effective_and_stable_ranks():
    values = np.array([[3.0, 3, 3, 3], [5, 0, 0, 0], [4, 2, 0, 0], [0, 0, 0, 0]])
    entropy = -(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3))
    np.testing.assert_allclose(spectra.effective_rank(values), [4, 1, np.exp(entropy), 0])
    np.testing.assert_allclose(spectra.stable_rank(values), [4, 1, 1.25, 0])
    dense = np.random.default_rng(0).normal(size=(9, 7))
    ratio = (np.linalg.norm(dense) / np.linalg.norm(dense, 2)) ** 2
    found = spectra.stable_rank(np.linalg.svd(dense, compute_uv=False))
    np.testing.assert_allclose(found, ratio)


def test_the_overlap_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    first, second = directions(10, 3, rng), directions(10, 5, rng)
    found = spectra.overlap(first, second)
    assert found.shape == (3, 5)
    for i in range(1, 4):
        for j in range(1, 6):
            norm = np.linalg.norm(first[:, :i].T @ second[:, :j])
            assert found[i - 1, j - 1] == pytest.approx(norm**2 / min(i, j))
    # The same subspace in any basis, one inside another, an orthogonal one.
    turned = first @ directions(3, 3, rng)
    assert spectra.overlap(first, turned)[-1, -1] == pytest.approx(1)
    np.testing.assert_allclose(spectra.overlap(second[:, :2], second)[:, 1:], 1)
    np.testing.assert_allclose(spectra.overlap(second[:, :2], second[:, 2:]), 0, atol=1e-12)


def test_random_directions_overlap_as_expected():
    rng = np.random.default_rng(0)
    dimension, draws = 24, 400
    pairs = [(directions(dimension, 3, rng), directions(dimension, 8, rng)) for _ in range(draws)]
    firsts, seconds = (np.stack(side) for side in zip(*pairs, strict=True))
    found = spectra.overlap(firsts, seconds)
    deviation = found.std(0) / draws**0.5
    expected = spectra.random_overlap(dimension, 3, 8)
    assert expected[1, 4] == 5 / dimension
    assert (abs(found.mean(0) - expected) < 4 * deviation).all()


def test_agreement_is_the_mean_diagonal_over_modules_and_layers():
    shapes = {"q_proj": (12, 6, 20), "v_proj": (12, 6, 4)}  # ΔW of v_proj has rank 4 at most
    first, second = (
        {name: spectra.spectrum(**drawn(*shape, seed=seed)) for name, shape in shapes.items()}
        for seed in (0, 1)
    )
    phi, random = spectra.agreement(first, second, "outputs")
    for k in range(1, 5):
        norms = [
            np.linalg.norm(first[name].outputs[i, :, :k].T @ second[name].outputs[i, :, :k])
            for name in shapes
            for i in range(LAYERS)
        ]
        assert phi[k - 1] == pytest.approx(np.mean(np.square(norms)) / k)
        assert random[k - 1] == pytest.approx((k / 20 + k / 4) / 2)
    assert len(phi) == len(random) == 4
    np.testing.assert_allclose(spectra.agreement(first, first, "inputs")[0], 1)
