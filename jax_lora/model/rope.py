"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its scaled variants.

The formulas and their defaults are those of transformers' `modeling_rope_utils.py`, against
which the tests compare; the half-split convention is Hugging Face's `rotate_half`.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jax_lora.model.config import LlamaConfig, RopeScaling


def rope_tables(
    config: LlamaConfig, positions: Int[Array, "B T"], lengths: Int[Array, " B"] | None = None
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Cosines and sines of the rotation angles, float32.

    Args:
      config: gives the base, the head size and the scaling.
      positions: (B, T) index of every token in its own row.
      lengths: tokens of the rows, by default up to their last position; for dynamic scaling.

    Returns:
      cos and sin, each (B, T, H/2), already times the scaling's attention factor.
    """
    h, scaling = config.head_dim, config.rope_scaling
    exponents = np.arange(0, h, 2, dtype=np.float32) / np.float32(h)
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    amplitude = 1.0
    if scaling is None:
        table = jnp.asarray(frequencies)
    elif scaling.rope_type == "dynamic":
        # A row's own length decides, by default its padding included (transformers takes the
        # longest row of the batch).
        lengths = jnp.max(positions, axis=1) + 1 if lengths is None else lengths
        length = jnp.maximum(lengths, config.max_position_embeddings)
        stretch = scaling.factor * length / config.max_position_embeddings - (scaling.factor - 1)
        base = config.rope_theta * stretch ** (h / (h - 2))
        table = (1.0 / base[:, None] ** jnp.asarray(exponents))[:, None, :]
    else:
        frequencies, amplitude = _scaled(frequencies, scaling, config)
        table = jnp.asarray(frequencies, jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * table
    return jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude


def _scaled(frequencies: np.ndarray, scaling: RopeScaling, config: LlamaConfig):
    factor = scaling.factor
    if scaling.rope_type == "linear":
        return frequencies / factor, 1.0
    original = scaling.original_max_position_embeddings
    assert original is not None  # RopeScaling checks it
    if scaling.rope_type == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        assert low is not None and high is not None
        turns = original * frequencies / (2 * math.pi)  # over the pretraining length
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return (1 - smooth) * frequencies / factor + smooth * frequencies, 1.0
    # YaRN (Peng et al. 2023, arXiv:2309.00071): fast dimensions keep their frequency, slow ones
    # are interpolated, a linear ramp lies between.
    h = config.head_dim

    def dimension(turns: float) -> float:
        return h * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    first, last = dimension(scaling.beta_fast or 32), dimension(scaling.beta_slow or 1)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, h - 1)
    width = (last - first) or 0.001
    ramp = np.clip((np.arange(h // 2, dtype=np.float32) - first) / width, 0.0, 1.0)
    return frequencies / factor * ramp + frequencies * (1 - ramp), _yarn_amplitude(scaling)


def _yarn_amplitude(scaling: RopeScaling) -> float:
    def grown(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return grown(scaling.mscale) / grown(scaling.mscale_all_dim)
    return grown(1.0)


def rotate(
    x: Float[Array, "B *heads T H"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B *heads T H"]:
    """Turn the pairs (x[i], x[i + H/2]) of every head by their angles; float32 inside."""
    heads = range(1, x.ndim - 2)
    cos, sin = jnp.expand_dims(cos, heads), jnp.expand_dims(sin, heads)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
