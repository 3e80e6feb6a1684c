"""What the last step leaves is looked at, as no step comes after it to notice."""

from __future__ import annotations

import pytest

import jax_lora
from jax_lora.errors import RunFailed


def test_an_adapter_that_the_last_update_made_infinite_is_not_saved(tmp_path, tiny_run):
    config = tiny_run(
        max_steps=1,
        batch_size=4,
        micro_tokens=1536,
        **{
            "lora.alpha_per_rank": 1e6,  # whose gradient of B is large, while B is zero
            "optim.name": "sgd",
            "optim.schedule": "constant",
            "optim.warmup_steps": 0,
            "optim.clip_norm": 0.0,
            "optim.learning_rate": 3e38,
            "data.train_per_task": 2,
        },
    )
    with pytest.raises(RunFailed, match="finite"):
        jax_lora.Run.open(config, tmp_path / "run").train()
    assert not (tmp_path / "run" / "adapter").exists()
    checkpoints = tmp_path / "run" / "checkpoints"
    assert not [path for path in checkpoints.iterdir() if path.name.isdigit()]
