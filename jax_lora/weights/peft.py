"""LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

    ours (layers stacked)                      PEFT's, one tensor a layer
    layers/self_attn/q_proj/a  (L, in, R)      base_model.model.model.layers.{i}.self_attn.q_proj
    layers/self_attn/q_proj/b  (L, R, out)         .lora_A.weight (r, in)  .lora_B.weight (out, r)
    layers/self_attn/q_proj/scale  (L,)        lora_alpha, r, use_rslora and the two patterns

Layers of unequal rank share one stack: A and B are zero-padded to the largest rank R, which adds
nothing to B·A, and `scale` carries each layer's own α/r (or α/√r). Saving crops again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jax_lora.model.config import GROUP, LINEAR
from jax_lora.weights.hf import read_json
from jax_lora.weights.tree import numpy_dtype

_KEY = re.compile(
    r"base_model\.model\.model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)\.lora_(A|B)\.weight"
)
# Options that change what an adapter computes, and the values at which they do not.
_PLAIN = {
    "bias": (None, "none"),
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "fan_in_fan_out": (None, False),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "monteclora_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
}
# These initialisations change the base weights too, which the adapter does not hold.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Adapter:
    """An adapter and all that its files say about it.

    `adapters`: the tree of the module's docstring, float32. `rank`, `alpha`: the ones that hold
    where the patterns say nothing else. `targets`: the linear layers that have one, in the order
    of the model. `ranks`, `alphas`: by target, the true value in each layer.
    """

    adapters: dict[str, Any]
    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    base_name: str | None
    use_rslora: bool
    ranks: dict[str, tuple[int, ...]]
    alphas: dict[str, tuple[float, ...]]


def scale(alpha: float, rank: int, use_rslora: bool) -> float:
    """α/r (Hu et al. 2021, arXiv:2106.09685), or α/√r (Kalajdzievski 2023, arXiv:2312.03732)."""
    return alpha / (rank**0.5 if use_rslora else rank)


def _targets(adapters: Mapping[str, Any]) -> dict[str, Any]:
    groups = adapters.get("layers", {})
    return {n: groups[GROUP[n]][n] for n in LINEAR if n in groups.get(GROUP[n], {})}


# ---------------------------------------------------------------- reading


def load(folder: str | os.PathLike[str]) -> Adapter:
    """Read a PEFT LoRA adapter of a Llama.

    Args:
      folder: with `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
      The adapter; tensors are float32, numpy. See `lora.does_nothing`.

    Raises:
      FileNotFoundError: one of the two files is missing.
      ValueError: another kind of adapter (DoRA, biases, …), a module that is none of the seven
        linear layers, a layer without its tensors, a wrong shape, a damaged file.
    """
    folder = Path(folder)
    config_path, path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for file in (config_path, path):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file, expected a PEFT adapter folder")
    raw = read_json(config_path)
    rank, alpha, dropout, rslora = _check_config(raw, str(config_path))
    tensors = _read_tensors(path)

    found: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or GROUP.get(match[3]) != match[2]:
            expected = f"layers.N.(self_attn|mlp).({'|'.join(LINEAR)}).lora_(A|B).weight"
            raise ValueError(f"{path}: found {key}, expected base_model.model.model.{expected}")
        found.setdefault(match[3], {}).setdefault(int(match[1]), {})[match[4]] = tensor
    named = raw.get("target_modules")
    wanted = [name.rsplit(".", 1)[-1] for name in named] if isinstance(named, list) else []
    layers = 1 + max((layer for module in found.values() for layer in module), default=-1)
    for name in dict.fromkeys((*wanted, *found)):
        lost = [
            f"{i}.{GROUP.get(name, '?')}.{name}"
            for i in range(max(layers, 1))
            if set(found.get(name, {}).get(i, {})) != {"A", "B"}
        ]
        if lost:
            more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            raise ValueError(f"{path}: layers without their A and B: {', '.join(lost[:3])}{more}")
    if not found:
        raise ValueError(f"{path}: found no tensors, expected a LoRA adapter's")

    adapters: dict[str, Any] = {}
    ranks: dict[str, tuple[int, ...]] = {}
    alphas: dict[str, tuple[float, ...]] = {}
    targets = tuple(name for name in LINEAR if name in found)
    for name in targets:
        modules = [f"model.layers.{i}.{GROUP[name]}.{name}" for i in range(layers)]
        expected = [_by_pattern(raw, "rank_pattern", m, rank) for m in modules]
        alphas[name] = tuple(float(_by_pattern(raw, "alpha_pattern", m, alpha)) for m in modules)
        pairs = [(found[name][i]["A"], found[name][i]["B"]) for i in range(layers)]
        size_in, size_out = pairs[0][0].shape[-1], pairs[0][1].shape[0]
        for module, r, (a, b) in zip(modules, expected, pairs, strict=True):
            if a.shape != (r, size_in) or b.shape != (size_out, r):
                raise ValueError(
                    f"{path}: {module}: found A {a.shape} and B {b.shape}, "
                    f"expected {(r, size_in)} and {(size_out, r)}"
                )
        ranks[name] = tuple(expected)
        stack_a = np.zeros((layers, size_in, max(expected)), np.float32)
        stack_b = np.zeros((layers, max(expected), size_out), np.float32)
        for i, (a, b) in enumerate(pairs):
            stack_a[i, :, : expected[i]], stack_b[i, : expected[i]] = a.T, b.T
        scales = [scale(x, r, rslora) for x, r in zip(alphas[name], expected, strict=True)]
        leaf = {"a": stack_a, "b": stack_b, "scale": np.asarray(scales, np.float32)}
        adapters.setdefault("layers", {}).setdefault(GROUP[name], {})[name] = leaf
    base_name = raw.get("base_model_name_or_path")
    return Adapter(adapters, rank, alpha, dropout, targets, base_name, rslora, ranks, alphas)


def _check_config(raw: Any, where: str) -> tuple[int, float, float, bool]:
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        found = raw.get("peft_type") if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(f"{where}: peft_type: found {found!r}, expected 'LORA'")
    for key, plain in _PLAIN.items():
        if raw.get(key) not in plain:
            raise ValueError(f"{where}: {key}: found {raw[key]!r}, expected {plain[-1]!r}")
    start = raw.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise ValueError(
            f"{where}: init_lora_weights: found {start!r}, which changes the base weights; "
            "expected an adapter converted to plain LoRA"
        )
    values = []
    for key, default in (("r", None), ("lora_alpha", None), ("lora_dropout", 0.0)):
        found = raw.get(key, default)
        if isinstance(found, bool) or not isinstance(found, int | float) or found < 0:
            raise ValueError(f"{where}: {key}: found {found!r}, expected a number from 0 up")
        values.append(found)
    if int(values[0]) != values[0] or values[0] < 1:
        raise ValueError(f"{where}: r: found {values[0]!r}, expected a positive integer")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(raw.get(key) or {}, dict):
            raise ValueError(f"{where}: {key}: found {raw[key]!r}, expected patterns and numbers")
    return int(values[0]), float(values[1]), float(values[2]), bool(raw.get("use_rslora"))


def _by_pattern(raw: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    # As PEFT does: the first pattern that is the module's name or a dotted end of it.
    for pattern, number in (raw.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return number
    return default


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    numpy_dtype("bfloat16")  # registers it, for adapters that are stored so
    try:
        with safe_open(path, framework="np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        size = path.stat().st_size
        raise ValueError(f"{path}: damaged or cut short at {size} bytes: {error}") from None
    return {name: tensor.astype(np.float32, copy=False) for name, tensor in tensors.items()}


# ---------------------------------------------------------------- writing


def save(
    folder: str | os.PathLike[str],
    adapters: Mapping[str, Any],
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    base_name: str | None = None,
    use_rslora: bool = False,
    ranks: Mapping[str, Sequence[int]] | None = None,
    alphas: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Write an adapter that PEFT, and whatever reads its format, loads; float32, bit for bit.

    Args:
      folder: where; made if need be, an adapter in it is replaced.
      adapters: the tree of the module's docstring, numpy or jax; the targets are what it holds.
      rank, alpha, dropout, use_rslora: as trained; go into `adapter_config.json`.
      base_name: name or path of the base model.
      ranks, alphas: for every target, the true value in each layer, where they differ.

    Raises:
      ValueError: no adapters, something in the tree that is no linear layer, or a `scale` that
        contradicts α and r.
    """
    pairs = _targets(adapters)
    held = [n for group in adapters.get("layers", {}).values() for n in group]
    if not pairs or set(held) != set(pairs):
        raise ValueError(f"adapters: found {held or 'nothing'}, expected some of {list(LINEAR)}")
    tensors: dict[str, np.ndarray] = {}
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    for name, pair in pairs.items():
        a, b, scales = (np.asarray(pair[k], np.float32) for k in ("a", "b", "scale"))
        layers = a.shape[0]
        own_ranks = list(ranks[name] if ranks else [rank] * layers)
        own_alphas = list(alphas[name] if alphas else [alpha] * layers)
        if not len(own_ranks) == len(own_alphas) == layers or max(own_ranks) > a.shape[-1]:
            raise ValueError(
                f"adapters of {name}: found {layers} layers of up to rank {a.shape[-1]}, "
                f"expected {len(own_ranks)} of ranks {own_ranks}"
            )
        said = [scale(x, r, use_rslora) for x, r in zip(own_alphas, own_ranks, strict=True)]
        if not np.allclose(scales, said, rtol=1e-6, atol=0):
            raise ValueError(f"adapters of {name}: scale {scales[0]:g}, expected {said[0]:g}")
        for i, r in enumerate(own_ranks):
            if np.any(a[i, :, r:]) or np.any(b[i, r:]):
                raise ValueError(f"adapters of {name}: layer {i} is not zero beyond its rank {r}")
            module = f"model.layers.{i}.{GROUP[name]}.{name}"
            key = f"base_model.model.{module}"
            tensors[f"{key}.lora_A.weight"] = np.ascontiguousarray(a[i, :, :r].T)
            tensors[f"{key}.lora_B.weight"] = np.ascontiguousarray(b[i, :r].T)
        _note(rank_pattern, name, own_ranks, rank)
        _note(alpha_pattern, name, own_alphas, alpha)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": _whole(alpha),
        "lora_dropout": dropout,
        "use_rslora": use_rslora,
        "target_modules": list(pairs),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path, config_path = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    partial, partial_config = (f.with_name(f".{f.name}.partial") for f in (path, config_path))
    try:
        save_file(tensors, partial, metadata={"format": "pt"})
    except SafetensorError as error:  # its only way to say that a disk is full
        raise OSError(f"{path}: {error}") from None
    partial_config.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.copymode(partial_config, partial)  # safetensors makes it readable by us only
    os.replace(partial, path)
    os.replace(partial_config, config_path)


def _note(pattern: dict[str, Any], name: str, values: Sequence[float], common: float) -> None:
    if all(x == values[0] for x in values):
        entries = {name: values[0]}
    else:
        entries = {f"layers.{i}.{GROUP[name]}.{name}": x for i, x in enumerate(values)}
    pattern.update({k: _whole(x) for k, x in entries.items() if x != common})


def _whole(x: float) -> float:
    return int(x) if x == int(x) else float(x)
