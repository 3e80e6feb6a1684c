"""One optimizer step: gradients of micro-batches, summed, then AdamW.

A global batch is a list of micro-batches of a few fixed shapes. The loss is the mean over all
loss tokens of the *global* batch (the sum of weighted losses over the sum of weights), so that
cutting it differently changes nothing but rounding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jax_lora import sharding
from jax_lora.errors import ConfigError
from jax_lora.model import attention, lora
from jax_lora.model.dropout import Dropout, keep_threshold
from jax_lora.model.transformer import Llama, positions
from jax_lora.model.xla_cpu import bitcast_bf16
from jax_lora.training.masks import combine, leaf_name

SCHEDULES = ("linear", "cosine", "constant")


class Micro(NamedTuple):
    """A micro-batch on its way to the device.

    `tokens` (B, T) ids, right-padded. `loss_mask` (B, T): True where the token is to be
    predicted (from the one before it), or the weight of its loss. `example` (B, T): the place of
    the token's example in the global batch; a packed row holds several.
    """

    tokens: Int[Array, "B T"]
    loss_mask: Bool[Array, "B T"] | Float[Array, "B T"]
    example: Int[Array, "B T"]


class Step(NamedTuple):
    """The functions of one optimizer step, from `make_step`.

    prepare(state, frozen) → diff_params: what a step differentiates, with materialized `delta`s.
    accumulate(gradients, loss, diff_params, step, frozen, micro, weight) → (gradients, loss), for
      every micro-batch, starting from `zeros(diff_params)`; `weight` is the sum of the loss weights
      of the whole global batch (its loss tokens, where each weighs 1), `step` the state's.
    update(state, frozen, gradients) → (state, gradient norm before the clip).

    accumulate donates the buffers of its first two arguments, update those of its state.
    """

    prepare: Callable[..., Any]
    accumulate: Callable[..., Any]
    update: Callable[..., Any]


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
        raise ConfigError(f"schedule: found {kind!r}, expected one of {', '.join(SCHEDULES)}")
    if not 0 <= warmup_steps < total_steps:
        raise ConfigError(
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
    b_ratio: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW behind a clip by global norm, to be initialised on the trainable half alone.

    `b_ratio`: how many times faster B (and DoRA's m) learns than A: LoRA+ (Hayou et al. 2024,
    arXiv:2402.12354; PEFT's `create_loraplus_optimizer`), whose authors propose 16.
    """
    parts = [optax.clip_by_global_norm(clip_norm)] if clip_norm is not None else []
    parts += [optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)]
    if b_ratio != 1.0:

        def fast(tree):
            return jax.tree_util.tree_map_with_path(
                lambda path, _: leaf_name(path).endswith(("/b", "/m")), tree
            )

        parts += [optax.masked(optax.scale(b_ratio), fast)]
    return skip_nonfinite(optax.chain(*parts))


def skip_nonfinite(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, where a gradient whose norm is not finite changes nothing but the counts.

    The counts go on, so that the learning rate stays a function of the step. The norm is the one
    that the clip needs, and the choice is part of the pass that updates: on a CPU it makes the
    update of what trains a fifth longer (64 to 78 ms for 17M parameters), which is far below 1% of
    a step.
    """

    def update(updates, state, params=None):
        is_finite = jnp.isfinite(optax.tree.norm(updates))

        def chosen(new, old):
            is_count = jnp.issubdtype(new.dtype, jnp.integer)
            return new if is_count else jnp.where(is_finite, new, old)

        taken, later = inner.update(updates, state, params)
        taken = jax.tree.map(lambda x: jnp.where(is_finite, x, jnp.zeros_like(x)), taken)
        return taken, jax.tree.map(chosen, later, state)

    return optax.GradientTransformation(inner.init, update)


def token_losses(
    model: Llama,
    variables: Any,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    chunk: int,
    groups: int = 1,
) -> Float[Array, ""]:
    """Sum of weights · cross-entropy, the logits computed `chunk` positions at a time.

    Positions that count come first and chunks without any are skipped, so the vocabulary
    product is paid for the loss tokens only (answers are a tenth of a prompt). The gradient is
    made with the loss, chunk by chunk: the logits of one chunk are all that ever exists.

    Args:
      groups: positions are sorted within so many equal parts of the batch, one for each device
        that holds rows of it, and a chunk takes as many from each.
    """
    count = targets.size // groups
    size = max(1, chunk // groups)
    pad = -count % size

    def split(x, order):
        # (B, T, …) → (chunks, groups, size, …), the positions of a group in the given order
        x = x.reshape(groups, count, *x.shape[2:])
        x = jax.vmap(lambda part, at: part[at])(x, order)
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(groups, -1, size, *x.shape[2:]).swapaxes(0, 1)

    order = jnp.argsort(weights.reshape(groups, count) == 0, axis=1, stable=True)
    parts = tuple(split(x, order) for x in (hidden, targets, weights))
    names = ("norm", "embed_tokens" if model.config.tie_word_embeddings else "lm_head")
    head = {"params": {name: variables["params"][name] for name in names}}
    return _summed(model, head, *parts)


def _losses(logits: Array, target: Array, weight: Array) -> tuple[Array, Array]:
    # The sum of weight · cross-entropy, and its gradient by the logits.
    highest = logits.max(axis=-1, keepdims=True)
    exp_logits = jnp.exp(logits - highest)
    total = exp_logits.sum(axis=-1, keepdims=True)
    label = jnp.take_along_axis(logits, target[..., None], axis=-1)
    losses = (jnp.log(total) + highest - label)[..., 0]
    one_hot = jnp.arange(logits.shape[-1]) == target[..., None]
    return jnp.sum(losses * weight), (exp_logits / total - one_hot) * weight[..., None]


def _logits(model: Llama, head: Any, h: Array) -> Array:
    h = model.shard_activation(h, "batch", None, "embed")
    logits = model.apply(head, h, method="head")
    return model.shard_activation(logits, "batch", None, "vocab")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(model: Llama, head: Any, hidden: Array, targets: Array, weights: Array) -> Array:
    """Sum of the losses of all chunks, (chunks, groups, size, …) each."""

    def body(total, part):
        def add(h, target, weight):
            return total + _losses(_logits(model, head, h), target, weight)[0]

        return jax.lax.cond(jnp.any(part[2] > 0), add, lambda *_: total, *part), None

    return jax.lax.scan(body, jnp.zeros((), jnp.float32), (hidden, targets, weights))[0]


def _summed_forward(model, head, hidden, targets, weights):
    # Whoever differentiates gets the gradient with the loss, while a chunk's logits are there: made
    # again in the backward pass they would cost a third product with the vocabulary. What is
    # frozen in the head has no gradient to be summed.
    leaves, tree = jax.tree.flatten(head)
    trained = {i: leaf.value for i, leaf in enumerate(leaves) if leaf.perturbed}

    def logits(trained, h):
        found = [trained.get(i, leaf.value) for i, leaf in enumerate(leaves)]
        return _logits(model, tree.unflatten(found), h)

    def body(carry, part):
        def add(h, target, weight):
            chunk_logits, vjp = jax.vjp(logits, trained, h)
            loss, dlogits = _losses(chunk_logits, target, weight)
            dtrained, dh = vjp(dlogits)
            return jax.tree.map(jnp.add, carry, (loss, dtrained)), dh

        skip = lambda h, *_: (carry, jnp.zeros_like(h))  # noqa: E731
        return jax.lax.cond(jnp.any(part[2] > 0), add, skip, *part)

    start = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, trained))
    parts = (hidden.value, targets.value, weights.value)
    (total, dtrained), dh = jax.lax.scan(body, start, parts)
    return total, (tree.unflatten([dtrained.get(i) for i in range(len(leaves))]), dh)


def _summed_backward(model, saved, g):
    head, hidden = jax.tree.map(lambda x: (g * x).astype(x.dtype), saved)
    return head, hidden, None, None


_summed.defvjp(_summed_forward, _summed_backward, symbolic_zeros=True)


def loss_sum(
    model: Llama,
    variables: Any,
    micro: Micro,
    dropout: Dropout | None = None,
    *,
    packed: bool = False,
    chunk: int = 256,
    groups: int = 1,
) -> Float[Array, ""]:
    """Sum of the cross-entropy over the micro-batch's loss tokens, float32."""
    segments = micro.example if packed else None
    hidden = model.apply(variables, micro.tokens, dropout, segments, method="hidden")
    # Position t predicts token t + 1. The first token of an example is never a loss token, so
    # none is predicted from the example before it.
    targets = jnp.roll(micro.tokens, -1, axis=1)
    weights = micro.loss_mask.astype(jnp.float32)
    weights = jnp.roll(weights, -1, axis=1).at[:, -1].set(0.0)
    return token_losses(model, variables, hidden, targets, weights, chunk, groups)


def make_step(
    model: Llama,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    dropout_rate: float,
    packed: bool = False,
    materialized: Sequence[str] = (),
    loss_chunk: int = 256,
    mesh: Mesh | None = None,
) -> Step:
    """The compiled functions of a step; `accumulate` compiles once per micro-batch shape.

    Args:
      model: gives the forward pass and its remat policy.
      optimizer: from `adamw`.
      seed: of dropout; a mask is a function of (seed, step, position in the batch, layer, target).
      dropout_rate: on the input of A, in [0, 1).
      packed: rows hold several examples.
      materialized: targets whose A B is computed once per step, see `lora.materialized_targets`.
      loss_chunk: positions whose logits exist at a time, for each of the data × fsdp parts of a
        micro-batch.
      mesh: of the arrays that the functions will get, from `sharding.make_mesh`; what they
        return lies as the table of `sharding` says. None is one device.

    Raises:
      ValueError: a dropout rate outside [0, 1), or too near 1, see `keep_threshold`.
    """
    keep_threshold(dropout_rate)  # refuses a bad rate before anything compiles
    groups = sharding.row_parts(mesh)
    if mesh is not None:
        local = sharding.LocalAttention(attention.kernel(model.attention, model.platform), mesh)
        model = model.clone(shard_activation=sharding.Activations(mesh), attention=local)

    def constrained(tree):
        return tree if mesh is None else sharding.constrain(tree, mesh)

    def compute_deltas(trainable, frozen):
        return lora.deltas(combine(trainable, frozen)["lora"], materialized)

    def diff_params_of(trainable, deltas):
        return {"deltas": deltas, "rest": _without(trainable, materialized)}

    def loss(diff_params, frozen, step, micro, weight):
        dropout = None
        if dropout_rate:
            segments = micro.example if packed else None
            dropout = Dropout(_keys(seed, step, micro, segments), dropout_rate)
        variables = combine(
            diff_params["rest"], bitcast_bf16(_without(frozen, materialized), model.platform)
        )
        if mesh is not None:
            variables = sharding.embeddings_gathered(variables, mesh)
        if materialized:
            formed = lora.with_deltas(variables["lora"], diff_params["deltas"])
            variables = {**variables, "lora": formed}
        # The share of each token in the loss, so that a bfloat16 gradient is rounded but once.
        micro = micro._replace(loss_mask=micro.loss_mask.astype(jnp.float32) / weight)
        chunk = loss_chunk * groups
        return loss_sum(model, variables, micro, dropout, packed=packed, chunk=chunk, groups=groups)

    compiled_deltas = jax.jit(
        lambda trainable, frozen: constrained(compute_deltas(trainable, frozen))
    )

    def prepare(state, frozen):
        deltas = compiled_deltas(state.trainable, frozen) if materialized else {}
        return diff_params_of(state.trainable, deltas)

    @partial(jax.jit, donate_argnums=(0, 1))
    def accumulate(gradients, total, diff_params, step, frozen, micro, weight):
        value, grad = jax.value_and_grad(loss)(diff_params, frozen, step, micro, weight)
        return constrained(jax.tree.map(jnp.add, gradients, grad)), total + value

    @partial(jax.jit, donate_argnums=0)
    def update(state, frozen, gradients):
        if materialized:
            of_trainable = lambda t: diff_params_of(t, compute_deltas(t, frozen))  # noqa: E731
            (gradients,) = jax.vjp(of_trainable, state.trainable)[1](gradients)
        else:
            gradients = gradients["rest"]
        updates, opt = optimizer.update(gradients, state.optimizer, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        return constrained(State(state.step + 1, trainable, opt)), optax.tree.norm(gradients)

    return Step(prepare, accumulate, update)


def zeros(diff_params: Any) -> tuple[Any, Array]:
    """Where a global batch starts: zero gradients, zero loss."""
    # On the same devices, or the first micro-batch would be compiled apart from the others.
    where = jax.tree.leaves(diff_params)[0].sharding
    where = NamedSharding(where.mesh, P()) if isinstance(where, NamedSharding) else None
    return jax.tree.map(jnp.zeros_like, diff_params), jnp.zeros((), jnp.float32, device=where)


def _without(half: Any, materialized: Sequence[str]) -> Any:
    # One half of the variables, less the a, b and scale of these targets.
    if not materialized:
        return half
    removed = re.compile(rf"lora/.*/({'|'.join(materialized)})/(a|b|scale)")
    return jax.tree_util.tree_map_with_path(
        lambda path, x: optax.MaskedNode() if removed.fullmatch(leaf_name(path)) else x, half
    )


def _keys(seed: int, step: Array, micro: Micro, segments: Array | None) -> Array:
    # (B, T) keys: of the example, then of the position of the token in it.
    fold = jax.vmap(jax.vmap(jax.random.fold_in))
    key = jax.random.fold_in(lora.seed_keys(seed).dropout, step)
    keys = jnp.broadcast_to(key, micro.tokens.shape)
    return fold(fold(keys, micro.example), positions(micro.tokens, segments))
