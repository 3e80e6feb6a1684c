"""LoRA adapters as plain pytrees (Hu et al. 2021, arXiv:2106.09685).

For a rank-r adapter on q_proj of a model with L layers the tree is

    layers
    └── self_attn
        └── q_proj
            ├── a      (L, in, r)    float32, drawn
            ├── b      (L, r, out)   float32, zero
            └── scale  (L,)          float32, α/r

so that y = x W + scale · dropout(x) a b. `scale` is data, not a function of the shapes: adapters
of unequal ranks are zero-padded to the widest, and keep their own α/r. A DoRA adapter has a
fourth leaf, m (L, out), see `jax_lora.model.variants`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jax_lora.errors import ConfigError
from jax_lora.model.arch import ATTENTION, GROUP, LINEAR
from jax_lora.model.config import LlamaConfig

INITS = ("kaiming", "gaussian")
SCALINGS = ("alpha/r", "alpha/sqrt(r)")


class SeedKeys(NamedTuple):
    """Independent random keys of a run: one for the draw of A, one for dropout."""

    adapters: jax.Array
    dropout: jax.Array


def seed_keys(seed: int) -> SeedKeys:
    """The keys of a run's seed, split once, so that no draw of A shares its bits with a mask."""
    adapters, dropout = jax.random.split(jax.random.key(seed))
    return SeedKeys(adapters, dropout)


def check_targets(targets: Sequence[str]) -> None:
    """Raises ValueError for an empty list or a module that is none of the seven linear layers."""
    unknown = [name for name in targets if name not in LINEAR]
    if unknown or not targets:
        raise ConfigError(
            f"lora targets: found {', '.join(unknown) or 'none'}, expected some of "
            f"{', '.join(LINEAR)}"
        )
    if len(set(targets)) != len(targets):
        raise ConfigError(f"lora targets: found a module twice in {', '.join(targets)}")


def check_rank(rank: object) -> None:
    """Raises ValueError unless `rank` is a positive integer."""
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ConfigError(f"lora rank: found {rank!r}, expected an integer of at least 1")


def scale(alpha: float, rank: int, scaling: str = "alpha/r") -> float:
    """What the update is multiplied by.

    "alpha/r" is LoRA's, "alpha/sqrt(r)" rsLoRA's (Kalajdzievski 2023, arXiv:2312.03732).

    Raises:
      ValueError: an unknown scaling.
    """
    if scaling not in SCALINGS:
        raise ConfigError(f"lora scaling: found {scaling!r}, expected one of {', '.join(SCALINGS)}")
    return alpha / (rank if scaling == "alpha/r" else rank**0.5)


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
    scaling: str = "alpha/r",
) -> PyTree:
    """Adapters that change nothing yet: A drawn, B zero.

    Args:
      key: of the whole draw; every target folds in its number in `arch.LINEAR`, so that the A
        of one target does not depend on which others are adapted.
      config: the base model.
      rank: r, any positive integer, also above the smaller side of a kernel.
      alpha: α of the scale.
      targets: names among the seven linear layers.
      a_init: "kaiming" is uniform within ±1/√in, which is PEFT's kaiming_uniform_(a=√5);
        "gaussian" is normal with deviation 1/r, PEFT's `init_lora_weights="gaussian"`.
      scaling: see `scale`.

    Returns:
      The tree drawn at the head of this file.

    Raises:
      ValueError: a rank below 1, an unknown target, `a_init` or `scaling`.
    """
    if a_init not in INITS:
        raise ConfigError(f"lora a_init: found {a_init!r}, expected one of {', '.join(INITS)}")
    groups: dict[str, PyTree] = {}
    for name, leaf in shapes(config, rank, targets).items():
        target_key = jax.random.fold_in(key, LINEAR.index(name))
        if a_init == "kaiming":
            bound = leaf["a"][1] ** -0.5
            a = jax.random.uniform(target_key, leaf["a"], jnp.float32, -bound, bound)
        else:
            a = jax.random.normal(target_key, leaf["a"], jnp.float32) / rank
        groups.setdefault(GROUP[name], {})[name] = {
            "a": a,
            "b": jnp.zeros(leaf["b"], jnp.float32),
            "scale": jnp.full(config.num_hidden_layers, scale(alpha, rank, scaling), jnp.float32),
        }
    return {"layers": groups}


def check(adapters: PyTree, config: LlamaConfig) -> None:
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
    for module in adapted:
        name = module.rsplit("/", 1)[-1]
        if name not in linear or module != f"layers/{GROUP[name]}/{name}":
            known = ", ".join(f"layers/{GROUP[n]}/{n}" for n in LINEAR)
            raise ConfigError(f"adapter: found a module {module!r}, expected some of {known}")
        rank = found.get(f"{module}/a", (0, 0, 0))[-1]
        expected[f"{module}/a"] = (layers, linear[name][0], rank)
        expected[f"{module}/b"] = (layers, rank, linear[name][1])
        expected[f"{module}/scale"] = (layers,)
        if f"{module}/m" in found:
            expected[f"{module}/m"] = (layers, linear[name][1])
    wrong = sorted(n for n in expected.keys() | found.keys() if found.get(n) != expected.get(n))
    if wrong or not found:
        name = wrong[0] if wrong else "layers"
        raise ConfigError(
            f"adapter leaf {name}: found {found.get(name, 'nothing')}, "
            f"expected {expected.get(name, 'nothing')}"
        )


def does_nothing(adapters: PyTree) -> bool:
    """Whether every B is zero, so that the adapted model is the base."""
    groups = adapters["layers"]
    return all(
        not np.any(np.asarray(leaf["b"])) for group in groups.values() for leaf in group.values()
    )


# ------------------------------------------------------------------ materialized deltas


def materialized_targets(config: LlamaConfig, rank: int, targets: Sequence[str]) -> tuple[str, ...]:
    """The targets whose s A B is cheaper computed once per step than applied as two products.

    Per token and target, forward and backward: r (in + out) multiplications thrice against
    in · out thrice; computing s A B, and the gradients of A and B from that of the delta, is shared
    by a whole batch. For a square kernel of side d that is r > d/2.
    """
    linear = config.linear_shapes()
    return tuple(
        name for name in targets if rank * sum(linear[name]) > linear[name][0] * linear[name][1]
    )


def deltas(adapters: PyTree, targets: Sequence[str]) -> PyTree:
    """s A B (L, in, out), float32, to be differentiated, of the `targets`: group → target → it."""

    def form(leaf: PyTree) -> jax.Array:
        scaled = leaf["b"] * leaf["scale"][:, None, None]
        return jnp.einsum("ldr,lrf->ldf", leaf["a"], scaled, precision=jax.lax.Precision.HIGHEST)

    return {
        group: {name: form(leaf) for name, leaf in members.items() if name in targets}
        for group, members in adapters["layers"].items()
    }


def with_deltas(adapters: PyTree, deltas: PyTree) -> PyTree:
    """Adapters as the module applies them: `delta`, where given, for `a`, `b`, `scale`."""

    def chosen(group: str, name: str, leaf: PyTree) -> PyTree:
        if name not in deltas.get(group, {}):
            return dict(leaf)
        rest = {key: leaf[key] for key in leaf if key not in ("a", "b", "scale")}
        return rest | {"delta": deltas[group][name]}

    return {
        "layers": {
            group: {name: chosen(group, name, leaf) for name, leaf in members.items()}
            for group, members in adapters["layers"].items()
        }
    }
