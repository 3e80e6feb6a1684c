"""LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

    ours (layers stacked)                      PEFT's, one tensor per layer
    layers/self_attn/q_proj/a  (L, in, R)      base_model.model.model.layers.{i}.self_attn.q_proj
    layers/self_attn/q_proj/b  (L, R, out)         .lora_A.weight (r, in)  .lora_B.weight (out, r)
    layers/self_attn/q_proj/scale  (L,)        lora_alpha, r, use_rslora and the two patterns
    layers/self_attn/q_proj/m  (L, out)            .lora_magnitude_vector (out,), of DoRA only
    lm_head/a  (1, in, R), …                   base_model.model.lm_head.lora_A.weight (r, in), …

Layers of unequal rank share one stack: A and B are zero-padded to the largest rank R, which adds
nothing to B·A, and `scale` carries the α/r of each layer (or α/√r). Saving crops again. Of an
adapter on lm_head PEFT also writes the frozen head: it is the base's, and neither read nor written.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jax.tree_util import tree_leaves_with_path
from jaxtyping import PyTree

from jax_lora.errors import DataError, MissingFileError
from jax_lora.files import fresh_file, read_json, write_json
from jax_lora.model import lora
from jax_lora.model.arch import GROUP, TARGETS
from jax_lora.model.config import LlamaConfig
from jax_lora.weights import origin, peft_config
from jax_lora.weights import peft_tensors as tensors
from jax_lora.weights.hf import write_tensors
from jax_lora.weights.peft_config import parse_config
from jax_lora.weights.peft_tensors import PARTS, module_name


@dataclass(frozen=True)
class Adapter:
    """An adapter and all that its files say about it.

    `adapters`: the tree of the module's docstring, float32. `rank`, `alpha`: the ones that hold
    where the patterns say nothing else. `targets`: the linear layers that have one, in the order
    of the model. `ranks`, `alphas`: by target, the true value in each layer, one for lm_head.
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


def _scale(use_rslora: bool, alpha: float, rank: int) -> float:
    if not rank:  # a layer without an adapter
        return 0.0
    return lora.scale(alpha, rank, "alpha/sqrt(r)" if use_rslora else "alpha/r")


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
        with (resolve(folder) / name).open("rb") as file:
            while part := file.read(2**24):
                content.update(part)
    return content.hexdigest()[:12]


def run_of(folder: str | os.PathLike[str]) -> Path:
    """The folder of a run, where that of the adapter in it, or a link to it, may be given."""
    found = resolve(folder).resolve()
    return found.parent if found.name == "adapter" else found


def base_digest(folder: str | os.PathLike[str]) -> str | None:
    """The digest of the base that an adapter or a run was trained on, where its files name it."""
    found = origin.read(resolve(folder)).get("base_digest")
    config = run_of(folder) / "config.json"
    if found is None and config.is_file():
        found = read_json(config, dict).get("base_digest")
    return found if isinstance(found, str) else None


def base_quantization(folder: str | os.PathLike[str]) -> str:
    """The quantization of the base that an adapter or a run was trained on; "none" where its files
    name none."""
    return _setting(folder, "quantization", "model_quantization") or "none"


def template(folder: str | os.PathLike[str]) -> str | None:
    """`data.template` of the run that an adapter is from, where its files name it."""
    return _setting(folder, "template", "data", "template")


def _setting(folder: str | os.PathLike[str], name: str, *keys: str) -> str | None:
    """What jax_lora.json beside an adapter names, else what its run's config has."""
    found: object = origin.read(resolve(folder)).get(name)
    config = run_of(folder) / "config.json"
    if found is None and config.is_file():
        found = read_json(config, dict).get("config")
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, str) else None


def trained_base(folder: str | os.PathLike[str]) -> list[str]:
    """Weights of the base that the run of an adapter trained, by jax_lora.json beside it or by the
    run's own table (see `run_of`)."""
    if isinstance(named := origin.read(resolve(folder)).get("base_trained"), list):
        return [str(name) for name in named]
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


def check_complete(folder: str | os.PathLike[str]) -> None:
    """Make sure that an adapter is all that its run trained.

    Raises:
      DataError: the run trained weights of the base, too.
    """
    if base := trained_base(folder):
        raise DataError(
            f"{folder}: its run trained {', '.join(base)} of the base, too; expected adapters alone"
        )


def load_trained(folder: str | os.PathLike[str], config: LlamaConfig) -> Adapter:
    """`load`, and make sure that the adapter fits a model and changes it.

    Raises:
      MissingFileError, DataError: as `load`; names or shapes that the model does not have,
        expected and found listed; every B zero; a run that trained weights of the base, too.
    """
    check_complete(folder)
    found = load(folder, config.num_hidden_layers)
    try:
        lora.check(found.adapters, config)
    except ValueError as error:
        raise DataError(f"{folder}: {error}") from None
    if lora.does_nothing(found.adapters):
        raise DataError(f"{folder}: every B is zero, expected a trained adapter")
    return found


def load(folder: str | os.PathLike[str], layers: int | None = None) -> Adapter:
    """Read a PEFT LoRA or DoRA adapter of a Llama.

    Args:
      folder: with `adapter_config.json` and `adapter_model.safetensors`, or a run's folder with
        such a folder `adapter` in it.
      layers: of the model; by default up to the last one with an adapter, and one more where
        that was the last to be chosen.

    Returns:
      The adapter; tensors are float32, numpy. Layers that the adapter leaves out (by PEFT's
      exclude_modules, layers_to_transform, …) have a rank of 0 and zeros, which change nothing.

    Raises:
      MissingFileError: one of the two files is missing.
      DataError: another kind of adapter (biases, embeddings, …), a module that is none of
        `arch.TARGETS`, other tensors than the config says, a wrong shape, a damaged file;
        DoRA in some layers of a target only, as a magnitude that changes nothing depends on W.
    """
    folder = resolve(folder)
    config_path, path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for file in (config_path, path):
        if not file.is_file():
            text = "no such file, expected a PEFT adapter folder or a run's folder with one"
            raise MissingFileError(errno.ENOENT, text, str(file))
    config = parse_config(read_json(config_path), str(config_path))
    parts = ("a", "b", "m") if config.use_dora else ("a", "b")
    found = tensors.read(path, parts)
    last = max(layer for module in found.values() for layer in module)
    if layers is not None and last >= layers:
        raise DataError(f"{path}: found a tensor of layer {last}, expected {layers} layers")
    if layers is None:
        layers = last + 1
        # Where the choice of layers ends here, one more without an adapter tells it from all.
        layers += not any(config.targets(module_name(name, layers)) for name in GROUP)
    copies = {name: layers if name in GROUP else 1 for name in TARGETS}
    chosen = {n: [i for i in range(copies[n]) if config.targets(module_name(n, i))] for n in copies}
    chosen = {name: where for name, where in chosen.items() if where}
    tensors.check_complete(path, found, chosen, parts)
    if config.use_dora and any(len(where) < copies[name] for name, where in chosen.items()):
        keys = ", ".join(peft_config.SELECTION)
        raise DataError(f"{config_path}: {keys}: found DoRA in some layers only, expected all")

    leaves: dict[str, PyTree] = {}
    ranks: dict[str, tuple[int, ...]] = {}
    alphas: dict[str, tuple[float, ...]] = {}
    for name, where in chosen.items():
        modules = [module_name(name, i) for i in range(copies[name])]
        ranks[name] = tuple(config.rank_of(m) if i in where else 0 for i, m in enumerate(modules))
        alphas[name] = tuple(config.alpha_of(module) for module in modules)
        # A target's tensors go when they are stacked.
        leaf = _stack(path, name, found.pop(name), ranks[name], parts)
        scales = map(functools.partial(_scale, config.use_rslora), alphas[name], ranks[name])
        leaf["scale"] = np.array(list(scales), np.float32)
        leaves[name] = leaf
    return Adapter(
        lora.tree(leaves),
        config.rank,
        config.alpha,
        config.dropout,
        tuple(chosen),
        config.base_name,
        config.use_rslora,
        ranks,
        alphas,
    )


def _stack(
    path: Path,
    name: str,
    layers: Mapping[int, Mapping[str, np.ndarray]],
    ranks: Sequence[int],
    parts: Sequence[str],
) -> dict[str, np.ndarray]:
    """`a`, `b` and perhaps `m` of one target: its layers' tensors, padded to the largest rank."""
    first = next(iter(layers.values()))
    size_in, size_out = first["a"].shape[-1], first["b"].shape[0]
    for i, tensor in sorted(layers.items()):  # before anything of a rank that is said is allocated
        r = ranks[i]
        shapes = {"a": (r, size_in), "b": (size_out, r), "m": (size_out,)}
        if any(tensor[part].shape != shapes[part] for part in parts):
            there = ", ".join(f"{PARTS[part]} {tensor[part].shape}" for part in parts)
            expected = ", ".join(f"{PARTS[part]} {shapes[part]}" for part in parts)
            raise DataError(f"{path}: {module_name(name, i)}: found {there}, expected {expected}")
    widest = max(ranks[i] for i in layers)  # of a layer that is left out nothing is stored
    leaf = {
        "a": np.zeros((len(ranks), size_in, widest), np.float32),
        "b": np.zeros((len(ranks), widest, size_out), np.float32),
    }
    for i, tensor in layers.items():
        leaf["a"][i, :, : ranks[i]], leaf["b"][i, : ranks[i]] = tensor["a"].T, tensor["b"].T
    if "m" in parts:
        leaf["m"] = np.stack([layers[i]["m"] for i in range(len(ranks))])
    return leaf


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
    base_digest: str | None = None,
    quantization: str = "none",
    template: str | None = None,
    base_trained: Sequence[str] = (),
) -> None:
    """Write an adapter that PEFT, and whatever reads its format, loads; float32, bit for bit.

    Args:
      folder: where; made if need be, an adapter in it is replaced.
      adapters: the tree of the module's docstring, numpy or jax; the targets are what it holds.
      rank, alpha, dropout, use_rslora: as trained; go into `adapter_config.json`.
      base_name: name or path of the base model.
      ranks, alphas: for every target, the true value in each layer, where they differ; a rank of
        0 is a layer without an adapter.
      base_digest: of the base, see `weights.base.digest`; goes into `jax_lora.json`.
      quantization, template: of the base, and `data.template` of the run if it is "chat"; go there.
      base_trained: weights of the base that the run trained, too; go there.

    Raises:
      ValueError: no adapters, something in the tree that is no linear layer, a `scale` that
        contradicts α and r, or a DoRA magnitude in some targets only.
    """
    leaves = _checked(adapters)
    dora = any("m" in leaf for leaf in leaves.values())
    written: dict[str, np.ndarray] = {}
    targets: list[str] = []
    rank_pattern: dict[str, float] = {}
    alpha_pattern: dict[str, float] = {}
    for name, leaf in leaves.items():
        layers = len(leaf["a"])
        layer_ranks = list(ranks[name] if ranks else [rank] * layers)
        layer_alphas = list(alphas[name] if alphas else [alpha] * layers)
        written |= tensors.cut(name, leaf, layer_ranks)
        expected = list(map(functools.partial(_scale, use_rslora), layer_alphas, layer_ranks))
        if not np.allclose(leaf["scale"], expected, rtol=1e-6, atol=0):
            there = float(leaf["scale"][0])
            raise ValueError(f"adapters of {name}: scale {there:g}, expected {expected[0]:g}")
        modules = [module_name(name, i).removeprefix("model.") for i in range(layers)]
        some = [module for module, r in zip(modules, layer_ranks, strict=True) if r]
        targets += [name] if len(some) == layers else some
        _add_pattern(rank_pattern, modules, layer_ranks, layer_ranks, rank)
        _add_pattern(alpha_pattern, modules, layer_ranks, layer_alphas, alpha)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": _as_json_number(alpha),
        "lora_dropout": dropout,
        "use_rslora": use_rslora,
        "use_dora": dora,
        "target_modules": targets,
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
    more = _trained_with(quantization, template, base_trained)
    origin.write(folder, base_name, base_digest, **more)
    with fresh_file(config_path) as partial_config, fresh_file(path) as partial:
        write_json(partial_config, config)
        write_tensors(partial, written)


def _trained_with(
    quantization: str, template: str | None, base_trained: Sequence[str]
) -> dict[str, object]:
    """What jax_lora.json names besides the base, see `_setting` and `trained_base`."""
    more: dict[str, object] = {}
    if quantization != "none":
        more["quantization"] = quantization
    if base_trained:
        more["base_trained"] = list(base_trained)
    # Other templates teach the tokenizer's end token; and a path would be one of this machine.
    return more | ({"template": template} if template == "chat" else {})


def _checked(adapters: PyTree) -> dict[str, PyTree]:
    """The adapters by target, which are all that is in the tree."""
    leaves = lora.by_target(adapters)
    found = [
        path[-1].key for path, _ in tree_leaves_with_path(adapters, is_leaf=_is_module) if path
    ]
    if not leaves or set(found) != set(leaves):
        raise ValueError(f"adapters: found {found or 'nothing'}, expected some of {list(TARGETS)}")
    dora = [name for name in leaves if "m" in leaves[name]]
    if dora and len(dora) < len(leaves):
        raise ValueError(f"adapters: found m in {', '.join(dora)} only, expected it in all or none")
    return leaves


def _is_module(node: PyTree) -> bool:
    return isinstance(node, Mapping) and not any(isinstance(x, Mapping) for x in node.values())


def _add_pattern(
    pattern: dict[str, float],
    modules: Sequence[str],
    ranks: Sequence[int],
    values: Sequence[float],
    common: float,
) -> None:
    """Add what differs from the common value, per target or, where that varies, per layer."""
    used = {module: x for module, r, x in zip(modules, ranks, values, strict=True) if r}
    if len(set(used.values())) == 1:
        used = {modules[0].rsplit(".", 1)[-1]: next(iter(used.values()))}
    pattern.update({module: _as_json_number(x) for module, x in used.items() if x != common})


def _as_json_number(x: float) -> float:
    return int(x) if x == int(x) else float(x)
