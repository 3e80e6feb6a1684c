"""LoRA on lm_head: what it computes, how it is drawn, and how it is decoded."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_lora.config import RunConfig
from jax_lora.errors import ConfigError
from jax_lora.generation import greedy, scheduler
from jax_lora.model import lora
from jax_lora.model.arch import BY_NAME, LINEAR_NAMES, TARGETS
from jax_lora.model.config import LlamaConfig
from jax_lora.model.families import CONFIGS
from jax_lora.model.transformer import Llama
from jax_lora.planning.counts import parameter_table
from jax_lora.training.resolve import resolve

TINY = LlamaConfig(61, 32, 48, 2, 4, 2, 8)
TIED = LlamaConfig(61, 32, 48, 2, 4, 2, 8, tie_word_embeddings=True)
IDS = np.arange(12).reshape(2, 6)


def moved(config, targets, alpha=8.0):
    """A base, and adapters that change its logits."""
    params = Llama(config).init(jax.random.key(0), IDS)["params"]
    adapters = lora.init(jax.random.key(1), config, 4, alpha=alpha, targets=targets)
    for leaf in lora.by_target(adapters).values():
        leaf["b"] = 0.1 * jax.random.normal(jax.random.key(2), leaf["b"].shape)
    return params, adapters


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
def test_the_update_is_added_to_the_logits(config, transposed):
    params, adapters = moved(config, ("lm_head",))
    assert ("lm_head" in params) is not config.tie_word_embeddings
    model = Llama(config, dtype=jnp.float32)
    states = jax.random.normal(jax.random.key(3), (2, 6, 32))
    stored = params
    if transposed and "lm_head" in params:
        stored = lora.with_kernel(params, "lm_head", params["lm_head"]["kernel"].T[None])
    found = model.clone(transposed=transposed).apply(
        {"params": stored, "lora": adapters}, states, method="head"
    )
    x = np.asarray(states, np.float64)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps)
    w = np.asarray(lora.kernel(params, "lm_head")[0], np.float64)
    leaf = adapters["lm_head"]
    update = leaf["scale"][0] * np.asarray(leaf["a"][0], np.float64) @ np.asarray(leaf["b"][0])
    assert leaf["scale"].shape == (1,) and leaf["scale"][0] == 2.0
    np.testing.assert_allclose(found, x @ (w + update), rtol=0, atol=1e-5)


def test_the_other_targets_are_drawn_as_without_it():
    with_head, without = (
        lora.init(jax.random.key(1), TINY, 4, alpha=8.0, targets=targets)
        for targets in (TARGETS, LINEAR_NAMES)
    )
    assert with_head.pop("lm_head")["a"].shape == (1, 32, 4)
    jax.tree.map(np.testing.assert_array_equal, with_head, without)


def test_the_tree_by_target_and_back():
    _, adapters = moved(TINY, ("lm_head", "v_proj"))
    leaves = lora.by_target(adapters)
    assert tuple(leaves) == ("v_proj", "lm_head")  # in the order of the model
    assert adapters == {"layers": {"self_attn": {"v_proj": leaves["v_proj"]}}} | {
        "lm_head": leaves["lm_head"]
    }
    assert lora.tree(leaves) == adapters
    lora.check(adapters, TINY)
    wrong = lora.map_targets(lambda name, leaf: {**leaf, "b": leaf["b"][..., 1:]}, adapters)
    with pytest.raises(ConfigError, match="adapter leaf layers/self_attn/v_proj/b"):
        lora.check(wrong, TINY)
    with pytest.raises(ConfigError, match=r"leaf lm_head/b: found \(1, 4, 60\), .* \(1, 4, 61\)"):
        lora.check({"lm_head": wrong["lm_head"]}, TINY)


def test_a_kernel_is_replaced_where_it_is_read():
    for config in (TINY, TIED):
        params, _ = moved(config, ("q_proj",))
        for name in TARGETS:
            other = lora.with_kernel(params, name, 0 * lora.kernel(params, name))
            assert not np.any(lora.kernel(other, name))
            apart = jax.tree.map(
                lambda x, y: x is y, {**params, "lm_head": 0}, {**other, "lm_head": 0}
            )
            assert jax.tree.leaves(apart).count(False) == (name != "lm_head")
            assert BY_NAME[name].outputs == "vocab" or name != "lm_head"


@pytest.mark.parametrize("targets", [("lm_head",), ("q_proj", "lm_head")])
@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
def test_decoding_is_the_forward_pass(config, targets):
    params, adapters = moved(config, targets, alpha=40.0)
    model, prompt, answer = Llama(config, dtype=jnp.float32), [3, 14, 15], []
    forward = jax.jit(model.apply)
    plain = []
    for said, variables in (
        (answer, {"params": params, "lora": adapters}),
        (plain, {"params": params}),
    ):
        for _ in range(6):
            text = np.zeros((1, 16), np.int32)
            text[0, : 3 + len(said)] = prompt + said
            said.append(int(forward(variables, text)[0, 2 + len(said)].argmax()))
    assert answer != plain
    weights = greedy.unstack_layers({"params": params, "lora": adapters})
    ((found,),) = scheduler.answers(
        model,
        weights,
        [prompt],
        max_new_tokens=6,
        end_ids=(99,),
        buckets=(8,),
        batch_tokens=100,
        max_batch=1,
    )
    assert found[1].tolist() == answer


def test_pissa_is_refused_where_it_would_change_the_embeddings():
    keys = {"lora.targets": ("q_proj", "lm_head"), "lora.init": "pissa", "data.buckets": (64,)}
    config = RunConfig().replace(**keys)
    assert resolve(config, TINY, "cpu", 1).materialized == ()
    with pytest.raises(ConfigError, match=r"config\.lora\.targets: found lm_head with init=pissa"):
        resolve(config, TIED, "cpu", 1)


def test_its_parameters_are_counted():
    for name in ("smollm2-135m", "llama-7b"):
        shape = CONFIGS[name]
        table = parameter_table(shape, 8, ("lm_head",)).set_index("module")
        assert table.trainable.sum() == 8 * (shape.hidden_size + shape.vocab_size)
        assert table.loc["lora.lm_head.b", "shape"] == (1, 8, shape.vocab_size)
