"""The key-value cache of one layer."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_lora.model.attention import softmax_mix


class Cache(NamedTuple):
    """Keys and values of the tokens before, S slots a row: a token's slot is its place there.

    Keys lie across: their products are several times as fast so on a CPU. `length`: (B,) slots
    taken; new tokens go behind them and see them, and each other under the causal mask.
    """

    k: Float[Array, "B K H S"]
    v: Float[Array, "B K S H"]
    length: Int[Array, " B"]

    def attend(
        self,
        q: Float[Array, "B K G T H"],
        keys: Float[Array, "B K T H"],
        values: Float[Array, "B K T H"],
    ) -> tuple[Float[Array, "B K G T H"], tuple[Array, Array]]:
        """Attention of T new tokens, and `k` and `v` with theirs, but for those behind slot S."""
        rows = jnp.arange(q.shape[0])[:, None]
        at = self.length[:, None] + jnp.arange(q.shape[3])
        k = self.k.at[rows, :, :, at].set(keys.transpose(0, 2, 1, 3), unique_indices=True)
        v = self.v.at[rows, :, at].set(values.transpose(0, 2, 1, 3), unique_indices=True)
        visible = jnp.arange(v.shape[2]) <= at[:, :, None]
        return softmax_mix(q, k.swapaxes(2, 3), v, visible), (k, v)
