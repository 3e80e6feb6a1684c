"""The table of promises: what the tests allow, and the worst that they saw.

A test states a promise with the fixture `promise`. A run in which every promise of the suite was
measured and kept writes `docs/exactness.md`; any other run leaves the file as it is.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from typing import NamedTuple

HEAD = """\
# How exact it is

What the tests promise, how far off they may be, and the worst that was seen. Everything is float32
on a CPU; θ is a tensor of weights, θ₀ where it started, g its gradient, and "ref" marks the
reference implementation's, a prime (θ') the same work of ours done otherwise. D is the width of the
model, m DoRA's magnitudes; a mesh is (data, fsdp, tensor), see `docs/many_devices.md`.

Written by `make exactness` (`pytest tests -m promise`) when every promise was measured and kept,
last with {versions}. Not to be edited. `make test`, `make parity` and CI keep the same promises.

| promise | tolerance | worst seen | test |
|---|---:|---:|---|
"""


class Row(NamedTuple):
    test: str
    promise: str
    tolerance: float
    worst: float


@dataclass
class Ledger:
    """What a run measured. `wanted`: ids of the collected tests that state promises; `unread`:
    test files of the suite that were not collected."""

    wanted: set[str] = field(default_factory=set)
    unread: set[str] = field(default_factory=set)
    measured: dict[str, list[Row]] = field(default_factory=dict)

    def record(self, test: str, promise: str, tolerance: float, worst: float) -> None:
        """Keep a measurement of the test with this id."""
        row = Row(test.partition("[")[0], promise, tolerance, worst)
        self.measured.setdefault(test, []).append(row)

    def gap(self) -> str | None:
        """Why this run's table would not be whole, or None."""
        if self.unread:
            return f"test files that were not read: {len(self.unread)}"
        if missing := self.wanted - self.measured.keys():
            return f"tests with a promise that did not run: {len(missing)}"
        return None

    def table(self) -> str:
        """The file: a row for each promise, the worst over all cases of its test."""
        worst: dict[tuple[str, str, float], float] = {}
        for row in (row for rows in self.measured.values() for row in rows):
            key = row[:3]
            worst[key] = max(row.worst, worst.get(key, 0.0))
        names = ("jax", "torch", "transformers", "peft")
        python = ".".join(map(str, sys.version_info[:2]))
        found = [f"{name} {version(name)}" for name in names if find_spec(name)]
        versions = ", ".join([f"Python {python}", *found])
        lines = []
        for (test, promise, tolerance), value in sorted(worst.items()):
            text = promise.replace("|", r"\|")  # which would end the cell
            where = test.removeprefix("tests/")
            lines.append(f"| {text} | {tolerance:.2g} | {value:.2g} | `{where}` |\n")
        return HEAD.format(versions=versions) + "".join(lines)
