"""The shape of a LLaMA: everything that decides its parameters and its arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from jax_lora.errors import ConfigError

ROPE_TYPES = ("linear", "dynamic", "llama3", "yarn")


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
    """One member of the LLaMA family; field names are Hugging Face's.

    Hashable, so that a module built from it can be a static argument of `jax.jit`.
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
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads: found {self.num_attention_heads}, expected a multiple of "
                f"num_key_value_heads, {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim: found {self.head_dim}, expected an even number")

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """The seven linear layers of a block: Hugging Face's name → (in, out)."""
        d, f = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "q_proj": (d, q),
            "k_proj": (d, kv),
            "v_proj": (d, kv),
            "o_proj": (q, d),
            "gate_proj": (d, f),
            "up_proj": (d, f),
            "down_proj": (f, d),
        }


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LINEAR = ATTENTION + MLP
# The logical axes of the (in, out) dimensions, see `Llama.shard_activation`.
LINEAR_AXES = {
    "q_proj": ("embed", "heads"),
    "k_proj": ("embed", "kv_heads"),
    "v_proj": ("embed", "kv_heads"),
    "o_proj": ("heads", "embed"),
    "gate_proj": ("embed", "mlp"),
    "up_proj": ("embed", "mlp"),
    "down_proj": ("mlp", "embed"),
}
GROUP = {name: "self_attn" for name in ATTENTION} | {name: "mlp" for name in MLP}


def _llama(v, d, f, layers, heads, kv=None, **more) -> LlamaConfig:
    more.setdefault("head_dim", d // heads)
    return LlamaConfig(v, d, f, layers, heads, kv or heads, **more)


def _llama3_rope(factor: float) -> RopeScaling:
    return RopeScaling("llama3", factor, 8192, low_freq_factor=1.0, high_freq_factor=4.0)


_L1 = dict(rms_norm_eps=1e-6)
_L2 = dict(max_position_embeddings=4096)
_L3 = dict(max_position_embeddings=8192, rope_theta=5e5)
_L31 = dict(max_position_embeddings=131072, rope_theta=5e5, rope_scaling=_llama3_rope(8.0))
_L32 = dict(
    max_position_embeddings=131072,
    rope_theta=5e5,
    rope_scaling=_llama3_rope(32.0),
    tie_word_embeddings=True,
)

# Published shapes, so that parameters can be counted without a download.
CONFIGS: dict[str, LlamaConfig] = {
    "llama-7b": _llama(32000, 4096, 11008, 32, 32, **_L1),
    "llama-13b": _llama(32000, 5120, 13824, 40, 40, **_L1),
    "llama-33b": _llama(32000, 6656, 17920, 60, 52, **_L1),
    "llama-65b": _llama(32000, 8192, 22016, 80, 64, rms_norm_eps=1e-5),
    "llama-2-7b": _llama(32000, 4096, 11008, 32, 32, **_L2),
    "llama-2-13b": _llama(32000, 5120, 13824, 40, 40, **_L2),
    "llama-2-70b": _llama(32000, 8192, 28672, 80, 64, 8, **_L2),
    "llama-3-8b": _llama(128256, 4096, 14336, 32, 32, 8, **_L3),
    "llama-3-70b": _llama(128256, 8192, 28672, 80, 64, 8, **_L3),
    "llama-3.1-8b": _llama(128256, 4096, 14336, 32, 32, 8, **_L31),
    "llama-3.1-70b": _llama(128256, 8192, 28672, 80, 64, 8, **_L31),
    "llama-3.2-1b": _llama(128256, 2048, 8192, 16, 32, 8, **_L32),
    "llama-3.2-3b": _llama(128256, 3072, 8192, 28, 24, 8, **_L32),
    "smollm2-135m": _llama(
        49152,
        576,
        1536,
        30,
        9,
        3,
        max_position_embeddings=8192,
        rope_theta=1e5,
        tie_word_embeddings=True,
    ),
}
