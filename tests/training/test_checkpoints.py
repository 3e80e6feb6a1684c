"""Saving and going on: a resumed run equals an unbroken one bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_lora.config import OptimConfig
from jax_lora.training import loop, trainable_mask
from jax_lora.training.checkpoints import Checkpoints
from jax_lora.training.optimizers import make_optimizer
from jax_lora.training.step import State, make_step
from tests.training.test_step import MODEL, global_batch, variables


def begin():
    everything = variables()
    trainable, frozen = trainable_mask.partition(
        everything, trainable_mask.mask(everything, *trainable_mask.LORA)
    )
    optimizer = make_optimizer(OptimConfig(), optax.constant_schedule(1e-2))
    functions = make_step(MODEL, optimizer, seed=3, dropout_rate=0.1)
    return State(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable)), frozen, functions


def steps(count, state, frozen, functions):
    *_, (last, _) = loop.train(state, frozen, [global_batch(4)] * count, functions)
    return last


def test_resuming_equals_not_stopping(tmp_path):
    unbroken = steps(4, *begin())
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.latest() is None
    checkpoints.save(steps(2, *begin()))
    checkpoints.close()

    checkpoints = Checkpoints(tmp_path / "checkpoints")
    fresh, frozen, functions = begin()
    restored = checkpoints.restore(fresh)
    assert int(restored.step) == checkpoints.latest() == 2
    resumed = steps(2, restored, frozen, functions)
    checkpoints.close()
    assert jax.tree.structure(resumed) == jax.tree.structure(unbroken)
    jax.tree.map(np.testing.assert_array_equal, resumed, unbroken)


def test_the_trainable_half_can_be_restored_alone(tmp_path):
    state = steps(1, *begin())
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(state)
    trainable = checkpoints.restore_trainable(begin()[0].trainable)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, trainable, state.trainable)
    folder = tmp_path / "checkpoints" / "1" / "trainable"
    assert folder.is_dir()
