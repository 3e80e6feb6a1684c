"""One optimizer step: gradients of micro-batches, summed, then AdamW.

A global batch is a list of micro-batches of a few fixed shapes. The loss is the mean over all
loss tokens of the *global* batch (the sum of losses over the sum of tokens), so that cutting it
differently changes nothing but rounding.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jax_lora.model.llama import Dropout, Llama
from jax_lora.training.masks import combine

SCHEDULES = ("linear", "cosine", "constant")


class Micro(NamedTuple):
    """A micro-batch on its way to the device.

    `tokens` (B, T) ids, right-padded. `loss_mask` (B, T): True where the token is to be
    predicted (from the one before it). `position` (B,): the row's place in the global batch.
    """

    tokens: Int[Array, "B T"]
    loss_mask: Bool[Array, "B T"]
    position: Int[Array, " B"]


class State(NamedTuple):
    """What a step changes. `trainable` holds `MaskedNode`s where a leaf is frozen."""

    step: Int[Array, ""]
    trainable: Any
    optimizer: Any


def schedule(kind: str, peak: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Learning rate by step: linear from 0 to `peak`, then to 0 (or constant).

    The same values as transformers' `get_{linear,cosine}_schedule_with_warmup`.

    Raises:
      ValueError: an unknown kind, or a warm-up as long as the whole run.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"schedule: found {kind!r}, expected one of {', '.join(SCHEDULES)}")
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps: found {warmup_steps}, expected 0 to {total_steps - 1}, "
            f"fewer than the run's {total_steps} steps"
        )
    rest = total_steps - warmup_steps
    tail = {
        "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
        "constant": lambda: optax.constant_schedule(peak),
    }[kind]()
    if not warmup_steps:
        return tail
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, warmup_steps), tail], [warmup_steps]
    )


def adamw(
    learning_rate: optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """AdamW behind a clip by global norm, to be initialised on the trainable half alone."""
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm is not None else []
    return optax.chain(
        *clip, optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    )


def token_losses(
    model: Llama,
    variables: Any,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    chunk: int,
) -> Float[Array, ""]:
    """Sum of weights · cross-entropy, the logits made `chunk` positions at a time.

    Positions that count come first and chunks without any are skipped, so the vocabulary
    product is paid for the loss tokens only (answers are a tenth of a prompt). Recomputed in the
    backward pass: the logits of one chunk are all that ever exists.
    """
    d = hidden.shape[-1]
    count = targets.size
    order = jnp.argsort(weights.reshape(-1) == 0, stable=True)
    pad = -count % chunk
    gather = jnp.pad(order, (0, pad))
    live = jnp.arange(count + pad) < count

    def split(x, fill=0):
        return jnp.where(live, x.reshape(-1)[gather], fill).reshape(-1, chunk)

    rows = hidden.reshape(count, d)[gather].reshape(-1, chunk, d)

    @jax.checkpoint
    def losses(h, target, weight):
        logits = model.apply(variables, h[None], method="head")[0]
        each = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        return jnp.sum(each * weight)

    def body(total, part):
        h, target, weight = part
        skip = lambda *_: jnp.zeros((), jnp.float32)  # noqa: E731
        return total + jax.lax.cond(jnp.any(weight > 0), losses, skip, h, target, weight), None

    parts = (rows, split(targets), split(weights))
    return jax.lax.scan(body, jnp.zeros((), jnp.float32), parts)[0]


def loss_sum(
    model: Llama, variables: Any, micro: Micro, dropout: Dropout | None, chunk: int
) -> Float[Array, ""]:
    """Sum of the cross-entropy over the micro-batch's loss tokens, float32."""
    hidden = model.apply(variables, micro.tokens, dropout, method="hidden")[0]
    # Position t predicts token t + 1.
    targets = jnp.roll(micro.tokens, -1, axis=1)
    weights = jnp.roll(micro.loss_mask, -1, axis=1).at[:, -1].set(False)
    return token_losses(model, variables, hidden, targets, weights.astype(jnp.float32), chunk)


def make_step(
    model: Llama,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    dropout_rate: float,
    loss_chunk: int = 256,
):
    """The two compiled functions of a step.

    Args:
      model: gives the forward pass and its remat policy.
      optimizer: from `adamw`.
      seed: of dropout; a mask is a function of (seed, step, place in the batch, layer, target).
      dropout_rate: on the input of A, in [0, 1).
      loss_chunk: positions whose logits exist at once.

    Returns:
      accumulate(gradients, loss, state, frozen, micro, tokens) → (gradients, loss), to be called
        for every micro-batch, starting from `zeros(state)`; `tokens` is the number of loss
        tokens of the whole global batch.
      update(state, gradients) → (state, gradient norm before the clip).
      Each compiles once a micro-batch shape; donated arguments are the ones replaced.

    Raises:
      ValueError: a dropout rate outside [0, 1).
    """
    if not 0.0 <= dropout_rate < 1.0:
        raise ValueError(f"lora dropout: found {dropout_rate}, expected 0 <= rate < 1")

    def loss(trainable, frozen, step, micro, tokens):
        dropout = None
        if dropout_rate:
            key = jax.random.fold_in(jax.random.key(seed), step)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, micro.position)
            dropout = Dropout(keys, jnp.float32(dropout_rate))
        variables = combine(trainable, frozen)
        return loss_sum(model, variables, micro, dropout, loss_chunk) / tokens

    @partial(jax.jit, donate_argnums=(0, 1))
    def accumulate(gradients, total, state, frozen, micro, tokens):
        value, grad = jax.value_and_grad(loss)(state.trainable, frozen, state.step, micro, tokens)
        return jax.tree.map(jnp.add, gradients, grad), total + value

    @partial(jax.jit, donate_argnums=0)
    def update(state, gradients):
        updates, opt = optimizer.update(gradients, state.optimizer, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        return State(state.step + 1, trainable, opt), optax.tree.norm(gradients)

    return accumulate, update


def zeros(state: State) -> tuple[Any, Array]:
    """Where a global batch starts: zero gradients like the trainable leaves, zero loss."""
    return jax.tree.map(jnp.zeros_like, state.trainable), jnp.zeros((), jnp.float32)
