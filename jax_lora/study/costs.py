"""What the cells of a study cost, before and after they are trained."""

from __future__ import annotations

from typing import Any

from jax_lora.model import lora
from jax_lora.model.config import CONFIGS
from jax_lora.planning.operations import operations
from jax_lora.planning.setup import Setup
from jax_lora.weights import base as base_weights


def operations_per_token(run: Any) -> tuple[float, float]:
    """Operations of a training step and of the base's forward pass, per token.

    They are planning's count (`planning.operations`) at the longest row: both passes, with the
    deltas that a step materializes, and without what the backward pass computes again. So they
    depend neither on the remat policy nor on the device.

    Args:
      run: the config of a run.
    """
    parts = operations(_setup(run))
    training = sum(work.forward + work.backward for work in parts.values())
    return training, sum(work.forward for name, work in parts.items() if name != "adapters")


def _setup(run: Any) -> Setup:
    shape = CONFIGS.get(run.model) or base_weights.read_config(run.model)
    is_lora, targets = run.method == "lora", tuple(run.lora.targets)
    materialize = is_lora and run.lora.contract != "never"
    return Setup(
        config=shape,
        rank=run.lora.rank if is_lora else None,
        length=max(run.data.buckets),
        batch_rows=run.batch_size,
        targets=targets,
        variant=run.lora.variant if is_lora else "lora",
        contracted=lora.contracted(shape, run.lora.rank, targets) if materialize else (),
        trainable=tuple(run.trainable),
        frozen=tuple(run.frozen),
        dropout=run.lora.dropout if is_lora else 0.0,
        attention="cudnn",  # the causal half of the pairs of tokens, whichever kernel runs
    )
