"""One optimizer step: gradients of micro-batches, summed, then the optimizer's update.

A global batch is a list of micro-batches of a few fixed shapes. The loss is the sum of loss
weight · cross-entropy over the *global* batch, divided by the sum of its loss weights: the mean
over all loss tokens, or over examples with `data.loss_mean="examples"`. So cutting the batch
differently changes nothing but rounding. `loop.total_loss_weight` computes the divisor, `_Loss`
divides.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Wrapped
from jaxtyping import Array, Float, Int, PyTree

from jax_lora import sharding
from jax_lora.data.loader import MicroBatch
from jax_lora.model import attention, lora
from jax_lora.model.dropout import Dropout, keep_threshold
from jax_lora.model.transformer import Llama, positions
from jax_lora.model.xla_cpu import bitcast_bf16
from jax_lora.training.loss import loss_sum
from jax_lora.training.trainable_mask import combine, leaf_name
from jax_lora.training.unstacked import stack


class Step(NamedTuple):
    """The functions of one optimizer step, from `make_step`.

    prepare(state, frozen) → diff_params: what a step differentiates, with materialized `delta`s.
    accumulate(gradients, loss, diff_params, step, frozen, micro, total_weight) → (gradients,
      loss), for every micro-batch, starting from `zeros(diff_params)`; `total_weight` is the sum of
      the loss weights of the whole global batch (its loss tokens, where each weighs 1), `step` the
      state's.
    update(state, frozen, gradients) → (state, gradient norm before the clip).
    loss(diff_params, frozen, micro) → the sum of loss weight · cross-entropy, without dropout.

    `frozen` may be unstacked, see `unstacked`. accumulate donates the buffers of its first two
    arguments, update those of its state.
    """

    prepare: Callable[..., PyTree]
    accumulate: Wrapped
    update: Wrapped
    loss: Wrapped


class State(NamedTuple):
    """What a step changes. `trainable` holds `MaskedNode`s where a leaf is frozen."""

    step: Int[Array, ""]
    trainable: PyTree
    optimizer: PyTree


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
      optimizer: of the trainable leaves, see `optimizers`.
      seed: of dropout; a mask is a function of (seed, step, example, token of the example, layer,
        target).
      dropout_rate: on the input of A, in [0, 1).
      packed: rows hold several examples.
      materialized: targets whose A B is computed once per step, see `lora.materialized_targets`.
      loss_chunk: positions whose logits exist at a time, for each of the data × fsdp parts of a
        micro-batch.
      mesh: of the arrays that the functions get, from `sharding.make_mesh`; what they return is
        sharded by the table of `sharding`. None is one device.

    Raises:
      ConfigError: a dropout rate outside [0, 1), or too near 1, see `keep_threshold`.
    """
    keep_threshold(dropout_rate)  # refuses a bad rate before anything compiles
    loss = _Loss(
        _on_mesh(model, mesh), seed, dropout_rate, packed, tuple(materialized), loss_chunk, mesh
    )

    def constrained(tree):
        return tree if mesh is None else sharding.constrain(tree, mesh)

    def compute_deltas(trainable, frozen):
        return lora.deltas(combine(trainable, frozen)["lora"], materialized)

    def diff_params_of(trainable, deltas):
        return {"deltas": deltas, "rest": _without(trainable, materialized)}

    compiled_deltas = jax.jit(
        lambda trainable, frozen: constrained(compute_deltas(trainable, frozen))
    )

    def prepare(state, frozen):
        deltas = compiled_deltas(state.trainable, frozen) if materialized else {}
        return diff_params_of(state.trainable, deltas)

    @partial(jax.jit, donate_argnums=(0, 1))
    def accumulate(gradients, total, diff_params, step, frozen, micro, total_weight):
        value, grad = jax.value_and_grad(loss)(diff_params, frozen, step, micro, total_weight)
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

    @jax.jit
    def loss_without_dropout(diff_params, frozen, micro):
        one, step = jnp.ones((), jnp.float32), jnp.zeros((), jnp.int32)
        return dataclasses.replace(loss, dropout_rate=0.0)(diff_params, frozen, step, micro, one)

    return Step(prepare, accumulate, update, loss_without_dropout)


def zeros(diff_params: PyTree) -> tuple[PyTree, Float[Array, ""]]:
    """The start of a global batch: zero gradients, zero loss."""
    # On the same devices, or `accumulate` would be compiled once more for the first micro-batch.
    where = jax.tree.leaves(diff_params)[0].sharding
    where = NamedSharding(where.mesh, P()) if isinstance(where, NamedSharding) else None
    return jax.tree.map(jnp.zeros_like, diff_params), jnp.zeros((), jnp.float32, device=where)


@dataclass(frozen=True)
class _Loss:
    """The loss of a micro-batch as a function of what a step differentiates."""

    model: Llama
    seed: int
    dropout_rate: float
    packed: bool
    materialized: tuple[str, ...]
    chunk: int
    mesh: Mesh | None

    def __call__(
        self,
        diff_params: PyTree,
        frozen: PyTree,
        step: Array,
        micro: MicroBatch,
        total_weight: Array,
    ) -> Float[Array, ""]:
        # The loss is normalized here, by the total weight of the whole global batch, and before the
        # cross-entropy, so that a bfloat16 gradient is rounded only once.
        micro = micro._replace(loss_weights=micro.loss_weights / total_weight)
        dropout = None
        if self.dropout_rate:
            keys = _dropout_keys(self.seed, step, micro, self.packed)
            dropout = Dropout(keys, self.dropout_rate)
        groups = sharding.row_groups(self.mesh)
        return loss_sum(
            self.model,
            self._variables(diff_params, frozen),
            micro,
            dropout,
            packed=self.packed,
            chunk=self.chunk * groups,
            groups=groups,
        )

    def _variables(self, diff_params: PyTree, frozen: PyTree) -> Mapping[str, PyTree]:
        frozen = stack(_without(frozen, self.materialized))
        frozen = bitcast_bf16(frozen, self.model.platform)
        variables = combine(diff_params["rest"], frozen)
        if self.mesh is not None:
            variables = sharding.gather_embeddings(variables, self.mesh)
        if self.materialized:
            adapters = lora.with_deltas(variables["lora"], diff_params["deltas"])
            variables = {**variables, "lora": adapters}
        return variables


def _on_mesh(model: Llama, mesh: Mesh | None) -> Llama:
    if mesh is None:
        return model
    local = sharding.LocalAttention(attention.kernel(model.attention, model.platform), mesh)
    return model.clone(shard_activation=sharding.Activations(mesh), attention=local)


def _without(half: PyTree, materialized: Sequence[str]) -> PyTree:
    # One half of the variables, less the a, b and scale of these targets.
    if not materialized:
        return half
    removed = re.compile(rf"lora/(.*/)?({'|'.join(materialized)})/(a|b|scale)")
    return jax.tree_util.tree_map_with_path(
        lambda path, x: optax.MaskedNode() if removed.fullmatch(leaf_name(path)) else x, half
    )


def _dropout_keys(seed: int, step: Array, micro: MicroBatch, packed: bool) -> Array:
    # (B, T) keys: of the example, then of the position of the token in it. `dropout.drop` folds the
    # layer and the target in.
    fold = jax.vmap(jax.vmap(jax.random.fold_in))
    key = jax.random.fold_in(lora.seed_keys(seed).dropout, step)
    keys = jnp.broadcast_to(key, micro.tokens.shape)
    in_example = positions(micro.tokens, jnp.asarray(micro.segment_ids) if packed else None)
    return fold(fold(keys, micro.segment_ids), in_example)
