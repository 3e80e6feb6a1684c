"""LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

    ours (layers stacked)                      PEFT's, one tensor per layer
    layers/self_attn/q_proj/a  (L, in, R)      base_model.model.model.layers.{i}.self_attn.q_proj
    layers/self_attn/q_proj/b  (L, R, out)         .lora_A.weight (r, in)  .lora_B.weight (out, r)
    layers/self_attn/q_proj/scale  (L,)        lora_alpha, r, use_rslora and the two patterns
    layers/self_attn/q_proj/m  (L, out)            .lora_magnitude_vector (out,), of DoRA only

Layers of unequal rank share one stack: A and B are zero-padded to the largest rank R, which adds
nothing to B·A, and `scale` carries the α/r of each layer (or α/√r). Saving crops again.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import PyTree
from safetensors import SafetensorError, safe_open

from jax_lora.errors import DataError, MissingFileError
from jax_lora.files import fresh_file, read_json, write_json
from jax_lora.model import lora
from jax_lora.model.arch import GROUP, LINEAR
from jax_lora.model.config import LlamaConfig
from jax_lora.weights.finite import check_finite
from jax_lora.weights.hf import write_tensors
from jax_lora.weights.peft_config import parse_config
from jax_lora.weights.tree import numpy_dtype

_KEY = re.compile(
    r"base_model\.model\.model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)"
    r"\.lora_(A\.weight|B\.weight|magnitude_vector(\.weight)?)"
)
_PARTS = {"a": "A", "b": "B", "m": "magnitude"}


@dataclass(frozen=True)
class Adapter:
    """An adapter and all that its files say about it.

    `adapters`: the tree of the module's docstring, float32. `rank`, `alpha`: the ones that hold
    where the patterns say nothing else. `targets`: the linear layers that have one, in the order
    of the model. `ranks`, `alphas`: by target, the true value in each layer.
    """

    adapters: PyTree
    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    base_name: str | None
    use_rslora: bool
    ranks: dict[str, tuple[int, ...]]
    alphas: dict[str, tuple[float, ...]]


def _scale(alpha: float, rank: int, use_rslora: bool) -> float:
    return lora.scale(alpha, rank, "alpha/sqrt(r)" if use_rslora else "alpha/r")


def _targets(adapters: PyTree) -> PyTree:
    groups = adapters.get("layers", {})
    return {n: groups[GROUP[n]][n] for n in LINEAR if n in groups.get(GROUP[n], {})}


# ---------------------------------------------------------------- reading


def resolve(folder: str | os.PathLike[str]) -> Path:
    """The folder of an adapter, given it or the folder of a run that holds one."""
    folder = Path(folder)
    inside = folder / "adapter"
    if (folder / "adapter_config.json").exists() or not inside.is_dir():
        return folder
    return inside


def digest(folder: str | os.PathLike[str]) -> str:
    """Twelve hexadecimal digits of what an adapter's two files hold."""
    content = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        content.update((resolve(folder) / name).read_bytes())
    return content.hexdigest()[:12]


def run_of(folder: str | os.PathLike[str]) -> Path:
    """The folder of a run, where that of the adapter in it may be given."""
    found = resolve(folder)
    return found.parent if found.name == "adapter" else found


def trained_base(folder: str | os.PathLike[str]) -> list[str]:
    """Weights of the base that the run of this folder (see `run_of`) trained."""
    table = run_of(folder) / "parameters.json"
    if not table.is_file():
        return []
    modules = read_json(table, dict).get("modules")
    try:
        trained = [m["module"] for m in modules or () if m["trainable"]]
        return [name for name in trained if not name.startswith("lora.")]
    except (KeyError, TypeError, AttributeError):
        raise DataError(
            f"{table}: modules: found {modules!r:.60}, expected a list of objects with module and "
            "trainable"
        ) from None


def load_trained(folder: str | os.PathLike[str], config: LlamaConfig) -> Adapter:
    """`load`, and make sure that the adapter fits a model and changes it.

    Raises:
      MissingFileError, DataError: as `load`; names or shapes that the model does not have,
        expected and found listed; every B zero; a run that trained weights of the base, too.
    """
    if base := trained_base(folder):
        raise DataError(
            f"{folder}: its run trained {', '.join(base)} of the base, too; expected adapters alone"
        )
    found = load(folder)
    try:
        lora.check(found.adapters, config)
    except ValueError as error:
        raise DataError(f"{folder}: {error}") from None
    if lora.does_nothing(found.adapters):
        raise DataError(f"{folder}: every B is zero, expected a trained adapter")
    return found


def load(folder: str | os.PathLike[str]) -> Adapter:
    """Read a PEFT LoRA or DoRA adapter of a Llama.

    Args:
      folder: with `adapter_config.json` and `adapter_model.safetensors`, or a run's folder with
        such a folder `adapter` in it.

    Returns:
      The adapter; tensors are float32, numpy.

    Raises:
      MissingFileError: one of the two files is missing.
      DataError: another kind of adapter (biases, embeddings, …), a module that is none of the
        seven linear layers, a layer or target without its tensors, a wrong shape, a damaged file.
    """
    folder = resolve(folder)
    config_path, path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for file in (config_path, path):
        if not file.is_file():
            text = "no such file, expected a PEFT adapter folder or a run's folder with one"
            raise MissingFileError(errno.ENOENT, text, str(file))
    config = parse_config(read_json(config_path), str(config_path))
    parts = ("a", "b", "m") if config.use_dora else ("a", "b")
    found = _read_tensors(path, parts)
    layers = 1 + max(layer for module in found.values() for layer in module)
    _check_complete(path, found, config.targets(layers), layers, parts)

    adapters: PyTree = {}
    ranks: dict[str, tuple[int, ...]] = {}
    alphas: dict[str, tuple[float, ...]] = {}
    targets = tuple(name for name in LINEAR if name in found)
    for name in targets:
        modules = [f"model.layers.{i}.{GROUP[name]}.{name}" for i in range(layers)]
        ranks[name] = tuple(config.rank_of(module) for module in modules)
        alphas[name] = tuple(config.alpha_of(module) for module in modules)
        stack = found.pop(name)  # a target's tensors go when they are stacked
        tensors = [stack[i] for i in range(layers)]
        size_in, size_out = tensors[0]["a"].shape[-1], tensors[0]["b"].shape[0]
        for module, r, tensor in zip(modules, ranks[name], tensors, strict=True):
            shapes = {"a": (r, size_in), "b": (size_out, r), "m": (size_out,)}
            if any(tensor[part].shape != shapes[part] for part in parts):
                there = ", ".join(f"{_PARTS[part]} {tensor[part].shape}" for part in parts)
                expected = ", ".join(f"{_PARTS[part]} {shapes[part]}" for part in parts)
                raise DataError(f"{path}: {module}: found {there}, expected {expected}")
        widest = max(ranks[name])
        leaf = {
            "a": np.zeros((layers, size_in, widest), np.float32),
            "b": np.zeros((layers, widest, size_out), np.float32),
            "scale": np.zeros(layers, np.float32),
        }
        for i, (r, tensor) in enumerate(zip(ranks[name], tensors, strict=True)):
            leaf["a"][i, :, :r], leaf["b"][i, :r] = tensor["a"].T, tensor["b"].T
            leaf["scale"][i] = _scale(alphas[name][i], r, config.use_rslora)
        if config.use_dora:
            leaf["m"] = np.stack([tensor["m"] for tensor in tensors])
        adapters.setdefault("layers", {}).setdefault(GROUP[name], {})[name] = leaf
    return Adapter(
        adapters,
        config.rank,
        config.alpha,
        config.dropout,
        targets,
        config.base_name,
        config.use_rslora,
        ranks,
        alphas,
    )


def _read_tensors(path: Path, parts: Sequence[str]) -> dict[str, dict[int, dict[str, np.ndarray]]]:
    """Linear layer → layer → part → tensor, float32 and in PEFT's orientation."""
    numpy_dtype("bfloat16")  # registers it, for adapters that are stored so
    try:
        with safe_open(path, framework="np") as file:
            tensors = {
                name: check_finite(file.get_tensor(name), name, path)
                for name in file.keys()  # noqa: SIM118
            }
    except SafetensorError as error:
        size = path.stat().st_size
        raise DataError(f"{path}: damaged or cut short at {size} bytes: {error}") from None
    found: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        part = match[4][0].lower() if match else ""
        if match is None or GROUP.get(match[3]) != match[2]:
            expected = f"layers.N.(self_attn|mlp).({'|'.join(LINEAR)}).lora_(A|B).weight"
            raise DataError(f"{path}: found {key}, expected base_model.model.model.{expected}")
        if part not in parts:
            raise DataError(f"{path}: found {key}, expected use_dora: true with it")
        dimensions = 1 if part == "m" else 2
        if tensor.ndim != dimensions:
            found_shape = f"found shape {tensor.shape}, expected {dimensions} dimensions"
            raise DataError(f"{path}: {key}: {found_shape}")
        layer = found.setdefault(match[3], {}).setdefault(int(match[1]), {})
        layer[part] = tensor.astype(np.float32, copy=False)
    if not found:
        raise DataError(f"{path}: found no tensors, expected a LoRA adapter's")
    return found


def _check_complete(
    path: Path, found: PyTree, targets: Sequence[str], layers: int, parts: Sequence[str]
) -> None:
    if targets and (extra := [name for name in found if name not in targets]):
        raise DataError(
            f"{path}: found tensors of {', '.join(extra)}, expected those of target_modules "
            f"alone: {', '.join(targets)}"
        )
    wanted = targets or list(found)
    lost = [
        f"{i}.{GROUP[name]}.{name}"
        for name in wanted
        for i in range(layers)
        if set(found.get(name, {}).get(i, {})) != set(parts)
    ]
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise DataError(
            f"{path}: found no complete ({', '.join(_PARTS[part] for part in parts)}) for "
            f"{', '.join(lost[:3])}{more}; expected one in all {layers} layers of "
            f"{', '.join(wanted)}"
        )


# ---------------------------------------------------------------- writing


def save(
    folder: str | os.PathLike[str],
    adapters: PyTree,
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
      ValueError: no adapters, something in the tree that is no linear layer, a `scale` that
        contradicts α and r, or a DoRA magnitude in some targets only.
    """
    leaves = _targets(adapters)
    found = [n for group in adapters.get("layers", {}).values() for n in group]
    if not leaves or set(found) != set(leaves):
        raise ValueError(f"adapters: found {found or 'nothing'}, expected some of {list(LINEAR)}")
    dora = [name for name in leaves if "m" in leaves[name]]
    if dora and len(dora) < len(leaves):
        raise ValueError(f"adapters: found m in {', '.join(dora)} only, expected it in all or none")
    tensors: dict[str, np.ndarray] = {}
    rank_pattern: dict[str, float] = {}
    alpha_pattern: dict[str, float] = {}
    for name, leaf in leaves.items():
        layers = len(leaf["a"])
        layer_ranks = list(ranks[name] if ranks else [rank] * layers)
        layer_alphas = list(alphas[name] if alphas else [alpha] * layers)
        tensors |= _target_tensors(name, leaf, layer_ranks, layer_alphas, use_rslora)
        _add_pattern(rank_pattern, name, layer_ranks, rank)
        _add_pattern(alpha_pattern, name, layer_alphas, alpha)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": _as_json_number(alpha),
        "lora_dropout": dropout,
        "use_rslora": use_rslora,
        "use_dora": bool(dora),
        "target_modules": list(leaves),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    folder = Path(folder)
    path, config_path = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    with fresh_file(config_path) as partial_config, fresh_file(path) as partial:
        write_json(partial_config, config)
        write_tensors(partial, tensors)


def _target_tensors(
    name: str, leaf: PyTree, ranks: Sequence[int], alphas: Sequence[float], use_rslora: bool
) -> dict[str, np.ndarray]:
    """PEFT's tensors of one target, its layers cropped to their ranks."""
    a, b, scales = (np.asarray(leaf[k], np.float32) for k in ("a", "b", "scale"))
    if not len(ranks) == len(alphas) == len(a) or max(ranks) > a.shape[-1]:
        raise ValueError(
            f"adapters of {name}: found {len(a)} layers of up to rank {a.shape[-1]}, "
            f"expected {len(ranks)} of ranks {ranks}"
        )
    expected = [_scale(x, r, use_rslora) for x, r in zip(alphas, ranks, strict=True)]
    if not np.allclose(scales, expected, rtol=1e-6, atol=0):
        raise ValueError(f"adapters of {name}: scale {scales[0]:g}, expected {expected[0]:g}")
    tensors = {}
    for i, r in enumerate(ranks):
        if np.any(a[i, :, r:]) or np.any(b[i, r:]):
            raise ValueError(f"adapters of {name}: layer {i} is not zero beyond its rank {r}")
        key = f"base_model.model.model.layers.{i}.{GROUP[name]}.{name}"
        tensors[f"{key}.lora_A.weight"] = np.ascontiguousarray(a[i, :, :r].T)
        tensors[f"{key}.lora_B.weight"] = np.ascontiguousarray(b[i, :r].T)
        if "m" in leaf:
            tensors[f"{key}.lora_magnitude_vector"] = np.array(leaf["m"][i], np.float32)
    return tensors


def _add_pattern(
    pattern: dict[str, float], name: str, values: Sequence[float], common: float
) -> None:
    if all(x == values[0] for x in values):
        entries = {name: values[0]}
    else:
        entries = {f"layers.{i}.{GROUP[name]}.{name}": x for i, x in enumerate(values)}
    pattern.update({k: _as_json_number(x) for k, x in entries.items() if x != common})


def _as_json_number(x: float) -> float:
    return int(x) if x == int(x) else float(x)
