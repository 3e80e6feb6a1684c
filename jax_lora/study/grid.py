"""The cells of a study: rank × variant × set × round × learning rate; what they cost; filters."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import product
from typing import Any

import pandas as pd

from jax_lora.study import GRID, Frame

FULL = "full"  # among ranks: full fine-tuning


@dataclass(frozen=True)
class Cell:
    """One model to train and score; the fields are `jax_lora.study.GRID`'s.

    `id` also names its folder; `rank` is None for full fine-tuning, `variant` "" for the plain
    recipe.
    """

    id: str
    method: str
    rank: int | None
    variant: str
    set: str
    round: int
    learning_rate: float


def cells(
    ranks: Sequence[int | str],
    sets: Sequence[str],
    rounds: Sequence[int],
    learning_rates: Mapping[str, Sequence[float]],
    variants: Mapping[str, Mapping[str, Any]],
) -> list[Cell]:
    """Every cell of a grid.

    Args:
      ranks: of the adapters, and "full".
      sets: what is trained on, such as "T100" and "T*500".
      rounds: draws of the sets.
      learning_rates: by method, "lora" and "full".
      variants: name → what it changes in a run's config; the plain recipe is there without being
        named. One that changes `lora` alone has no full fine-tuning.

    Raises:
      ValueError: an axis that is empty, has a value twice or one of the wrong kind.
    """
    methods = {FULL if rank == FULL else "lora" for rank in ranks}
    axes = {"ranks": ranks, "sets": sets, "rounds": rounds}
    axes |= {f"learning_rates.{m}": learning_rates[m] for m in sorted(methods)}
    for name, values in axes.items():
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name}: found {tuple(values)}, expected at least one, none twice")
    for name, values, least in (("ranks", ranks, 1), ("rounds", rounds, 0)):
        for value in values:
            if (name, value) != ("ranks", FULL) and not (type(value) is int and value >= least):
                raise ValueError(f"{name}: found {value!r}, expected numbers of at least {least}")
    for name in variants:
        if not re.fullmatch(r"[\w.]+", name):
            raise ValueError(f"variants: found {name!r}, expected a name of letters and digits")

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


def frame(cells: Iterable[Cell]) -> Frame:
    """The cells as a table of `jax_lora.study.GRID`: what a report expects."""
    return pd.DataFrame([astuple(cell) for cell in cells], columns=GRID).astype({"rank": "Int64"})


# ---------------------------------------------------------------- costs


def operations(modules: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """Analytic operations a training token needs, and those of the base's forward pass alone.

    2 a parameter forward, 2 for the gradient of activations, 2 for that of what trains. What
    attention does between tokens is left out (4% of LLaMA-7B's forward pass at 1024 tokens), and
    so is recomputation.

    Args:
      modules: rows of `planning.counts.table`: module, frozen, trainable.
    """
    rows = list(modules)
    untied = any(row["module"] == "lm_head.kernel" for row in rows)
    base = adapters = trained = 0
    for row in rows:
        if untied and row["module"] == "embed_tokens.embedding":
            continue  # looked up, not multiplied with
        count = row["frozen"] + row["trainable"]
        trained += row["trainable"]
        if row["module"].startswith("lora."):
            adapters += count
        else:
            base += count
    return 4.0 * (base + adapters) + 2.0 * trained, 2.0 * base


def cheap_first(cells: Iterable[Cell], operations: Mapping[str, float]) -> list[Cell]:
    """The cells by their operations (by id), so that much is known early; else as they were."""
    return sorted(cells, key=lambda cell: operations[cell.id])


# ---------------------------------------------------------------- filters

Test = Callable[[Cell], bool]
_WORD = re.compile(r"\s*(<=|>=|!=|[<>=()]|'[^']*'|\"[^\"]*\"|[^\s<>=!()'\"]+)")
_COMPARE = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_NUMBERS = ("rank", "round", "learning_rate")
_TEXTS = ("method", "variant", "set")


def choose(cells: Sequence[Cell], text: str) -> list[Cell]:
    """The cells that a condition such as "rank<=64 and (set=T100 or round!=0)" holds for.

    Names are the fields of `Cell`; `rank=full` is full fine-tuning, which no other comparison of
    ranks but != holds for; `not` and quotes (`variant=''`) work too.

    Raises:
      ValueError: what is no condition, a value that no cell has, or a condition that no cell meets.
    """
    words, end = [], 0
    text = text.rstrip()
    while end < len(text):
        match = _WORD.match(text, end)
        if not match:
            raise ValueError(f"--only: found {text[end:]!r}, expected a word or a comparison")
        words.append(match[1])
        end = match.end()
    words.reverse()  # the next word is the last

    def take(*expected: str) -> str:
        word = words.pop() if words else "the end"
        if expected and word not in expected:
            raise ValueError(f"--only: found {word!r}, expected {' or '.join(expected)}")
        return word

    def chain(word: str, part: Callable[[], Test], join: Callable[[Iterable[bool]], bool]) -> Test:
        tests = [part()]
        while words and words[-1] == word:
            words.pop()
            tests.append(part())
        return lambda cell: join(test(cell) for test in tests)

    def either() -> Test:
        return chain("or", both, any)

    def both() -> Test:
        return chain("and", one, all)

    def one() -> Test:
        word = take("(", "not", *_NUMBERS, *_TEXTS)
        if word == "not":
            test = one()
            return lambda cell: not test(cell)
        if word == "(":
            test = either()
            take(")")
            return test
        sign = take(*(_COMPARE if word in _NUMBERS else ("=", "!=")))
        return _comparison(cells, word, sign, take())

    test = either()
    if words:
        take("and", "or")
    chosen = [cell for cell in cells if test(cell)]
    if not chosen:
        raise ValueError(f"--only: {text!r} holds for none of {len(cells)} cells, expected some")
    return chosen


def _comparison(cells: Sequence[Cell], name: str, sign: str, word: str) -> Test:
    compare, value = _COMPARE[sign], word.strip("'\"")
    if name in _TEXTS:
        known = sorted({getattr(cell, name) for cell in cells})
        if value not in known:
            raise ValueError(f"--only: {name} is {word!r}, expected one of {', '.join(known)}")
        return lambda cell: compare(getattr(cell, name), value)
    if (name, value) == ("rank", FULL) and sign in ("=", "!="):
        return lambda cell: compare(cell.rank, None)
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"--only: {name} is {word!r}, expected a number") from None

    def test(cell: Cell) -> bool:
        there = getattr(cell, name)
        return sign == "!=" if there is None else compare(there, number)

    return test
