"""The one boolean mask that says what trains.

It decides what is differentiated, what the optimizer holds state for, what a checkpoint stores
and what the parameter table counts. Rules are regular expressions on leaf names such as
`lora/layers/self_attn/q_proj/a` or `params/norm/scale`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import optax
from jaxtyping import PyTree

from jax_lora.errors import ConfigError
from jax_lora.model.quantization import is_quantized
from jax_lora.patterns import Matcher

LORA = ((r"lora/.*/[abm]",), (r"lora/.*/scale", r"params/.*"))
FULL = ((r"params/.*",), ())


def leaf_name(path: jax.tree_util.KeyPath) -> str:
    """`params/norm/scale` for the key path of that leaf."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def mask(variables: PyTree, trainable: Sequence[str], frozen: Sequence[str]) -> PyTree:
    """A boolean for every leaf of `variables`: does it train?

    Args:
      variables: the tree {"params": base, "lora": adapters}, or shapes of it.
      trainable: regular expressions that must match a whole leaf name; they win over `frozen`.
      frozen: the same for the leaves that do not train.

    Returns:
      A tree of `variables`' structure with True and False, fit for `optax.masked`; a quantized
      kernel is one leaf of it.

    Raises:
      ConfigError: a leaf that no expression covers, a trainable expression that decides no leaf,
        or nothing that trains.
    """
    used, matcher = set(), Matcher("config.trainable and frozen", ConfigError)
    for rule in (*trainable, *frozen):
        matcher.check(rule)

    def trains(path, _):
        name = leaf_name(path)
        for rules, verdict in ((trainable, True), (frozen, False)):
            for rule in rules:
                if matcher.fullmatch(rule, name):
                    used.add(rule)
                    return verdict
        raise ConfigError(
            f"mask: no regular expression covers the leaf {name}; "
            f"trainable {list(trainable)}, frozen {list(frozen)}"
        )

    result = jax.tree_util.tree_map_with_path(trains, variables, is_leaf=is_quantized)
    for path, trained in jax.tree_util.tree_leaves_with_path(result):
        name = leaf_name(path)
        if trained and name.startswith("lora/") and name.endswith("/scale"):
            raise ConfigError(f"mask: {name} is α/r, which is data: expected it to stay frozen")
    # A frozen rule may well be shadowed by a trainable one; a trainable rule that is never used
    # is a misspelling that would silently train less.
    for rule in trainable:
        if rule not in used:
            raise ConfigError(f"mask: the trainable expression {rule!r} decides no leaf")
    if not any(jax.tree.leaves(result)):
        raise ConfigError("mask: nothing trains, expected at least one trainable leaf")
    return result


def check_kernels_frozen(trains: PyTree, quantization: str) -> None:
    """Make sure that nothing trains that is stored quantized.

    Args:
      trains: the mask of a base's parameters.
      quantization: `config.model_quantization`.

    Raises:
      ConfigError: a kernel of a linear layer that trains.
    """
    if quantization == "none":
        return
    for path, trained in jax.tree_util.tree_leaves_with_path(trains["layers"]):
        name = f"params/layers/{leaf_name(path)}"
        if trained and name.endswith("/kernel"):
            raise ConfigError(
                f"config.model_quantization: found {quantization} and {name}, which trains; "
                "expected none, or that it is frozen"
            )


def partition(variables: PyTree, trains: PyTree) -> tuple[PyTree, PyTree]:
    """Split a tree into (trainable, frozen), an `optax.MaskedNode` where a leaf is elsewhere.

        {a: 1, b: 2}, {a: True, b: False}  →  {a: 1, b: ·}, {a: ·, b: 2}

    A quantized kernel, one leaf of the mask, goes into one half as a whole.
    A MaskedNode has no leaves, so gradients, optimizer state and checkpoints of one half share
    its structure and hold nothing of the other.
    """
    gap = optax.MaskedNode()
    return (
        jax.tree.map(lambda t, x: x if t else gap, trains, variables),
        jax.tree.map(lambda t, x: gap if t else x, trains, variables),
    )


def combine(trainable: PyTree, frozen: PyTree) -> PyTree:
    """The inverse of `partition`."""
    return jax.tree.map(
        lambda t, f: f if isinstance(t, optax.MaskedNode) else t,
        trainable,
        frozen,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
