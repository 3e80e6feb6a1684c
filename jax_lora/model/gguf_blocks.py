"""The quantized blocks of GGUF files, dequantized in JAX, bit for bit as the `gguf` package does.

A block is some bytes that stand for 32 or 256 neighbouring weights of one output; here the outputs
are the last axis: bytes (n, bytes, out) → weights (n, 32 or 256, out), float32. A half-precision
scale, its integer factor and the integer of a weight have 24 bits together at most: their products
are exact, and one addition rounds, in whatever order a compiler computes them.

Layout: ggml-common.h and ggml-quants.c of https://github.com/ggml-org/ggml.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

# Of a GGUF file: (linear layer, the kinds of its blocks, each once and sorted).
Kinds = tuple[tuple[str, tuple[str, ...]], ...]


class Kind(NamedTuple):
    """A kind of block: its weights, its bytes, where its half-precision scales begin, and how it
    is dequantized: bytes (n, bytes, out) → float32 (n, weights, out)."""

    weights: int
    bytes: int
    scales: tuple[int, ...]
    read: Callable[[Array], Array]


def _half(pair: Array) -> Array:
    # (n, 2, out) little-endian bytes of a float16 → (n, 1, out) float32
    low, high = (pair[:, i : i + 1].astype(jnp.uint16) for i in range(2))
    return jax.lax.bitcast_convert_type(low | (high << 8), jnp.float16).astype(jnp.float32)


def _nibbles(packed: Array, run: int) -> Array:
    # (n, k, out) → (n, 2k, out): of each run of bytes the low halves, then the high ones.
    n, k, out = packed.shape
    runs = packed.reshape(n, k // run, run, out)
    return jnp.stack([runs & 15, runs >> 4], axis=2).reshape(n, 2 * k, out)


def _planes(packed: Array, bits: int) -> Array:
    # (n, k, out) → (n, 8 / bits · k, out): the lowest bits of all bytes, then the next ones, …
    shifts = range(0, 8, bits)
    return jnp.concatenate([(packed >> shift) & (2**bits - 1) for shift in shifts], axis=1)


def _signed(byte: Array) -> Array:
    return jax.lax.bitcast_convert_type(byte, jnp.int8).astype(jnp.float32)


def _q8_0(block: Array) -> Array:
    return _signed(block[:, 2:]) * _half(block[:, :2])


def _q4_0(block: Array) -> Array:
    return _half(block[:, :2]) * (_nibbles(block[:, 2:], 16).astype(jnp.float32) - 8)


def _q4_1(block: Array) -> Array:
    levels = _nibbles(block[:, 4:], 16).astype(jnp.float32)
    return _half(block[:, :2]) * levels + _half(block[:, 2:4])


def _fifth_bits(packed: Array) -> Array:
    # (n, 4, out): bit i of 32 little-endian bits belongs to weight i → (n, 32, out), 0 or 16
    n, k, out = packed.shape
    bits = jnp.stack([(packed >> i) & 1 for i in range(8)], axis=2)
    return bits.reshape(n, 8 * k, out) << 4


def _q5_0(block: Array) -> Array:
    levels = _nibbles(block[:, 6:], 16) | _fifth_bits(block[:, 2:6])
    return _half(block[:, :2]) * (levels.astype(jnp.float32) - 16)


def _q5_1(block: Array) -> Array:
    levels = _nibbles(block[:, 8:], 16) | _fifth_bits(block[:, 4:8])
    return _half(block[:, :2]) * levels.astype(jnp.float32) + _half(block[:, 2:4])


def _k_scales(block: Array, levels: Array) -> Array:
    # Eight groups of 32 weights, scales and minima of 6 bits each, in 12 bytes: those of the
    # first four groups in bytes of their own, the others' four low bits in the last four bytes
    # and their two high bits on top of the first eight.
    n, out = block.shape[0], block.shape[-1]
    scale, least, low = block[:, 4:8], block[:, 8:12], block[:, 12:16]
    scales = jnp.concatenate([scale & 63, (low & 15) | ((scale >> 2) & 48)], axis=1)
    minima = jnp.concatenate([least & 63, (low >> 4) | ((least >> 2) & 48)], axis=1)
    scales = _half(block[:, :2]) * scales.astype(jnp.float32)
    minima = _half(block[:, 2:4]) * minima.astype(jnp.float32)
    groups = levels.astype(jnp.float32).reshape(n, 8, 32, out)
    return (scales[:, :, None] * groups - minima[:, :, None]).reshape(n, 256, out)


def _q4_k(block: Array) -> Array:
    return _k_scales(block, _nibbles(block[:, 16:], 32))


def _q5_k(block: Array) -> Array:
    fifth = _planes(block[:, 16:48], 1) << 4
    return _k_scales(block, _nibbles(block[:, 48:], 32) | fifth)


def _q6_k(block: Array) -> Array:
    n, out = block.shape[0], block.shape[-1]
    high = jnp.concatenate([_planes(block[:, i : i + 32], 2) for i in (128, 160)], axis=1)
    levels = (_nibbles(block[:, :128], 64) | (high << 4)).astype(jnp.float32) - 32
    scales = _half(block[:, 208:210]) * _signed(block[:, 192:208])  # one per 16 weights
    return (scales[:, :, None] * levels.reshape(n, 16, 16, out)).reshape(n, 256, out)


KINDS = {
    "Q4_0": Kind(32, 18, (0,), _q4_0),
    "Q4_1": Kind(32, 20, (0, 2), _q4_1),
    "Q5_0": Kind(32, 22, (0,), _q5_0),
    "Q5_1": Kind(32, 24, (0, 2), _q5_1),
    "Q8_0": Kind(32, 34, (0,), _q8_0),
    "Q4_K": Kind(256, 144, (0, 2), _q4_k),
    "Q5_K": Kind(256, 176, (0, 2), _q5_k),
    "Q6_K": Kind(256, 210, (208,), _q6_k),
}


def unit(kinds: Sequence[str]) -> int:
    """The weights of the largest block among some kinds."""
    return max(KINDS[name].weights for name in kinds)


def unit_bytes(kinds: Sequence[str]) -> int:
    """The most bytes that a unit takes in one of some kinds."""
    return max(unit(kinds) // KINDS[name].weights * KINDS[name].bytes for name in kinds)


def dequantize(
    name: str, blocks: UInt8[Array, "units bytes out"], weights: int
) -> Float[Array, "in out"]:
    """The weights of blocks, float32.

    Args:
      name: of the kind, in `KINDS`.
      blocks: the bytes of each unit; those behind its blocks are padding.
      weights: of a unit, a multiple of a block's.
    """
    kind, (units, _, out) = KINDS[name], blocks.shape
    each = weights // kind.weights
    blocks = blocks[:, : each * kind.bytes].reshape(units * each, kind.bytes, out)
    return kind.read(blocks).reshape(units * weights, out)
