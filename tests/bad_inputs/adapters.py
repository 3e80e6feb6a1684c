"""Adapters in PEFT's format: adapter_config.json, adapter_model.safetensors, jax_lora.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.bad_inputs import Case, Ground, copy, edit_json
from tests.bad_inputs.models import TEXTS

# Each takes longer than anybody waits; see tests/test_patterns.py.
ENDLESS = (r"(.|\w)*(.|\w)*[!?]", r"(?:a|b|.|..|...)*[!?]", r"(?:\w|\w\w|\.|..)*[A-Z]")
CONFIG = {
    "peft_type": (None, "IA3", ["LORA"]),
    "r": (0, -1, 1.5, "x", 10**12, 10**400, True, None),
    "lora_alpha": (-1, "x", 1e300, 10**400, None, float("nan")),
    "lora_dropout": (-1, "x", float("nan")),
    "bias": ("all", 5),
    "modules_to_save": (["lm_head"], 5),
    "fan_in_fan_out": (True,),
    "target_modules": (
        "*", 5, [5], ["embed_tokens"], "(" * 300, "a" * 10_001, ["q"] * 2001, *ENDLESS,
    ),
    "exclude_modules": ("(", 5, [5], *ENDLESS),
    "rank_pattern": (
        5, {"(": 1}, {"q_proj": 0}, {"q_proj": "x"}, {"q_proj": 10**12},
        {str(i): 1 for i in range(2001)}, *({text: 4} for text in ENDLESS),
    ),
    "alpha_pattern": ({"(": 1}, {"q_proj": -1}, {ENDLESS[0]: 4}),
    "layers_to_transform": ("x", [-1], [0.5]),
    "layers_pattern": (["("], 5, ["layers"]),
    "base_model_name_or_path": (5, ["x"]),
    "init_lora_weights": ("pissa", "olora"),
}  # fmt: skip


def _adapter(change: Callable[[Path], object]) -> Callable[[Ground, Path], list[str]]:
    def make(ground: Ground, folder: Path) -> list[str]:
        adapter = copy(ground.adapter, folder)
        change(adapter)
        return [str(ground.hf), str(folder / "out"), f"--merge={adapter}"]

    return make


def _tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    def apply(adapter: Path) -> None:
        tensors = load_file(adapter / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, adapter / "adapter_model.safetensors")

    return apply


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def _renamed(name: str) -> Callable[[Path], None]:
    return _tensors(lambda t: t.update({name: t.pop(FIRST)}))


def _filled(value: float) -> Callable[[Path], None]:
    def fill(tensors: dict[str, np.ndarray]) -> None:
        for name, x in tensors.items():
            if "lora_B" in name:
                tensors[name] = np.full_like(x, value)

    return _tensors(fill)


def _without(name: str) -> Callable[[Path], None]:
    return lambda adapter: (adapter / name).unlink()


TENSORS = {
    "no B that is not zero": (_filled(0.0), "every B is zero"),
    "values that are not finite": (_filled(np.nan), "found nan"),
    "a layer of 10^12": (_renamed(FIRST.replace(".0.", f".{10**12}.")), str(10**12)),
    "a layer that the model lacks": (_renamed(FIRST.replace(".0.", ".7.")), "layer 7"),
    "a layer written with a zero": (_renamed(FIRST.replace(".0.", ".00.")), ".00."),
    "a layer that is a word": (_renamed(FIRST.replace(".0.", ".x.")), ".x."),
    "a module that is none": (_renamed(FIRST.replace("q_proj", "query")), "query"),
    "a tensor of something else": (_renamed("x"), "found x"),
    "a tensor too few": (_tensors(lambda t: t.pop(FIRST)), "0.self_attn.q_proj"),
    "a tensor of one dimension": (
        _tensors(lambda t: t.update({FIRST: np.ones(4, np.float32)})), "found shape (4,)",
    ),
    "a tensor of no size": (
        _tensors(lambda t: t.update({FIRST: np.ones((4, 0), np.float32)})), "found shape (4, 0)",
    ),
    "a tensor of another rank": (
        _tensors(lambda t: t.update({FIRST: np.ones((5, 64), np.float32)})), "(5, 64)",
    ),
    "no tensors": (_tensors(lambda t: t.clear()), "no tensors"),
    "no config": (_without("adapter_config.json"), "adapter_config.json"),
    "no weights": (_without("adapter_model.safetensors"), "adapter_model.safetensors"),
    "another base": (
        lambda a: (a / "jax_lora.json").write_text(json.dumps({"base_digest": "0" * 64})),
        "000000000000",
    ),
    "an origin that is a list": (lambda a: (a / "jax_lora.json").write_text("[]"), "jax_lora.json"),
}  # fmt: skip


def cases() -> Iterator[Case]:
    """The cases of this module."""
    name = "adapter_config.json"
    for key, values in CONFIG.items():
        for i, value in enumerate(values):
            change = _adapter(lambda a, key=key, value=value: edit_json(a / name, **{key: value}))
            words = ("adapter",) if key == "rank_pattern" else (name,)
            yield Case(f"{key} of an adapter", f"{i}: {value!r:.30}", "convert.py", change, words)
    for file in (name, "adapter_model.safetensors"):
        for variant, content in TEXTS.items():
            change = _adapter(lambda a, f=file, content=content: (a / f).write_bytes(content))
            yield Case(f"{file} as a text", variant, "convert.py", change, (file,))
    for kind, (change, word) in TENSORS.items():
        yield Case(f"an adapter with {kind}", "", "convert.py", _adapter(change), (word,))
