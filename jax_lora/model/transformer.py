"""LLaMA as a thin Flax Linen module over plain dicts (Touvron et al. 2023, arXiv:2302.13971),
with the flags in which Mistral and Qwen differ (see `families`).

    Llama(config).apply({"params": base, "lora": adapters}, tokens)  →  logits (B, T, V)

The layers are stacked and scanned, so that compile time does not grow with depth. The `lora`
collection is optional and may hold any subset of the linear layers: a `Dense` adds the low-rank
update where the collection has its name, and the module itself knows no rank.

Letters in shapes: B batch, T tokens, S cached tokens, D model, N query heads, K kv heads,
G = N/K query heads per kv head, H head size, F mlp, V vocabulary, L layers, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from jax_lora.errors import ConfigError
from jax_lora.model import arch, attention
from jax_lora.model.attention import Kernel
from jax_lora.model.config import LlamaConfig
from jax_lora.model.dropout import Dropout, drop
from jax_lora.model.kv_cache import Cache
from jax_lora.model.quantization import QuantizedKernel, as_float
from jax_lora.model.quantization import product as quantized_product
from jax_lora.model.rope import rope_tables, rotate
from jax_lora.model.xla_cpu import (
    checkpoint_name,
    einsum,
    lookup,
    matmul_transposed,
)

# What the backward pass recomputes: nothing; whole layers; layers but for the results of their
# linear layers' products with frozen kernels and of attention, the expensive ones.
REMAT = ("none", "full", "products")
_INIT = nn.initializers.normal(0.02)
Tokens = Int[Array | np.ndarray, "B T"]  # ids, not necessarily on the device yet
# Constrains the sharding of an activation, or of a B (R, out): (x, logical axis of every dimension)
# → x. The axes: "batch" (rows), "embed" (D), "heads" (N, or N·H), "kv_heads" (K, or K·H), "mlp"
# (F), "vocab" (V), None for any other; those at the end may be left out.
ShardActivation = Callable[..., Array]


class Positions(NamedTuple):
    """The positions of the tokens: the rotary tables (cos, sin), each (B, T, H/2), and in packed
    rows `segments` (B, T), equal within an example, else None."""

    rope: tuple[Array, Array]
    segments: Int[Array, "B T"] | None


class _Linear(nn.Module):
    """What all linear layers have: the low-rank update where the `lora` collection has one.

    LoRA (Hu et al. 2021): x W + s · dropout(x) A B. Where the collection holds `delta`, the
    product s A B materialized beforehand, in place of `a`, `b`, `scale`: x W + dropout(x) delta.
    DoRA (Liu et al. 2024, arXiv:2402.09353), where it has `m`: g ⊙ (x W + s · dropout(x) A B)
    with g = m / ‖W + s A B‖, one norm per output, taken as a constant; like PEFT, the correction
    (g - 1) x W goes through the same dropout and the bias stays outside.

    `target`: its name in `arch`. `transposed`: the kernel is stored (out, in), which is faster when
    decoding on a CPU, see `matmul_transposed`. A quantized one never is.
    """

    target: str
    config: LlamaConfig
    shard_activation: ShardActivation
    transposed: bool
    platform: str

    def _has_adapter(self) -> bool:
        return self.has_variable("lora", "a") or self.has_variable("lora", "delta")

    def _adapted(
        self, y: Array, x: Array, kernel: PyTree, layer: Array | int, dropout: Dropout | None
    ) -> Array:
        """y = x W, a bias left out, with the update. `kernel`: W (in, out), however it is stored;
        `layer`: the index of the block, or the number of blocks for lm_head, which has none."""
        *_, in_axis, out_axis, _ = arch.BY_NAME[self.target]
        base = y
        if dropout is not None:
            linear_index = layer * len(arch.LINEAR_NAMES) + arch.TARGETS.index(self.target)
            x = drop(x, dropout, linear_index)
            x = self.shard_activation(x, "batch", None, in_axis)
        update, delta = self._update(x, out_axis, y.dtype)
        if not self.has_variable("lora", "m"):
            return y + update
        if dropout is not None:
            base = self._product(x, kernel, y.dtype)
        if isinstance(kernel, QuantizedKernel):
            kernel = kernel.gathered(self.shard_activation, (in_axis, out_axis))
        wide = as_float(kernel, x.dtype).astype(jnp.float32) + delta()
        norm = jax.lax.stop_gradient(jnp.linalg.norm(wide, axis=0))
        gain = self._leaf("m") / norm
        return y + (gain - 1).astype(x.dtype) * base + gain.astype(x.dtype) * update

    def _leaf(self, name: str) -> Array:
        leaf = jnp.asarray(self.get_variable("lora", name))
        return leaf if arch.BY_NAME[self.target].group else leaf[0]

    def _product(self, x: Array, kernel: Array | QuantizedKernel, dtype: DTypeLike) -> Array:
        if isinstance(kernel, QuantizedKernel):
            axes = arch.BY_NAME[self.target][2:4]
            return quantized_product(self.platform, self.shard_activation, axes, x, kernel)
        return einsum("btd,df->btf", dtype, x, kernel, self.platform)

    def _update(
        self, x: Array, out_axis: str, dtype: DTypeLike
    ) -> tuple[Array, Callable[[], Array]]:
        """The update of the outputs, and a function that computes the update of the kernel."""
        if self.has_variable("lora", "delta"):
            delta = self._leaf("delta")
            return einsum("btd,df->btf", dtype, x, delta, self.platform), lambda: delta
        a, b, scale = (self._leaf(name) for name in ("a", "b", "scale"))
        b = self.shard_activation(b, None, out_axis)
        # The scale multiplies the R numbers of a token, which are fewer than its outputs.
        low = einsum("btd,dr->btr", x.dtype, x, a, self.platform)
        low = (low.astype(jnp.float32) * scale).astype(x.dtype)  # a scale of 2/3 would be rounded
        return einsum("btr,rf->btf", dtype, low, b, self.platform), lambda: scale * (a @ b)


class Dense(_Linear):
    """A linear layer of a block: x W (+ bias)."""

    @nn.compact
    def __call__(self, x: Array, layer: Array | int, dropout: Dropout | None) -> Array:
        *_, in_axis, out_axis, _ = arch.BY_NAME[self.target]
        features = self.config.size(out_axis)
        x = self.shard_activation(x, "batch", None, in_axis)
        kernel = self.get_variable("params", "kernel")
        if isinstance(kernel, QuantizedKernel):
            y = checkpoint_name(self._product(x, kernel, x.dtype), "product", self.platform)
        elif self.transposed:
            kernel = self.param("kernel", _INIT, (features, x.shape[-1]))
            y = matmul_transposed(x.dtype, x, kernel, self.platform)
            kernel = kernel.T
        else:
            kernel = self.param("kernel", _INIT, (x.shape[-1], features))
            y = checkpoint_name(self._product(x, kernel, x.dtype), "product", self.platform)
        if self._has_adapter():
            y = self._adapted(y, x, kernel, layer, dropout)
        if self.target in self.config.biases:
            bias = self.param("bias", nn.initializers.zeros, (features,))
            y = y + bias.astype(x.dtype)
        return self.shard_activation(y, "batch", None, out_axis)


class RMSNorm(nn.Module):
    """x / rms(x) · scale, the quotient in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return _rms_norm(x, self.param("scale", nn.initializers.ones, (x.shape[-1],)), self.eps)


# What is cheap is computed again in the backward pass, whatever the policy: saving it would cost
# more memory traffic than computing it.
@partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def _rms_norm(x: Array, scale: Array, eps: float) -> Array:
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)
    return scale.astype(x.dtype) * wide.astype(x.dtype)


@partial(jax.checkpoint, prevent_cse=False)
def _swiglu(gate: Array, up: Array) -> Array:
    return nn.silu(gate) * up


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: LlamaConfig
    kernel: str | Kernel
    dense: Callable[..., Dense]
    shard_activation: ShardActivation
    platform: str

    @nn.compact
    def __call__(
        self, x, layer, positions: Positions, cache: Cache | None, dropout: Dropout | None
    ):
        c = self.config
        b, t, _ = x.shape
        n, k, h = c.num_attention_heads, c.num_key_value_heads, c.head_dim

        def project(name: str, y: Array) -> Array:
            y = self.dense(name, name=name)(y, layer, dropout)
            # At one row a TPU's compiler would else derive the layout of the kernels from the
            # transposed heads, and copy those of all layers: 3 GiB of LLaMA-7B.
            return jax.lax.optimization_barrier(y) if self.platform == "tpu" else y

        # Heads go before tokens, (B, K, G, T, H) and (B, K, S, H): batched matrix products on a
        # CPU are twice as fast so (benchmarks/cpu_products.py), and GPUs transpose to it anyway.
        q = project("q_proj", x).reshape(b, t, k, n // k, h).transpose(0, 2, 3, 1, 4)
        keys = project("k_proj", x).reshape(b, t, k, h).transpose(0, 2, 1, 3)
        values = project("v_proj", x).reshape(b, t, k, h).transpose(0, 2, 1, 3)
        if c.qk_norm:
            q = RMSNorm(c.rms_norm_eps, name="q_norm")(q)
            keys = RMSNorm(c.rms_norm_eps, name="k_norm")(keys)
        q, keys = rotate(q, *positions.rope), rotate(keys, *positions.rope)
        if cache is None:
            attend = attention.kernel(self.kernel, self.platform)
            mixed, updated = attend(q, keys, values, positions.segments), None
        else:
            # Without these the partitioner communicates the cache where `tensor` does not divide K.
            q, keys, values = (
                self.shard_activation(x, "batch", "kv_heads") for x in (q, keys, values)
            )
            mixed, updated = cache.attend(q, keys, values, self.platform)
            updated = tuple(self.shard_activation(x, "batch", "kv_heads") for x in updated)
        mixed = checkpoint_name(mixed, "product", self.platform)
        mixed = mixed.transpose(0, 3, 1, 2, 4).reshape(b, t, n * h)
        return project("o_proj", mixed), updated


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    dense: Callable[..., Dense]

    @nn.compact
    def __call__(self, x: Array, layer: Array | int, dropout: Dropout | None) -> Array:
        gate, up, down = (self.dense(name, name=name) for name in arch.MLP)
        return down(_swiglu(gate(x, layer, dropout), up(x, layer, dropout)), layer, dropout)


def _unsharded(x: Array, *axes: str | None) -> Array:
    return x


class Block(nn.Module):
    """One layer: the states after it, and its updated keys and values, or None without a cache.

    `layer` is its number; `transposed`: all kernels are stored (out, in).
    """

    config: LlamaConfig
    attention: str | Kernel
    shard_activation: ShardActivation
    transposed: bool
    platform: str

    @nn.compact
    def __call__(
        self, x, layer, positions: Positions, cache: Cache | None, dropout: Dropout | None
    ):
        c = self.config
        shard, platform = self.shard_activation, self.platform
        dense = partial(
            Dense,
            config=c,
            shard_activation=shard,
            transposed=self.transposed,
            platform=platform,
        )
        if platform == "cpu":  # what every remat policy saves, see `checkpoint_name`
            x = checkpoint_name(x, "states", platform)
        normed = RMSNorm(c.rms_norm_eps, name="input_layernorm")(x)
        attend = Attention(c, self.attention, dense, shard, platform, name="self_attn")
        attended, updated = attend(normed, layer, positions, cache, dropout)
        x = x + attended
        normed = RMSNorm(c.rms_norm_eps, name="post_attention_layernorm")(x)
        x = x + MLP(dense, name="mlp")(normed, layer, dropout)
        return x, updated


def positions(tokens: Tokens, segments: Int[Array, "B T"] | None) -> Int[Array, "B T"]:
    """The position of each token in its row, or in its segment."""
    count = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    if segments is None:
        return count
    is_first = segments != jnp.roll(segments, 1, axis=1)
    is_first = is_first.at[:, 0].set(True)
    return count - jax.lax.cummax(jnp.where(is_first, count, 0), axis=1)


class Llama(nn.Module):
    """A model of LLaMA's shape, of any family and size.

    Attributes:
      config: its shape.
      dtype: of the activations and matrix products; parameters keep their own.
      remat: what the backward pass recomputes, see `REMAT`.
      attention: without a cache, among `attention.KERNELS`; or a kernel itself.
      unroll: layers per iteration of the scan; all of them compile longer and run faster. With
        `remat` on a CPU, leave 1: unrolled, its compiler finds what the backward pass would
        compute again, and keeps it.
      shard_activation: constrains the sharding of activations, see `jax_lora.sharding.Activations`.
      transposed: the head's kernel is stored (V, D), see `matmul_transposed`; for decoding.
      platform: that the program will run on: "cpu", "gpu"/"cuda" or "tpu"; by default JAX's
        backend when the module is made. It belongs to the module, so that `jax.jit` with the
        module as a static argument compiles a program for each platform.
    """

    config: LlamaConfig
    dtype: DTypeLike = jnp.bfloat16
    remat: str = "none"
    attention: str | Kernel = "xla"
    unroll: int = 1
    shard_activation: ShardActivation = _unsharded
    transposed: bool = False
    platform: str = field(default_factory=jax.default_backend)

    if TYPE_CHECKING:  # Linen's own is a union of everything that any module may return

        def apply(self, *args: PyTree, **options: object) -> PyTree: ...

    def setup(self):
        c = self.config
        if self.remat not in REMAT:
            raise ConfigError(f"remat: found {self.remat!r}, expected one of {', '.join(REMAT)}")
        self.embed_tokens = nn.Embed(c.vocab_size, c.hidden_size, embedding_init=_INIT)
        block: PyTree = Block
        if self.remat != "none":
            names = ("states", "product") if self.remat == "products" else ("states",)
            policy = jax.checkpoint_policies.save_only_these_names(*names)
            # Without a loop XLA would find what the backward pass computes again, but for this.
            unrolled = self.unroll >= c.num_hidden_layers
            block = nn.remat(Block, prevent_cse=unrolled, policy=policy)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),  # pyright: ignore
            length=c.num_hidden_layers,
            unroll=self.unroll,
        )(c, self.attention, self.shard_activation, False, self.platform)
        self.norm = RMSNorm(c.rms_norm_eps)
        self.lm_head = _Head("lm_head", c, self.shard_activation, self.transposed, self.platform)

    def embed(self, tokens: Tokens) -> Float[Array, "B T D"]:
        """Embeddings of the tokens, the input of the first layer."""
        x = lookup(self.embed_tokens.embedding, jnp.asarray(tokens), self.platform)
        return self.shard_activation(x.astype(self.dtype), "batch", None, "embed")

    def hidden(
        self,
        tokens: Tokens,
        dropout: Dropout | None = None,
        segments: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """States after the last layer, under a causal mask.

        Args:
          tokens: (B, T) ids, each row starting at its first token; the padding behind its
            end cannot influence it.
          dropout: on the adapters' input; None is off.
          segments: (B, T) in rows that hold several examples: equal within an example, which
            attends to itself only and counts its positions from 0.

        Returns:
          The states (B, T, D), not yet normed.

        Raises:
          ConfigError: rows longer than the model's sliding window.
        """
        self.config.check_length(tokens.shape[1])
        rope = rope_tables(self.config, positions(tokens, segments))
        layers = jnp.arange(self.config.num_hidden_layers)
        return self.layers(self.embed(tokens), layers, Positions(rope, segments), None, dropout)[0]

    def head(
        self, hidden: Float[Array, "B T D"], dropout: Dropout | None = None
    ) -> Float[Array, "B T V"]:
        """Logits in float32: the final norm and the vocabulary product.

        `dropout`: as for `hidden`, on the input of the head's adapter.
        """
        tied = self.config.tie_word_embeddings
        table = self.embed_tokens.embedding if tied else None
        return self.lm_head(self.norm(hidden), table, dropout)

    def __call__(self, tokens: Tokens, dropout: Dropout | None = None) -> Float[Array, "B T V"]:
        """Logits in float32 of every position."""
        return self.head(self.hidden(tokens, dropout), dropout)


class _Head(_Linear):
    """The product with the vocabulary. `table`: the embeddings (V, D) where the two are tied."""

    @nn.compact
    def __call__(self, hidden: Array, table: Array | None, dropout: Dropout | None) -> Array:
        hidden = self.shard_activation(hidden, "batch", None, "embed")
        sides = (hidden.shape[-1], self.config.vocab_size)
        is_transposed, kernel = self.transposed or table is not None, table
        if kernel is None:
            kernel = self.param("kernel", _INIT, sides[::-1] if is_transposed else sides)
        if self.transposed:
            logits = matmul_transposed(jnp.float32, hidden, kernel, self.platform)
        elif is_transposed:
            logits = einsum("btd,vd->btv", jnp.float32, hidden, kernel, self.platform)
        else:
            logits = self._product(hidden, kernel, jnp.float32)
        if self._has_adapter():
            kernel = kernel.T if is_transposed else kernel
            layer = self.config.num_hidden_layers
            logits = self._adapted(logits, hidden, kernel, layer, dropout)
        return logits
