"""The cells of a study: rank × variant × set × round × learning rate; their order; filters."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import pandas as pd

from jax_lora.errors import ConfigError
from jax_lora.study import GRID, Frame
from jax_lora.study.config import EACH, FULL, Changes, StudyConfig


@dataclass(frozen=True)
class Cell:
    """One model to train and score; the fields but the last are `jax_lora.study.GRID`'s.

    `id` also names its folder; `rank` is None for full fine-tuning, `variant` "" for the plain
    recipe; `repeat` is added to the run's seed.
    """

    id: str
    method: str
    rank: int | None
    variant: str
    set: str
    round: int
    learning_rate: float
    repeat: int = 0


def cells(
    ranks: Sequence[int | str],
    sets: Sequence[str],
    rounds: Sequence[int],
    learning_rates: Mapping[str, Sequence[float]],
    variants: Mapping[str, Changes],
) -> list[Cell]:
    """Every cell of a grid.

    Args:
      ranks: of the adapters, and "full".
      sets: what is trained on, such as "T100" and "T*500".
      rounds: draws of the sets.
      learning_rates: by method, "lora" and "full".
      variants: name → what it changes in a run's config; the plain recipe is there without being
        named. One that changes `lora` alone has no full fine-tuning.
    """
    found = []
    for rank, variant, name, round_ in product(ranks, ["", *variants], sets, rounds):
        method = FULL if rank == FULL else "lora"
        if method == FULL and variant and set(variants[variant]) <= {"lora"}:
            continue
        for rate in learning_rates[method]:
            parts = [FULL if rank == FULL else f"r{rank}", variant, name.replace("*", "x")]
            parts += [f"round{round_}", f"lr{rate:g}" if len(learning_rates[method]) > 1 else ""]
            label = "-".join(filter(None, parts))
            size = None if rank == FULL else int(rank)
            found.append(Cell(label, method, size, variant, name, round_, rate))
    return found


def cells_of(config: StudyConfig) -> list[Cell]:
    """All cells of a study, at all of their learning rates; `choice` says which are run.

    Behind the trials (see `is_trial`) stand their repeats with another seed, one of which is run.
    """
    rates = {"lora": config.learning_rates.lora, FULL: config.learning_rates.full}
    found = cells(config.ranks, config.sets, config.rounds, rates, config.variants)
    repeats = (replace(c, id=f"{c.id}-seed1", repeat=1) for c in found if is_trial(config, c))
    return [*found, *repeats]


def is_trial(config: StudyConfig, cell: Cell) -> bool:
    """Whether a cell tries one of several learning rates, among which its validation loss decides:
    those of the first round, on `config.choose_on`."""
    several = len(getattr(config.learning_rates, cell.method)) > 1
    return several and cell.round == config.rounds[0] and config.choose_on in (EACH, cell.set)


def frame(cells: Iterable[Cell]) -> Frame:
    """The cells as a table of `jax_lora.study.GRID`: what a report expects."""
    rows = [[cell.id, *(getattr(cell, name) for name in GRID[1:])] for cell in cells]
    return pd.DataFrame(rows, columns=GRID).astype({"rank": "Int64"})


# ---------------------------------------------------------------- costs


def cheap_first(cells: Iterable[Cell], operations: Mapping[str, float]) -> list[Cell]:
    """The cells by their operations (by id), so that much is known early; else as they were."""
    return sorted(cells, key=lambda cell: operations[cell.id])


# ---------------------------------------------------------------- filters

NAMES = ("rank", "round", "learning_rate", "method", "variant", "set")
_SYNTAX = (
    *(ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.Compare),
    *(ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.In, ast.NotIn),
    *(ast.List, ast.Tuple, ast.Name, ast.Constant, ast.Load),
)


def choose(cells: Sequence[Cell], text: str) -> list[Cell]:
    """The cells that an expression of `DataFrame.query` holds for.

    Args:
      cells: to choose from.
      text: comparisons of NAMES with numbers and quoted texts, such as
        `rank <= 64 and (set == "T100" or round in [1, 2])`. The rank of full fine-tuning is NaN;
        `method == "full"` chooses it.

    Raises:
      ConfigError: what is no such expression, or one that no cell meets.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
        if not all(map(_is_allowed, ast.walk(tree))):
            raise SyntaxError
        table = frame(cells).astype({"rank": float})
        chosen = table.query(ast.unparse(tree), engine="python").index
    except Exception:  # what pandas raises over an expression may be of any class
        raise ConfigError(
            f"--only: found {text!r}, expected comparisons of {', '.join(NAMES)}, "
            'such as: rank <= 64 and set == "T100"; or: method == "full"'
        ) from None
    if chosen.empty:
        raise ConfigError(
            f"--only: {text!r} holds for none of {len(cells)} cells, expected at least one"
        )
    return [cells[i] for i in chosen]


def _is_allowed(node: ast.AST) -> bool:
    """Whether a part of an expression is one that cannot but compare."""
    if isinstance(node, ast.Name):
        return node.id in NAMES
    if isinstance(node, ast.Constant):
        return type(node.value) in (int, float, str)
    if isinstance(node, ast.Expression | ast.BoolOp):
        parts = node.values if isinstance(node, ast.BoolOp) else [node.body]
        return all(map(_is_condition, parts))
    if isinstance(node, ast.UnaryOp):
        return _is_condition(node.operand) == isinstance(node.op, ast.Not)
    return isinstance(node, _SYNTAX)


def _is_condition(node: ast.AST) -> bool:
    is_not = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    return is_not or isinstance(node, ast.BoolOp | ast.Compare)
