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
fourth leaf, m (L, out), see `jax_lora.model.variants`. An adapter on lm_head is a stack of one at
the root of the tree, a (1, in, r), …: whatever maps over `by_target` needs no case of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jax_lora.errors import ConfigError
from jax_lora.model.arch import ATTENTION, BY_NAME, TARGETS
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
    """Raises ValueError for an empty list or a module that is none of `arch.TARGETS`."""
    unknown = [name for name in targets if name not in TARGETS]
    if unknown or not targets:
        raise ConfigError(
            f"lora targets: found {', '.join(unknown) or 'none'}, expected some of "
            f"{', '.join(TARGETS)}"
        )
    if len(set(targets)) != len(targets):
        raise ConfigError(f"lora targets: found a module twice in {', '.join(targets)}")


def check_init(init: str, config: LlamaConfig, targets: Sequence[str]) -> None:
    """Raises ConfigError for PiSSA on a head whose kernel is the table of embeddings."""
    if init == "pissa" and config.tie_word_embeddings and "lm_head" in targets:
        raise ConfigError(
            "config.lora.targets: found lm_head with init=pissa and tied embeddings, which would "
            "change with it; expected other targets or another init"
        )


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


# ------------------------------------------------------------------ the tree by target


def by_target(adapters: PyTree) -> dict[str, PyTree]:
    """The adapters by linear layer, in the order of `arch.TARGETS`: target → {"a": …, …}."""
    found = {}
    for name in TARGETS:
        node = adapters
        for key in BY_NAME[name].tree_path:
            node = None if node is None else node.get(key)
        if node is not None:
            found[name] = node
    return found


def tree(leaves: Mapping[str, PyTree]) -> PyTree:
    """The inverse of `by_target`."""
    made: PyTree = {}
    for name, leaf in leaves.items():
        node, (*path, last) = made, BY_NAME[name].tree_path
        for key in path:
            node = node.setdefault(key, {})
        node[last] = leaf
    return made


def map_targets(change: Callable[[str, PyTree], PyTree], adapters: PyTree) -> PyTree:
    """The tree with `change(target, leaf)` for every leaf."""
    return tree({name: change(name, leaf) for name, leaf in by_target(adapters).items()})


def kernel(params: PyTree, name: str) -> PyTree:
    """The stacked kernel (copies, in, out) of a linear layer of the base; that of lm_head is the
    table of embeddings where they are tied."""
    if group := BY_NAME[name].group:
        return params["layers"][group][name]["kernel"]
    if name in params:
        return params[name]["kernel"][None]
    return params["embed_tokens"]["embedding"].T[None]


def with_kernel(params: PyTree, name: str, stack: PyTree) -> PyTree:
    """The base with another stacked kernel in a linear layer; lm_head is no longer tied then."""
    group, layers = BY_NAME[name].group, params["layers"]
    if not group:
        return {**params, name: {"kernel": stack[0]}}
    members = {**layers[group], name: {**layers[group][name], "kernel": stack}}
    return {**params, "layers": {**layers, group: members}}


# ------------------------------------------------------------------ new adapters


def shapes(
    config: LlamaConfig, rank: int, targets: Sequence[str] = ATTENTION
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shape of every drawn leaf: target → {"a": (L, in, r), "b": (L, r, out)}; 1 for L of lm_head.

    Raises:
      ValueError: a rank below 1 or an unknown target.
    """
    check_rank(rank)
    check_targets(targets)
    stacks = {name: config.stack_shapes()[name] for name in targets}
    return {
        name: {"a": (copies, size_in, rank), "b": (copies, rank, size_out)}
        for name, (copies, size_in, size_out) in stacks.items()
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
      key: of the whole draw; every target folds in its number in `arch.TARGETS`, so that the A
        of one target does not depend on which others are adapted.
      config: the base model.
      rank: r, any positive integer, also above the smaller side of a kernel.
      alpha: α of the scale.
      targets: names among `arch.TARGETS`.
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
    leaves: dict[str, PyTree] = {}
    for name, leaf in shapes(config, rank, targets).items():
        target_key = jax.random.fold_in(key, TARGETS.index(name))
        if a_init == "kaiming":
            bound = leaf["a"][1] ** -0.5
            a = jax.random.uniform(target_key, leaf["a"], jnp.float32, -bound, bound)
        else:
            a = jax.random.normal(target_key, leaf["a"], jnp.float32) / rank
        leaves[name] = {
            "a": a,
            "b": jnp.zeros(leaf["b"], jnp.float32),
            "scale": jnp.full(leaf["a"][0], scale(alpha, rank, scaling), jnp.float32),
        }
    return tree(leaves)


def check(adapters: PyTree, config: LlamaConfig) -> None:
    """Make sure that every leaf will be used: Linen ignores an unknown name in silence.

    Raises:
      ValueError: names and shapes that `config` does not have, expected and found listed.
    """
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(adapters)
    }
    known = {"/".join(BY_NAME[name].tree_path): name for name in TARGETS}
    adapted = sorted({name.rpartition("/")[0] for name in found})
    expected: dict[str, tuple[int, ...]] = {}
    for module in adapted:
        if module not in known:
            expectation = ", ".join(known)
            raise ConfigError(f"adapter: found a module {module!r}, expected some of {expectation}")
        copies, size_in, size_out = config.stack_shapes()[known[module]]
        rank = found.get(f"{module}/a", (0, 0, 0))[-1]
        expected[f"{module}/a"] = (copies, size_in, rank)
        expected[f"{module}/b"] = (copies, rank, size_out)
        expected[f"{module}/scale"] = (copies,)
        if f"{module}/m" in found:
            expected[f"{module}/m"] = (copies, size_out)
    wrong = sorted(n for n in expected.keys() | found.keys() if found.get(n) != expected.get(n))
    if wrong or not found:
        name = wrong[0] if wrong else "layers"
        raise ConfigError(
            f"adapter leaf {name}: found {found.get(name, 'nothing')}, "
            f"expected {expected.get(name, 'nothing')}"
        )


def does_nothing(adapters: PyTree) -> bool:
    """Whether every B is zero, so that the adapted model is the base."""
    return all(not np.any(np.asarray(leaf["b"])) for leaf in by_target(adapters).values())


# ------------------------------------------------------------------ materialized deltas


def materialized_targets(config: LlamaConfig, rank: int, targets: Sequence[str]) -> tuple[str, ...]:
    """The targets whose s A B is cheaper computed once per step than applied as two products.

    Per token and target, forward and backward: r (in + out) multiplications thrice against
    in · out thrice; computing s A B, and the gradients of A and B from that of the delta, is shared
    by a whole batch. For a square kernel of side d that is r > d/2.
    """
    sides = {name: config.stack_shapes()[name][1:] for name in targets}
    return tuple(name for name, (a, b) in sides.items() if rank * (a + b) > a * b)


def deltas(adapters: PyTree, targets: Sequence[str]) -> PyTree:
    """s A B (L, in, out), float32, to be differentiated, in the places of the `targets`."""

    def form(leaf: PyTree) -> jax.Array:
        scaled = leaf["b"] * leaf["scale"][:, None, None]
        return jnp.einsum("ldr,lrf->ldf", leaf["a"], scaled, precision=jax.lax.Precision.HIGHEST)

    chosen = {name: leaf for name, leaf in by_target(adapters).items() if name in targets}
    return tree({name: form(leaf) for name, leaf in chosen.items()})


def with_deltas(adapters: PyTree, deltas: PyTree) -> PyTree:
    """Adapters as the module applies them: `delta`, where given, for `a`, `b`, `scale`."""

    given = by_target(deltas)

    def chosen(name: str, leaf: PyTree) -> PyTree:
        if name not in given:
            return dict(leaf)
        rest = {key: leaf[key] for key in leaf if key not in ("a", "b", "scale")}
        return rest | {"delta": given[name]}

    return map_targets(chosen, adapters)
