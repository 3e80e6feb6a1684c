"""Dropout whose mask depends on the token alone, not on how a batch is cut, padded or packed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jax_lora.errors import ConfigError

RESOLUTION = 2**16  # a rate is rounded to a multiple of 1/RESOLUTION


@partial(jax.tree_util.register_dataclass, data_fields=["keys"], meta_fields=["rate"])
@dataclass(frozen=True)
class Dropout:
    """Dropout on the input of A.

    Attributes:
      keys: one per token. In training they are the seed's, into which the step, the number of the
        example in the global batch and the position in the example are folded
        (`step._dropout_keys`); `drop` folds in the linear layer.
      rate: in [0, 1).
    """

    keys: Key[Array, "B T"]
    rate: float


def keep_threshold(rate: float) -> int:
    """The number of values of 16 random bits, out of `RESOLUTION`, that keep an element.

    Raises:
      ConfigError: a rate outside [0, 1), or so near 1 that nothing would be kept.
    """
    threshold = round((1.0 - rate) * RESOLUTION) if 0.0 <= rate < 1.0 else 0
    if threshold == 0:
        raise ConfigError(
            f"lora dropout: found {rate}, expected 0 <= rate < 1 - {1 / (2 * RESOLUTION):.3g}"
        )
    return threshold


def drop(
    x: Float[Array, "B T D"], dropout: Dropout, linear_index: Int[Array, ""] | int
) -> Float[Array, "B T D"]:
    """Dropout of activations.

    Args:
      x: the activations.
      dropout: the keys and the rate.
      linear_index: the number of this linear layer in the network, folded into every key.

    Returns:
      x / (1 - rate) where an element is kept, -0 where it is dropped. A rate below 2^-17 is
      rounded to 0.
    """
    threshold = keep_threshold(dropout.rate)
    if threshold == RESOLUTION:
        return x
    d = x.shape[-1]

    # Sixteen random bits per element are enough, and half the work of threefry.
    def random_bits(key):
        words = jax.random.bits(jax.random.fold_in(key, linear_index), (-(-d // 2),), jnp.uint32)
        return jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)[:d]

    return apply_mask(x, jax.vmap(jax.vmap(random_bits))(dropout.keys), threshold)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def apply_mask(x: Array, bits: Array, threshold: int) -> Array:
    """x · RESOLUTION / threshold where bits < threshold, -0 elsewhere; threshold < RESOLUTION.

    What is dropped becomes -0 and nothing else does, so that the result, which the following
    matrix product saves for its own gradient, is also the mask: no other one is stored.
    """
    scaled = _divided(x, threshold)
    scaled = jnp.where(scaled == 0, 0, scaled)
    return jnp.where(bits < threshold, scaled, -jnp.zeros((), x.dtype))


def _apply_mask_forward(x, bits, threshold):
    out = apply_mask(x, bits, threshold)
    return out, out


def _apply_mask_backward(threshold, out, g):
    is_dropped = (out == 0) & jnp.signbit(out)
    return jnp.where(is_dropped, 0, _divided(g, threshold)), None


def _divided(x: Array, threshold: int) -> Array:
    # In float32, as PyTorch does: rounded to bfloat16, 0.95 would make all that is kept 0.08% too
    # large.
    return (x.astype(jnp.float32) / (threshold / RESOLUTION)).astype(x.dtype)


apply_mask.defvjp(_apply_mask_forward, _apply_mask_backward)
