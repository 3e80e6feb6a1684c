"""`config.json` of a LLaMA-shaped model, as transformers 4 or 5 writes it, ↔ `LlamaConfig`."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict

from jax_lora.errors import ConfigError, DataError
from jax_lora.files import Json
from jax_lora.model.arch import LINEAR_NAMES
from jax_lora.model.config import LARGEST_INT, ROPE_TYPES, LlamaConfig, RopeScaling
from jax_lora.model.families import FAMILIES, Family

logger = logging.getLogger(__name__)

_ROPE_THETA = 10000.0
# Fields of `LlamaConfig` that config.json says otherwise, or by its model_type.
_NOT_HF = ("rope_scaling", "family", "biases", "qk_norm", "sliding_window")
# The keys that each kind of rope scaling reads, beside its type and theta.
_ROPE_KEYS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}


def parse_config(raw: Json, where: str = "config.json") -> LlamaConfig:
    """Read the contents of a `config.json`, as transformers 4 or 5 writes it.

    Args:
      raw: the parsed JSON.
      where: the file, for messages.

    Returns:
      The configuration; defaults are transformers' own.

    Raises:
      DataError: another architecture, another activation, a window that only some layers have, a
        quantised checkpoint, an unknown kind of rope scaling, or a value of the wrong type.
    """

    def field(key: str, kind: type, default: object = None) -> Json:
        value = raw.get(key)
        default = family.defaults.get(key, default)
        return _typed(where, key, default if value is None else value, kind)

    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise DataError(f"{where}: model_type: found {name!r}, expected one of {known}")
    family = FAMILIES[name]
    architectures = raw.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        raise DataError(
            f"{where}: architectures: found {architectures}, expected {[family.architecture]}"
        )
    if (activation := raw.get("hidden_act", "silu")) != "silu":
        raise DataError(f"{where}: hidden_act: found {activation!r}, expected 'silu'")
    if quantized := raw.get("quantization_config"):
        raise DataError(f"{where}: quantization_config: {_another_way(quantized)}")

    hidden, heads = field("hidden_size", int), field("num_attention_heads", int)
    head_dim = raw.get("head_dim") or family.defaults.get("head_dim")
    if head_dim is None and hidden % heads:
        raise DataError(
            f"{where}: hidden_size: found {hidden}, expected a multiple of num_attention_heads, "
            f"{heads}, where head_dim is not given"
        )
    positions = field("max_position_embeddings", int)
    theta, scaling = _parse_rope(raw, where, positions)
    given = {key for key in family.bias_keys if field(key, bool, False)}
    try:
        return LlamaConfig(
            vocab_size=field("vocab_size", int),
            hidden_size=hidden,
            intermediate_size=field("intermediate_size", int),
            num_hidden_layers=field("num_hidden_layers", int),
            num_attention_heads=heads,
            num_key_value_heads=field("num_key_value_heads", int, heads),
            head_dim=field("head_dim", int, hidden // heads),
            rms_norm_eps=field("rms_norm_eps", float),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=positions,
            tie_word_embeddings=field("tie_word_embeddings", bool, False),
            family=name,
            biases=_biases(family, given),
            qk_norm=family.qk_norm,
            sliding_window=_window(raw, where, family),
        )
    except ValueError as error:
        text = str(error)
        raise DataError(text if text.startswith(where) else f"{where}: {text}") from None


def _another_way(quantized: object) -> str:
    """What was found of weights that another library quantized, and what to load for them."""
    found = quantized if isinstance(quantized, Mapping) else {}
    bits = {"load_in_8bit": "int8", "load_in_4bit": "nf4"}
    here = [form for key, form in bits.items() if found.get(key)]
    kind = str(found.get("quant_method") or ("bitsandbytes" if here else "an unknown method"))
    if kind == "bitsandbytes":
        form = here[0] if here else "nf4"
        return (
            f"found bitsandbytes in {form}, expected the weights that it was made from, loaded "
            f"with model_quantization={form}"
        )
    return (
        f"found {kind}, expected the weights that it was made from, loaded with "
        "model_quantization=nf4, or a GGUF file of them with model_quantization=gguf"
    )


def _biases(family: Family, given: Iterable[str]) -> tuple[str, ...]:
    # The linear layers with a bias, where these of the family's keys are true.
    names = {*family.biases, *(name for key in given for name in family.bias_keys[key])}
    return tuple(name for name in LINEAR_NAMES if name in names)


def _window(raw: Json, where: str, family: Family) -> int | None:
    if not family.window:
        return None
    window = raw.get(family.window, family.defaults.get(family.window))
    if not family.window_switch:
        return None if window is None else _typed(where, family.window, window, int)
    # Behind a switch only some layers have a window. No published model sets it.
    if _typed(where, family.window_switch, raw.get(family.window_switch, False), bool):
        raise DataError(f"{where}: {family.window_switch}: found true, expected false")
    types = raw.get("layer_types") or []
    if not isinstance(types, list) or any(kind != "full_attention" for kind in types):
        raise DataError(f"{where}: layer_types: found {types!r:.60}, expected full_attention alone")
    return None


def _typed(where: str, key: str, value: Json, kind: type) -> Json:
    if kind is float and type(value) is int and abs(value) < 2**1023:  # what a float holds
        value = float(value)
    if type(value) is not kind or not (
        kind is bool or (1 <= value <= LARGEST_INT if kind is int else math.isfinite(value))
    ):
        expected = {int: "a positive integer", float: "a number", bool: "true or false"}[kind]
        found = "nothing" if value is None else repr(value)[:60]
        raise DataError(f"{where}: {key}: found {found}, expected {expected}")
    return value


def _parse_rope(raw: Json, where: str, max_positions: int) -> tuple[float, RopeScaling | None]:
    """θ and scaling from `rope_scaling` + `rope_theta` (transformers 4) or `rope_parameters` (5).

    Where both are present the old key decides, as in transformers 5.
    """
    new = raw.get("rope_parameters") or {}
    rope = raw.get("rope_scaling") or new
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    if not isinstance(rope, Mapping) or any(isinstance(v, Mapping) for v in rope.values()):
        raise DataError(f"{where}: {key}: found {rope!r}, expected one flat table of parameters")
    for table in (raw, rope):
        if table.get("partial_rotary_factor") not in (None, 1):
            found = table["partial_rotary_factor"]
            raise DataError(f"{where}: partial_rotary_factor: found {found!r}, expected 1")
    candidates = (rope.get("rope_theta"), raw.get("rope_theta"), new.get("rope_theta"))
    theta = next((value for value in candidates if value is not None), _ROPE_THETA)
    theta = _typed(where, "rope_theta", theta, float)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ROPE_TYPES:
        expected = ", ".join(("default", *ROPE_TYPES))
        raise DataError(f"{where}: rope_type in {key}: found {kind!r}, expected one of {expected}")
    values: Json = {k: rope[k] for k in _ROPE_KEYS[kind] if rope.get(k) is not None}
    known = {*_ROPE_KEYS[kind], "type", "rope_type", "rope_theta", "partial_rotary_factor"}
    if unknown := sorted(set(rope) - known):
        logger.warning("%s: %s: %s ignored by rope type %s", where, key, ", ".join(unknown), kind)
    if (original := "original_max_position_embeddings") in _ROPE_KEYS[kind]:
        if raw.get(original) is not None:  # it wins over the table's, as in transformers 5
            values[original] = raw[original]
        values.setdefault(original, max_positions)
    if kind == "yarn":
        values.setdefault("factor", max_positions / values["original_max_position_embeddings"])
    for name in values:
        kinds = {"original_max_position_embeddings": int, "truncate": bool}
        values[name] = _typed(where, f"{name} in {key}", values[name], kinds.get(name, float))
    if values.get("factor", 0.0) < 1:
        found = values.get("factor", "nothing")
        raise DataError(f"{where}: factor in {key}: found {found}, expected a number from 1 up")
    try:
        return theta, RopeScaling(kind, **values)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None


def config_to_hf(config: LlamaConfig) -> Json:
    """The inverse of `parse_config`: a `config.json` that transformers 4 and 5 both read.

    Raises:
      ConfigError: biases that the family's config.json has no keys for.
    """
    family = FAMILIES[config.family]
    raw = {k: v for k, v in asdict(config).items() if k not in _NOT_HF}
    given = {
        key: set(names) <= set(config.biases) for key, names in family.bias_keys.items() if names
    }
    if _biases(family, (key for key in given if given[key])) != config.biases:
        raise ConfigError(
            f"biases: found {', '.join(config.biases) or 'none'}, which config.json of "
            f"{config.family} cannot say"
        )
    if family.window:
        raw[family.window] = config.sliding_window
    if family.window_switch:
        raw[family.window_switch] = config.sliding_window is not None
    scaling = None
    if config.rope_scaling is not None:
        values = asdict(config.rope_scaling)
        scaling = {"rope_type": config.rope_scaling.rope_type} | {
            k: values[k] for k in _ROPE_KEYS[config.rope_scaling.rope_type] if values[k] is not None
        }
    return {
        "architectures": [family.architecture],
        "model_type": config.family,
        "hidden_act": "silu",
        **raw,
        **given,
        "rope_scaling": scaling,
        "rope_parameters": {
            **(scaling or {"rope_type": "default"}),
            "rope_theta": config.rope_theta,
        },
    }
