"""Greedy decoding with a key-value cache: the programs that run on the device.

B rows are decoded in lockstep, each at a position of its own: the slot of a token in the cache is
its position in the row. So no row sees what it is batched with, and one that has ended makes
room for another prompt at any time. `generation.scheduler.answers` drives these programs.
"""

from __future__ import annotations

import operator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, PyTree

from jax_lora import sharding
from jax_lora.model import kv_cache, xla_cpu
from jax_lora.model.quantization import is_quantized
from jax_lora.model.rope import rope_tables
from jax_lora.model.transformer import Block, Llama, Positions

Caches = tuple[kv_cache.Arrays, ...]  # of every layer


class Weights(NamedTuple):
    """The variables as `unstack_layers` returns them: those outside the blocks (embedding, last
    norm, head), and those of each block."""

    outside: PyTree
    layers: tuple[PyTree, ...]


class Rows(NamedTuple):
    """B answers that are being generated.

    `caches`: S slots per row. `prompt`: (B,) tokens of the prompts. `new`: (B, N) the answers, of
    which `count` (B,) tokens are generated; the last one is not in the cache yet. `running`: (B,)
    those that have not ended; the others are free.
    """

    caches: Caches
    prompt: Int[Array, " B"]
    new: Int[Array, "B N"]
    count: Int[Array, " B"]
    running: Bool[Array, " B"]


class Chunks(NamedTuple):
    """Chunks of prompts: A of them, C tokens each, of any rows, several of a row allowed. Those of
    a row do not overlap, and only its last one is padded.

    `row`: (A,) whose they are; ids of B and more, no two the same, are padding. `start`: (A,) the
    position of the first token. `tokens`: (A, C), right-padded, and `length`: (A,) how many of
    them there are, at least 1. `prompt`: (A,) tokens of the whole prompt.
    """

    row: Int[Array | np.ndarray, " A"]
    start: Int[Array | np.ndarray, " A"]
    tokens: Int[Array | np.ndarray, "A C"]
    length: Int[Array | np.ndarray, " A"]
    prompt: Int[Array | np.ndarray, " A"]


def unstack_layers(
    variables: PyTree, mesh: Mesh | None = None, platform: str | None = None
) -> Weights:
    """{"params": base} and perhaps "lora", the stacked layers split into arrays per layer:
    slices inside the loop would copy the model once per token. On a CPU kernels are stored
    transposed, (out, in), and converted by `xla_cpu.for_few_rows`, quantized ones excepted.

    Stacks may be numpy's. Then a device never holds more than its part of what is returned and of
    one layer.

    Args:
      variables: arrays, or numpy's.
      mesh: of the devices that share the weights; the model needs its `sharding.Activations`. By
        default they lie on one device.
      platform: of the model that will use them, by default JAX's backend.
    """
    transpose = partial(_transpose_kernels, platform=platform or jax.default_backend())
    stacks = {name: tree["layers"] for name, tree in variables.items() if "layers" in tree}
    outside = {
        name: {key: value for key, value in tree.items() if key != "layers"}
        for name, tree in variables.items()
    }
    depth = len(stacks["params"]["input_layernorm"]["scale"])
    # With an Ellipsis a number is an array of numpy's too.
    layers = (jax.tree.map(operator.itemgetter((i, ...)), stacks) for i in range(depth))
    if mesh is not None:
        outside = sharding.shard(outside, mesh)
        layers = (sharding.shard_layer(layer, mesh) for layer in layers)
    return Weights(transpose(outside), tuple(map(transpose, layers)))


@partial(jax.jit, static_argnames="platform")
def _transpose_kernels(tree: PyTree, platform: str) -> PyTree:
    if platform != "cpu":
        return tree

    is_tied = "lm_head" not in tree.get("params", {})  # then the embedding is multiplied too

    def transposed(path: jax.tree_util.KeyPath, x: PyTree) -> PyTree:
        is_kernel = path[-1].key == "kernel"
        if is_quantized(x) or not (is_kernel or is_tied and path[-1].key == "embedding"):
            return x
        return xla_cpu.for_few_rows(x.T if is_kernel else x, platform)

    return jax.tree_util.tree_map_with_path(transposed, tree, is_leaf=is_quantized)


@partial(jax.jit, static_argnames=("model", "batch", "slots", "new_tokens"))
def empty_rows(model: Llama, batch: int, slots: int, new_tokens: int) -> Rows:
    """A batch of free rows."""
    zeros = jnp.zeros(batch, jnp.int32)
    new = jnp.zeros((batch, new_tokens), jnp.int32)
    return Rows(_empty_caches(model, batch, slots), zeros, new, zeros + 1, zeros > 0)


@partial(jax.jit, donate_argnames=("rows",))
def copy_caches(rows: Rows, source: Int[Array, " A"], into: Int[Array, " A"]) -> Rows:
    """Copy the caches of the rows `source` into the rows `into`; ids of B and more are padding."""
    copied = jax.tree.map(
        lambda x: x.at[into].set(jnp.take(x, source, axis=0, mode="clip"), unique_indices=True),
        rows.caches,
    )
    return rows._replace(caches=copied)


@partial(jax.jit, static_argnames=("model", "end_ids"), donate_argnames=("rows",))
def prefill(
    model: Llama, weights: Weights, rows: Rows, chunks: Chunks, *, end_ids: tuple[int, ...]
) -> Rows:
    """Put chunks of prompts into free rows, and generate the first token behind those that end
    their prompt.

    Args:
      model: the module.
      weights: see `unstack_layers`.
      rows: donated.
      chunks: in any order, as long as what is before a chunk in its row is there or among them.
      end_ids: the stop tokens (EOS): any of these ends an answer, and is its last token.
    """
    row, start, tokens, length, prompt = map(jnp.asarray, chunks)
    rope = rope_tables(model.config, start[:, None] + jnp.arange(tokens.shape[1]), prompt)
    hidden, caches = _forward(model, weights, rows.caches, start, rope, tokens, row)
    last = jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)
    first = _argmax_token(model, weights, last)
    into = jnp.where(start + length == prompt, row, len(rows.new))
    return Rows(
        caches,
        rows.prompt.at[into].set(prompt),
        rows.new.at[into, 0].set(first),
        rows.count.at[into].set(1),
        rows.running.at[into].set(~_has_ended(first, jnp.ones_like(first), rows, end_ids)),
    )


@partial(jax.jit, static_argnames=("model", "end_ids"), donate_argnames=("rows",))
def decode(
    model: Llama,
    weights: Weights,
    rows: Rows,
    max_running: Int[Array, ""],
    max_steps: Int[Array, ""] | int = 2**31 - 1,
    *,
    end_ids: tuple[int, ...],
) -> Rows:
    """Decode until at most `max_running` rows are running, or for `max_steps` tokens per row;
    `rows` are donated.

    Every step computes all B rows. What it generates for a row that has ended is dropped; the host
    gives the row to another prompt, or makes the batch smaller, once this returns.
    """
    row_ids = jnp.arange(len(rows.new))

    def step(state: tuple[Array, Rows]) -> tuple[Array, Rows]:
        steps, rows = state
        token = rows.new[row_ids, rows.count - 1]
        positions = (rows.prompt + rows.count - 1)[:, None]
        rope = rope_tables(model.config, positions)
        hidden, caches = _forward(
            model, weights, rows.caches, positions[:, 0], rope, token[:, None]
        )
        token = _argmax_token(model, weights, hidden)
        # What is generated for a row that has ended is behind its count.
        new = rows.new.at[row_ids, rows.count].set(token)
        count = rows.count + rows.running
        running = rows.running & ~_has_ended(token, count, rows, end_ids)
        return steps + 1, Rows(caches, rows.prompt, new, count, running)

    def is_decoding(state: tuple[Array, Rows]) -> Array:
        steps, rows = state
        return (steps < max_steps) & (rows.running.sum() > max_running)

    return jax.lax.while_loop(is_decoding, step, (jnp.zeros((), jnp.int32), rows))[1]


@partial(jax.jit, static_argnames=("model", "slots"))
def gather_rows(model: Llama, rows: Rows, chosen: Int[Array, " C"], slots: int) -> Rows:
    """The rows `chosen`, where B stands for a free one, with `slots` slots each, no more than they
    had."""
    rows = jax.tree.map(lambda x: jnp.take(x, chosen, axis=0, mode="fill", fill_value=0), rows)
    caches = tuple(kv_cache.shortened(arrays, slots, model.platform) for arrays in rows.caches)
    return rows._replace(caches=caches, count=jnp.maximum(rows.count, 1))


def _empty_caches(model: Llama, batch: int, slots: int) -> Caches:
    model.config.check_length(slots)
    k, v = kv_cache.empty(model.config, batch, slots, model.dtype, model.platform)
    return (
        (
            model.shard_activation(k, "batch", "kv_heads"),
            model.shard_activation(v, "batch", "kv_heads"),
        ),
    ) * model.config.num_hidden_layers


def _forward(
    model: Llama,
    weights: Weights,
    caches: Caches,
    starts: Array,
    rope: tuple[Array, Array],
    tokens: Array,
    rows: Array | None = None,
) -> tuple[Array, Caches]:
    """The states (B, T, D) of tokens, the first at position `starts` (B,) of the caches' `rows`
    (B,), by default all of them, and the caches after."""
    positions = Positions(rope, None)
    transposed = model.platform == "cpu"
    block = Block(model.config, model.attention, model.shard_activation, transposed, model.platform)
    x, updated = model.apply(weights.outside, tokens, method="embed"), []
    for i, (k, v) in enumerate(caches):
        cache = kv_cache.Cache(k, v, starts, rows)
        x, kv = block.apply(weights.layers[i], x, i, positions, cache, None)
        updated.append(kv)
    return x, tuple(updated)


def _argmax_token(model: Llama, weights: Weights, hidden: Array) -> Array:
    logits = model.clone(transposed=model.platform == "cpu").apply(
        weights.outside, hidden, method="head"
    )
    return xla_cpu.argmax(logits[:, 0], model.platform)


def _has_ended(token: Array, count: Array, rows: Rows, end_ids: tuple[int, ...]) -> Array:
    # A row ends with a stop token, one of `end_ids`, or with its last slot for a new token. Stop
    # texts end rows on the host: `scheduler.pop_finished`.
    return jnp.isin(token, jnp.asarray(end_ids, jnp.int32)) | (count >= rows.new.shape[1])
