"""`adapter_config.json`: what PEFT says of an adapter, and what of it we can follow."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from jax_lora.errors import DataError
from jax_lora.model.arch import GROUP, LINEAR

# Options that change what an adapter computes, and the values at which they do not.
_PLAIN = {
    "bias": (None, "none"),
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
# These initialisations change the base weights too, which the adapter does not hold. One that
# PEFT has converted to plain LoRA says `true` instead, and has twice the rank.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """The part of `adapter_config.json` that decides what an adapter computes.

    `rank`, `alpha`: where the patterns (a regular expression for the end of a module's name → its
    own value) say nothing else. `target_modules`: as the file has it, see `targets`.
    """

    rank: int
    alpha: float
    dropout: float
    use_rslora: bool
    use_dora: bool
    base_name: str | None
    target_modules: list[str] | str
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]

    def rank_of(self, module: str) -> int:
        """r of a module such as "model.layers.0.self_attn.q_proj"."""
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def alpha_of(self, module: str) -> float:
        """α of a module."""
        return _by_pattern(self.alpha_pattern, module, self.alpha)

    def targets(self, layers: int) -> list[str]:
        """Names of the linear layers that should have an adapter in a model of `layers` layers."""
        named = self.target_modules
        if isinstance(named, list):
            return [name.rsplit(".", 1)[-1] for name in named]
        modules = {n: [f"model.layers.{i}.{GROUP[n]}.{n}" for i in range(layers)] for n in LINEAR}
        return [n for n in LINEAR if any(re.fullmatch(named, module) for module in modules[n])]


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    # As PEFT does: the first pattern that is the module's name or a dotted end of it.
    for pattern, number in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return number
    return default


def parse_config(raw: object, where: str) -> AdapterConfig:
    """Read the parsed JSON of an `adapter_config.json`.

    Args:
      raw: what `json.loads` gave.
      where: the file, for the message.

    Raises:
      DataError: another kind of adapter, an option whose effect we do not compute, a value that
        is none.
    """
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        found = raw.get("peft_type") if isinstance(raw, dict) else type(raw).__name__
        raise DataError(f"{where}: peft_type: found {found!r}, expected 'LORA'")
    for key, plain in _PLAIN.items():
        if raw.get(key) not in plain:
            raise DataError(f"{where}: {key}: found {raw[key]!r}, expected {plain[-1]!r}")
    start = raw.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise DataError(
            f"{where}: init_lora_weights: found {start!r}, which changes the base weights; "
            "expected an adapter converted to plain LoRA "
            "(PEFT's save_pretrained with path_initial_model_for_weight_conversion)"
        )

    def number(key: str, found: object, is_integer: bool) -> float:
        if isinstance(found, int | float) and not isinstance(found, bool):
            if is_integer <= found < math.inf and not (is_integer and found % 1):
                return int(found) if is_integer else float(found)
        expected = "a positive integer" if is_integer else "a number from 0 up"
        raise DataError(f"{where}: {key}: found {found!r}, expected {expected}")

    def pattern(key: str, is_integer: bool) -> dict[str, float]:
        table = raw.get(key) or {}
        if not isinstance(table, dict):
            raise DataError(f"{where}: {key}: found {table!r}, expected patterns and numbers")
        for expression in table:
            _check_expression(expression, f"{where}: {key}")
        return {name: number(f"{key}: {name}", value, is_integer) for name, value in table.items()}

    targets = raw.get("target_modules") or []
    if isinstance(targets, str):
        _check_expression(targets, f"{where}: target_modules")
    elif not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise DataError(f"{where}: target_modules: found {targets!r}, expected names")
    elif unknown := [name for name in targets if name.rsplit(".", 1)[-1] not in LINEAR]:
        raise DataError(
            f"{where}: target_modules: found {', '.join(unknown)}, "
            f"expected some of {', '.join(LINEAR)}"
        )
    base_name = raw.get("base_model_name_or_path")
    if base_name is not None and not isinstance(base_name, str):
        key = "base_model_name_or_path"
        raise DataError(f"{where}: {key}: found {base_name!r:.60}, expected a name or a folder")
    return AdapterConfig(
        rank=int(number("r", raw.get("r"), True)),
        alpha=number("lora_alpha", raw.get("lora_alpha"), False),
        dropout=number("lora_dropout", raw.get("lora_dropout", 0.0), False),
        use_rslora=bool(raw.get("use_rslora")),
        use_dora=bool(raw.get("use_dora")),
        base_name=base_name,
        target_modules=targets,
        rank_pattern=pattern("rank_pattern", True),
        alpha_pattern=pattern("alpha_pattern", False),
    )


def _check_expression(found: str, where: str) -> None:
    try:
        re.compile(found)
    except re.error as error:
        raise DataError(
            f"{where}: found {found!r}, expected a regular expression: {error}"
        ) from None
