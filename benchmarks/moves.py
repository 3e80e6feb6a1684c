"""What a compiled program moves without computing: read off its text, the HLO of XLA.

A loop over layers takes each layer's weights out of a stack. Where the product cannot read them in
place, the compiler writes them to a buffer first: work that no profile should have.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

# Operations that hand numbers on as they are.
MOVES = {
    "bitcast",
    "bitcast-convert",
    "broadcast",
    "concatenate",
    "constant",
    "copy",
    "dynamic-slice",
    "dynamic-update-slice",
    "get-tuple-element",
    "iota",
    "parameter",
    "reshape",
    "slice",
    "transpose",
    "tuple",
}
FREE = {"bitcast", "constant", "get-tuple-element", "iota", "parameter", "reshape", "tuple"}
BYTES = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "u16": 2, "s16": 2, "f64": 8, "s64": 8}
FAST_MEMORY = re.compile(r"S\([1-9]")  # of a TPU: what lies there is on its way to a product


@dataclass(frozen=True)
class Array:
    """The shape of a value: its dtype by XLA's name, its sizes without ones, and its layout."""

    dtype: str
    sizes: tuple[int, ...]
    layout: str

    @property
    def bytes(self) -> int:
        """Of all elements."""
        return math.prod(self.sizes) * BYTES.get(self.dtype, 4)


class Instruction(NamedTuple):
    """One line of a computation; `shapes` has one entry per element of a tuple, `rest` is the
    text behind the opcode."""

    name: str
    shapes: list[Array]
    opcode: str
    operands: list[str]
    rest: str


class Move(NamedTuple):
    """Bytes that an operation writes as it read them, `times` per call of the program.

    `source` is what they are taken from, the whole stack where it is a slice; None where nothing
    is read: zeros.
    """

    source: Array | None
    bytes: int
    times: int
    name: str


Computation = dict[str, Instruction]  # by name; the last one is the root


def moves(text: str) -> list[Move]:
    """Every operation of a compiled program that only moves data in the device's main memory.

    A fusion counts if none of its instructions computes, indices aside. Of what is written into a
    stack the slice counts.
    """
    computations, entry = _read(text)
    return list(_walk(computations, computations[entry], 1))


def _walk(computations: dict[str, Computation], computation: Computation, times: int):
    for one in computation.values():
        called = [computations[n] for n in _called(one) if n in computations]
        if one.opcode == "while":
            yield from _walk(computations, called[-1], times * _trips(one, called[0]))
        elif one.opcode == "fusion":
            if all(map(_only_moves, called[0].values())):
                yield from _results(called[0], times, one.name)
        elif one.opcode in ("call", "conditional", "async-start"):
            for body in called:
                yield from _walk(computations, body, times)
        elif one.opcode in MOVES - FREE:
            yield from _result(computation, one, FREE, times, one.name)


def _results(fused: Computation, times: int, name: str) -> Iterator[Move]:
    root = next(reversed(fused.values()))
    for found in [fused[n] for n in root.operands] if root.opcode == "tuple" else [root]:
        yield from _result(fused, found, MOVES, times, name)


def _result(
    computation: Computation, found: Instruction, through: set[str], times: int, name: str
) -> Iterator[Move]:
    # `through`: the operations that a fusion does on its way to the result, which cost nothing.
    while found.opcode in ("bitcast", "reshape") and found.operands[0] in computation:
        found = computation[found.operands[0]]
    if found.opcode == "dynamic-update-slice":
        found = computation[found.operands[1]]
    (written,) = found.shapes
    source = found
    while source.operands and source.opcode != "parameter":
        before = computation[source.operands[0]]
        if source is not found and source.opcode not in through or len(before.shapes) != 1:
            break
        source = before
    if not FAST_MEMORY.search(written.layout):
        is_fill = source.opcode in ("constant", "iota", "broadcast") or not source.shapes[0].sizes
        yield Move(None if is_fill else source.shapes[0], written.bytes, times, name)


def _only_moves(one: Instruction) -> bool:
    return one.opcode in MOVES or all(not shape.sizes for shape in one.shapes)


# ------------------------------------------------------------------ reading

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(
    r"(?:condition|body|calls|to_apply|branch_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)


def _read(text: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif found := _LINE.match(line):
            current[found[1]] = _instruction(found[1], found[2])
    return computations, entry


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    shape, text = text[:end], text[end:].lstrip()
    start = text.index("(")
    end = _closing(text, start)
    shapes = [
        Array(dtype, tuple(n for n in map(int, filter(None, sizes.split(","))) if n > 1), layout)
        for dtype, sizes, layout in _SHAPE.findall(shape)
    ]
    operands = re.findall(r"%([\w.\-]+)", text[start:end])
    return Instruction(name, shapes, text[:start], operands, text[start:])


def _closing(text: str, start: int) -> int:
    # The end of the bracket that opens at `start`.
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if not depth:
            return i + 1
    raise ValueError(f"no closing bracket: {text[start : start + 80]}")


def _called(one: Instruction) -> list[str]:
    found = (several or name for several, name in _CALLED.findall(one.rest))
    return [name.strip().lstrip("%") for names in found for name in names.split(",")]


def _trips(loop: Instruction, condition: Computation) -> int:
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    # A TPU's compiler leaves it to the condition, which compares with it.
    limits = [one.rest for one in condition.values() if one.opcode == "constant"]
    found = [int(n) for limit in limits for n in re.findall(r"^\((\d+)\)", limit)]
    if len(found) != 1:
        raise ValueError(f"{loop.name}: a loop without a number of iterations")
    return found[0]
