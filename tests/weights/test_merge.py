"""Merging against NumPy in float64, and against the model with its adapter left apart."""

from __future__ import annotations

from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from jax_lora.model.transformer import Llama
from jax_lora.weights import hf, merge
from tests import reference
from tests.weights.builders import flat

TARGETS = {"self_attn": ("q_proj", "o_proj"), "mlp": ("down_proj",)}


def adapters(dora: bool):
    """Random adapters on `TARGETS`, the scale another one in each layer."""
    rng = np.random.default_rng(1)
    every = reference.adapters()["layers"]
    tree = {"layers": {g: {name: every[g][name] for name in TARGETS[g]} for g in TARGETS}}
    for group in tree["layers"].values():
        for leaf in group.values():
            leaf["scale"][1] *= 0.3
            if dora:
                leaf["m"] = rng.uniform(0.5, 2.0, (2, leaf["b"].shape[-1])).astype(np.float32)
    return tree


def toy(folder, case="gqa"):
    return hf.load(reference.write(folder, case), "float32", put=lambda _, array: array)


def whole(leaf):
    """A leaf as an array, merged or not."""
    return np.stack([leaf[0], leaf[1]]) if isinstance(leaf, merge.MergedKernel) else leaf


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_merged_kernel_is_float64s_to_the_last_bits_of_float32(tmp_path, dora, dtype):
    base = jax.tree.map(lambda array: array.astype(dtype), toy(tmp_path)[1])
    tree = adapters(dora)
    merged = merge.merge(base, tree)
    for path, array in flat(base):
        found: Any = merged
        for key in path:
            found = found[key]
        group, name = (*path, "")[1:3]
        if name not in TARGETS.get(group, ()):
            assert found is array  # not a copy
            continue
        leaf = tree["layers"][group][name]
        a, b, scale = (leaf[key].astype(np.float64) for key in ("a", "b", "scale"))
        wanted = array.astype(np.float64) + scale[:, None, None] * (a @ b)
        if dora:
            norm = np.sqrt((wanted**2).sum(axis=1, keepdims=True))
            wanted = leaf["m"][:, None, :] * wanted / norm
        assert found.shape == array.shape and found[0].dtype == np.float32
        np.testing.assert_allclose(whole(found), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
def test_the_merged_model_says_what_the_adapted_one_says(tmp_path, dora):
    config, base = toy(tmp_path)
    tree = adapters(dora)
    say = jax.jit(Llama(config, np.float32).apply)
    apart = say({"params": base, "lora": tree}, reference.tokens())
    merged = jax.tree.map(whole, merge.merge(base, tree))
    np.testing.assert_allclose(
        say({"params": merged}, reference.tokens()), apart, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("case", ["gqa", "tied"])
def test_the_change_by_rounding_is_that_of_the_whole_model(tmp_path, case):
    config, base = toy(tmp_path, case)
    weights = merge.merge(base, adapters(False)) if case == "gqa" else base
    tokens = (np.arange(merge.TOKENS) * 7919 % config.vocab_size)[None]
    say = jax.jit(Llama(config, np.float32).apply)
    exact = jax.tree.map(whole, weights)
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), exact)
    exact, rounded = (np.asarray(say({"params": tree}, tokens)) for tree in (exact, rounded))
    change, largest = merge.rounding_change(config, weights, "bfloat16")
    assert change == pytest.approx(np.abs(exact - rounded).max(), abs=1e-5)
    assert change > 1e-3 and largest == pytest.approx(np.abs(exact).max(), abs=1e-5)
    assert merge.rounding_change(config, weights, "float32")[0] == 0
