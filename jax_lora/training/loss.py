"""The cross-entropy of a micro-batch, in chunks of positions, with its own gradient."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jax_lora.data.loader import MicroBatch
from jax_lora.model.dropout import Dropout
from jax_lora.model.transformer import Llama


def loss_sum(
    model: Llama,
    variables: PyTree,
    micro: MicroBatch,
    dropout: Dropout | None = None,
    *,
    packed: bool = False,
    chunk: int = 256,
    groups: int = 1,
) -> Float[Array, ""]:
    """Sum of loss weight · cross-entropy over a micro-batch, float32.

    It is not normalized here: `step._Loss` has divided the weights by `loop.total_loss_weight`.

    Args:
      model: the forward pass.
      variables: {"params": …, "lora": …}.
      micro: the micro-batch.
      dropout: on the input of A; None is none.
      packed: rows hold several examples, which do not attend to each other.
      chunk, groups: see `chunked_cross_entropy`.
    """
    segments = micro.segment_ids if packed else None
    hidden = model.apply(variables, micro.tokens, dropout, segments, method="hidden")
    # Position t predicts token t + 1. The first token of an example is never a loss token, so
    # none is predicted from the example before it.
    targets = jnp.roll(micro.tokens, -1, axis=1)
    weights = jnp.roll(micro.loss_weights, -1, axis=1).at[:, -1].set(0.0)
    return chunked_cross_entropy(model, variables, hidden, targets, weights, chunk, groups, dropout)


def chunked_cross_entropy(
    model: Llama,
    variables: PyTree,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    chunk: int,
    groups: int = 1,
    dropout: Dropout | None = None,
) -> Float[Array, ""]:
    """Sum of weights · cross-entropy, the logits computed `chunk` positions at a time.

    Positions with a weight come first and chunks without any are skipped, so the product with the
    vocabulary is computed for the loss tokens only (answers are a tenth of a prompt). The gradient
    is computed with the loss, chunk by chunk: only the logits of one chunk exist at a time.

    Args:
      model: applies the final norm and the head.
      variables: of the model.
      hidden: of the last layer.
      targets: ids to predict.
      weights: of the loss at each position.
      chunk: positions.
      groups: positions are sorted within so many equal parts of the batch, one per group of
        devices that computes different rows, and a chunk takes as many from each.
      dropout: on the input of the head's adapter, where there is one.
    """
    count = targets.size // groups
    size = min(count, max(1, chunk // groups))
    pad = -count % size

    def split(x, order):
        # (B, T, …) → (chunks, groups, size, …), the positions of a group in the given order
        x = x.reshape(groups, count, *x.shape[2:])
        x = jax.vmap(lambda part, at: part[at])(x, order)
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(groups, -1, size, *x.shape[2:]).swapaxes(0, 1)

    order = jnp.argsort(weights.reshape(groups, count) == 0, axis=1, stable=True)
    names = ("norm", "embed_tokens" if model.config.tie_word_embeddings else "lm_head")
    head = {"params": {name: variables["params"][name] for name in names}}
    keys, rate = None, 0.0
    if "lm_head" in variables.get("lora", {}):
        head["lora"] = {"lm_head": variables["lora"]["lm_head"]}
        if dropout is not None:
            keys, rate = jax.random.key_data(dropout.keys), dropout.rate
    parts = [x if x is None else split(x, order) for x in (hidden, targets, weights, keys)]
    return _sum_of_chunks(model, rate, head, *parts)


def _cross_entropy(logits: Array, target: Array, weight: Array) -> tuple[Array, Array]:
    # The sum of weight · cross-entropy, and its gradient by the logits.
    highest = logits.max(axis=-1, keepdims=True)
    exp_logits = jnp.exp(logits - highest)
    total = exp_logits.sum(axis=-1, keepdims=True)
    label = jnp.take_along_axis(logits, target[..., None], axis=-1)
    losses = (jnp.log(total) + highest - label)[..., 0]
    one_hot = jnp.arange(logits.shape[-1]) == target[..., None]
    return jnp.sum(losses * weight), (exp_logits / total - one_hot) * weight[..., None]


def _logits(model: Llama, rate: float, head: PyTree, h: Array, keys: Array | None) -> Array:
    h = model.shard_activation(h, "batch", None, "embed")
    dropout = None if keys is None else Dropout(jax.random.wrap_key_data(keys), rate)
    logits = model.apply(head, h, dropout, method="head")
    return model.shard_activation(logits, "batch", None, "vocab")


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_of_chunks(
    model: Llama,
    rate: float,
    head: PyTree,
    hidden: Array,
    targets: Array,
    weights: Array,
    keys: Array | None,
) -> Array:
    """The sum over all chunks; the arrays are (chunks, groups, size, …). `rate` and `keys`, the
    data of one key per token, are dropout's."""

    def body(total, part):
        def add(h, target, weight, keys):
            return total + _cross_entropy(_logits(model, rate, head, h, keys), target, weight)[0]

        return jax.lax.cond(jnp.any(part[2] > 0), add, lambda *_: total, *part), None

    return jax.lax.scan(body, jnp.zeros((), jnp.float32), (hidden, targets, weights, keys))[0]


def _sum_forward(model, rate, head, *parts):
    # The gradient is computed with the loss, while a chunk's logits exist: to recompute them in the
    # backward pass would cost a third product with the vocabulary. Frozen leaves of the head have
    # no gradient to be summed.
    leaves, tree = jax.tree.flatten(head)
    trained = {i: leaf.value for i, leaf in enumerate(leaves) if leaf.perturbed}

    def logits(trained, h, keys):
        found = [trained.get(i, leaf.value) for i, leaf in enumerate(leaves)]
        return _logits(model, rate, tree.unflatten(found), h, keys)

    def body(carry, part):
        def add(h, target, weight, keys):
            chunk_logits, vjp = jax.vjp(lambda t, h: logits(t, h, keys), trained, h)
            loss, dlogits = _cross_entropy(chunk_logits, target, weight)
            dtrained, dh = vjp(dlogits)
            return jax.tree.map(jnp.add, carry, (loss, dtrained)), dh

        skip = lambda h, *_: (carry, jnp.zeros_like(h))  # noqa: E731
        return jax.lax.cond(jnp.any(part[2] > 0), add, skip, *part)

    start = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, trained))
    parts = jax.tree.map(lambda x: x.value, parts)
    (total, dtrained), dh = jax.lax.scan(body, start, parts)
    return total, (tree.unflatten([dtrained.get(i) for i in range(len(leaves))]), dh)


def _sum_backward(model, rate, saved, g):
    head, hidden = jax.tree.map(lambda x: (g * x).astype(x.dtype), saved)
    return head, hidden, None, None, None


_sum_of_chunks.defvjp(_sum_forward, _sum_backward, symbolic_zeros=True)
