"""The model families that share LLaMA's shape: a row of flags each, and published sizes.

A row says how a family differs from LLaMA and how its files spell it; nothing else in the package
asks for a family. docs/models.md says what it takes to add one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jax_lora.model.arch import ATTENTION, MLP
from jax_lora.model.config import LlamaConfig, RopeScaling


@dataclass(frozen=True)
class Family:
    """How a family differs from LLaMA.

    Attributes:
      architecture: its class in transformers; `model_type` is its key in `FAMILIES`.
      biases: linear layers that always have one.
      bias_keys: keys of config.json that, where true, give a bias to these linear layers.
      qk_norm: queries and keys pass through an RMS norm of each head before they are rotated.
      window: key of config.json with the tokens that attention looks back on, "" for none.
      window_switch: key of config.json without which, or where false, the window is unused.
      defaults: transformers' own, for keys that config.json lacks.
      gguf: name of the architecture in GGUF files, "" where llama.cpp has no name of its own.
      gguf_interleaved: whether llama.cpp keeps the rows of q and k in its own order of rotation.
    """

    architecture: str
    biases: tuple[str, ...] = ()
    bias_keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    qk_norm: bool = False
    window: str = ""
    window_switch: str = ""
    defaults: Mapping[str, int | float | bool] = field(default_factory=dict)
    gguf: str = ""
    gguf_interleaved: bool = False


_QWEN = {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "num_key_value_heads": 32}

FAMILIES: dict[str, Family] = {
    # Touvron et al. 2023, arXiv:2302.13971 and 2307.09288; Grattafiori et al. 2024, 2407.21783.
    "llama": Family(
        "LlamaForCausalLM",
        bias_keys={"attention_bias": ATTENTION, "mlp_bias": MLP},
        defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
        gguf="llama",
        gguf_interleaved=True,
    ),
    # Jiang et al. 2023, arXiv:2310.06825. Its GGUF files say "llama".
    "mistral": Family(
        "MistralForCausalLM",
        window="sliding_window",
        defaults={
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
    ),
    # Yang et al. 2024, arXiv:2407.10671; Qwen2.5, arXiv:2412.15115, is the same.
    "qwen2": Family(
        "Qwen2ForCausalLM",
        biases=("q_proj", "k_proj", "v_proj"),
        window="sliding_window",
        window_switch="use_sliding_window",
        defaults=_QWEN,
        gguf="qwen2",
    ),
    # Yang et al. 2025, arXiv:2505.09388.
    "qwen3": Family(
        "Qwen3ForCausalLM",
        bias_keys={"attention_bias": ATTENTION},
        qk_norm=True,
        window="sliding_window",
        window_switch="use_sliding_window",
        defaults=_QWEN | {"head_dim": 128},
        gguf="qwen3",
    ),
}


# ------------------------------------------------------------------ published sizes


def _llama(v, d, f, layers, heads, kv=None, **more) -> LlamaConfig:
    more.setdefault("head_dim", d // heads)
    return LlamaConfig(v, d, f, layers, heads, kv or heads, **more)


def _qwen2(v, d, f, layers, heads, kv, **more) -> LlamaConfig:
    more = {"max_position_embeddings": 32768} | more
    biases = FAMILIES["qwen2"].biases
    return _llama(
        v,
        d,
        f,
        layers,
        heads,
        kv,
        family="qwen2",
        biases=biases,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        **more,
    )


def _qwen3(d, f, layers, heads, **more) -> LlamaConfig:
    return _llama(
        151936,
        d,
        f,
        layers,
        heads,
        8,
        family="qwen3",
        head_dim=128,
        qk_norm=True,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=40960,
        **more,
    )


def _llama3_rope(factor: float) -> RopeScaling:
    return RopeScaling("llama3", factor, 8192, low_freq_factor=1.0, high_freq_factor=4.0)


_L1 = dict(rms_norm_eps=1e-6)
_L2 = dict(max_position_embeddings=4096)
_L3 = dict(max_position_embeddings=8192, rope_theta=5e5)
_L31 = dict(max_position_embeddings=131072, rope_theta=5e5, rope_scaling=_llama3_rope(8.0))
_TIED = dict(tie_word_embeddings=True)
_L32 = _L31 | _TIED | dict(rope_scaling=_llama3_rope(32.0))
_SMOL = _TIED | dict(max_position_embeddings=8192, rope_theta=1e5)

# So that parameters and memory can be counted without a download; names as on the hub.
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
    "smollm2-135m": _llama(49152, 576, 1536, 30, 9, 3, **_SMOL),
    "mistral-7b-v0.1": _llama(
        32000,
        4096,
        14336,
        32,
        32,
        8,
        family="mistral",
        max_position_embeddings=32768,
        sliding_window=4096,
    ),
    "qwen2.5-0.5b": _qwen2(151936, 896, 4864, 24, 14, 2, **_TIED),
    "qwen2.5-1.5b": _qwen2(151936, 1536, 8960, 28, 12, 2, max_position_embeddings=131072, **_TIED),
    "qwen2.5-7b": _qwen2(152064, 3584, 18944, 28, 28, 4, max_position_embeddings=131072),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, **_TIED),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32),
}
