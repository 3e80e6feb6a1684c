"""Matrix products, and what the compiler of each platform needs to run them fast.

`platform` is the one that the program will run on, "cpu", "gpu"/"cuda" or "tpu", which need not be
the one at hand. It is an argument, so that `jax.jit` compiles a program for each.
Measured by benchmarks/cpu_products.py; docs/decisions/0002 tells the story.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import ad_checkpoint
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree


def einsum(spec: str, dtype: DTypeLike, x: Array, w: Array | np.ndarray, platform: str) -> Array:
    """`einsum(spec, x, w)` in x's dtype, accumulated in float32, returned in `dtype`.

    A gradient of its own, because the automatic one multiplies mixed dtypes and rounds the
    gradient of a float32 master weight to bfloat16. Every index of `spec` must occur in two of
    its three terms. `w` may hold the bits of bfloat16 numbers, see `bitcast_bf16`.
    """
    return _einsum_vjp(spec, dtype, platform, x, from_bits(jnp.asarray(w)))


def matmul_transposed(dtype: DTypeLike, x: Array, w: Array | np.ndarray, platform: str) -> Array:
    """x (B, T, in) by the transpose of w (out, in), for decoding: few rows, a large kernel.

    XLA's CPU compiler rearranges the right operand of a product before it multiplies. With the
    kernel on the left that is the few rows; it is read once, in the order in which it is stored.
    Has JAX's own gradient, see `einsum`. A kernel `for_few_rows` is not rounded to x's dtype.
    """
    w = jnp.asarray(w, None if _multiplies_as_float32(x, platform) else x.dtype)
    return _einsum("fd,btd->fbt", w, x, dtype, platform).transpose(1, 2, 0)


def for_few_rows(kernel: Array, platform: str) -> Array:
    """A kernel that is multiplied again and again by few rows: in float32 where a CPU multiplies
    bfloat16 as that, because to convert it would take as long as the product."""
    return kernel.astype(jnp.float32) if _multiplies_as_float32(kernel, platform) else kernel


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def lookup(table: Float[Array, "V D"], ids: Int[Array, "B T"], platform: str) -> Array:
    """The rows `ids` of an embedding table, (B, T, D), taken from `to_bits`.

    Where tokens change in a loop, the compiler would convert the whole table before it.
    """
    return from_bits(jnp.take(to_bits(table, platform), ids, axis=0))


@lookup.defjvp
def _lookup_jvp(platform, primals, tangents):
    table, ids = primals
    return lookup(table, ids, platform), jnp.take(tangents[0], ids, axis=0)


def argmax(logits: Float[Array, "B V"], platform: str) -> Int[Array, " B"]:
    """The index of the first largest logit of each row.

    On a CPU the maximum and then its index, two reductions that XLA vectorizes, in the order in
    which `matmul_transposed` makes logits: its own argmax goes through them one by one, which took
    as long as a bfloat16 product with SmolLM2's vocabulary. NaN gives some index.
    """
    if platform != "cpu":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    columns, size = logits.T, logits.shape[-1]
    ids = jnp.arange(size, dtype=jnp.int32)[:, None]
    found = jnp.where(columns == columns.max(axis=0), ids, size).min(axis=0)
    return jnp.minimum(found, size - 1)


def to_bits(x: Array, platform: str) -> Array:
    """The bits (uint16) of bfloat16 numbers on a CPU; elsewhere, or in another dtype, `x` itself.

    XLA's CPU compiler has no bfloat16 slices and updates in jax 0.10.2: it widens the whole array
    to float32, and after an update rounds it back. Integers it takes as they are.
    """
    if platform == "cpu" and x.dtype == jnp.bfloat16:
        return jax.lax.bitcast_convert_type(x, jnp.uint16)
    return x


def from_bits(x: Array) -> Array:
    """What `to_bits` was given."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def checkpoint_name(x: Array, name: str, platform: str) -> Array:
    """`jax.ad_checkpoint.checkpoint_name`, what is saved being `to_bits`.

    A scan over layers writes what it saves into stacks, one layer after another. To do so it would
    convert the whole stack each time, work that grows with the square of the depth.
    """
    return _named_bits(x, name, platform)


def _name_bits(x: Array, name: str, platform: str) -> Array:
    return from_bits(ad_checkpoint.checkpoint_name(to_bits(x, platform), name))


# Integers have no tangent: that of x goes around them.
_named_bits = jax.custom_jvp(_name_bits, nondiff_argnums=(1, 2))
_named_bits.defjvp(lambda name, platform, x, dx: (_name_bits(x[0], name, platform), dx[0]))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _einsum_vjp(spec: str, dtype: DTypeLike, platform: str, x: Array, w: Array) -> Array:
    return _einsum(spec, x, w.astype(x.dtype), dtype, platform)


def _einsum(spec: str, a: Array, b: Array, dtype: DTypeLike, platform: str) -> Array:
    # XLA's CPU compiler reaches the bfloat16 matrix units only through a float32 result: five
    # times faster. GPUs and TPUs accumulate in float32 whatever the result's dtype, and a
    # float32 result would cost them a pass over memory.
    inner = jnp.float32 if platform == "cpu" else dtype
    if _multiplies_as_float32(a, platform) or _multiplies_as_float32(b, platform):
        # XLA would convert the same numbers inside of the product, at little more than half of its
        # speed.
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    out = jnp.einsum(spec, a, b, precision=precision, preferred_element_type=inner)
    return out.astype(dtype)


def _einsum_vjp_forward(spec, dtype, platform, x, w):
    return _einsum_vjp(spec, dtype, platform, x, w), (x, w)


def _einsum_vjp_backward(spec, dtype, platform, saved, g):
    x, w = saved
    terms, out = spec.split("->")
    xs, ws = terms.split(",")
    g = g.astype(x.dtype)
    dx = _einsum(f"{out},{ws}->{xs}", g, w.astype(x.dtype), x.dtype, platform)
    dw = _einsum(f"{xs},{out}->{ws}", x, g, w.dtype, platform)
    return dx, dw


_einsum_vjp.defvjp(_einsum_vjp_forward, _einsum_vjp_backward)


def _multiplies_as_float32(x: Array, platform: str) -> bool:
    return platform == "cpu" and x.dtype == jnp.bfloat16 and not has_bfloat16_products()


def has_bfloat16_products(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU at hand multiplies bfloat16 numbers: AMX or AVX512-BF16, as Linux names them.

    Elsewhere XLA converts them to float32 first, which is slower than float32 alone. An instruction
    set that XLA_FLAGS excludes (`--xla_cpu_max_isa=AVX2`) counts as one that the CPU lacks.
    """
    found = re.search(r"xla_cpu_max_isa=(\w+)", os.environ.get("XLA_FLAGS", ""))
    if found and not found[1].startswith(("AVX512_BF16", "AMX")):
        return False
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(_instruction_sets(cpuinfo))


@lru_cache
def _instruction_sets(cpuinfo: Path) -> frozenset[str]:
    found = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.M) if cpuinfo.is_file() else None
    return frozenset(found[1].split()) if found else frozenset()


def reduction_error() -> float:
    """The relative error of a sum that a compiler is known to get wrong; about 1e-7 if right.

    A batched product with a broadcast constant, times its own left operand, in float32. Without
    `cli.set_xla_flags` the CPU compilers of jax 0.10.2 and 0.12.0 are wrong without bound, see
    docs/upstream/xla_cpu_reduce.md.
    """
    x = np.random.default_rng(1).standard_normal((4, 48, 48), np.float32)

    @jax.jit
    def total(x, c):
        w = jnp.broadcast_to(c, (x.shape[0], x.shape[2], x.shape[1]))
        return jnp.sum(jnp.matmul(x, w, precision="highest") * x, axis=(1, 2))

    expected = (x.sum(2, keepdims=True, dtype=np.float64) * 0.5 * x).sum((1, 2))
    return float(np.abs(total(x, np.float32(0.5)) - expected).max() / np.abs(expected).max())


def bitcast_bf16(frozen: PyTree, platform: str) -> PyTree:
    """Stacked kernels as `to_bits`, for the loop that takes one layer at a time.

    For weights that are not differentiated: their gradient would be zero, silently.

    Args:
      frozen: a tree of arrays, the base or the frozen half of the variables.
      platform: of the program that takes it.
    """
    if platform != "cpu":
        return frozen
    return jax.tree.map(lambda x: to_bits(x, platform) if x.ndim == 3 else x, frozen)
