"""Dropout: its rate, its scale and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_lora.model.dropout import Dropout, apply_mask, drop, keep_threshold


def keys(*shape):
    return jax.random.split(jax.random.key(0), shape)


@pytest.mark.parametrize("rate", [0.0, 1e-6, 2**-18, 2**-17, 2**-16, 0.05, 0.5, 0.999])
def test_value_and_gradient_follow_the_rate(rate):
    x = jax.random.normal(jax.random.key(1), (4, 64, 512))
    x = x.at[0, 0, :2].set(jnp.asarray([0.0, -0.0]))
    out, pull = jax.vjp(lambda x: drop(x, Dropout(keys(4, 64), rate), 3), x)
    (gradient,) = pull(jnp.ones_like(x))
    is_dropped = np.asarray(gradient) == 0
    scale = 2**16 / keep_threshold(rate)
    np.testing.assert_allclose(gradient[~is_dropped], scale, rtol=1e-6)
    np.testing.assert_allclose(out, np.where(is_dropped, 0, x * scale), rtol=1e-6)
    if rate <= 2**-17:
        assert not is_dropped.any()
    else:
        assert abs(is_dropped.mean() - rate) <= 5 * (rate * (1 - rate) / x.size) ** 0.5


@pytest.mark.parametrize("rate", [-0.1, 0.999999, 1.0, float("nan")])
def test_a_rate_that_keeps_nothing_is_refused(rate):
    with pytest.raises(ValueError, match=f"lora dropout: found {rate}, expected 0 <= rate < 1 - "):
        drop(jnp.ones((1, 2, 8)), Dropout(keys(1, 2), rate), 0)


def test_the_scale_is_not_rounded_to_bfloat16():
    x = jax.random.normal(jax.random.key(1), (512, 512), jnp.bfloat16)
    threshold = keep_threshold(0.05)
    kept, pull = jax.vjp(lambda x: apply_mask(x, jnp.zeros(x.shape, jnp.uint16), threshold), x)
    wide = np.asarray(x, np.float32)
    expected = jnp.asarray(wide / (threshold / 2**16)).astype(jnp.bfloat16)
    for found in (kept, pull(x)[0]):
        np.testing.assert_array_equal(
            np.asarray(found, np.float32), np.asarray(expected, np.float32)
        )
    # Rounded alone, 0.95 would move the mean by 8e-4.
    mean = float(np.abs(np.asarray(kept, np.float32)).mean() / np.abs(wide).mean())
    assert abs(mean * 0.95 - 1) < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dropout_has_the_gradient_of_its_mask_where_inputs_are_zero(dtype):
    # The mask lives in the result's zeros: neither an input of 0 or -0, nor one that becomes 0
    # when it is scaled, may look dropped.
    tiny = jnp.finfo(dtype).smallest_subnormal
    x = jnp.asarray([0.0, -0.0, tiny, -tiny, 1.0, -3.0] * 2, dtype)
    bits = jnp.asarray([5] * 6 + [60_000] * 6, jnp.uint16)
    threshold = 2**15 + 2**14  # keeps three quarters

    def plain(x):
        return jnp.where(bits < threshold, x / 0.75, 0).astype(x.dtype)

    def masked(x):
        return apply_mask(x, bits, threshold)

    g = jnp.arange(1, 13, dtype=dtype)
    for found, wanted in zip(jax.vjp(masked, x), jax.vjp(plain, x), strict=True):
        if callable(found):
            (found,), (wanted,) = found(g), wanted(g)
        np.testing.assert_array_equal(found, wanted)
