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


def test_the_rank_of_most_of_the_variance():
    values = np.array([[4.0, 1, 0, 0], [2, 2, 2, 2], [5, 0, 0, 0], [0, 0, 0, 0]])
    assert spectra.variance_rank(values).tolist() == [1, 4, 1, 0]
    assert spectra.variance_rank(values, 0.5).tolist() == [1, 2, 1, 0]
    drawn_values = np.sort(np.random.default_rng(0).random(9))[::-1]
    for share in (0.1, 0.5, 0.9, 1.0):
        sums = np.cumsum(drawn_values**2) / np.sum(drawn_values**2)
        expected = 1 + int((sums < share - 1e-12).sum())
        assert spectra.variance_rank(drawn_values, share) == expected


def counted(before: np.ndarray, after: np.ndarray) -> int:
    """Intruder dimensions by the paper's definition, on Hugging Face's (out, in) weights."""
    base, *_ = np.linalg.svd(before.T, full_matrices=False)
    tuned, *_ = np.linalg.svd(after.T, full_matrices=False)
    count = 0
    for j in range(min(spectra.LEADING, tuned.shape[1])):
        cosines = [abs(tuned[:, j] @ base[:, i]) for i in range(base.shape[1])]
        count += int(max(cosines) < spectra.EPSILON)
    return count


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40), (6, 30)])
def test_leading_directions_are_those_of_the_whole_decomposition(shape):
    kernels = np.random.default_rng(1).normal(size=(LAYERS, *shape))
    whole = spectra.output_directions(kernels)
    assert whole.shape == (LAYERS, shape[1], min(shape))
    for layer in range(LAYERS):
        expected = np.linalg.svd(kernels[layer].T, full_matrices=False)[0]
        cosines = abs(expected.T @ whole[layer])
        np.testing.assert_allclose(cosines, np.eye(min(shape)), atol=1e-6)
    leading = spectra.leading_output_directions(kernels, 5)
    np.testing.assert_allclose(
        abs(leading.mT @ whole)[..., :5], np.tile(np.eye(5), (LAYERS, 1, 1)), atol=1e-6
    )


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40), (6, 30)])
@pytest.mark.parametrize("size", [0.0, 0.3, 1.0, 3.0])
def test_intruder_dimensions_are_those_of_the_definition(shape, size):
    rng = np.random.default_rng(2)
    before = rng.normal(size=(LAYERS, *shape))
    a, b = rng.normal(size=(LAYERS, shape[0], 3)), rng.normal(size=(LAYERS, 3, shape[1]))
    after = before + size * a @ b
    found = spectra.intruder_dimensions(spectra.output_directions(before), after)
    assert found.tolist() == [counted(*pair) for pair in zip(before, after, strict=True)]
    if not size:
        assert not found.any()


@pytest.mark.parametrize("planted", [1, 2, 4])
def test_planted_directions_are_intruders(planted):
    """Kernels that write to half of the outputs, and large updates that write to the others."""
    rng = np.random.default_rng(3)
    before = rng.normal(size=(20, 40))
    before[:, 20:] = 0
    update = np.zeros((20, 40))
    update[:, 20:] = 30 * directions(20, planted, rng) @ directions(20, planted, rng).T
    base = spectra.output_directions(before)
    assert spectra.intruder_dimensions(base, before + update) == planted
    assert spectra.intruder_dimensions(base, before) == 0


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
