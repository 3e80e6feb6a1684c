"""`adapter_config.json`: what PEFT says of an adapter, and what of it we can follow."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from jax_lora.errors import DataError
from jax_lora.model.arch import TARGETS
from jax_lora.patterns import Matcher

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
# The options that say which modules have an adapter.
SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
ALL_LINEAR = "all-linear"
_DEFAULT_TARGETS = ("q_proj", "v_proj")  # PEFT's for every family here
_EMBEDDINGS = "model.embed_tokens"  # a module that PEFT can adapt, and this cannot
# These initialisations change the base weights too, which the adapter does not hold. One that
# PEFT has converted to plain LoRA says `true` instead, and has twice the rank.
_LARGEST = 1e9  # rank or α
_MOST_NAMES = 2000  # of a list or table: more than the linear layers of any model
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """The part of `adapter_config.json` that decides what an adapter computes.

    `rank`, `alpha`: where the patterns (a regular expression for the end of a module's name → its
    own value) say nothing else. `target_modules`, `exclude_modules`: a regular expression for the
    whole name of a module, or ends of names. `layers`: the layers that may have an adapter, None
    for all; `layers_pattern`: names of the list that they are counted in. `matcher`: of all these
    expressions.
    """

    rank: int
    alpha: float
    dropout: float
    use_rslora: bool
    use_dora: bool
    base_name: str | None
    target_modules: tuple[str, ...] | str
    exclude_modules: tuple[str, ...] | str
    layers: frozenset[int] | None
    layers_pattern: tuple[str, ...]
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]
    matcher: Matcher

    def rank_of(self, module: str) -> int:
        """r of a module such as "model.layers.0.self_attn.q_proj"."""
        return int(self._by_pattern(self.rank_pattern, module, self.rank))

    def alpha_of(self, module: str) -> float:
        """α of a module."""
        return self._by_pattern(self.alpha_pattern, module, self.alpha)

    def _by_pattern(self, patterns: Mapping[str, float], module: str, default: float) -> float:
        # As PEFT does: the first pattern that is the module's name or a dotted end of it.
        matches = (x for name, x in patterns.items() if self.matcher.matches_end(name, module))
        return next(matches, default)

    def targets(self, module: str) -> bool:
        """Whether a module such as "model.layers.0.self_attn.q_proj" has an adapter.

        As PEFT's `check_target_module_exists` decides it.
        """
        if self.exclude_modules and self._is_named(self.exclude_modules, module):
            return False
        if self.target_modules == ALL_LINEAR:
            return module not in ("lm_head", _EMBEDDINGS)  # as PEFT defines it
        names = self.target_modules
        if not self._is_named(names, module):
            return False
        is_listed = not isinstance(names, str) and module in names  # by its whole name
        if self.layers is None or is_listed:
            return True
        for pattern in self.layers_pattern or (r"[^.]*",):
            expression = rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\..*"
            if found := self.matcher.fullmatch(expression, module):
                return int(found["layer"]) in self.layers
        return False

    def _is_named(self, names: tuple[str, ...] | str, module: str) -> bool:
        if isinstance(names, str):
            return self.matcher.fullmatch(names, module) is not None
        return any(module == name or module.endswith(f".{name}") for name in names)


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

    matcher = Matcher(where)

    def number(key: str, found: object, is_integer: bool) -> float:
        if isinstance(found, int | float) and not isinstance(found, bool):
            if is_integer <= found <= _LARGEST and not (is_integer and found % 1):
                return int(found) if is_integer else float(found)
        expected = "a positive integer" if is_integer else "a number from 0 up"
        raise DataError(f"{where}: {key}: found {found!r}, expected {expected}")

    def pattern(key: str, is_integer: bool) -> dict[str, float]:
        table = raw.get(key) or {}
        if not isinstance(table, dict):
            raise DataError(f"{where}: {key}: found {table!r:.60}, expected patterns and numbers")
        _check_count(table, f"{where}: {key}")
        for expression in table:
            matcher.check(expression, key)
        return {name: number(f"{key}: {name}", value, is_integer) for name, value in table.items()}

    targets = _names(raw, "target_modules", where, matcher) or _DEFAULT_TARGETS
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        targets = ALL_LINEAR
    layers, layers_pattern = _layers(raw, targets, where, matcher)
    base_name = raw.get("base_model_name_or_path")
    if base_name is not None and not isinstance(base_name, str):
        key = "base_model_name_or_path"
        raise DataError(f"{where}: {key}: found {base_name!r:.60}, expected a name or a folder")
    config = AdapterConfig(
        rank=int(number("r", raw.get("r"), True)),
        alpha=number("lora_alpha", raw.get("lora_alpha"), False),
        dropout=number("lora_dropout", raw.get("lora_dropout", 0.0), False),
        use_rslora=bool(raw.get("use_rslora")),
        use_dora=bool(raw.get("use_dora")),
        base_name=base_name,
        target_modules=targets,
        exclude_modules=_names(raw, "exclude_modules", where, matcher),
        layers=layers,
        layers_pattern=layers_pattern,
        rank_pattern=pattern("rank_pattern", True),
        alpha_pattern=pattern("alpha_pattern", False),
        matcher=matcher,
    )
    if config.targets(_EMBEDDINGS):
        raise DataError(
            f"{where}: target_modules: found {_EMBEDDINGS}, expected some of {', '.join(TARGETS)}"
        )
    return config


def _names(
    raw: Mapping[str, object], key: str, where: str, matcher: Matcher
) -> tuple[str, ...] | str:
    """A regular expression as it is, a list of names as a tuple."""
    found = raw.get(key) or []
    if isinstance(found, str):
        matcher.check(found, key)
        return found
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise DataError(f"{where}: {key}: found {found!r:.60}, expected names")
    _check_count(found, f"{where}: {key}")
    return tuple(found)


def _layers(
    raw: Mapping[str, object], targets: object, where: str, matcher: Matcher
) -> tuple[frozenset[int] | None, tuple[str, ...]]:
    """`layers` and `layers_pattern`; what PEFT refuses is refused."""
    found, pattern = raw.get("layers_to_transform"), raw.get("layers_pattern") or []
    layers = [found] if isinstance(found, int) else found
    if layers is not None and not (
        isinstance(layers, list) and all(type(layer) is int and layer >= 0 for layer in layers)
    ):
        raise DataError(
            f"{where}: layers_to_transform: found {found!r:.60}, expected layers from 0 up"
        )
    patterns = [pattern] if isinstance(pattern, str) else pattern
    if not isinstance(patterns, list) or not all(isinstance(name, str) for name in patterns):
        raise DataError(f"{where}: layers_pattern: found {pattern!r:.60}, expected names")
    _check_count(patterns, f"{where}: layers_pattern")
    for name in patterns:
        matcher.check(name, "layers_pattern")
    for key, value in (("layers_to_transform", layers), ("layers_pattern", patterns)):
        if value and isinstance(targets, str):
            text = "expected none where target_modules is a text, as in PEFT"
            raise DataError(f"{where}: {key}: found {raw[key]!r:.60}, {text}")
    if patterns and layers is None:
        text = "expected layers_to_transform with it, as in PEFT"
        raise DataError(f"{where}: layers_pattern: found {pattern!r:.60}, {text}")
    return frozenset(layers) if layers else None, tuple(patterns)


def _check_count(found: Collection[object], where: str) -> None:
    if len(found) > _MOST_NAMES:
        raise DataError(f"{where}: found {len(found)} entries, expected at most {_MOST_NAMES}")
