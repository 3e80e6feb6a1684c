"""What was not finite in a step, traced to a micro-batch.

Such a step has changed no parameter, see `optimizers.skip_nonfinite`, so that it can be taken
again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from jax_lora.data.loader import MicroBatch
from jax_lora.training.loop import total_loss_weight
from jax_lora.training.step import State, Step, zeros
from jax_lora.training.trainable_mask import leaf_name


class Cause(NamedTuple):
    """What was not finite first, in words, the micro-batch (from 0) where it is one's, and whether
    it is a weight, so that no later step can be better."""

    what: str
    micro: int | None
    is_weight: bool = False


def cause(
    state: State,
    frozen: PyTree,
    batch: Sequence[MicroBatch],
    functions: Step,
    step: int,
    put: Callable[[MicroBatch], MicroBatch],
) -> Cause:
    """Find what was not finite in a step, by taking its forward and backward passes again.

    Args:
      state: after that step, or after the one that was dispatched before its loss was read.
      frozen: the other half of the variables.
      batch: the micro-batches of the step, on the host.
      functions: from `step.make_step`.
      step: the number of the step, from 1.
      put: places a micro-batch on its devices.
    """
    for half, words in (
        (frozen, "input"),
        (state.trainable, "update of an earlier step, or input"),
    ):
        if names := _not_finite(half):
            return Cause(f"{words}: {names[0]} is not finite", None, is_weight=True)
    total_weight = total_loss_weight(batch)
    diff_params = functions.prepare(state, frozen)
    number = state.step * 0 + (step - 1)  # where state.step lies; dropout's keys depend on it
    for i, micro in enumerate(batch):
        start = zeros(diff_params)
        gradients, loss = functions.accumulate(
            *start, diff_params, number, frozen, put(micro), total_weight
        )
        if not np.isfinite(float(loss)):
            return Cause("loss", i)
        if not np.isfinite(float(_norm(gradients))):
            return Cause("gradient", i)
    return Cause("gradient of the step, though of none of its micro-batches when taken again", None)


def _not_finite(tree: PyTree) -> list[str]:
    finite = jax.device_get(_finite(tree))
    leaves = jax.tree_util.tree_leaves_with_path(finite)
    return [leaf_name(path) for path, is_finite in leaves if not is_finite]


@jax.jit
def _finite(tree: PyTree) -> PyTree:
    def one(x):
        if x.dtype == jnp.uint16:  # as xla_cpu.bitcast_bf16 leaves bfloat16
            x = jax.lax.bitcast_convert_type(x, jnp.bfloat16)
        return jnp.isfinite(x).all()

    return jax.tree.map(one, tree)


@jax.jit
def _norm(tree: PyTree) -> Array:
    return optax.tree.norm(tree)
