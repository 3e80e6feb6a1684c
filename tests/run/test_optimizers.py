"""A run with each optimizer: resumed, it equals an unbroken one bit for bit."""

import numpy as np
import pytest

import jax_lora
from jax_lora.errors import Stopped
from jax_lora.training.optimizers import OPTIMIZERS

RATES = {"sgd": 1.0, "adafactor": 1.0, "lion": 1e-3}  # the others: 0.01


@pytest.fixture(scope="module")
def config(tiny_run):
    return tiny_run(
        batch_size=4,
        micro_tokens=1536,
        epochs=1,
        **{
            "lora.targets": ("q_proj",),
            "optim.warmup_steps": 0,
            "optim.schedule": "constant",
            "optim.loraplus_lr_ratio": 4.0,
        },
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_equals_an_unbroken_one(config, tmp_path, name):
    changes = {"optim.name": name, "optim.learning_rate": RATES.get(name, 1e-2)}
    config = config.replace(max_steps=4, **changes)
    unbroken = jax_lora.Run.open(config, tmp_path / "unbroken").train()
    asked = iter((False, True))
    with pytest.raises(Stopped, match="stopped at step 2 of 4"):
        jax_lora.Run.open(config, tmp_path / "resumed").train(asked_to_stop=lambda: next(asked))
    resumed = jax_lora.Run.open(config, tmp_path / "resumed").train()
    assert unbroken.loss.tolist() == resumed.loss.tolist()
    adapters = [
        (tmp_path / folder / "adapter" / "adapter_model.safetensors").read_bytes()
        for folder in ("unbroken", "resumed")
    ]
    assert adapters[0] == adapters[1]
    assert np.isfinite(unbroken.loss).all()
