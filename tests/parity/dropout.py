"""Which inputs a training step drops, seen from outside."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_lora.data.loader import MicroBatch
from jax_lora.model import lora
from jax_lora.model.config import LlamaConfig
from jax_lora.model.transformer import Llama
from jax_lora.training import trainable_mask
from tests.parity import training


class DropoutMasks:
    """Reads the masks off the gradients of training steps.

    With A the identity and B zero, dropout leaves the forward pass alone, and the gradient of B
    is xᵀg without it and (mask/keep · x)ᵀg with it. Tokens embedded at zero stay zero through
    all layers, so that the gradient is that of one token, and its rows tell its mask.
    """

    def __init__(self, config: LlamaConfig, params: Any, rate: float, **options: Any):
        table = jnp.asarray(params["embed_tokens"]["embedding"]).at[0].set(0.0)
        leaves = {
            name: {
                "a": jnp.stack([jnp.eye(size_in)] * copies),
                "b": jnp.zeros((copies, size_in, size_out)),
                "scale": jnp.ones(copies),
            }
            for name, (copies, size_in, size_out) in config.stack_shapes().items()
        }
        self.variables = {
            "params": {**params, "embed_tokens": {"embedding": table}},
            "lora": lora.tree(leaves),
        }
        model = Llama(config, dtype=jnp.float32)
        self.with_dropout = training.Ours(model, dropout_rate=rate, **options)
        without = training.Ours(model, **options)
        # The gradients without it, of any example at any step.
        self.plain = cache(lambda *where, **more: self._gradients(without, 0, *where, **more))

    def dropped(self, *where: Any, **more: Any) -> dict[str, np.ndarray]:
        """Which inputs of a token's are dropped: target → (L, in). See `_gradients`."""
        found = self._gradients(self.with_dropout, *where, **more)
        return {name: ~g.any(axis=2) for name, g in found.items()}

    def scaled(self, example: int, place: int, step: int = 0, **more: Any) -> dict[str, np.ndarray]:
        """mask / keep of a token's inputs: target → (L, in). See `_gradients`."""
        found = self._gradients(self.with_dropout, example, place, step, **more)
        plain = self.plain(place, **more)
        return {
            name: (found[name] * g).sum(axis=2) / (g**2).sum(axis=2) for name, g in plain.items()
        }

    def _gradients(
        self,
        ours: training.Ours,
        example: int,
        place: int,
        step: int = 0,
        shape: tuple[int, int] = (1, 8),
        row: int = 0,
        begin: int = 0,
    ) -> dict[str, np.ndarray]:
        # Of B, from the token at `place` (from 1) of an example that begins in column `begin` of
        # row `row` of a micro-batch of this shape.
        tokens, weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        at = begin + place
        tokens[row, at : at + 2] = 5, 9
        weights[row, at + 1] = 1
        examples = np.tile(np.arange(100, 100 + shape[0], dtype=np.int32)[:, None], shape[1])
        examples[row, begin:] = example
        batch = [MicroBatch(tokens, weights, examples)]
        found, _ = ours.gradients(self.variables, trainable_mask.LORA, batch, step)
        return {name: np.asarray(leaf["b"]) for name, leaf in lora.by_target(found["lora"]).items()}
