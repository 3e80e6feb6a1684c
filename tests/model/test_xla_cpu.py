"""What the CPU's compiler makes of the model: what is slow in it, and what is wrong."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_lora.config import RunConfig
from jax_lora.generation import greedy
from jax_lora.model import kv_cache, xla_cpu
from jax_lora.model.config import LlamaConfig
from jax_lora.model.transformer import Llama
from jax_lora.model.xla_cpu import has_bfloat16_products
from jax_lora.training.resolve import resolve

SHAPE = LlamaConfig(256, 32, 48, 5, 4, 2, 8, tie_word_embeddings=True)
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 24), np.int32)


def loss_and_gradient(dtype, **options):
    model = Llama(SHAPE, dtype=dtype, **options)
    variables = jax.jit(model.init)(jax.random.key(0), TOKENS)

    def loss(embedding, layers):
        params = {**layers["params"], "embed_tokens": embedding}
        return jnp.sum(jax.nn.log_softmax(model.apply({"params": params}, TOKENS)) ** 2)

    return jax.jit(jax.value_and_grad(loss)), variables["params"]["embed_tokens"], variables


@pytest.mark.parametrize("remat", ["full", "products"])
def test_saved_activations_are_not_stacked_in_float32(remat):
    step, *arguments = loss_and_gradient(jnp.bfloat16, remat=remat)
    program = step.lower(*arguments).compile().as_text() or ""
    assert re.search(r"u16\[5,2,24,", program)
    assert not re.search(r"(f32|bf16)\[5,2,(24|2),", program)


@pytest.mark.parametrize("remat", ["full", "products"])
def test_gradients_pass_what_is_saved_as_bits(remat):
    step, *arguments = loss_and_gradient(jnp.bfloat16, remat=remat)
    plain, *_ = loss_and_gradient(jnp.bfloat16)
    found, expected = step(*arguments), plain(*arguments)
    exact = loss_and_gradient(jnp.float32)[0](*arguments)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    (g,), (e,), (x,) = (jax.tree.leaves(tree[1]) for tree in (found, expected, exact))
    assert np.linalg.norm(g - x) <= 1.1 * np.linalg.norm(e - x) + 1e-6 * np.linalg.norm(x)


@pytest.mark.parametrize(
    ("platform", "changes", "layers"),
    [
        ("cpu", {"remat": "none"}, 5),
        ("cpu", {"remat": "full"}, 1),
        ("cpu", {"remat": "products"}, 1),
        ("cpu", {"remat": "none", "unroll": 2}, 2),
        ("cuda", {"remat": "none"}, 5),
        ("cuda", {"remat": "full"}, 1),
        ("tpu", {"remat": "none"}, 1),
        ("tpu", {"remat": "none", "unroll": 9}, 5),
    ],
)
def test_without_remat_there_is_no_scan(platform, changes, layers):
    assert resolve(RunConfig().replace(**changes), SHAPE, platform, 1).model().unroll == layers


@pytest.mark.parametrize("fast", [False, True])
def test_the_cache_is_written_without_a_conversion(fast, monkeypatch):
    monkeypatch.setattr(xla_cpu, "has_bfloat16_products", lambda: fast)
    q, new = jnp.ones((3, 2, 2, 1, 8), jnp.bfloat16), jnp.ones((3, 2, 1, 8), jnp.bfloat16)
    shapes = kv_cache.empty(SHAPE, 3, 40, jnp.bfloat16, "cpu")
    attend = jax.jit(lambda k, v, n: kv_cache.Cache(k, v, n).attend(q, new, new, "cpu"))
    program = attend.lower(*shapes, jnp.arange(3)).compile().as_text() or ""
    assert re.search(r"u16\[3,2,40,8\]", program)
    whole = r"\[3,2,(40,8|8,40)\]\S* "
    assert not re.search(rf"bf16{whole}convert\(", program)  # back, once it has the new tokens
    # A CPU that multiplies float32 reads it so.
    assert bool(re.search(rf"f32{whole}", program)) != fast


def test_embeddings_are_looked_up_without_a_conversion():
    table, ids = jnp.ones((300, 16), jnp.bfloat16), jnp.asarray(TOKENS)
    take = jax.jit(xla_cpu.lookup, static_argnums=2)
    assert "f32[300,16]" not in (take.lower(table, ids, "cpu").compile().as_text() or "")
    table = jax.random.normal(jax.random.key(0), (300, 16), jnp.bfloat16)
    np.testing.assert_array_equal(take(table, ids, "cpu"), table[ids])
    weights = jax.random.normal(jax.random.key(1), (*ids.shape, 16), jnp.bfloat16)
    gradient = jax.grad(lambda t: jnp.sum(xla_cpu.lookup(t, ids, "cpu") * weights))(table)
    expected = jax.grad(lambda t: jnp.sum(t[ids] * weights))(table)
    np.testing.assert_array_equal(gradient, expected)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_argmax_is_the_first_of_the_largest(platform):
    logits = np.random.default_rng(0).integers(-9, 9, (4, 300)).astype(np.float32)
    logits[3] = -np.inf
    np.testing.assert_array_equal(
        xla_cpu.argmax(jnp.asarray(logits), platform), logits.argmax(axis=1)
    )


def test_the_compiler_is_right_about_a_sum():
    # In a process of its own: the flag must be set before JAX starts.
    check = (
        "from jax_lora import cli; cli.set_xla_flags()\n"
        "from jax_lora.model.xla_cpu import reduction_error; print(reduction_error())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    found = subprocess.check_output([sys.executable, "-c", check], text=True, env=environment)
    assert float(found) <= 1e-6


@pytest.mark.parametrize(
    ("flags", "xla_flags", "fast"),
    [
        ("fpu avx2 avx512_bf16 avx512f", "", True),
        ("fpu amx_tile amx_bf16", "--xla_cpu_multi_thread_eigen=true", True),
        ("fpu avx2 avx512f", "", False),
        ("fpu avx512_bf16", "--xla_cpu_max_isa=AVX2", False),
        ("fpu avx512_bf16", "--xla_cpu_max_isa=AVX512_BF16", True),
    ],
)
def test_auto_is_bfloat16_where_the_cpu_multiplies_it(
    flags, xla_flags, fast, tmp_path, monkeypatch
):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t:\n")
    monkeypatch.setenv("XLA_FLAGS", xla_flags)
    assert has_bfloat16_products(cpuinfo) == fast
    assert not has_bfloat16_products(tmp_path / "none")  # neither Linux nor x86
    monkeypatch.setattr(xla_cpu, "has_bfloat16_products", lambda: fast)
    config = RunConfig().replace(dtype="auto")
    assert resolve(config, SHAPE, "cpu", 1).config.dtype == ("bfloat16" if fast else "float32")
    assert resolve(config, SHAPE, "cuda", 1).config.dtype == "bfloat16"


@pytest.mark.parametrize("fast", [False, True])
def test_bfloat16_products_are_exact_on_either_cpu(fast, monkeypatch):
    # The products of bfloat16 numbers are exact in float32: only the order of a sum is free.
    monkeypatch.setattr(xla_cpu, "has_bfloat16_products", lambda: fast)
    dice = np.random.default_rng(0)
    x, w = (jnp.asarray(dice.normal(size=s), jnp.bfloat16) for s in ((2, 24, 96), (96, 40)))
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    scale = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(w, np.float64))
    kernel = xla_cpu.for_few_rows(w.T, "cpu")
    assert kernel.dtype == (jnp.bfloat16 if fast else jnp.float32)
    product = jax.jit(lambda x, w: xla_cpu.einsum("btd,df->btf", jnp.float32, x, w, "cpu"))
    few = jax.jit(lambda x, w: xla_cpu.matmul_transposed(jnp.float32, x, w, "cpu"))
    for found in (product(x, w), few(x, kernel), few(x, w.T)):
        assert np.all(np.abs(found - expected) <= 1e-6 * scale)
    dots = re.findall(r"stablehlo.dot_general.*: \((.*?)\)", few.lower(x, kernel).as_text())
    assert ["bf16" in types for types in dots] == [fast]
    for platform in ("gpu", "tpu"):
        assert xla_cpu.for_few_rows(w, platform) is w


@pytest.mark.parametrize("is_tied", [False, True])
def test_what_is_multiplied_in_decoding_is_converted_once(is_tied, monkeypatch):
    shape = LlamaConfig(61, 32, 48, 2, 4, 2, 8, tie_word_embeddings=is_tied)
    model = Llama(shape, dtype=jnp.bfloat16)
    variables = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16), model.init(jax.random.key(0), jnp.zeros((1, 4), int))
    )
    for fast in (True, False):
        monkeypatch.setattr(xla_cpu, "has_bfloat16_products", lambda fast=fast: fast)
        greedy._transpose_kernels.clear_cache()
        weights = greedy.unstack_layers(variables)
        kinds = {
            path[-1].key: leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(weights)
        }
        wide = jnp.bfloat16 if fast else jnp.float32
        embedding = wide if is_tied else jnp.bfloat16
        assert kinds == {"kernel": wide, "embedding": embedding, "scale": jnp.bfloat16}
    greedy._transpose_kernels.clear_cache()
