"""Dropout's masks: their rate, what they depend on, and what they do not depend on."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from jax_lora.model.arch import TARGETS
from tests.parity import training
from tests.parity.dropout import DropoutMasks

RATE = 0.1
STEPS, EXAMPLES, PLACES = 4, 6, 4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return training.load_base(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def read(base):
    return DropoutMasks(base.config, base.params, RATE)


def flat(found) -> np.ndarray:
    return np.concatenate([found[name].ravel() for name in TARGETS])


@pytest.fixture(scope="module")
def seen(read):
    """mask / keep by step, example and the token's place."""
    every = itertools.product(range(STEPS), range(EXAMPLES), range(1, PLACES + 1))
    found = [flat(read.scaled(example, place, step)) for step, example, place in every]
    return np.stack(found).reshape(STEPS, EXAMPLES, PLACES, -1)


def test_rate_and_scaling(seen, promise):
    dropped = seen == 0
    error = abs(dropped.mean() - RATE) / (RATE * (1 - RATE) / dropped.size) ** 0.5
    promise(f"dropout {RATE}: share of dropped inputs, in standard errors", error, 4.0)
    kept = np.abs(seen[~dropped] * (1 - RATE) - 1).max()
    promise(f"dropout {RATE}: what is kept is divided by {1 - RATE}, relative", kept, 1e-5)


def test_masks_are_independent(read, seen, promise):
    text = "dropout: correlation between the masks of {}, in standard errors"
    for axis, what in enumerate(("steps", "examples", "tokens")):
        promise(text.format(what), training.correlation(np.moveaxis(seen, axis, 0)), 4.5)
    # The first 32 inputs, which all kernels have, of every target and layer.
    found = [read.dropped(example, 2) for example in range(40)]
    places = [
        [masks[name][copy, :32] for masks in found]
        for name in TARGETS
        for copy in range(len(found[0][name]))
    ]
    promise(text.format("targets and layers"), training.correlation(np.asarray(places)), 4.5)


def test_an_example_keeps_its_masks_however_the_batch_is_cut(base, read, promise):
    alone = [flat(read.dropped(3, place, step=2)) for place in (1, 4)]
    packed = DropoutMasks(base.config, base.params, RATE, packed=True)
    for how, masks, cut in (
        ("in a micro-batch of 4 longer rows", read, dict(shape=(4, 16), row=2)),
        ("behind another example in a packed row", packed, dict(shape=(1, 16), begin=7)),
    ):
        again = [flat(masks.dropped(3, place, step=2, **cut)) for place in (1, 4)]
        differ = int((np.stack(again) != np.stack(alone)).sum())
        promise(f"dropout {how}: inputs whose mask differs", differ, 0)
