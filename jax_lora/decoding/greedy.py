"""Greedy decoding with a key-value cache, compiled whole.

A batch of prompts is right-padded to a common length P. The prefill computes their keys and
values once; then every step writes one slot, P, P + 1, …, the same for all rows, while a row's
rotary position goes on from its own true length and its mask hides the padding between. So the
cache is written without a scatter, and no row sees what it is batched with.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jax_lora.model.llama import Block, Cache, Llama, Place
from jax_lora.model.products import sliceable
from jax_lora.model.rope import rope_tables


@partial(jax.jit, static_argnames=("model", "max_new_tokens", "end_ids"))
def greedy(
    model: Llama,
    variables: Any,
    tokens: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    *,
    max_new_tokens: int,
    end_ids: tuple[int, ...],
) -> tuple[Int[Array, "B new"], Int[Array, " B"]]:
    """The most likely next token, again and again.

    Args:
      model: the module; its `keep_kv` is set here.
      variables: {"params": base} and, for an adapted model, "lora".
      tokens: (B, P) prompts, right-padded.
      lengths: (B,) true length of each prompt; 0 marks a row that only fills the batch.
      max_new_tokens: where to stop a row that does not end.
      end_ids: any of these ends a row.

    Returns:
      The new tokens (B, max_new_tokens), and how many of them each row has, its end token
      included; what follows is the first end id. The loop stops when every row has ended.
    """
    b, p = tokens.shape
    prefill = model.clone(keep_kv=True)
    hidden, kv = prefill.apply(sliceable(variables), tokens, method="hidden")
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    first = _most_likely(model, variables, jnp.take_along_axis(hidden, last, axis=1))

    # Layers unrolled and their weights and caches apart: slices of the stacked arrays inside the
    # loop would copy the whole model once a token.
    depth = model.config.num_hidden_layers
    layers = [
        {
            name: jax.tree.map(lambda x, i=i: x[i], tree["layers"])
            for name, tree in variables.items()
        }
        for i in range(depth)
    ]
    room = ((0, 0), (0, 0), (0, max_new_tokens), (0, 0))
    caches: Any = [jax.tree.map(lambda x, i=i: jnp.pad(x[i], room), kv) for i in range(depth)]
    block: Any = Block(model.config, keep_kv=True)
    slots = jnp.arange(p + max_new_tokens)
    in_prompt = slots[None, :] < lengths[:, None]
    ends = jnp.asarray(end_ids, first.dtype)

    def running(state):
        t, _, _, _, finished = state
        return (t < max_new_tokens) & ~jnp.all(finished)

    def step(state):
        t, token, caches, out, finished = state
        token = jnp.where(finished, ends[0], token)
        out = out.at[:, t].set(token)
        finished = finished | jnp.isin(token, ends)
        visible = in_prompt | ((slots >= p) & (slots <= p + t))[None, :]
        place = Place(rope_tables(model.config, (lengths + t)[:, None]), None)
        x = model.apply(variables, token[:, None], method="embed")
        grown = []
        for i in range(depth):
            k, v = caches[i]
            x, kv = block.apply(layers[i], x, i, place, Cache(k, v, p + t, visible), None)
            grown.append(kv)
        return t + 1, _most_likely(model, variables, x), grown, out, finished

    out = jnp.full((b, max_new_tokens), end_ids[0], first.dtype)
    state = (jnp.zeros((), jnp.int32), first, caches, out, lengths == 0)
    out = jax.lax.while_loop(running, step, state)[3]
    ended = jnp.isin(out, ends)
    count = jnp.where(ended.any(axis=1), jnp.argmax(ended, axis=1) + 1, max_new_tokens)
    return out, jnp.where(lengths == 0, 0, count)


def _most_likely(model: Llama, variables: Any, hidden: Array) -> Array:
    logits = model.apply(variables, hidden, method="head")
    return jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)
