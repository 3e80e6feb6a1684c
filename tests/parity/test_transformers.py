"""LLaMAs of every kind against transformers: gradients and full fine-tuning.

Their logits are recorded, see tests/record.py, and compared in tests/model/test_transformer.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_lora.config import OptimConfig
from jax_lora.model.transformer import Llama
from jax_lora.training import trainable_mask
from jax_lora.training.optimizers import make_optimizer, schedule
from tests import reference
from tests.parity import training

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity
KINDS = f"{len(reference.CASES)} kinds of LLaMA"
# SGD's step is the gradient, which is compared for every kind: grouped heads, all that LLaMA 3.2
# has (tied embeddings, scaled positions), and biases stand for the rest.
BY_SGD = ("gqa", "LLaMA-3.2", "biases")
STEPS = 10


@pytest.fixture(scope="module", params=reference.CASES)
def toy(request, tmp_path_factory):
    base = training.load_base(tmp_path_factory.mktemp("model"), request.param)
    model = Llama(base.config, dtype=jnp.float32)
    return SimpleNamespace(
        variables={"params": base.params},
        ours=training.Ours(model),
        load=base.load,
        tensors=lambda found: training.base_tensors(base.config, found["params"]),
    )


@pytest.fixture(scope="module")
def taken():
    return training.batches(STEPS, (4, 24), (4, 24))


def test_gradients_of_every_weight(toy, taken, promise):
    model = toy.load()
    expected_loss = training.backward(model, taken[0])
    gradients, loss = toy.ours.gradients(toy.variables, trainable_mask.FULL, taken[0])
    error = training.worst_error(
        toy.tensors(gradients), training.torch_tensors(model, gradients=True)
    )
    promise(f"‖g − g_ref‖ / ‖g_ref‖ of every weight of {KINDS}", error, 1e-5)
    promise(f"loss of {KINDS}", abs(loss - expected_loss), 1e-5)


@pytest.mark.parametrize("toy", BY_SGD, indirect=True)
def test_full_fine_tuning_by_sgd(toy, taken, promise):
    rate = 0.1
    found, losses, _ = toy.ours.train(toy.variables, trainable_mask.FULL, taken, optax.sgd(rate))
    model = toy.load()
    start = training.torch_tensors(model)
    expected_losses, _ = training.theirs(model, taken, torch.optim.SGD(model.parameters(), lr=rate))
    found, ref = toy.tensors(found), training.torch_tensors(model)
    what = f"{STEPS} SGD steps of full fine-tuning, {len(BY_SGD)} kinds of LLaMA"
    promise(f"{what}: ‖θ − θ_ref‖ / ‖θ_ref‖", training.worst_error(found, ref), 1e-5)
    promise(f"{what}: ‖θ − θ_ref‖ / ‖θ_ref − θ₀‖", training.worst_error(found, ref, start), 1e-3)
    promise(f"{what}: losses", np.abs(np.subtract(losses, expected_losses)).max(), 1e-4)


def test_full_fine_tuning_by_adamw(toy, taken, promise):
    rate, decay, warmup = 1e-3, 0.01, 3
    config = OptimConfig(weight_decay=decay, clip_norm=1.0)
    optimizer = make_optimizer(config, schedule("linear", rate, warmup, STEPS))
    found, losses, norms = toy.ours.train(toy.variables, trainable_mask.FULL, taken, optimizer)
    model = toy.load()
    start = training.torch_tensors(model)
    reference_adamw = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    expected_losses, expected_norms = training.theirs(
        model,
        taken,
        reference_adamw,
        transformers.get_linear_schedule_with_warmup(reference_adamw, warmup, STEPS),
        clip=1.0,
    )
    assert max(expected_norms) > 1.0  # the clip does something
    found, ref = toy.tensors(found), training.torch_tensors(model)
    what = f"{STEPS} AdamW steps of full fine-tuning, {KINDS}"
    promise(f"{what}: ‖θ − θ_ref‖ / ‖θ_ref − θ₀‖", training.worst_error(found, ref, start), 1e-3)
    promise(f"{what}: losses", np.abs(np.subtract(losses, expected_losses)).max(), 1e-4)
    promise(
        f"{what}: gradient norms, relative",
        np.abs(np.divide(norms, expected_norms) - 1).max(),
        1e-4,
    )
