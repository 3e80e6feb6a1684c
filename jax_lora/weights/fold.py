"""An adapter rewritten for servers that know a plain LoRA alone: one rank, one α, α/r."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import PyTree

from jax_lora.errors import DataError
from jax_lora.model import lora
from jax_lora.weights.peft import Adapter


def fold_scale(found: Adapter, where: str) -> Adapter:
    """The same update with one rank R and α = R.

    Each B takes its own α/r or α/√r, rounded once to float32. A and B are padded with zeros to the
    largest rank R of the adapter, which adds nothing to A B. Layers without an adapter stay so.

    Args:
      found: a LoRA adapter.
      where: its folder, for the message.

    Raises:
      DataError: DoRA, which such servers do not know either.
    """
    widest = max(max(ranks) for ranks in found.ranks.values())

    def fold(leaf: PyTree, ranks: Sequence[int]) -> PyTree:
        if "m" in leaf:
            raise DataError(f"{where}: found DoRA, expected LoRA, whose scale can be folded into B")
        padding = (0, widest - leaf["a"].shape[-1])
        b = leaf["b"] * leaf["scale"][:, None, None]
        return {
            "a": np.pad(leaf["a"], ((0, 0), (0, 0), padding)),
            "b": np.pad(b, ((0, 0), padding, (0, 0))),
            "scale": (np.array(ranks) > 0).astype(np.float32),
        }

    return dataclasses.replace(
        found,
        adapters=lora.map_targets(lambda n, leaf: fold(leaf, found.ranks[n]), found.adapters),
        rank=widest,
        alpha=float(widest),
        use_rslora=False,
        ranks={n: tuple(widest if r else 0 for r in ranks) for n, ranks in found.ranks.items()},
        alphas={n: (float(widest),) * len(ranks) for n, ranks in found.ranks.items()},
    )
