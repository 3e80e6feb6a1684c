"""Optimizers by name: plain optax on what trains, with the mask, the clip and LoRA+."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_lora.config import CHOICES, OPTIMIZER_KEYS, OptimConfig, RunConfig
from jax_lora.errors import ConfigError
from jax_lora.training import trainable_mask
from jax_lora.training.optimizers import OPTIMIZERS, make_optimizer

# Other values than the defaults, and the same optimizers written out.
VALUES = {"b1": 0.8, "b2": 0.95, "eps": 1e-3, "weight_decay": 0.3, "momentum": 0.7}
REFERENCES = {
    "adamw": lambda rate: optax.adamw(rate, 0.8, 0.95, 1e-3, weight_decay=0.3),
    "adam": lambda rate: optax.adam(rate, 0.8, 0.95, 1e-3),
    "sgd": lambda rate: optax.sgd(rate, momentum=0.7),
    "adafactor": lambda rate: optax.adafactor(rate),
    "lion": lambda rate: optax.lion(rate, 0.8, 0.95, weight_decay=0.3),
}
RULES = ((*trainable_mask.LORA[0], r"params/norm/.*"), trainable_mask.LORA[1])
RATE, RATIO, CLIP = optax.linear_schedule(1e-2, 0.0, 5), 16.0, 1.0


def tree(seed):
    """Two layers; A is large enough for adafactor to factor its second moments."""
    rng = np.random.default_rng(seed)

    def drawn(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    adapter = {"a": drawn(2, 160, 130), "b": drawn(2, 130, 48), "scale": drawn(2)}
    return {
        "params": {"norm": {"scale": drawn(160)}, "lm_head": {"kernel": drawn(160, 61)}},
        "lora": {"layers": {"self_attn": {"q_proj": adapter}}},
    }


def keys_of(name):
    return {key: VALUES[key] for key in OPTIMIZER_KEYS[name]}


def three_updates(optimizer, trains):
    """What trains after three updates."""
    trainable, _ = trainable_mask.partition(tree(0), trains)
    state = optimizer.init(trainable)
    for seed in (1, 2, 3):
        gradients, _ = trainable_mask.partition(tree(seed), trains)
        updates, state = optimizer.update(gradients, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    return trainable


def by_plain_optax(name, trains):
    """The same from a list of the leaves that train: B has a learning rate of its own."""
    names = [
        trainable_mask.leaf_name(path)
        for path, trained in jax.tree_util.tree_leaves_with_path(trains)
        if trained
    ]
    slow, fast = REFERENCES[name](RATE), REFERENCES[name](lambda step: RATIO * RATE(step))
    weights = jax.tree.leaves(trainable_mask.partition(tree(0), trains)[0])
    each = [fast if name.endswith("/b") else slow for name in names]
    states = [one.init(weight) for one, weight in zip(each, weights, strict=True)]
    for seed in (1, 2, 3):
        gradients = jax.tree.leaves(trainable_mask.partition(tree(seed), trains)[0])
        norm = np.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in gradients))
        for i, gradient in enumerate(gradients):
            clipped = gradient * min(1.0, CLIP / norm)
            update, states[i] = each[i].update(clipped, states[i], weights[i])
            weights[i] = weights[i] + update
    return weights


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_three_updates_equal_plain_optax(name):
    trains = trainable_mask.mask(tree(0), *RULES)
    config = OptimConfig(name=name, clip_norm=CLIP, loraplus_lr_ratio=RATIO, **keys_of(name))
    found = jax.tree.leaves(three_updates(make_optimizer(config, RATE), trains))
    expected = by_plain_optax(name, trains)
    assert len(found) == 3
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_state_is_held_for_frozen_leaves(name):
    trains = trainable_mask.mask(tree(0), *RULES)
    trainable, _ = trainable_mask.partition(tree(0), trains)
    state = make_optimizer(OptimConfig(name=name), RATE).init(trainable)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        held = trainable_mask.leaf_name(path)
        assert not leaf.ndim or held.endswith(("q_proj/a", "q_proj/b", "norm/scale")), held


def test_the_config_and_the_table_have_the_same_optimizers():
    names = {*OPTIMIZERS}
    assert names == {*OPTIMIZER_KEYS} == {*CHOICES["optim.name"]} == {*REFERENCES}


@pytest.mark.parametrize("key", VALUES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_key_is_read_or_refused(name, key):
    changes = {"optim.name": name, f"optim.{key}": VALUES[key]}
    if key not in OPTIMIZER_KEYS[name]:
        message = f"config.optim.{key}: found {VALUES[key]}, which the optimizer {name} does not"
        with pytest.raises(ConfigError, match=message):
            RunConfig().replace(**changes)
        return
    trains = trainable_mask.mask(tree(0), *RULES)
    configs = (RunConfig().replace(**changes).optim, OptimConfig(name=name))
    one, other = (three_updates(make_optimizer(config, RATE), trains) for config in configs)
    assert any(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x != y).any()), one, other)))


def test_unknown_optimizers_are_refused():
    with pytest.raises(ConfigError, match=r"config.optim.name: found 'muon', expected one of adam"):
        RunConfig().replace(**{"optim.name": "muon"})
