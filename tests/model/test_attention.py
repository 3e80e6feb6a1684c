"""Kernels of attention, and the bits of stacked weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_lora.model import attention
from jax_lora.model.config import LlamaConfig
from jax_lora.model.transformer import Llama, positions
from jax_lora.model.xla_cpu import bitcast_bf16, matmul_transposed


def drawn(t):
    shapes = ((2, 2, 3, t, 8), (2, 2, t, 8), (2, 2, t, 8))
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("t", [64, 256, 384, 1024])
@pytest.mark.parametrize("packed", [False, True])
def test_rows_in_parts_are_plain_attention(t, packed):
    q, k, v = drawn(t)
    segments = jnp.asarray(np.sort(np.random.default_rng(1).integers(0, 4, (2, t))))
    visible = np.tril(np.ones((t, t), bool))[None]
    if packed:
        visible = visible & (np.asarray(segments)[:, :, None] == np.asarray(segments)[:, None, :])
    scores = np.einsum("bkgth,bksh->bkgts", *map(np.float64, (q, k))) * 8**-0.5
    scores = np.where(visible[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bkgts,bksh->bkgth", weights, np.float64(v))
    found = attention.xla(q, k, v, segments if packed else None, platform="cpu")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("t", [64, 256])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_those_of_plain_attention(t, packed):
    segments = jnp.asarray(np.sort(np.random.default_rng(1).integers(0, 4, (2, t))))
    segments = segments if packed else jnp.zeros((2, t), jnp.int32)
    visible = jnp.tril(jnp.ones((t, t), bool)) & (segments[:, :, None] == segments[:, None])
    pull = jax.random.normal(jax.random.key(1), drawn(t)[0].shape)

    def plain(q, k, v):
        scores = jnp.einsum("bkgth,bksh->bkgts", q, k, precision="highest") * 8**-0.5
        weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf))
        return jnp.sum(pull * jnp.einsum("bkgts,bksh->bkgth", weights, v, precision="highest"))

    ours = lambda q, k, v: jnp.sum(pull * attention.xla(q, k, v, segments, platform="cpu"))  # noqa: E731
    for found, expected in zip(
        *(jax.grad(f, (0, 1, 2))(*drawn(t)) for f in (ours, plain)), strict=True
    ):
        assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def test_positions_restart_in_a_packed_row():
    segments = jnp.asarray([[5, 5, 5, 0, 0, 7, -1, -1]])
    found = positions(jnp.zeros((1, 8), jnp.int32), segments)
    np.testing.assert_array_equal(found, [[0, 1, 2, 0, 1, 0, 0, 1]])
    plain = positions(jnp.zeros((2, 3), jnp.int32), None)
    np.testing.assert_array_equal(plain, [[0, 1, 2]] * 2)


def test_kernels_are_chosen_by_what_can_run():
    assert attention.best("cpu", "bfloat16", 128) == "xla"
    assert attention.best("gpu", "bfloat16", 128) == "cudnn"
    assert attention.best("gpu", "float32", 128) == "xla"
    assert attention.best("gpu", "bfloat16", 256) == "xla"
    assert attention.best("tpu", "float32", 128) == "flash"
    for name, platform, dtype, message in (
        ("cudnn", "cpu", "bfloat16", "'cudnn' needs gpu, found cpu"),
        ("cudnn", "gpu", "float32", "needs 16-bit numbers .* found float32"),
        ("flash", "gpu", "bfloat16", "'flash' needs tpu, found gpu"),
        ("sdpa", "gpu", "bfloat16", "attention: found 'sdpa'"),
    ):
        with pytest.raises(ValueError, match=message):
            attention.check(name, platform, dtype, 128)
    assert attention.best("tpu", "bfloat16", 128, (128, 1152)) == "flash"
    assert attention.best("tpu", "bfloat16", 128, (128, 80)) == "xla"
    with pytest.raises(ValueError, match="multiples of 128 tokens, found \\(80,\\)"):
        attention.check("flash", "tpu", "bfloat16", 128, (80,))


def test_bits_of_weights_change_nothing():
    config = LlamaConfig(61, 32, 48, 2, 4, 2, 8)
    model = Llama(config, dtype=jnp.bfloat16)
    ids = jnp.arange(12).reshape(2, 6)
    params = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16), model.init(jax.random.key(0), ids)["params"]
    )
    bits = bitcast_bf16(params, "cpu")
    assert bits["layers"]["mlp"]["up_proj"]["kernel"].dtype == jnp.uint16
    assert bits["embed_tokens"]["embedding"].dtype == jnp.bfloat16
    one, other = (model.apply({"params": p}, ids) for p in (params, bits))
    np.testing.assert_array_equal(one, other)
    assert bitcast_bf16(params, "tpu") is params


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_transposed_kernel_gives_the_same_product(dtype):
    x = jax.random.normal(jax.random.key(0), (3, 2, 16), dtype)
    kernel = jax.random.normal(jax.random.key(1), (16, 5), dtype)
    expected = np.einsum("btd,df->btf", *map(np.float64, (x, kernel)))
    found = matmul_transposed(jnp.float32, x, kernel.T, "cpu")
    assert (
        found.dtype == jnp.float32 and matmul_transposed(dtype, x, kernel.T, "cpu").dtype == dtype
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_jitted_function_has_a_program_per_platform():
    config = LlamaConfig(61, 32, 48, 1, 4, 2, 8)
    logits = jax.jit(Llama.apply, static_argnums=0)
    ids = jnp.zeros((1, 8), jnp.int32)
    variables = jax.eval_shape(Llama(config).init, jax.random.key(0), ids)
    traced = {
        platform: str(logits.trace(Llama(config, platform=platform), variables, ids).jaxpr)
        for platform in ("cpu", "cuda", "tpu")
    }
    wide = "preferred_element_type=float32"  # what XLA's CPU compiler wants of every product
    count = {platform: text.count(wide) for platform, text in traced.items()}
    assert count["cpu"] > count["cuda"] == count["tpu"]
    assert "optimization_barrier" in traced["tpu"]
    assert "optimization_barrier" not in traced["cpu"] + traced["cuda"]
    assert Llama(config).platform == jax.default_backend()
