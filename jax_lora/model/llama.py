"""LLaMA as a thin Flax Linen module over plain dicts (Touvron et al. 2023, arXiv:2302.13971).

    Llama(config).apply({"params": base, "lora": adapters}, tokens)  →  logits (B, T, V)

The layers are stacked and scanned, so that compile time does not grow with depth. The `lora`
collection is optional and may hold any subset of the linear layers: a `Dense` adds the low-rank
update where the collection has its name, and the module itself knows no rank.

Letters in shapes: B batch, T tokens, S cached tokens, D model, N query heads, K kv heads,
G = N/K query heads a kv head, H head size, F mlp, V vocabulary, L layers, R rank.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jax_lora.model.config import LINEAR, LlamaConfig
from jax_lora.model.rope import rope_tables, rotate

REMAT = ("none", "full")
_INIT = nn.initializers.normal(0.02)


class Dropout(NamedTuple):
    """Dropout on the input of A. `keys`: (B,) one key an example, `rate`: scalar in [0, 1)."""

    keys: Key[Array, " B"]
    rate: Float[Array, ""]


class Cache(NamedTuple):
    """Keys and values of earlier tokens, and where the next ones go.

    `k`, `v`: (B, K, S, H) of one layer. `slot`: scalar, the first slot to write. `visible`:
    (B, S), the slots that each row may attend to, the new one included.
    """

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]
    slot: Int[Array, ""]
    visible: Bool[Array, "B S"]


def contract(spec: str, dtype: Any, x: Array, w: Array) -> Array:
    """`einsum(spec, x, w)` in x's dtype, accumulated in float32, returned in `dtype`.

    A gradient of its own, because the automatic one multiplies mixed dtypes and rounds the
    gradient of a float32 master weight to bfloat16. Every index of `spec` must occur in two of
    its three terms.
    """
    product: Any = _contract(spec, dtype, x, w)
    return product


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _contract(spec: str, dtype: Any, x: Array, w: Array) -> Array:
    return _einsum(spec, x, w.astype(x.dtype), dtype)


def _einsum(spec: str, a: Array, b: Array, dtype: Any) -> Array:
    # XLA's CPU compiler reaches the bfloat16 matrix units only through a float32 result
    # (benchmarks/cpu_products.py: five times faster). GPUs and TPUs accumulate in float32
    # whatever the result's dtype, and a float32 result would cost them a pass over memory.
    inner = jnp.float32 if jax.default_backend() == "cpu" else dtype
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    out = jnp.einsum(spec, a, b, precision=precision, preferred_element_type=inner)
    return out.astype(dtype)


def _contract_forward(spec, dtype, x, w):
    return _contract(spec, dtype, x, w), (x, w)


def _contract_backward(spec, dtype, saved, g):
    x, w = saved
    terms, out = spec.split("->")
    xs, ws = terms.split(",")
    g = g.astype(x.dtype)
    dx = _einsum(f"{out},{ws}->{xs}", g, w.astype(x.dtype), x.dtype)
    dw = _einsum(f"{xs},{out}->{ws}", x, g, w.dtype)
    return dx, dw


_contract.defvjp(_contract_forward, _contract_backward)


class Dense(nn.Module):
    """x W (+ bias) + scale · dropout(x) A B, the last where the `lora` collection has A and B."""

    name_in_block: str
    features: int
    use_bias: bool

    @nn.compact
    def __call__(self, x: Array, layer: Array, dropout: Dropout | None) -> Array:
        kernel = self.param("kernel", _INIT, (x.shape[-1], self.features))
        y = contract("btd,df->btf", x.dtype, x, kernel)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(x.dtype)
        if self.has_variable("lora", "a"):
            a, b, scale = (self.get_variable("lora", leaf) for leaf in ("a", "b", "scale"))
            if dropout is not None:
                x = _dropped(x, dropout, layer * len(LINEAR) + LINEAR.index(self.name_in_block))
            low = contract("btd,dr->btr", x.dtype, x, a)
            update = contract("btr,rf->btf", x.dtype, low, b)
            y = y + update * scale.astype(x.dtype)
        return y


def _dropped(x: Array, dropout: Dropout, place: Array) -> Array:
    # One key an example, folded with the place in the network: how a batch is cut into
    # micro-batches or padded cannot change an example's mask.
    keep = 1.0 - dropout.rate
    keys = jax.vmap(jax.random.fold_in, (0, None))(dropout.keys, place)
    mask = jax.vmap(lambda key: jax.random.bernoulli(key, keep, x.shape[1:]))(keys)
    return jnp.where(mask, x / keep.astype(x.dtype), jnp.zeros((), x.dtype))


class RMSNorm(nn.Module):
    """x / rms(x) · scale, the quotient in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        return scale.astype(x.dtype) * wide.astype(x.dtype)


class Attention(nn.Module):
    """Causal attention with grouped kv heads; softmax in float32."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x, layer, rope, cache: Cache | None, dropout: Dropout | None):
        c = self.config
        b, t, _ = x.shape
        n, k, h = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        dense = partial(Dense, use_bias=c.attention_bias)

        def project(name: str, features: int, y: Array) -> Any:
            return dense(name, features, name=name)(y, layer, dropout)

        # Heads go before tokens, (B, K, G, T, H) and (B, K, S, H): batched matrix products on a
        # CPU are twice as fast so (benchmarks/cpu_products.py), and GPUs transpose to it anyway.
        q = project("q_proj", n * h, x).reshape(b, t, k, n // k, h).transpose(0, 2, 3, 1, 4)
        keys = project("k_proj", k * h, x).reshape(b, t, k, h).transpose(0, 2, 1, 3)
        values = project("v_proj", k * h, x).reshape(b, t, k, h).transpose(0, 2, 1, 3)
        q, keys = rotate(q, *rope), rotate(keys, *rope)
        if cache is None:
            visible = jnp.tril(jnp.ones((t, t), bool))[None]  # (1, T, S = T)
        else:
            at = (0, 0, cache.slot, 0)
            keys = jax.lax.dynamic_update_slice(cache.k, keys, at)
            values = jax.lax.dynamic_update_slice(cache.v, values, at)
            visible = cache.visible[:, None, :]  # (B, T = 1, S)
        scores = contract("bkgth,bksh->bkgts", jnp.float32, q, keys) * h**-0.5
        scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        mixed = contract("bkgts,bksh->bkgth", x.dtype, weights, values)
        mixed = mixed.transpose(0, 3, 1, 2, 4).reshape(b, t, n * h)
        return project("o_proj", c.hidden_size, mixed), (keys, values)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: Array, layer: Array, dropout: Dropout | None) -> Array:
        c = self.config
        dense = partial(Dense, use_bias=c.mlp_bias)
        gate = dense("gate_proj", c.intermediate_size, name="gate_proj")(x, layer, dropout)
        up = dense("up_proj", c.intermediate_size, name="up_proj")(x, layer, dropout)
        return dense("down_proj", c.hidden_size, name="down_proj")(
            nn.silu(gate) * up, layer, dropout
        )


class Block(nn.Module):
    """One layer: the states after it, and the keys and values it attended to if `keep_kv`.

    `layer` is its number, `rope` the tables of `rope_tables`, `cache` what it attended to
    before (then T = 1) or None.
    """

    config: LlamaConfig
    keep_kv: bool

    @nn.compact
    def __call__(self, x, layer, rope, cache: Cache | None, dropout: Dropout | None):
        c = self.config
        normed = RMSNorm(c.rms_norm_eps, name="input_layernorm")(x)
        attended, kv = Attention(c, name="self_attn")(normed, layer, rope, cache, dropout)
        x = x + attended
        normed = RMSNorm(c.rms_norm_eps, name="post_attention_layernorm")(x)
        x = x + MLP(c, name="mlp")(normed, layer, dropout)
        return x, kv if self.keep_kv else None


class Llama(nn.Module):
    """A LLaMA of any family and size.

    Attributes:
      config: its shape.
      dtype: of the activations and matrix products; parameters keep their own.
      remat: "none" keeps every activation for the backward pass, "full" recomputes each layer.
      unroll: layers a step of the scan; more compiles longer and, on a CPU, runs faster.
      keep_kv: `hidden` also returns the keys and values of all layers (for a prefill).
    """

    config: LlamaConfig
    dtype: Any = jnp.bfloat16
    remat: str = "none"
    unroll: int = 1
    keep_kv: bool = False

    if TYPE_CHECKING:  # Linen's own is a union of everything that any module may return

        def apply(self, *args: Any, **options: Any) -> Any: ...

    def setup(self):
        c = self.config
        if self.remat not in REMAT:
            raise ValueError(f"remat: found {self.remat!r}, expected one of {', '.join(REMAT)}")
        self.embed_tokens = nn.Embed(c.vocab_size, c.hidden_size, embedding_init=_INIT)
        block = nn.remat(Block, prevent_cse=False) if self.remat == "full" else Block
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),  # pyright: ignore
            length=c.num_hidden_layers,
            unroll=self.unroll,
        )(c, self.keep_kv)
        self.norm = RMSNorm(c.rms_norm_eps)
        if not c.tie_word_embeddings:
            self.lm_head = _Head(c.vocab_size)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What the first layer reads."""
        return self.embed_tokens(tokens).astype(self.dtype)

    def hidden(
        self, tokens: Int[Array, "B T"], dropout: Dropout | None = None
    ) -> tuple[Float[Array, "B T D"], Any]:
        """States after the last layer, under a causal mask.

        Args:
          tokens: (B, T) ids, each row starting at its first token; what follows a row's end
            cannot influence it.
          dropout: on the adapters' input; None is off.

        Returns:
          The states (B, T, D), not yet normed, and where `keep_kv` is set the keys and values of
          all layers, each (L, B, K, T, H), else None.
        """
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        rope = rope_tables(self.config, positions)
        layers = jnp.arange(self.config.num_hidden_layers)
        return self.layers(self.embed(tokens), layers, rope, None, dropout)

    def head(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits in float32: the final norm and the vocabulary product."""
        hidden = self.norm(hidden)
        if self.config.tie_word_embeddings:
            return contract("btd,vd->btv", jnp.float32, hidden, self.embed_tokens.embedding)
        return self.lm_head(hidden)

    def __call__(
        self, tokens: Int[Array, "B T"], dropout: Dropout | None = None
    ) -> Float[Array, "B T V"]:
        """Logits in float32 of every position."""
        return self.head(self.hidden(tokens, dropout)[0])


class _Head(nn.Module):
    vocab_size: int

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        kernel = self.param("kernel", _INIT, (hidden.shape[-1], self.vocab_size))
        return contract("btd,dv->btv", jnp.float32, hidden, kernel)
