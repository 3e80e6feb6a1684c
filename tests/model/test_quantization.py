"""Dequantization against numpy by the papers' definitions and against the `gguf` package."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_lora.model import lora
from jax_lora.model.arch import LINEAR_NAMES
from jax_lora.model.quantization import (
    FORWARD,
    NF4_CODES,
    Int8,
    Residual,
    dynamic_codes,
    is_quantized,
    kernel_shapes,
    product,
    with_int8_products,
)
from jax_lora.model.transformer import Llama
from jax_lora.weights import quantize
from tests import quantized
from tests.quantized import FORMS, GGUF_KINDS, TOY

DTYPES = [np.float32, ml_dtypes.bfloat16]


def weights(out=24, size=192, seed=0):
    """Weights (out, in) with outliers, a row of zeros and rows of other sizes."""
    rng = np.random.default_rng(seed)
    found = rng.normal(size=(out, size)) * rng.lognormal(-3, 1, (out, 1))
    found[3, 7] = 40.0
    found[5] = 0.0
    return found.astype(np.float32)


def compiled(kernel, dtype=np.float32):
    """The compiled dequantization of one layer, a numpy array."""
    return np.asarray(jax.jit(lambda k: k.dequantize(dtype))(kernel))


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_symmetric_with_one_scale_per_output(dtype):
    dense = weights()
    kernel = Int8(**quantize.int8(dense))
    assert kernel.shape == (192, 24) and kernel.values.dtype == np.int8
    scale = np.abs(dense).max(axis=1) / np.float32(127)
    levels = np.array(
        [
            [round(float(w) / s) if s else 0 for w in row]
            for row, s in zip(dense, scale.astype(float), strict=True)
        ]
    )  # noqa: E501
    expected = (levels.astype(np.float32) * scale[:, None]).T.astype(dtype)
    np.testing.assert_array_equal(compiled(kernel, dtype), expected)
    assert np.abs(expected.astype(np.float32).T - dense).max() <= scale.max() * 0.75
    np.testing.assert_array_equal(expected[:, 5], 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_products_are_of_integers(dtype):
    kernel = Int8(**quantize.int8(weights()))
    x = np.random.default_rng(1).normal(size=(2, 5, 192)).astype(dtype)
    x[1, 2] = 0.0
    wide = x.astype(np.float32)
    largest = np.abs(wide).max(-1, keepdims=True)
    x[2 * np.abs(wide) == largest] = 0.0  # 63.5 steps, which XLA may round either way
    wide = x.astype(np.float32)
    levels = np.round(wide * np.float32(127) / np.where(largest, largest, 1)).astype(np.int64)
    assert np.abs(levels).max() == 127
    sums = levels @ np.asarray(kernel.values).astype(np.int64)
    expected = sums.astype(np.float32) * (largest / 127) * np.asarray(kernel.scale)

    def times(kernel, x):
        return kernel.times(FORWARD, x, "cpu")

    found = np.asarray(jax.jit(times)(with_int8_products(kernel), x))
    assert found.dtype == x.dtype
    np.testing.assert_allclose(
        found.astype(np.float32), expected, rtol=1e-6 if dtype == np.float32 else 2**-8
    )
    exact = wide @ kernel.dequantize(np.float32)
    assert 0 < np.abs(expected - exact).max() < 0.02 * np.abs(exact).max()


def test_the_gradient_of_int8_products_is_that_of_int8():
    kernel = Int8(**quantize.int8(weights()))
    x, g = (jax.random.normal(jax.random.key(i), (2, 5, n)) for i, n in ((1, 192), (2, 24)))

    def gradient(kernel):
        run = functools.partial(product, "cpu", lambda x, *_: x, ("embed", "mlp"), kernel=kernel)
        return jax.vjp(run, x)[1](g)[0]

    found = gradient(with_int8_products({"kernel": kernel})["kernel"])
    np.testing.assert_array_equal(found, gradient(kernel))


def nf4_reference(dense):
    """QLoRA's definition, block by block: (in, out) float32, from weights (out, in)."""
    codes, second = np.array(NF4_CODES, np.float32), dynamic_codes()
    blocks = dense.reshape(-1, 64)
    constants = np.abs(blocks).max(axis=1)
    offset = np.float32(constants.astype(np.float64).mean())
    restored = []
    for start in range(0, len(constants), 256):
        group = constants[start : start + 256] - offset
        largest = np.abs(group).max()
        nearest = np.abs(group[:, None] / largest - second).argmin(axis=1)
        restored.append(second[nearest] * largest + offset)
    restored = np.concatenate(restored)
    levels = blocks / np.where(constants, constants, 1)[:, None]
    nearest = np.abs(levels[:, :, None] - codes).argmin(axis=2)
    return (codes[nearest] * restored[:, None]).reshape(dense.shape).T


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(24, 192), (200, 128), (3, 64)])
def test_nf4_is_qloras_with_double_quantization(dtype, shape):
    # 72, 400 and 3 block constants: less than a group, more than one, and rows across groups.
    dense = weights(*shape) if shape[0] > 5 else weights()[: shape[0], : shape[1]]
    kernel = quantized.NF4(**quantize.nf4(dense))
    assert kernel.shape == dense.shape[::-1]
    np.testing.assert_array_equal(compiled(kernel, dtype), nf4_reference(dense).astype(dtype))


def test_the_dynamic_float_is_the_papers():
    codes = dynamic_codes()
    assert len(codes) == len(set(codes)) == 256 and codes[-1] == 1.0 and 0.0 in codes
    np.testing.assert_array_equal(np.sort(-codes[:-1]), codes[:-1])  # all but 1 have a negative
    # Six zeros and no fraction: 10^-6 times the middle of 0.1 and 1; then one bit of fraction.
    np.testing.assert_allclose(codes[codes > 0][:3], [5.5e-7, 3.25e-6, 7.75e-6], rtol=1e-6)
    np.testing.assert_allclose(codes[-2], 1 - 0.9 / 128, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GGUF_KINDS)
def test_gguf_blocks_are_the_gguf_packages(kind, dtype):
    kernel, dense = quantized.gguf_kernel([kind], (512, 12), 3)
    one = jax.tree.map(lambda x: x[0], kernel)
    assert kernel.shape == dense.shape and one.shape == (512, 12)
    np.testing.assert_array_equal(compiled(one, dtype), dense[0].astype(dtype))
    np.testing.assert_array_equal(one.dequantize(dtype), dense[0].astype(dtype))


@pytest.mark.parametrize("kinds", [["Q4_K", "Q6_K", "Q4_K"], ["Q8_0", "Q6_K"], ["Q5_0", "Q8_0"]])
def test_layers_of_several_kinds_share_a_stack(kinds):
    kernel, dense = quantized.gguf_kernel(kinds, (512, 8), 1)
    one_by_one = jax.jit(lambda k: jax.lax.map(lambda one: one.dequantize(jnp.float32), k))
    np.testing.assert_array_equal(one_by_one(kernel), dense)


def test_the_rest_of_pissa_is_not_rounded():
    rng = np.random.default_rng(2)
    kernel, dense = quantized.gguf_kernel(["Q4_0"], (64, 8), 4)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((64, 3), (3, 8)))
    rest = Residual(jax.tree.map(lambda x: x[0], kernel), a, b, np.float32(0.5))
    expected = dense[0].astype(np.float64) - 0.5 * (a.astype(np.float64) @ b)
    np.testing.assert_allclose(rest.dequantize(jnp.float32), expected, rtol=0, atol=1e-5)
    assert rest.shape == (64, 8)


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_goes_to_the_activations_alone(form):
    kernel = quantized.quantized(form, np.random.default_rng(0).normal(size=(1, 256, 12)))
    kernel = jax.tree.map(lambda x: x[0], kernel)
    x = jax.random.normal(jax.random.key(1), (2, 3, 256))
    dense = kernel.dequantize(jnp.float32)

    def unsharded(x, *axes):
        return x

    def ours(x):
        return product("cpu", unsharded, ("embed", "mlp"), x, kernel)

    def plain(x):
        return jnp.matmul(x, dense, precision="highest")

    (y, back), (expected, reference) = (jax.vjp(f, x) for f in (ours, plain))
    g = jax.random.normal(jax.random.key(2), y.shape)
    for found, wanted in ((y, expected), (back(g)[0], reference(g)[0])):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_model_computes_with_the_dequantized_weights(form, dtype):
    params, dense = quantized.base(form)
    dense = jax.tree.map(lambda x: x.astype(dtype), dense)
    tokens = jnp.arange(20).reshape(2, 10)
    apply = jax.jit(Llama(TOY, dtype).apply)
    found, expected = (apply({"params": p}, tokens) for p in (params, dense))
    scale = float(jnp.abs(expected).max())
    # In bfloat16 norms and embeddings are float32 here and rounded there: the same to its bits.
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=1e-5 * scale if dtype == jnp.float32 else 0.05 * scale
    )  # noqa: E501


def test_a_tree_shows_kernels_by_their_shapes():
    params, dense = quantized.base("nf4")
    shapes = kernel_shapes(params)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, dense)
    kernels = [x for x in jax.tree.leaves(params, is_leaf=is_quantized) if is_quantized(x)]
    assert len(kernels) == len(LINEAR_NAMES)
    assert lora.init(jax.random.key(0), TOY, 2, alpha=4.0)  # adapters know nothing of it
