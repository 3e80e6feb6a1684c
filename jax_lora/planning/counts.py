"""Parameters, counted from shapes: no weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import PyTree

from jax_lora.model import lora
from jax_lora.model.arch import ATTENTION
from jax_lora.model.config import LlamaConfig
from jax_lora.model.quantization import kernel_shapes
from jax_lora.model.transformer import Llama
from jax_lora.training import trainable_mask


@cache
def base_shapes(config: LlamaConfig) -> PyTree:
    """The base tree as `jax.ShapeDtypeStruct`s; one tree per config, not to be changed."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(Llama(config).init, jax.random.key(0), tokens)["params"]


def adapter_shapes(config: LlamaConfig, rank: int, targets: Sequence[str] = ATTENTION) -> PyTree:
    """A and B of every target as `jax.ShapeDtypeStruct`s.

    The vector of scales is no parameter and is left out.

    Raises:
      ValueError: a rank below 1 or an unknown target.
    """
    return lora.tree(
        {
            name: {key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in leaf.items()}
            for name, leaf in lora.shapes(config, rank, targets).items()
        }
    )


def table(variables: PyTree, trains: PyTree) -> pd.DataFrame:
    """Frozen and trainable parameters by module.

    Args:
      variables: {"params": …, "lora": …}, arrays or shapes; `scale` vectors of adapters are data
        and do not count, and a quantized kernel counts as the kernel that it stands for.
      trains: the boolean tree of `trainable_mask.mask`.

    Returns:
      One row per leaf: module, shape (stacked over layers), frozen, trainable.
    """
    rows = []
    variables = kernel_shapes(variables)
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    for (path, leaf), trained in zip(leaves, jax.tree.leaves(trains), strict=True):
        name = trainable_mask.leaf_name(path)
        if name.startswith("lora/") and name.endswith("/scale"):
            continue
        count = int(np.prod(leaf.shape, dtype=np.int64))
        module = name.removeprefix("params/").replace("/", ".")
        rows.append((module, tuple(leaf.shape), 0 if trained else count, count if trained else 0))
    return pd.DataFrame(rows, columns=["module", "shape", "frozen", "trainable"])


def parameter_table(
    config: LlamaConfig, rank: int | None, targets: Sequence[str] = ATTENTION
) -> pd.DataFrame:
    """Frozen and trainable parameters of a model with LoRA of a rank, or fully fine-tuned.

    The trainable share of the paper's tables is trainable / (frozen + trainable).

    Args:
      config: the base model.
      rank: of the adapters; None is full fine-tuning.
      targets: the adapted linear layers; the paper's are q, k, v and o.

    Returns:
      One row per stacked leaf: module, shape, frozen, trainable.

    Raises:
      ValueError: a rank below 1 or an unknown target.
    """
    variables = {"params": base_shapes(config)}
    if rank is not None:
        variables["lora"] = adapter_shapes(config, rank, targets)
    trainable, frozen = trainable_mask.FULL if rank is None else trainable_mask.LORA
    return table(variables, trainable_mask.mask(variables, trainable, frozen))
