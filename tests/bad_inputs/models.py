"""Bases: config.json, safetensors and their index, tokenizers, GGUF."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.bad_inputs import Case, Ground, copy, edit_json
from tests.scripts import REPOSITORY
from tests.weights import builders

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
SIZES += ("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")
ABSURD = (-1, 2**31, 10**30, 1.5, "x", [1], True)
FLOATS = {"rms_norm_eps": (-1.0, "x", [], float("nan"), 10**400), "rope_theta": (-1, "x", 0, 1e999)}
CONFIG_JSON = {
    "model_type": (None, 5, "bert", ["llama"]),
    "architectures": (["BertModel"], "LlamaForCausalLM"),
    "hidden_act": ("gelu", 1),
    "quantization_config": ({"bits": 4},),
    "tie_word_embeddings": ("yes", 1),
    "attention_bias": ("yes",),
    "rope_scaling": (
        5, {"rope_type": "new"}, {"rope_type": "linear"}, {"rope_type": "linear", "factor": 0.5},
        {"rope_type": "linear", "factor": float("nan")}, {"rope_type": ["linear"]},
    ),
}  # fmt: skip
TEXTS = {  # of a JSON file
    "cut": b'{"model_type": "llam',
    "empty": b"",
    "no UTF-8": b'{"model_type": "\xff"}',
    "a list": b"[]",
    "nested 100,000 deep": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "of half a surrogate pair": b'{"model_type": "\\ud800"}',
    "of 16 MiB and more": b'{"a": "' + b"a" * (16 << 20) + b'"}',
}


def plan(path: Path) -> list[str]:
    """Arguments of plan.py, which reads a model's config alone."""
    config = f"--config={REPOSITORY}/configs/lora.py:rank=2"
    return [config, f"--config.model={path}", "--target=a100-80gb"]


def _config_json(name: str, value: object) -> Callable[[Ground, Path], list[str]]:
    def make(ground: Ground, folder: Path) -> list[str]:
        changed = json.loads((ground.hf / "config.json").read_text()) | {name: value}
        del changed["rope_parameters"]  # which would win
        (folder / "config.json").write_text(json.dumps(changed))
        return plan(folder)

    return make


def _file(name: str, content: bytes) -> Callable[[Ground, Path], list[str]]:
    def make(ground: Ground, folder: Path) -> list[str]:
        model = copy(ground.hf, folder)
        (model / name).write_bytes(content)
        return [str(model), str(folder / "out")]

    return make


def _folder(change: Callable[[Path], object]) -> Callable[[Ground, Path], list[str]]:
    def make(ground: Ground, folder: Path) -> list[str]:
        model = copy(ground.hf, folder)
        change(model)
        return [str(model), str(folder / "out")]

    return make


def _tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors")

    return apply


def _index(weight_map: object) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        (model / "model.safetensors").rename(model / "model-1.safetensors")
        index = {"metadata": {}, "weight_map": weight_map}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))

    return apply


def _header(length: int, header: bytes) -> Callable[[Path], object]:
    return lambda model: (model / "model.safetensors").write_bytes(
        struct.pack("<Q", length) + header
    )


def _nan(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.norm.weight"][3] = np.nan


HUGE = json.dumps(
    {"lm_head.weight": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}
).encode()
FOLDERS = {
    "a tensor too few": (_tensors(lambda t: t.pop("model.norm.weight")), "model.norm.weight"),
    "a tensor too many": (_tensors(lambda t: t.update(x=np.ones(2, np.float32))), "tensor x"),
    "a tensor of another shape": (
        _tensors(lambda t: t.update({"model.norm.weight": np.ones(3, np.float32)})),
        "model.norm.weight has shape (3,)",
    ),
    "a tensor of integers": (
        _tensors(lambda t: t.update({"model.norm.weight": np.ones(64, np.int64)})),
        "model.norm.weight is I64",
    ),
    "a value that is not finite": (_tensors(_nan), "model.norm.weight: found nan at (3,)"),
    "a header of 2^60 bytes": (_header(2**60, b"{}"), "model.safetensors"),
    "a header that is no JSON": (_header(4, b"[[[["), "model.safetensors"),
    "a header of deep JSON": (_header(99_999, b"[" * 99_999), "model.safetensors"),
    "a tensor beyond the file": (_header(len(HUGE), HUGE), "model.safetensors"),
    "an empty weight file": (lambda m: (m / "model.safetensors").write_bytes(b""), "model.safe"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "no weights"),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), "no tokenizer"),
    "an index of paths above": (_index({"a": "../../../etc/passwd"}), "'../../../etc/passwd'"),
    "an index of absolute paths": (_index({"a": "/etc/passwd"}), "'/etc/passwd'"),
    "an index of a folder": (_index({"a": "x/model-1.safetensors"}), "x/model-1"),
    "an index of no name": (_index({"a": ".."}), "found '..'"),
    "an index of numbers": (_index({"a": 5}), "no weight_map"),
    "an index that is a list": (_index([1]), "no weight_map"),
    "an index of a missing shard": (_index({"a": "model-2.safetensors"}), "model-2.safetensors"),
    "an index of a missing tensor": (_index({"a": "model-1.safetensors"}), "no tensor a"),
    "more layers than tensors": (
        lambda m: edit_json(m / "config.json", num_hidden_layers=4096),
        "expected those of 4096 layers",
    ),
    "a vocabulary of millions": (
        lambda m: edit_json(m / "config.json", vocab_size=10**7),
        "expected (10000000, 64)",
    ),
    "end ids that are none": (
        lambda m: edit_json(m / "config.json", eos_token_id={"a": 1}),
        "eos_token_id",
    ),
    "a chat template that is none": (
        lambda m: edit_json(m / "tokenizer_config.json", chat_template=5),
        "tokenizer",
    ),
    "a tokenizer class that is none": (
        lambda m: edit_json(m / "tokenizer_config.json", tokenizer_class=5),
        "tokenizer",
    ),
}
GGUF = {
    "general.alignment": (0, "x"),
    "general.architecture": (["llama"], "gpt2", 5),
    "split.count": (4, "x", [1, 2]),
    "llama.block_count": (0, 2**31, "x", [1], 4097),
    "llama.embedding_length": (0, "x", [64]),
    "llama.attention.head_count": (0, "x", 3),
    "llama.attention.layer_norm_rms_epsilon": (5, "x", float("nan"), float("inf")),
    "llama.vocab_size": (2**31, "x", [1], 7),
    "llama.context_length": (0, "x", None),
    "llama.rope.scaling.type": ("new", 5),
    "llama.rope.freq_base": ("x", float("nan"), -1.0),
    "llama.expert_count": (8, "x"),
    "tokenizer.ggml.model": ("bert", 5, ["gpt2"]),
    "tokenizer.ggml.pre": ("new", 5, ["gpt-2"]),
    "tokenizer.ggml.tokens": (5, "x", [1, 2, 3], ["a", "a"]),
    "tokenizer.ggml.merges": (5, [1, 2], ["nospace"]),
    "tokenizer.ggml.token_type": (5, "x", [1, 2]),
    "tokenizer.ggml.bos_token_id": ("x", 10**6, [1]),
    "tokenizer.chat_template": (5,),
}


def _gguf(key: str, value: object) -> Callable[[Ground, Path], list[str]]:
    def make(ground: Ground, folder: Path) -> list[str]:
        path, prefix = folder / "bad.gguf", "tokenizer.ggml."
        more = {"tokenizer": ground.vocabulary, "metadata": {key: value}}
        if key.startswith(prefix):
            more["tokenizer"] = ground.vocabulary | {key.removeprefix(prefix): value}
            more["metadata"] = {}
        builders.write_gguf(path, ground.weights, **more)
        return [str(path), str(folder / "out")]

    return make


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _raw(body: bytes, keys: int = 1, tensors: int = 0) -> Callable[[Ground, Path], list[str]]:
    def make(ground: Ground, folder: Path) -> list[str]:
        path = folder / "bad.gguf"
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + body)
        return [str(path), str(folder / "out")]

    return make


def _tensor(name: bytes, *dims: int, kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return _text(name) + sizes + struct.pack("<IQ", kind, offset)


RAW = {
    "no GGUF": lambda g, f: [_written(f / "bad.gguf", b"GGML" + bytes(60)), str(f / "out")],
    "an empty GGUF": lambda g, f: [_written(f / "bad.gguf", b""), str(f / "out")],
    "a GGUF of version 9": lambda g, f: [
        _written(f / "bad.gguf", b"GGUF" + struct.pack("<IQQ", 9, 0, 0)), str(f / "out"),
    ],
    "a GGUF that is cut": lambda g, f: [
        _written(f / "bad.gguf", g.gguf.read_bytes()[:3000]), str(f / "out"),
    ],
    "2^60 keys": _raw(b"", keys=2**60),
    "2^60 tensors": _raw(b"", keys=0, tensors=2**60),
    "a text of 2^60 bytes": _raw(struct.pack("<Q", 2**60)),
    "a list of 2^60 numbers": _raw(_text(b"a") + struct.pack("<IIQ", 9, 4, 2**60)),
    "a list of 2^60 texts": _raw(_text(b"a") + struct.pack("<IIQ", 9, 8, 2**60)),
    "a list of unknown things": _raw(_text(b"a") + struct.pack("<IIQ", 9, 77, 1) + bytes(90)),
    "lists 100,000 deep": _raw(
        _text(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 100_000
    ),
    "a list of 5 million numbers": _raw(
        _text(b"a") + struct.pack("<IIQ", 9, 0, 5_000_000) + bytes(5_000_000)
    ),
    "a tensor of 2^32 dimensions": _raw(
        _text(b"t") + struct.pack("<I", 2**32 - 1) + bytes(100), keys=0, tensors=1
    ),
    "a tensor of 2^63 numbers": _raw(_tensor(b"t", 2**62, 2) + bytes(64), keys=0, tensors=1),
    "a tensor of an unknown kind": _raw(
        _tensor(b"t", 32, kind=999) + bytes(999), keys=0, tensors=1
    ),
    "a tensor without a size": _raw(_tensor(b"t") + bytes(64), keys=0, tensors=1),
    "tensors of the same bytes": _raw(
        b"".join(_tensor(b"t%d" % i, 1000) for i in range(9)) + bytes(4096), keys=0, tensors=9
    ),
    "a tensor twice": _raw(_tensor(b"t", 8) * 2 + bytes(4096), keys=0, tensors=2),
}  # fmt: skip


def _written(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def cases() -> Iterator[Case]:
    """The cases of this module."""
    fields = dict.fromkeys(SIZES, ABSURD) | FLOATS | CONFIG_JSON
    for name, values in fields.items():
        for value in values:
            kind, word = f"{name} in config.json", name.split("_")[0]
            variant, words = f"{value!r:.60}", ("{folder}", word)
            yield Case(kind, variant, "plan.py", _config_json(name, value), words)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        for variant, content in TEXTS.items():
            if name == "config.json" or "surrogate" not in variant:
                yield Case(
                    f"{name} as a text", variant, "convert.py", _file(name, content), (name,)
                )
    for variant in ("cut", "empty", "a list", "nested 100,000 deep"):
        for name in ("tokenizer.json", "model.safetensors"):
            words = ("{folder}", name.split(".")[0])
            make = _file(name, TEXTS[variant])
            yield Case(f"{name} as a text", variant, "convert.py", make, words)
    for kind, (change, word) in FOLDERS.items():
        yield Case(f"a folder with {kind}", "", "convert.py", _folder(change), (word,))
    for key, values in GGUF.items():
        for value in values:
            words = ("bad.gguf",)
            yield Case(f"{key} in a GGUF", f"{value!r:.30}", "convert.py", _gguf(key, value), words)
    for kind, make in RAW.items():
        yield Case(f"a GGUF with {kind}", "", "convert.py", make, ("bad.gguf",))
