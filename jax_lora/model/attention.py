"""Causal attention, by name: what runs everywhere, and the fused kernels of NVIDIA and TPU.

Shapes: q (B, K, G, T, H), k and v (B, K, T, H), the result as q; `segments` (B, T) or None. A
token sees those of its own segment up to itself. Softmax in float32, scores scaled by 1/√H.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jax_lora.errors import ConfigError
from jax_lora.model.xla_cpu import einsum


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def softmax_mix(
    platform: str,
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    visible: Bool[Array, "#B T S"],
) -> Float[Array, "B K G T H"]:
    """Attention with an explicit mask, the scores of all pairs in memory.

    The result is divided by the sum of the softmax, not the scores: it has H columns instead of
    S. The backward pass computes the scores again, and takes the sum over S that the gradient of
    the softmax needs over H (Dao et al. 2022, arXiv:2205.14135, section B.4): a long row leaves
    no T × S array behind.
    """
    return _softmax_mix_forward(platform, q, k, v, visible)[0]


def _exp_scores(platform, q, k, visible):
    # exp(score - the maximum of the row), (B, K, G, T, S) float32
    scores = einsum("bkgth,bksh->bkgts", jnp.float32, q, k, platform) * q.shape[-1] ** -0.5
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    return jnp.exp(scores - scores.max(axis=-1, keepdims=True))


def _softmax_mix_forward(platform, q, k, v, visible):
    exp_scores = _exp_scores(platform, q, k, visible)
    total = exp_scores.sum(axis=-1, keepdims=True)
    probs = exp_scores.astype(q.dtype)  # not normalized yet
    out = einsum("bkgts,bksh->bkgth", jnp.float32, probs, v, platform) / total
    return out.astype(q.dtype), (q, k, v, visible, total, out)


def _softmax_mix_backward(platform, saved, g):
    q, k, v, visible, total, out = saved
    product = partial(einsum, platform=platform)
    exp_scores, g = _exp_scores(platform, q, k, visible), g.astype(jnp.float32) / total
    inner = jnp.sum(g * out, axis=-1, keepdims=True)
    g = g.astype(q.dtype)
    dv = product("bkgts,bkgth->bksh", v.dtype, exp_scores.astype(q.dtype), g)
    ds = product("bkgth,bksh->bkgts", jnp.float32, g, v) - inner
    ds = (exp_scores * ds * q.shape[-1] ** -0.5).astype(q.dtype)
    dq = product("bkgts,bksh->bkgth", q.dtype, ds, k)
    dk = product("bkgts,bkgth->bksh", k.dtype, ds, q)
    return dq, dk, dv, None


softmax_mix.defvjp(_softmax_mix_forward, _softmax_mix_backward)


def xla(
    q: Array, k: Array, v: Array, segments: Int[Array, "B T"] | None, *, platform: str
) -> Array:
    """`softmax_mix` under the causal mask: any platform and dtype.

    Long rows are split into 2, 4 or 8 parts, each with the keys up to its own end: little more
    than half of the work and memory.
    """
    t = q.shape[3]
    size = next((t // n for n in (8, 4, 2) if t % n == 0 and t // n >= 128), t)
    parts = []
    for start in range(0, t, size):
        rows, keys = slice(start, start + size), slice(0, start + size)
        visible = jnp.tril(jnp.ones((size, start + size), bool), k=start)[None]
        if segments is not None:
            visible = visible & (segments[:, rows, None] == segments[:, None, keys])
        part = (q[..., rows, :], k[..., keys, :], v[..., keys, :], visible)
        parts.append(softmax_mix(platform, *part))
    return jnp.concatenate(parts, axis=3)


def cudnn(q: Array, k: Array, v: Array, segments: Int[Array, "B T"] | None) -> Array:
    """cuDNN's fused attention through `jax.nn.dot_product_attention`: NVIDIA, 16-bit, H ≤ 128.

    Packed rows give it their mask as a bias, (B, 1, T, T).
    """
    b, kv, g, t, h = q.shape
    rows = q.reshape(b, kv * g, t, h).transpose(0, 2, 1, 3)
    mask = None
    if segments is not None:
        mask = (segments[:, :, None] == segments[:, None, :])[:, None]
    out = jax.nn.dot_product_attention(
        rows,
        k.transpose(0, 2, 1, 3),
        v.transpose(0, 2, 1, 3),
        mask=mask,
        is_causal=True,
        implementation="cudnn",
    )
    return out.transpose(0, 2, 1, 3).reshape(q.shape)


def flash(q: Array, k: Array, v: Array, segments: Int[Array, "B T"] | None) -> Array:
    """The Pallas flash attention that jax ships for TPU; T a multiple of 128, one chip."""
    from jax.experimental.pallas.ops.tpu import flash_attention as pallas

    b, kv, g, t, h = q.shape
    ids = None if segments is None else pallas.SegmentIds(segments, segments)
    wide = partial(jnp.repeat, repeats=g, axis=1)
    out = pallas.flash_attention(
        q.reshape(b, kv * g, t, h),
        wide(k),
        wide(v),
        segment_ids=ids,
        causal=True,
        sm_scale=h**-0.5,
    )
    return out.reshape(q.shape)


Kernel = Callable[[Array, Array, Array, Array | None], Array]
KERNELS: dict[str, Callable[..., Array]] = {"xla": xla, "cudnn": cudnn, "flash": flash}


@lru_cache  # the same object for the same name: kernels are static arguments of jit
def kernel(which: str | Kernel, platform: str) -> Kernel:
    """The kernel of that name for a platform; a kernel is returned as it is."""
    if callable(which):
        return which
    return partial(xla, platform=platform) if which == "xla" else KERNELS[which]


def best(platform: str, dtype: DTypeLike, head_dim: int, lengths: Sequence[int] = ()) -> str:
    """The fastest kernel that can run there, see `check`."""
    for name in ("cudnn", "flash"):
        try:
            check(name, platform, dtype, head_dim, lengths)
        except ValueError:
            continue
        return name
    return "xla"


def check(
    name: str, platform: str, dtype: DTypeLike, head_dim: int, lengths: Sequence[int] = ()
) -> None:
    """Make sure that a kernel can run.

    Args:
      name: among `KERNELS`.
      platform: "cpu", "gpu"/"cuda" or "tpu".
      dtype: of the activations.
      head_dim: H.
      lengths: T of every shape of rows.

    Raises:
      ValueError: an unknown name; another platform, dtype or length than the kernel's.
    """
    if name not in KERNELS:
        raise ConfigError(f"attention: found {name!r}, expected one of {', '.join(KERNELS)}")
    wanted = {"cudnn": ("gpu", "cuda"), "flash": ("tpu",)}.get(name)
    if wanted and platform not in wanted:
        raise ConfigError(
            f"attention: {name!r} needs {wanted[0]}, found {platform}; expected 'xla'"
        )
    if name == "cudnn" and (jnp.dtype(dtype).itemsize != 2 or head_dim > 128):
        raise ConfigError(
            f"attention: 'cudnn' needs 16-bit numbers and heads of at most 128, found "
            f"{jnp.dtype(dtype).name} and {head_dim}; expected 'xla'"
        )
    if name == "flash" and any(length % 128 for length in lengths):
        raise ConfigError(
            f"attention: 'flash' needs rows of multiples of 128 tokens, found {tuple(lengths)}; "
            "expected 'xla' or other buckets"
        )
