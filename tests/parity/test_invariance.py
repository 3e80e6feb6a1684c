"""How a global batch is cut changes nothing but rounding: 128 examples, dropout on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_lora.config import OptimConfig
from jax_lora.data.loader import MicroBatch
from jax_lora.model import lora
from jax_lora.model.arch import LINEAR_NAMES
from jax_lora.model.transformer import Llama
from jax_lora.training import trainable_mask
from jax_lora.training.optimizers import make_optimizer, schedule
from tests.parity import training

EXAMPLES, STEPS = 128, 3
CUTS = ("4 x 32", "128 x 1", "packed in rows of two")
OPTIMIZERS = {
    "SGD": optax.sgd(0.1),
    "AdamW": make_optimizer(OptimConfig(), schedule("linear", 1e-2, 1, STEPS)),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return training.load_base(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def variables(base):
    adapters = lora.init(jax.random.key(5), base.config, 4, alpha=16.0, targets=LINEAR_NAMES)
    return {"params": base.params, "lora": adapters}


@pytest.fixture(scope="module")
def taken():
    return training.batches(STEPS, (EXAMPLES, 24))


@pytest.fixture(scope="module")
def rows(base):
    return training.Ours(Llama(base.config, dtype=jnp.float32), dropout_rate=0.1)


@pytest.fixture(scope="module")
def whole(rows, variables, taken):
    return results(rows, variables, taken)


def results(ours, variables, taken):
    """Losses and adapters by optimizer, from the same start."""
    found = {}
    for name, optimizer in OPTIMIZERS.items():
        trained, losses, _ = ours.train(variables, trainable_mask.LORA, taken, optimizer)
        found[name] = losses, training.adapter_tensors(trained["lora"])
    return found


def cut(micro: MicroBatch, how: str) -> list[MicroBatch]:
    if how == "packed in rows of two":
        # Left halves hold the even rows, right halves the odd ones, padding and all.
        return [MicroBatch(*(x.reshape(EXAMPLES // 2, -1) for x in micro))]
    rows = {"4 x 32": 32, "128 x 1": 1}[how]
    return [MicroBatch(*(x[i : i + rows] for x in micro)) for i in range(0, EXAMPLES, rows)]


@pytest.mark.parametrize("how", CUTS)
def test_the_cut_does_not_matter(base, rows, variables, taken, whole, promise, how):
    if "packed" in how:
        model = Llama(base.config, dtype=jnp.float32)
        rows = training.Ours(model, dropout_rate=0.1, packed=True)
    found = results(rows, variables, [cut(*batch, how) for batch in taken])
    start = training.adapter_tensors(variables["lora"])
    what = f"128 examples as {how} instead of 1 x 128, dropout on, {STEPS} steps"
    losses = [np.abs(np.subtract(found[k][0], whole[k][0])).max() for k in whole]
    promise(f"{what}: losses", max(losses), 1e-5)
    error = training.worst_error(found["SGD"][1], whole["SGD"][1])
    promise(f"{what} of SGD: ‖θ − θ'‖ / ‖θ'‖", error, 1e-5)
    error = training.worst_error(found["AdamW"][1], whole["AdamW"][1], start)
    promise(f"{what} of AdamW: ‖θ − θ'‖ / ‖θ' − θ₀‖", error, 1e-3)
