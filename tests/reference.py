"""Small models of every family and kind, the same for the reference implementations and for ours.

`record.py` runs transformers and PEFT on them and keeps what they say in `recorded/llama.npz`;
the tests run ours and compare.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

RECORDED = Path(__file__).parent / "recorded" / "llama.npz"

BASE: dict[str, Any] = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    hidden_act="silu",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
)


def rope(kind: str, **more: Any) -> dict[str, Any]:
    """The old keys, which transformers 5 still reads."""
    return {"rope_scaling": {"rope_type": kind, "factor": 4.0} | more}


QWEN2: dict[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "num_key_value_heads": 2,
    # Qwen's own θ of 1e6 hardly turns the heads of so short rows: the gradient of the bias of
    # keys, which a softmax does not feel unturned, would be rounding, and AdamW would scale it up.
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "sliding_window": 16,
    "max_window_layers": 2,
}
QWEN3: dict[str, Any] = QWEN2 | {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 12,
}
CASES: dict[str, dict[str, Any]] = {
    "LLaMA-1": {"rms_norm_eps": 1e-6},
    "mha": {},  # LLaMA-2, its smaller sizes
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "LLaMA-3": {"num_key_value_heads": 2, "rope_theta": 500000.0, "vocab_size": 67},
    "LLaMA-3.2": {
        "num_key_value_heads": 1,
        "rope_theta": 500000.0,
        "vocab_size": 63,
        "tie_word_embeddings": True,
        **rope(
            "llama3",
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    },
    "tied": {"tie_word_embeddings": True},
    "wide_heads": {"head_dim": 12, "num_key_value_heads": 2},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "linear": rope("linear"),
    "dynamic": {**rope("dynamic"), "max_position_embeddings": 16},
    "llama3": rope(
        "llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
    ),
    "yarn": rope("yarn", original_max_position_embeddings=16),
    # At 24 tokens the window is not felt; rows that would feel it are refused.
    "Mistral": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "num_key_value_heads": 2,
        "sliding_window": 24,
    },
    "Mistral without a window": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "head_dim": 12,
        "num_key_value_heads": 1,
        "sliding_window": None,
    },
    "Qwen2": QWEN2,
    "Qwen2 tied, yarn": QWEN2
    | {"num_key_value_heads": 1, "tie_word_embeddings": True}
    | rope("yarn", original_max_position_embeddings=16),
    "Qwen3": QWEN3,
    "Qwen3 tied, biases, linear": QWEN3
    | {"num_key_value_heads": 4, "tie_word_embeddings": True, "attention_bias": True}
    | rope("linear"),
}
ADAPTED = "gqa"  # the case that adapters and decoding are recorded for, as these are
FAMILIES = ("Mistral without a window", "Qwen2", "Qwen3")
RANK, ALPHA = 3, 6.0
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
END = 7  # ends an answer in the decoding case
PROMPTS = ((3, 14, 15, 9, 26, 5, 35), (58,), (9, 7, 9, 3, 23, 8, 46, 26, 43, 38, 32))
NEW_TOKENS = 12


def config(case: str) -> dict[str, Any]:
    """`config.json` of a case."""
    return BASE | CASES[case]


def linear_shapes(case: str) -> dict[str, tuple[int, int]]:
    """The linear layers of a block: name → (out, in)."""
    c = config(case)
    d, f = c["hidden_size"], c["intermediate_size"]
    h = c.get("head_dim", d // c["num_attention_heads"])
    q, kv = c["num_attention_heads"] * h, c["num_key_value_heads"] * h
    return {
        "self_attn.q_proj": (q, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, q),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
    }


def state(case: str) -> dict[str, np.ndarray]:
    """Random float32 weights under Hugging Face's names."""
    c = config(case)
    d, v = c["hidden_size"], c["vocab_size"]
    h = c.get("head_dim", d // c["num_attention_heads"])
    rng = np.random.default_rng(list(CASES).index(case))
    out = {"model.embed_tokens.weight": rng.normal(size=(v, d))}
    for i in range(c["num_hidden_layers"]):
        for name, shape in linear_shapes(case).items():
            out[f"model.layers.{i}.{name}.weight"] = rng.normal(size=shape) * shape[1] ** -0.5
            always = c["model_type"] == "qwen2" and name.endswith(("q_proj", "k_proj", "v_proj"))
            if always or c.get("attention_bias" if "attn" in name else "mlp_bias"):
                out[f"model.layers.{i}.{name}.bias"] = rng.normal(size=shape[:1])
        for name in ("input_layernorm", "post_attention_layernorm"):
            out[f"model.layers.{i}.{name}.weight"] = 1 + 0.1 * rng.normal(size=d)
        for name in ("q_norm", "k_norm") if c["model_type"] == "qwen3" else ():
            out[f"model.layers.{i}.self_attn.{name}.weight"] = 1 + 0.1 * rng.normal(size=h)
    out["model.norm.weight"] = 1 + 0.1 * rng.normal(size=d)
    if not c["tie_word_embeddings"]:
        out["lm_head.weight"] = rng.normal(size=(v, d)) * d**-0.5
    return {name: array.astype(np.float32) for name, array in out.items()}


def write(folder: Path, case: str) -> Path:
    """A Hugging Face folder of a case."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(case)))
    save_file(state(case), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tokens() -> np.ndarray:
    """(2, 24) ids, longer than the pretraining length of the scaled cases."""
    return np.random.default_rng(99).integers(0, BASE["vocab_size"], (2, 24)).astype(np.int32)


def loss_mask() -> np.ndarray:
    """(2, 24): the tokens to predict, other numbers of them in the two rows."""
    mask = np.zeros((2, 24), bool)
    mask[0, 5:20], mask[1, 17:24] = True, True
    return mask


def adapters(rank: int = RANK, dora: bool = False, case: str = ADAPTED) -> dict[str, Any]:
    """Random adapters on every linear layer of a case, in our layout.

    Their scale is that of RANK, and B·A is of the same size at any rank. DoRA's have an m too.
    """
    rng = np.random.default_rng(7)
    size = 0.2 * (RANK / rank) ** 0.25
    groups: dict[str, Any] = {}
    for module, (out, wide) in linear_shapes(case).items():
        group, name = module.split(".")
        groups.setdefault(group, {})[name] = {
            "a": rng.normal(size=(2, wide, rank)).astype(np.float32) * size,
            "b": rng.normal(size=(2, rank, out)).astype(np.float32) * size,
            "scale": np.full(2, ALPHA / RANK, np.float32),
        }
        if dora:
            groups[group][name]["m"] = 1 + 0.2 * rng.normal(size=(2, out)).astype(np.float32)
    return {"layers": groups}
