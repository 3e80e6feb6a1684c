"""A run whose frozen kernels are one array per layer, as on a GPU without remat."""

import gc
import weakref

import jax
import numpy as np
import pytest

import jax_lora
from jax_lora.planning import counts
from jax_lora.run import initial_weights
from jax_lora.training import unstacked
from jax_lora.training.resolve import Resolved
from jax_lora.training.unstacked import put
from jax_lora.weights import base as base_weights


def test_a_run_trains_and_validates_as_with_stacks(tiny_run, tmp_path, monkeypatch):
    config = tiny_run(max_steps=2, remat="none", dtype="float32", validate_every=2)
    config = config.replace(**{"data.validation_per_task": 2})
    metrics, loaded = [], []

    def spied(path, array):
        loaded.append(path[-1])
        return put(path, array)

    monkeypatch.setattr(unstacked, "put", spied)
    for unstacks in (False, True):
        monkeypatch.setattr(Resolved, "unstacks", unstacks)
        monkeypatch.setattr(initial_weights, "_CACHED", {})
        run = jax_lora.Run.open(config, tmp_path / str(unstacks))
        metrics.append(run.train())
        assert ("kernel" in loaded) == unstacks
    columns = ["loss", "gradient_norm"]
    np.testing.assert_allclose(metrics[0][columns], metrics[1][columns], rtol=1e-5)


def test_a_base_that_trains_does_not_lie_beside_a_frozen_one(tiny_model, monkeypatch):
    # As of a study's cell with an adapter, before one of full fine-tuning.
    monkeypatch.setattr(initial_weights, "_CACHED", {})
    shapes = counts.base_shapes(base_weights.read_config(tiny_model))
    frozen, trains = (jax.tree.map(lambda _, x=x: x, shapes) for x in (False, True))
    held = jax.tree.leaves(initial_weights.load_base(str(tiny_model), "float32", frozen))
    held = [weakref.ref(x) for x in held]
    read, load = [], base_weights.load

    def counted(*arguments):
        gc.collect()
        read.append([leaf() is None for leaf in held])
        return load(*arguments)

    monkeypatch.setattr(base_weights, "load", counted)
    initial_weights.load_base(str(tiny_model), "float32", trains)
    assert read and all(read[0])


@pytest.mark.parametrize("forms", [(put, None, put), (None, put, None)])
def test_one_read_of_the_base_gives_both_forms(tiny_model, monkeypatch, forms):
    """Training unstacks it and scoring stacks it: the same arrays as of a base that is read for
    each, and what somebody holds stays what it was."""
    load, read = base_weights.load, []

    def counted(*arguments):
        read.append(arguments)
        return load(*arguments)

    trains = jax.tree.map(lambda _: False, counts.base_shapes(base_weights.read_config(tiny_model)))
    whole = []
    for form in forms:
        monkeypatch.setattr(initial_weights, "_CACHED", {})
        whole.append(initial_weights.load_base(str(tiny_model), "bfloat16", trains, form))
    monkeypatch.setattr(initial_weights, "_CACHED", {})
    monkeypatch.setattr(base_weights, "load", counted)
    found = [initial_weights.load_base(str(tiny_model), "bfloat16", trains, form) for form in forms]
    for one, other in zip(found, whole, strict=True):
        assert jax.tree.structure(one) == jax.tree.structure(other)
        assert [x.dtype for x in jax.tree.leaves(one)] == [x.dtype for x in jax.tree.leaves(other)]
        jax.tree.map(np.testing.assert_array_equal, one, other)
    assert len(read) == 1
    initial_weights.load_base(str(tiny_model), "float32", trains, forms[0])  # another dtype is read
    assert len(read) == 2
