"""The shape of a model: everything that decides its parameters and its arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jax_lora.errors import ConfigError
from jax_lora.model.arch import BY_NAME, LINEAR_NAMES, LINEARS, NORMS, Norm

ROPE_TYPES = ("linear", "dynamic", "llama3", "yarn")
# More than any model has, and so little that no count of parameters is beyond 64 bits.
LARGEST_SIZE, LARGEST_LAYERS, LARGEST_INT = 1 << 24, 1 << 12, (1 << 31) - 1


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the pretraining length.

    The fields are those of Hugging Face's `rope_parameters` for the same `rope_type`; the
    formulas are in `rope.py`.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self):
        if self.rope_type not in ROPE_TYPES:
            raise ConfigError(
                f"rope_type: found {self.rope_type!r}, expected one of {', '.join(ROPE_TYPES)}"
            )
        required = {
            "llama3": ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
            "yarn": ("original_max_position_embeddings",),
        }
        for name in required.get(self.rope_type, ()):
            if getattr(self, name) is None:
                raise ConfigError(f"rope scaling {self.rope_type!r} needs {name}, found none")


@dataclass(frozen=True)
class LlamaConfig:
    """One model of LLaMA's shape; field names are Hugging Face's where it has one.

    Hashable, so that a module built from it can be a static argument of `jax.jit`.

    Attributes:
      family: key of `families.FAMILIES`; only file formats ask for it.
      biases: linear layers that have one.
      qk_norm: queries and keys are normed, see `families.Family`.
      sliding_window: tokens that attention looks back on, itself included; None is all. Longer
        rows are refused, see `check_length`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    family: str = "llama"
    biases: tuple[str, ...] = ()
    qk_norm: bool = False
    sliding_window: int | None = None

    def __post_init__(self):
        heads = self.num_attention_heads * self.head_dim
        for name, found, most in (
            ("num_hidden_layers", self.num_hidden_layers, LARGEST_LAYERS),
            ("vocab_size", self.vocab_size, LARGEST_SIZE),
            ("hidden_size", self.hidden_size, LARGEST_SIZE),
            ("intermediate_size", self.intermediate_size, LARGEST_SIZE),
            ("num_attention_heads × head_dim", heads, LARGEST_SIZE),
        ):
            if not 1 <= found <= most:
                raise ConfigError(f"{name}: found {found}, expected 1 to {most:,}")
        if not (self.rope_theta > 0 and math.isfinite(self.rope_theta)):
            raise ConfigError(f"rope_theta: found {self.rope_theta}, expected a number above 0")
        if not (self.rms_norm_eps >= 0 and math.isfinite(self.rms_norm_eps)):
            raise ConfigError(f"rms_norm_eps: found {self.rms_norm_eps}, expected 0 or more")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads: found {self.num_attention_heads}, expected a multiple of "
                f"num_key_value_heads, {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim: found {self.head_dim}, expected an even number")
        if unknown := [name for name in self.biases if name not in LINEAR_NAMES]:
            raise ConfigError(
                f"biases: found {unknown[0]}, expected some of {', '.join(LINEAR_NAMES)}"
            )

    def size(self, axis: str) -> int:
        """The size of a logical axis of `arch`."""
        return {
            "embed": self.hidden_size,
            "heads": self.num_attention_heads * self.head_dim,
            "kv_heads": self.num_key_value_heads * self.head_dim,
            "head": self.head_dim,
            "mlp": self.intermediate_size,
            "vocab": self.vocab_size,
        }[axis]

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """The linear layers of a block: Hugging Face's name → (in, out)."""
        return {x.name: (self.size(x.inputs), self.size(x.outputs)) for x in LINEARS}

    def stack_shapes(self) -> dict[str, tuple[int, int, int]]:
        """The linear layers that may have an adapter: name → (copies in the model, in, out)."""
        return {
            x.name: (
                self.num_hidden_layers if x.group else 1,
                self.size(x.inputs),
                self.size(x.outputs),
            )
            for x in BY_NAME.values()
        }

    def norms(self) -> tuple[Norm, ...]:
        """The norms of a block."""
        return tuple(norm for norm in NORMS if self.qk_norm or not norm.of_heads)

    def check_length(self, tokens: int) -> None:
        """Refuse rows in which a token could look back beyond the sliding window.

        Up to that length attention with a window and without are the same.

        Args:
          tokens: of a row, of training or of a prompt with its answer.

        Raises:
          ConfigError: longer rows than the window.
        """
        if self.sliding_window is not None and tokens > self.sliding_window:
            raise ConfigError(
                f"rows of {tokens} tokens: expected at most {self.sliding_window}, the model's "
                "sliding_window, which longer rows would need"
            )
