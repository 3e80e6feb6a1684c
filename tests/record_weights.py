"""What sentencepiece, llama.cpp and PEFT say of tokens and adapter files; called by `record.py`."""

from __future__ import annotations

import json
import tempfile
import urllib.request
from importlib import import_module
from pathlib import Path

import numpy as np

from tests.weights import builders


def llama_cpp(path: Path) -> dict[str, list[int]]:
    """The corpus's ids by llama.cpp's own server: special tokens added and parsed."""
    xllamacpp = import_module("xllamacpp")

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = 64, 1, False
    params.hostnames, params.port = ["127.0.0.1"], 0
    server = xllamacpp.Server(params)
    found = {}
    for text in builders.CORPUS:
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.listening_address}/tokenize", body, kind)
        with urllib.request.urlopen(request) as answer:
            found[text] = json.load(answer)["tokens"]
    return found


def tokens(tokenizer_model: Path, smollm2: Path) -> dict[str, dict[str, list[int]]]:
    """Ids of the corpus: LLaMA's `tokenizer.model` by sentencepiece, GGUF files by llama.cpp."""
    sentencepiece = import_module("sentencepiece")

    spm = sentencepiece.SentencePieceProcessor(str(tokenizer_model))
    # Hugging Face's tokenizers find special tokens in the text, SentencePiece never does.
    plain = [text for text in builders.CORPUS if "<s>" not in text]
    found = {
        "sentencepiece": {text: spm.encode(text) for text in plain},
        "smollm2": llama_cpp(smollm2),
    }
    vocabularies = {
        pre: builders.tiny_bpe(pre) for pre in ("smollm", "llama-bpe", "qwen2", "gpt-2", "default")
    }
    vocabularies["llama"] = builders.tiny_sentencepiece(True)
    vocabularies["llama without prefix"] = builders.tiny_sentencepiece(False)
    for name, keys in vocabularies.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tiny.gguf"
            builders.write_gguf(path, builders.hf_weights(len(keys["tokens"])), tokenizer=keys)
            found[name] = llama_cpp(path)
    return found


def write_adapter(folder: Path) -> None:
    """An adapter with unequal ranks and α, as PEFT writes it, and the ΔW that PEFT computes."""
    import torch  # pyright: ignore[reportMissingImports]
    from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    lora = LoraConfig(
        r=4,
        lora_alpha=6,
        lora_dropout=0.05,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2, "down_proj": 3},
        alpha_pattern={"v_proj": 5},
        use_rslora=True,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    model = get_peft_model(LlamaForCausalLM(config), lora)
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    deltas = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().numpy()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    np.savez_compressed(folder / "deltas.npz", **deltas)
