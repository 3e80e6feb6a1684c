"""Matrix products, and what the compiler of each platform needs to run them fast.

`platform` is the one that the program will run on, "cpu", "gpu"/"cuda" or "tpu", which need not be
the one at hand. It is an argument, so that `jax.jit` compiles a program for each.
Measured by benchmarks/cpu_products.py; docs/decisions/0002 tells the story.
"""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, ad_checkpoint


def einsum(spec: str, dtype: Any, x: Array, w: Array, platform: str) -> Array:
    """`einsum(spec, x, w)` in x's dtype, accumulated in float32, returned in `dtype`.

    A gradient of its own, because the automatic one multiplies mixed dtypes and rounds the
    gradient of a float32 master weight to bfloat16. Every index of `spec` must occur in two of
    its three terms. `w` may hold the bits of bfloat16 numbers, see `bitcast_bf16`.
    """
    product: Any = _einsum_vjp(spec, dtype, platform, x, from_bits(w))
    return product


def matmul_transposed(dtype: Any, x: Array, w: Array, platform: str) -> Array:
    """x (B, T, in) by the transpose of w (out, in), for decoding: few rows, a large kernel.

    XLA's CPU compiler rearranges the right operand of a product before it multiplies. With the
    kernel on the left that is the few rows; it is read once, in the order in which it is stored.
    Has JAX's own gradient, see `einsum`.
    """
    return _einsum("fd,btd->fbt", w.astype(x.dtype), x, dtype, platform).transpose(1, 2, 0)


def from_bits(kernel: Array) -> Array:
    """The bfloat16 numbers of a kernel that `bitcast_bf16` may have turned into bits."""
    if kernel.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(kernel, jnp.bfloat16)
    return kernel


def checkpoint_name(x: Array, name: str, platform: str) -> Array:
    """`jax.ad_checkpoint.checkpoint_name`, what is saved being bits where bfloat16 is slow.

    A scan over layers stacks what it saves. For every layer XLA's CPU compiler (jax 0.10.2) widens
    a whole bfloat16 stack to float32, writes one layer and rounds it back, work that grows with
    the square of the depth. A stack of integers is updated in place.
    """
    if platform == "cpu" and x.dtype == jnp.bfloat16:
        return _named_bits(x, name)
    return ad_checkpoint.checkpoint_name(x, name)


def _name_bits(x: Array, name: str) -> Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16)
    return from_bits(ad_checkpoint.checkpoint_name(bits, name))


# Integers have no tangent: that of x goes around them.
_named_bits = jax.custom_jvp(_name_bits, nondiff_argnums=(1,))
_named_bits.defjvp(lambda name, x, dx: (_name_bits(x[0], name), dx[0]))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _einsum_vjp(spec: str, dtype: Any, platform: str, x: Array, w: Array) -> Array:
    return _einsum(spec, x, w.astype(x.dtype), dtype, platform)


def _einsum(spec: str, a: Array, b: Array, dtype: Any, platform: str) -> Array:
    # XLA's CPU compiler reaches the bfloat16 matrix units only through a float32 result: five
    # times faster. GPUs and TPUs accumulate in float32 whatever the result's dtype, and a
    # float32 result would cost them a pass over memory.
    inner = jnp.float32 if platform == "cpu" else dtype
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


def has_bfloat16_products(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU at hand multiplies bfloat16 numbers: AMX or AVX512-BF16, as Linux names them.

    Elsewhere XLA converts them to float32 first, which is slower than float32 alone. An instruction
    set that XLA_FLAGS excludes (`--xla_cpu_max_isa=AVX2`) counts as one that the CPU lacks.
    """
    found = re.search(r"xla_cpu_max_isa=(\w+)", os.environ.get("XLA_FLAGS", ""))
    if found and not found[1].startswith(("AVX512_BF16", "AMX")):
        return False
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.M) if cpuinfo.is_file() else None
    return flags is not None and not {"amx_bf16", "avx512_bf16"}.isdisjoint(flags[1].split())


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


def bitcast_bf16(frozen: Any, platform: str) -> Any:
    """Stacked bfloat16 kernels as their bits (uint16) on a CPU; elsewhere the tree itself.

    XLA's CPU compiler has no bfloat16 slice: it widens a whole stack of layers to float32 before
    the loop that takes one layer at a time, once per call. Slices of integers it does not widen.
    For weights that are not differentiated: their gradient would be zero, silently.

    Args:
      frozen: a tree of arrays, the base or the frozen half of the variables.
      platform: of the program that takes it.
    """
    if platform != "cpu":
        return frozen

    def bits(x):
        stacked = x.dtype == jnp.bfloat16 and x.ndim == 3
        return jax.lax.bitcast_convert_type(x, jnp.uint16) if stacked else x

    return jax.tree.map(bits, frozen)
