"""Steps whose gradient is not finite: skipped by the optimizer, and traced to their cause."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_lora.config import OptimConfig
from jax_lora.training.nonfinite import cause
from jax_lora.training.optimizers import make_optimizer
from tests.training.test_checkpoints import begin
from tests.training.test_step import global_batch


def trees(seed):
    rng = np.random.default_rng(seed)
    return {"a": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32), "b": jnp.ones(2)}


def test_a_finite_gradient_is_updated_as_by_optax():
    ours = make_optimizer(OptimConfig(weight_decay=0.1), optax.constant_schedule(1e-2))
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1))
    params = [trees(0), trees(0)]
    states = [ours.init(params[0]), theirs.init(params[1])]
    for step in range(3):
        for i, optimizer in enumerate((ours, theirs)):
            updates, states[i] = optimizer.update(trees(step + 1), states[i], params[i])
            params[i] = optax.apply_updates(params[i], updates)
    jax.tree.map(np.testing.assert_array_equal, *params)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])  # whose square is infinite
def test_another_one_changes_nothing_but_the_count_of_the_schedule(value):
    optimizer = make_optimizer(
        OptimConfig(loraplus_lr_ratio=2.0), optax.linear_schedule(1e-2, 0.0, 10)
    )
    params = trees(0)
    _, state = optimizer.update(trees(1), optimizer.init(params), params)
    bad = trees(2)
    bad["a"] = bad["a"].at[1, 2].set(value)
    updates, later = optimizer.update(bad, state, params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))

    def schedules(tree):
        is_one = lambda x: isinstance(x, optax.ScaleByScheduleState)  # noqa: E731
        leaves = jax.tree.leaves(tree, is_leaf=is_one)
        return [x for x in leaves if is_one(x)], [x for x in leaves if not is_one(x)]

    (counted, rest), (before, same) = schedules(later), schedules(state)
    assert [int(x.count) for x in counted] == [int(x.count) + 1 for x in before] == [2]
    jax.tree.map(np.testing.assert_array_equal, rest, same)


def test_after_a_step_that_is_skipped_the_next_is_as_large_as_without_it():
    # Adam corrects its moments by how many gradients they are of.
    optimizer = make_optimizer(OptimConfig(), optax.constant_schedule(1e-2))
    params, bad = trees(0), jax.tree.map(lambda x: x * jnp.nan, trees(1))
    state = optimizer.init(params)
    plain, _ = optimizer.update(trees(2), state, params)
    _, skipped = optimizer.update(bad, state, params)
    after, _ = optimizer.update(trees(2), skipped, params)
    jax.tree.map(np.testing.assert_array_equal, after, plain)


def spoiled(tree, name, dtype=None):
    """The tree with one value of the leaf of that name not finite."""

    def one(path, leaf):
        if not jax.tree_util.keystr(path, simple=True, separator="/").endswith(name):
            return leaf
        leaf = jnp.asarray(leaf).at[(0,) * leaf.ndim].set(jnp.nan)
        if dtype is None:
            return leaf
        return jax.lax.bitcast_convert_type(leaf.astype(jnp.bfloat16), jnp.uint16)

    return jax.tree_util.tree_map_with_path(one, tree)


def test_the_first_cause_is_named():
    state, frozen, functions = begin()
    batch = global_batch(4)

    def found(state, frozen):
        return cause(state, frozen, batch, functions, 1, lambda m: jax.tree.map(jnp.asarray, m))

    for dtype in (None, jnp.bfloat16):
        bad = found(state, spoiled(frozen, "norm/scale", dtype))
        assert bad.what.startswith("input: params/") and bad.micro is None
    bad = found(state._replace(trainable=spoiled(state.trainable, "q_proj/a")), frozen)
    assert bad.what.startswith("update of an earlier step, or input: lora/layers/self_attn/q")
    assert found(state, frozen).what.startswith("gradient of the step, though of none")
