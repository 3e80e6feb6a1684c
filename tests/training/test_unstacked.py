"""Frozen kernels as one array per layer: the same numbers, and when a run has them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_lora.config import RunConfig
from jax_lora.model import lora
from jax_lora.model.config import LlamaConfig
from jax_lora.model.transformer import Llama
from jax_lora.planning import compile, steps
from jax_lora.planning.targets import target
from jax_lora.training import trainable_mask
from jax_lora.training.resolve import Resolved, resolve
from jax_lora.training.step import State, make_step, zeros
from jax_lora.training.unstacked import put, stack, unstack
from tests.training.test_step import global_batch

SHAPE = LlamaConfig(61, 32, 48, 3, 4, 2, 8)
MODEL = Llama(SHAPE, dtype=jnp.float32, unroll=3)


@pytest.fixture(scope="module")
def halves():
    params = MODEL.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    found = {"params": params, "lora": lora.init(jax.random.key(1), SHAPE, 4, alpha=8.0)}
    return trainable_mask.partition(found, trainable_mask.mask(found, *trainable_mask.LORA))


def test_stacking_again_gives_the_tree_back(halves):
    apart = unstack(halves[1])
    kernels = apart["params"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert [x.shape for x in kernels] == [(32, 48)] * 3
    assert isinstance(apart["lora"]["layers"]["self_attn"]["q_proj"]["a"], optax.MaskedNode)
    jax.tree.map(np.testing.assert_array_equal, stack(apart), halves[1])
    jax.tree.map(np.testing.assert_array_equal, unstack(apart), apart)


def test_a_base_is_loaded_as_it_would_be_unstacked(halves):
    params = halves[1]["params"]
    loaded = jax.tree_util.tree_map_with_path(
        lambda path, x: put(tuple(key.key for key in path), np.asarray(x)), params
    )
    jax.tree.map(np.testing.assert_array_equal, loaded, unstack(params))


@pytest.mark.parametrize("materialized", [(), ("q_proj", "v_proj")])
def test_gradient_and_loss_are_those_of_stacks(halves, materialized):
    (micro,) = global_batch(8)
    found = []
    for frozen in (halves[1], unstack(halves[1])):
        optimizer = optax.sgd(1.0)
        functions = make_step(
            MODEL, optimizer, seed=3, dropout_rate=0.1, loss_chunk=8, materialized=materialized
        )
        state = jax.tree.map(jnp.copy, State(jnp.zeros((), jnp.int32), halves[0], ()))
        state = state._replace(optimizer=optimizer.init(state.trainable))
        diff_params = functions.prepare(state, frozen)
        plain = functions.loss(diff_params, frozen, micro)
        weight = np.float32(micro.loss_weights.sum())
        gradients, loss = functions.accumulate(
            *zeros(diff_params), diff_params, state.step, frozen, micro, weight
        )
        after, norm = functions.update(state, frozen, gradients)
        found.append((plain, loss, norm, after.trainable))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), *found)


@pytest.mark.parametrize(
    ("platform", "devices", "changes", "expected"),
    [
        ("gpu", 1, {"remat": "none"}, True),
        ("cuda", 1, {"remat": "none"}, True),
        ("cuda", 1, {"remat": "none", "unroll": 2}, False),
        ("cuda", 1, {"remat": "full"}, False),
        ("cuda", 2, {"remat": "none"}, False),
        ("cuda", 1, {"remat": "none", "lora.init": "pissa"}, False),
        ("cuda", 1, {"remat": "none", "lora.variant": "dora"}, False),
        ("cpu", 1, {"remat": "none"}, False),
        ("tpu", 1, {"remat": "none"}, False),
    ],
)
def test_when_kernels_are_unstacked(platform, devices, changes, expected):
    config = RunConfig().replace(**{"mesh.fsdp": devices, "data.buckets": (128,)}, **changes)
    assert resolve(config, SHAPE, platform, devices).unstacks == expected


def test_the_planner_compiles_what_the_run_has(monkeypatch):
    monkeypatch.setattr(Resolved, "unstacks", True)
    config = RunConfig().replace(remat="none", attention="xla", dtype="float32", batch_size=1)
    planned = steps.planned(config, SHAPE, "cpu", rows=1, length=8)
    program = compile.lower_step(planned, target("cpu"))["accumulate"]
    shapes = [x.shape for x in jax.tree.leaves(program.args_info)]
    assert shapes.count((48, 32)) == 3 and (3, 48, 32) not in shapes  # down_proj
