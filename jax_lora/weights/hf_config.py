"""`config.json` of a Llama, as transformers 4 or 5 writes it, ↔ `LlamaConfig`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from jax_lora.errors import DataError
from jax_lora.model.config import ROPE_TYPES, LlamaConfig, RopeScaling

logger = logging.getLogger(__name__)

# What transformers' LlamaConfig takes where config.json is silent.
_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_ROPE_THETA = 10000.0
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


def parse_config(raw: Mapping[str, Any], where: str = "config.json") -> LlamaConfig:
    """Read the contents of a `config.json`, as transformers 4 or 5 writes it.

    Args:
      raw: the parsed JSON.
      where: the file, for messages.

    Returns:
      The configuration; defaults are transformers' own.

    Raises:
      DataError: another architecture, another activation, a quantised checkpoint, an unknown
        kind of rope scaling, or a value of the wrong type.
    """

    def field(key: str, kind: type, default: Any = None) -> Any:
        value = raw.get(key)
        return _typed(where, key, default if value is None else value, kind)

    if raw.get("model_type") != "llama":
        raise DataError(f"{where}: model_type: found {raw.get('model_type')!r}, expected 'llama'")
    architectures = raw.get("architectures") or ["LlamaForCausalLM"]
    if architectures != ["LlamaForCausalLM"]:
        raise DataError(
            f"{where}: architectures: found {architectures}, expected ['LlamaForCausalLM']"
        )
    if (activation := raw.get("hidden_act", "silu")) != "silu":
        raise DataError(f"{where}: hidden_act: found {activation!r}, expected 'silu'")
    if raw.get("quantization_config"):
        raise DataError(f"{where}: quantization_config: found one, expected unquantised weights")

    hidden, heads = field("hidden_size", int), field("num_attention_heads", int)
    if raw.get("head_dim") is None and hidden % heads:
        raise DataError(
            f"{where}: hidden_size: found {hidden}, expected a multiple of num_attention_heads, "
            f"{heads}, where head_dim is not given"
        )
    more = {key: field(key, type(default), default) for key, default in _DEFAULTS.items()}
    theta, scaling = _parse_rope(raw, where, more["max_position_embeddings"])
    try:
        return LlamaConfig(
            vocab_size=field("vocab_size", int),
            hidden_size=hidden,
            intermediate_size=field("intermediate_size", int),
            num_hidden_layers=field("num_hidden_layers", int),
            num_attention_heads=heads,
            num_key_value_heads=field("num_key_value_heads", int, heads),
            head_dim=field("head_dim", int, hidden // heads),
            rope_theta=theta,
            rope_scaling=scaling,
            **more,
        )
    except ValueError as error:
        text = str(error)
        raise DataError(text if text.startswith(where) else f"{where}: {text}") from None


def _typed(where: str, key: str, value: Any, kind: type) -> Any:
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is int and value < 1):
        expected = {int: "a positive integer", float: "a number", bool: "true or false"}[kind]
        found = "nothing" if value is None else repr(value)
        raise DataError(f"{where}: {key}: found {found}, expected {expected}")
    return value


def _parse_rope(
    raw: Mapping[str, Any], where: str, max_positions: int
) -> tuple[float, RopeScaling | None]:
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
    values: dict[str, Any] = {k: rope[k] for k in _ROPE_KEYS[kind] if rope.get(k) is not None}
    known = {*_ROPE_KEYS[kind], "type", "rope_type", "rope_theta", "partial_rotary_factor"}
    if unknown := sorted(set(rope) - known):
        logger.warning("%s: %s: %s ignored by rope type %s", where, key, ", ".join(unknown), kind)
    if "original_max_position_embeddings" in _ROPE_KEYS[kind]:
        values.setdefault("original_max_position_embeddings", max_positions)
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


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """The inverse of `parse_config`: a `config.json` that transformers 4 and 5 both read."""
    raw = {k: v for k, v in asdict(config).items() if k != "rope_scaling"}
    scaling = None
    if config.rope_scaling is not None:
        values = asdict(config.rope_scaling)
        scaling = {"rope_type": config.rope_scaling.rope_type} | {
            k: values[k] for k in _ROPE_KEYS[config.rope_scaling.rope_type] if values[k] is not None
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        **raw,
        "rope_scaling": scaling,
        "rope_parameters": {
            **(scaling or {"rope_type": "default"}),
            "rope_theta": config.rope_theta,
        },
    }
