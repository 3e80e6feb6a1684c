"""Tiny models and vocabularies of our own making, written in the formats under test.

Names, orientation and llama.cpp's row order are spelled out here a second time, on purpose: a
mistake in the package's tables must not be mirrored by its tests.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants

LAYERS, D, F, HEADS, KV, H = 2, 64, 96, 4, 2, 16

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
}

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def hf_weights(vocab: int = 40, tied: bool = False, bias: bool = False) -> dict[str, np.ndarray]:
    """Random float32 weights of the tiny model, under Hugging Face's names."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, D)}
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        shapes[at + "input_layernorm.weight"] = (D,)
        shapes[at + "post_attention_layernorm.weight"] = (D,)
        shapes[at + "self_attn.q_proj.weight"] = (HEADS * H, D)
        shapes[at + "self_attn.k_proj.weight"] = (KV * H, D)
        shapes[at + "self_attn.v_proj.weight"] = (KV * H, D)
        shapes[at + "self_attn.o_proj.weight"] = (D, HEADS * H)
        shapes[at + "mlp.gate_proj.weight"] = (F, D)
        shapes[at + "mlp.up_proj.weight"] = (F, D)
        shapes[at + "mlp.down_proj.weight"] = (D, F)
        if bias:
            for name in ("q", "k", "v", "o"):
                weight = shapes[f"{at}self_attn.{name}_proj.weight"]
                shapes[f"{at}self_attn.{name}_proj.bias"] = weight[:1]
    shapes["model.norm.weight"] = (D,)
    if not tied:
        shapes["lm_head.weight"] = (vocab, D)
    return {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}


GGUF_NAMES = {
    "embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    theirs = next(v for k, v in GGUF_NAMES.items() if k in name)
    layer = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
    return f"{layer}{theirs}.{name.rsplit('.', 1)[1]}"


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order: row 2i of a head is the half-split row i, row 2i + 1 is i + H/2."""
    out = np.empty_like(rows)
    for head in range(heads):
        for i in range(H // 2):
            out[head * H + 2 * i] = rows[head * H + i]
            out[head * H + 2 * i + 1] = rows[head * H + i + H // 2]
    return out


def write_gguf(
    path: Path,
    weights: dict[str, np.ndarray],
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    metadata: dict[str, Any] | None = None,
    tokenizer: dict[str, Any] | None = None,
    architecture: str = "llama",
    extra: dict[str, np.ndarray] | None = None,
) -> None:
    """Write the tiny model with the `gguf` package, matrices as `kind`, vectors as float32.

    `metadata` and `tokenizer` add or replace keys (None drops one).
    """
    writer = GGUFWriter(path, architecture)
    keys: dict[str, Any] = {
        "llama.block_count": LAYERS,
        "llama.context_length": 512,
        "llama.embedding_length": D,
        "llama.feed_forward_length": F,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": H,
        "llama.vocab_size": weights["model.embed_tokens.weight"].shape[0],
        **(metadata or {}),
        **{f"tokenizer.ggml.{k}": v for k, v in (tokenizer or {}).items()},
    }
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, array in weights.items():
        if ".q_proj." in name or ".k_proj." in name:
            array = interleave(array, HEADS if ".q_" in name else KV)
        used = kind if array.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(name), quants.quantize(array, used), raw_dtype=used)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_hf(folder: Path, weights: dict[str, np.ndarray], **config: Any) -> Path:
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    save_file(weights, folder / "model.safetensors")
    return folder


def refusal(function, *arguments, **more) -> str:
    """The message of the error, which must be one line."""
    import pytest

    with pytest.raises((ValueError, OSError)) as caught:
        function(*arguments, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def flat(tree, path=()):
    """(path, numpy array) of every leaf."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, (*path, key))
        else:
            yield (*path, key), np.asarray(value)


# ---------------------------------------------------------------- vocabularies


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


def tiny_bpe(pre: str) -> dict[str, Any]:
    """Keys of a byte-level BPE vocabulary whose words straddle where the `pre` kinds cut."""
    words = ["Hello", "Ġworld", "Ġthe", "ing", "123", "456", "1234", "Ġ12", "!!", "...", "Ġ..."]
    words += ["don", "'t", "'T", "'LL", "ĠĠ", "ĠĠĠĠ", "ĊĊ", ":Ċ", ".Ċ", "$5", "a.b", "x=1", "ĠĊ"]
    words += ["##", "###", "Ġ###", "Ã©", "ÂŃ", "Ġa", "Ġb", "ab", "(a", "Ċa", "--", "Ċ###"]
    tokens = ["<|end|>", "<|start|>", *byte_alphabet().values()]
    merges = []
    for word in words:
        for cut in range(1, len(word)):
            if (pair := f"{word[:cut]} {word[cut]}") not in merges:
                merges.append(pair)
                tokens.append(word[: cut + 1])
    kinds = [3, 3] + [1] * (len(tokens) - 2)
    tokens.append("<user>")
    kinds.append(4)
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": kinds,
        "merges": merges,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "padding_token_id": 0,
    }


def tiny_sentencepiece(prefix: bool) -> dict[str, Any]:
    """Keys of a SentencePiece BPE vocabulary with byte fallback."""
    words = ["▁", "▁t", "▁th", "▁the", "he", "▁he", "ll", "▁hell", "▁hello", "or", "▁w", "▁wor"]
    words += ["▁world", "ld", "in", "ing", "12", "123", "▁1", "▁▁", "▁▁▁▁", "##", "▁##", "é"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words]
    pieces += [c for c in map(chr, range(33, 127)) if c not in pieces]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(pieces) - 259)
    return {
        "model": "llama",
        "tokens": pieces,
        "scores": [0.0] * 259 + [-float(i) for i in range(len(pieces) - 259)],
        "token_type": kinds,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_space_prefix": prefix,
    }


CORPUS = [
    "",
    " ",
    "  ",
    "\n",
    "\n\n",
    " \n",
    "a",
    " a",
    "  a b",
    "Hello world",
    "hello the world",
    " Hello  world ",
    "the cat and the hat\n\nthe end",
    "1 12 123 1234 12345 123456789",
    "x=123456 y=-7.50",
    "don't DON'T we'll WE'LL it's",
    "Wait... what?!! (a) $5.00 a.b a--b",
    "### Instruction:\nDo it.\n\n### Response:\n",
    "Definition: x.\n\nNow complete the following example -\nInput: a\nOutput: ",
    "    indented\n\ttabbed\r\nlines  \n  end",
    "naïve café é ½ ٣٤ Ⅷ ²",
    "日本語テキスト と한국어",
    "😀👍🏽 🇩🇪",
    "a\u00a0b\u2028c\u200bd",
    "soft\u00adhyphen",
    "<|start|>user<|end|>",
    "<s>the</s> the",
    "a<user>b",
    "~^|`<>=+",
    "\t\t\n \n\n   x",
]
