"""The key-value cache of one layer."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from jax_lora.model.attention import softmax_mix
from jax_lora.model.config import LlamaConfig
from jax_lora.model.xla_cpu import from_bits, to_bits

Arrays = tuple[Array, Array]  # `k` and `v` of a `Cache`


class Cache(NamedTuple):
    """Keys and values of the tokens before, S slots a row: a token's slot is its place there.

    On a CPU keys are transposed, (B, K, H, S): their products are several times as fast so. A GPU's
    compiler would turn them back, with a second copy of all keys. Both are `to_bits`. `length`:
    (A,) slots before the new tokens, which see them, and each other under the causal mask. `row`:
    (A,) the rows of the new tokens, by default all B; those behind the last one are padding.
    """

    k: Shaped[Array, "B K S H"] | Shaped[Array, "B K H S"]
    v: Shaped[Array, "B K S H"]
    length: Int[Array, " A"]
    row: Int[Array, " A"] | None = None

    def attend(
        self,
        q: Float[Array, "A K G T H"],
        keys: Float[Array, "A K T H"],
        values: Float[Array, "A K T H"],
        platform: str,
    ) -> tuple[Float[Array, "A K G T H"], Arrays]:
        """Attention of T new tokens, and `k` and `v` with theirs, but for those behind slot S."""
        rows = (jnp.arange(q.shape[0]) if self.row is None else self.row)[:, None]
        at = self.length[:, None] + jnp.arange(q.shape[3])
        slots = (
            (rows, slice(None), slice(None), at) if platform == "cpu" else (rows, slice(None), at)
        )
        keys, values = (to_bits(x.transpose(0, 2, 1, 3), platform) for x in (keys, values))
        k = self.k.at[slots].set(keys, unique_indices=True)
        v = self.v.at[rows, :, at].set(values, unique_indices=True)
        visible = jnp.arange(v.shape[2]) <= at[:, :, None]
        # Read after all are written: chunks of one row see each other.
        seen = [x if self.row is None else jnp.take(x, self.row, 0, mode="clip") for x in (k, v)]
        numbers = _upright(from_bits(seen[0]), platform), from_bits(seen[1])
        return softmax_mix(platform, q, *numbers, visible), (k, v)


def _upright(k: Array, platform: str) -> Array:
    return k.swapaxes(2, 3) if platform == "cpu" else k


def empty(config: LlamaConfig, rows: int, slots: int, dtype: DTypeLike, platform: str) -> Arrays:
    """`k` and `v` of a layer without tokens."""
    shape = (rows, config.num_key_value_heads, slots, config.head_dim)
    v = to_bits(jnp.zeros(shape, dtype), platform)
    return _upright(v, platform), v


def shortened(arrays: Arrays, slots: int, platform: str) -> Arrays:
    """The first `slots` slots of each row."""
    k, v = arrays
    return (k[..., :slots] if platform == "cpu" else k[:, :, :slots]), v[:, :, :slots]
