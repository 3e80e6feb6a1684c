"""Data of one's own as sets: "train", and as asked for "validation" and "test".

No question is in two of them: a question of the test set is never trained on, nor validated on.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from jax_lora.config import DataConfig
from jax_lora.data.example import Example
from jax_lora.data.sources.rows import Unused, parse_columns, read_examples
from jax_lora.data.sources.tables import FILES, Table, read_tables
from jax_lora.data.tasksets import TaskSet
from jax_lora.errors import ConfigError, DataError

logger = logging.getLogger(__name__)
HELD_OUT = ("test", "validation")  # the first one wins where two have a question


@dataclass(frozen=True)
class UserData:
    """Examples by set, as the study's task sets are.

    Attributes:
      examples: "train" and those of `HELD_OUT` that there are.
    """

    examples: Mapping[str, tuple[Example, ...]]

    @cached_property
    def sets(self) -> dict[str, TaskSet]:
        """The sets, see `tasksets.TaskSet`."""
        return {
            name: TaskSet(name, tuple(dict.fromkeys(e.task for e in rows)), lambda rows=rows: rows)
            for name, rows in self.examples.items()
        }

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over all examples with their sets; names the data in a run."""
        digest = hashlib.sha256()
        for name, rows in self.examples.items():
            for e in rows:
                fields = [name, e.instruction, e.input, *e.references, e.task, e.category, e.id]
                digest.update(json.dumps([*fields, e.messages]).encode())
        return digest.hexdigest()

    def answers(self, task: str) -> Iterable[Sequence[str]]:
        """The accepted answers of all examples of a task."""
        return (e.references for rows in self.examples.values() for e in rows if e.task == task)


def read(config: DataConfig, seed: int) -> UserData:
    """Read, check and split what `config.path` and the paths beside it name.

    Args:
      config: `path`, `format`, `columns`, `strict`, and for each held-out set a path or a share.
      seed: decides which questions the shares take.

    Raises:
      ConfigError, DataError, OSError: one line with the key or with the file and row.
    """
    columns, unused = parse_columns(config.columns), Unused(config.strict)

    def examples(table: Table, needs_all: bool = False) -> list[Example]:
        return list(read_examples(table, columns, unused, needs_all))

    tables = read_tables(config.path, config.format)
    if "train" not in tables:
        found = ", ".join(tables) or "none"
        raise DataError(f"{config.path}: found the splits {found}, expected train")
    train = examples(tables["train"], needs_all=True)
    held_out: dict[str, list[Example]] = {}
    shares: dict[str, float] = {}
    for name in HELD_OUT:
        path, share = getattr(config, f"{name}_path"), getattr(config, name)
        if share and (path or name in tables):
            other = f"config.data.{name}_path" if path else f"a split {name} of {config.path}"
            raise ConfigError(
                f"config.data.{name}: found {share} and {other}, expected one of them"
            )
        if share:
            shares[name] = share
        elif path:
            theirs = read_tables(path, config.format if config.format in FILES else "auto")
            if name not in theirs and len(theirs) > 1:
                raise DataError(
                    f"{path}: found the splits {', '.join(theirs)}, expected {name}, or one alone"
                )
            held_out[name] = examples(theirs.get(name) or next(iter(theirs.values())))
        elif name in tables:
            held_out[name] = examples(tables[name])
    train, taken = take_shares(train, shares, seed)
    sets = _disjoint({**held_out, **taken, "train": train}, unused)
    if unused.reasons:
        logger.warning("%s", unused)
    for name, rows in sets.items():
        if not rows:
            raise DataError(f"{config.path}: found no usable row for {name}, expected some")
    return UserData({name: tuple(sets[name]) for name in ("train", *HELD_OUT) if name in sets})


def take_shares(
    rows: Sequence[Example], shares: Mapping[str, float], seed: int
) -> tuple[list[Example], dict[str, list[Example]]]:
    """Take shares of the distinct questions, in the order of a hash of (seed, question).

    Rows that ask the same go together, and so do conversations that begin with the same question,
    unless they all do. A share takes at least one question.

    Returns:
      What is left, and what each share took, all in the order of `rows`.
    """
    firsts = {row.keys[0] for row in rows}
    turn = 0 if len(firsts) > len(shares) else -1
    keys = sorted({row.keys[turn] for row in rows}, key=lambda key: _hash(seed, key))
    owner: dict[tuple[str, ...], str] = {}
    start = 0
    for name, share in shares.items():
        stop = start + max(1, round(share * len(keys)))
        owner |= dict.fromkeys(keys[start:stop], name)
        start = stop
    taken = {name: [row for row in rows if owner.get(row.keys[turn]) == name] for name in shares}
    return [row for row in rows if row.keys[turn] not in owner], taken


def _hash(seed: int, key: tuple[str, ...]) -> bytes:
    return hashlib.sha256(json.dumps([seed, *key]).encode()).digest()


def _disjoint(sets: Mapping[str, Sequence[Example]], unused: Unused) -> dict[str, list[Example]]:
    """The sets without the questions that an earlier one of test, validation, train has, in any
    turn of a conversation."""
    owner: dict[tuple[str, ...], str] = {}
    found: dict[str, list[Example]] = {}
    for name in (*HELD_OUT, "train"):
        if name not in sets:
            continue
        found[name] = []
        for row in sets[name]:
            others = {owner[key] for key in row.keys if key in owner} - {name}
            if others:
                unused.add(f"{name}: {row.name}", f"a question that is in {min(others)} too")
            else:
                found[name].append(row)
                owner[row.key] = name
    return found
