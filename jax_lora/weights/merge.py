"""An adapter merged into the base, so that whatever knows no adapters runs the tuned model.

    LoRA   W' = W + s A B                        (Hu et al. 2021, arXiv:2106.09685)
    DoRA   W' = m (W + s A B) / ‖W + s A B‖      ‖·‖ and m per column (Liu et al. 2024, 2402.09353)

In float32 whatever W is kept in, as rounding a small update into a bfloat16 W loses part of it;
a quantized W is dequantized to float32. What is rounded, once, is W'. How much that changes,
`rounding_change` says.

A head with an adapter that was tied to the embeddings is a matrix of its own once it is merged:
`merged_config` says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from jax_lora.model import lora
from jax_lora.model.config import LlamaConfig
from jax_lora.model.quantization import QuantizedKernel, is_quantized
from jax_lora.model.transformer import Llama
from jax_lora.weights.tree import numpy_dtype

TOKENS = 32  # ids that `rounding_change` reads


@jax.jit
def _dequantize(kernel: QuantizedKernel) -> jax.Array:
    return kernel.dequantize(jnp.float32)


@dataclass(frozen=True)
class DequantizedKernel:
    """A stacked kernel (L, in, out) whose layers are dequantized one by one, when they are asked
    for. `kernel`: as it is stored."""

    kernel: QuantizedKernel

    @property
    def shape(self) -> tuple[int, ...]:
        """(L, in, out)."""
        return self.kernel.shape

    def __getitem__(self, layer: int) -> np.ndarray:
        """A layer: (in, out), float32."""
        one = jax.tree.map(lambda x: jnp.asarray(x[layer]), self.kernel)
        return np.asarray(_dequantize(one))


@dataclass(frozen=True)
class MergedKernel:
    """A stacked kernel (L, in, out) whose layers are merged one by one, when they are asked for.

    `kernel`: of the base, any float dtype, or a `DequantizedKernel`. `adapter`: its `a`, `b`,
    `scale` and perhaps `m`.
    """

    kernel: PyTree
    adapter: PyTree

    @property
    def shape(self) -> tuple[int, ...]:
        """(L, in, out)."""
        return tuple(self.kernel.shape)

    def __getitem__(self, layer: int) -> np.ndarray:
        """W' of a layer: (in, out), float32."""
        leaves = {name: np.asarray(leaf[layer], np.float32) for name, leaf in self.adapter.items()}
        merged = leaves["a"] @ leaves["b"]
        merged *= leaves["scale"]
        merged += np.asarray(self.kernel[layer], np.float32)
        if "m" in leaves:
            merged *= leaves["m"] / np.linalg.norm(merged, axis=0)
        return merged


def merge(base: PyTree, adapters: PyTree) -> PyTree:
    """The base's tree with a `MergedKernel` for each kernel that has an adapter, and a
    `DequantizedKernel` for each other one that is quantized.

    Args:
      base: the parameters, see `jax_lora.weights.tree`; numpy or jax.
      adapters: see `jax_lora.model.lora`; `lora.check` has passed.

    Returns:
      A tree for `hf.save` and `rounding_change`, of the shape `merged_config`. It holds no arrays
      but those of its arguments, and lm_head in float32 where that has an adapter.
    """
    layers = jax.tree.map(
        lambda x: DequantizedKernel(x) if isinstance(x, QuantizedKernel) else x,
        base["layers"],
        is_leaf=is_quantized,
    )
    merged = {**base, "layers": layers}
    for name, adapter in lora.by_target(adapters).items():
        merged = lora.with_kernel(merged, name, MergedKernel(lora.kernel(merged, name), adapter))
    return merged


def merged_config(config: LlamaConfig, merged: PyTree) -> LlamaConfig:
    """The shape of what `merge` returned, given that of the base."""
    return replace(config, tie_word_embeddings="lm_head" not in merged)


def rounding_change(config: LlamaConfig, weights: PyTree, dtype: DTypeLike) -> tuple[float, float]:
    """How far the logits move when the weights are rounded.

    One row of `TOKENS` fixed ids, spread over the vocabulary, goes through the weights in float32
    and through the weights rounded to `dtype`, both computed in float32; layer by layer, so that
    one layer in float32 is all that is held beside the weights.

    Args:
      config: the model's shape.
      weights: a tree as of `merge`, or a base.
      dtype: bfloat16, float16 or float32, in whose range all weights lie.

    Returns:
      The largest absolute difference of two logits, and the largest absolute float32 logit.
    """
    dtype = numpy_dtype(dtype)

    def rounded(x: np.ndarray) -> np.ndarray:
        return x.astype(dtype).astype(np.float32)

    # A one-layer model whose embedding table is the states so far reads row t at position t.
    one = Llama(replace(config, num_hidden_layers=1, vocab_size=TOKENS), jnp.float32)
    positions = jnp.arange(TOKENS)[None]

    @jax.jit
    def through(layer: PyTree, states: jax.Array) -> jax.Array:
        params = {"embed_tokens": {"embedding": states}, "layers": layer}
        return one.apply({"params": params}, positions, method="hidden")[0]

    tokens = np.arange(TOKENS) * 7919 % config.vocab_size  # a prime, so that they spread
    first = np.asarray(weights["embed_tokens"]["embedding"][tokens], np.float32)
    states = [jnp.asarray(first), jnp.asarray(rounded(first))]
    for i in range(config.num_hidden_layers):
        layer = jax.tree.map(
            lambda leaf, i=i: np.asarray(leaf[i], np.float32)[None], weights["layers"]
        )
        states[0] = through(layer, states[0])
        states[1] = through(jax.tree.map(rounded, layer), states[1])

    outer = {name: tree for name, tree in weights.items() if name != "layers"}
    logits = []
    for x, cast in zip(states, (np.asarray, rounded), strict=True):
        params = jax.tree.map(
            lambda leaf, cast=cast: jnp.asarray(cast(np.asarray(leaf, np.float32))), outer
        )
        head = Llama(config, jnp.float32).apply({"params": params}, x[None], method="head")
        logits.append(np.asarray(head))
    return float(np.abs(logits[0] - logits[1]).max()), float(np.abs(logits[0]).max())
