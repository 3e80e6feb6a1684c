"""What a checkpoint is checked by: a digest of every array, and whether all of it is finite.

A digest is 64 bits that are computed where the array lies, on any mesh and in any number of
processes: the sum over all elements of a bijection of the element's bits and its indices. So one
element with other bits, such as a flipped one, always gives another digest; other damage goes
unseen once in 2^64. It protects against faults, not against an attacker.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # by bytes of an element


def examine(arrays: Mapping[str, Array | np.ndarray]) -> tuple[dict[str, str], list[str]]:
    """The digest of every array, and the names of those that are not finite.

    All processes that hold a part of the arrays take part. It reads every array once, and waits
    for what computes them.
    """
    found = jax.device_get(_examined(dict(arrays)))
    digests = {name: f"{high:08x}{low:08x}" for name, (high, low, _) in found.items()}
    return digests, [name for name, (*_, finite) in found.items() if not finite]


@jax.jit
def _examined(arrays: dict[str, Array]) -> dict[str, tuple[Array, Array, Array]]:
    return {name: (*_digest(x), jnp.isfinite(x).all()) for name, x in arrays.items()}


def _digest(x: Array) -> tuple[UInt32[Array, ""], UInt32[Array, ""]]:
    word = _WORDS[x.dtype.itemsize]
    bits = x.astype(word) if x.dtype == bool else jax.lax.bitcast_convert_type(x, word)
    bits = bits.astype(jnp.uint32)
    # Index by index, and not over the flattened array, which would be gathered from its mesh.
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        position = _mixed(position + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis))
    term = _mixed(bits ^ position)
    return _mixed(term + jnp.uint32(0x9E3779B9)).sum(dtype=jnp.uint32), term.sum(dtype=jnp.uint32)


def _mixed(x: UInt32[Array, ...]) -> UInt32[Array, ...]:
    """The finalizer of MurmurHash3 (Appleby 2011), a bijection of 32 bits; 1 is added so that no
    number of zeros is mapped to itself."""
    x = x + jnp.uint32(1)
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
