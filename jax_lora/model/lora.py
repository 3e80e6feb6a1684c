"""LoRA adapters as plain pytrees (Hu et al. 2021, arXiv:2106.09685).

For a rank-r adapter on q_proj of a model with L layers the tree is

    layers
    └── self_attn
        └── q_proj
            ├── a      (L, in, r)    float32, drawn
            ├── b      (L, r, out)   float32, zero
            └── scale  (L,)          float32, α/r

so that y = x W + scale · dropout(x) a b. `scale` is data, not a function of the shapes: adapters
of unequal ranks are zero-padded to the widest, and keep their own α/r.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.model.config import ATTENTION, GROUP, LINEAR, LlamaConfig

INITS = ("kaiming", "gaussian")


def check_targets(targets: Sequence[str]) -> None:
    """Raises ValueError for an empty list or a module that is none of the seven linear layers."""
    unknown = [name for name in targets if name not in LINEAR]
    if unknown or not targets:
        raise ValueError(
            f"lora targets: found {', '.join(unknown) or 'none'}, expected some of "
            f"{', '.join(LINEAR)}"
        )
    if len(set(targets)) != len(targets):
        raise ValueError(f"lora targets: found a module twice in {', '.join(targets)}")


def check_rank(rank: int) -> None:
    """Raises ValueError unless `rank` is a positive integer."""
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"lora rank: found {rank!r}, expected an integer of at least 1")


def shapes(
    config: LlamaConfig, rank: int, targets: Sequence[str] = ATTENTION
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shape of every drawn leaf: target → {"a": (L, in, r), "b": (L, r, out)}.

    Raises:
      ValueError: a rank below 1 or an unknown target.
    """
    check_rank(rank)
    check_targets(targets)
    layers, linear = config.num_hidden_layers, config.linear_shapes()
    return {
        name: {"a": (layers, linear[name][0], rank), "b": (layers, rank, linear[name][1])}
        for name in targets
    }


def init(
    key: jax.Array,
    config: LlamaConfig,
    rank: int,
    *,
    alpha: float,
    targets: Sequence[str] = ATTENTION,
    a_init: str = "kaiming",
) -> dict[str, Any]:
    """Adapters that change nothing yet: A drawn, B zero.

    Args:
      key: of the whole draw; every target folds in its own number, so that the A of one target
        does not depend on which others are adapted.
      config: the base model.
      rank: r, any positive integer, also above the smaller side of a kernel.
      alpha: α of the scale α/r.
      targets: names among the seven linear layers.
      a_init: "kaiming" is uniform within ±1/√in, which is PEFT's kaiming_uniform_(a=√5);
        "gaussian" is normal with deviation 1/r, PEFT's `init_lora_weights="gaussian"`.

    Returns:
      The tree drawn at the head of this file.

    Raises:
      ValueError: a rank below 1, an unknown target or an unknown `a_init`.
    """
    if a_init not in INITS:
        raise ValueError(f"lora a_init: found {a_init!r}, expected one of {', '.join(INITS)}")
    groups: dict[str, dict[str, Any]] = {}
    for name, leaf in shapes(config, rank, targets).items():
        own = jax.random.fold_in(key, LINEAR.index(name))
        if a_init == "kaiming":
            bound = leaf["a"][1] ** -0.5
            a = jax.random.uniform(own, leaf["a"], jnp.float32, -bound, bound)
        else:
            a = jax.random.normal(own, leaf["a"], jnp.float32) / rank
        groups.setdefault(GROUP[name], {})[name] = {
            "a": a,
            "b": jnp.zeros(leaf["b"], jnp.float32),
            "scale": jnp.full(config.num_hidden_layers, alpha / rank, jnp.float32),
        }
    return {"layers": groups}


def check(adapters: Mapping[str, Any], config: LlamaConfig) -> None:
    """Make sure that every leaf will be used: Linen ignores an unknown name in silence.

    Raises:
      ValueError: names and shapes that `config` does not have, expected and found listed.
    """
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(adapters)
    }
    linear, layers = config.linear_shapes(), config.num_hidden_layers
    adapted = sorted({name.rsplit("/", 1)[0] for name in found})
    expected: dict[str, tuple[int, ...]] = {}
    for place in adapted:
        name = place.rsplit("/", 1)[-1]
        if name not in linear or place != f"layers/{GROUP[name]}/{name}":
            known = ", ".join(f"layers/{GROUP[n]}/{n}" for n in LINEAR)
            raise ValueError(f"adapter: found a module {place!r}, expected some of {known}")
        rank = found.get(f"{place}/a", (0, 0, 0))[-1]
        expected[f"{place}/a"] = (layers, linear[name][0], rank)
        expected[f"{place}/b"] = (layers, rank, linear[name][1])
        expected[f"{place}/scale"] = (layers,)
    wrong = sorted(n for n in expected.keys() | found.keys() if found.get(n) != expected.get(n))
    if wrong or not found:
        name = wrong[0] if wrong else "layers"
        raise ValueError(
            f"adapter leaf {name}: found {found.get(name, 'nothing')}, "
            f"expected {expected.get(name, 'nothing')}"
        )


def does_nothing(adapters: Mapping[str, Any]) -> bool:
    """Whether every B is zero, so that the adapted model is the base."""
    groups = adapters["layers"]
    return all(
        not np.any(np.asarray(leaf["b"])) for group in groups.values() for leaf in group.values()
    )
