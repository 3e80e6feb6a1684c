"""The vocabulary in a SentencePiece `tokenizer.model`, without the sentencepiece package.

The file is one protocol buffer; field numbers are those of
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jax_lora.errors import DataError

NORMAL_KINDS = (1, 4, 5)  # normal, user-defined, unused: what merging may produce
_BPE = 2


class SentencePiece(NamedTuple):
    """Pieces in id order, their scores and kinds; special ids (None: there is none)."""

    pieces: list[str]
    scores: list[float]
    kinds: list[int]
    add_prefix: bool
    bos: int | None
    eos: int | None
    unk: int | None
    pad: int | None


def read_sentencepiece(path: Path) -> SentencePiece:
    """Read a BPE model with byte fallback, LLaMA's kind.

    Raises:
      DataError: not a SentencePiece file, cut short, or a model of another kind.
    """
    data = path.read_bytes()
    try:
        model = list(_fields(data))
        pieces = [dict(_fields(piece)) for number, piece in model if number == 1]
        trainer, normalizer = (
            dict(_fields(b"".join(part for number, part in model if number == wanted)))
            for wanted in (2, 3)
        )
        names = [piece[1].decode() for piece in pieces]
        scores = [struct.unpack("<f", piece.get(2, bytes(4)))[0] for piece in pieces]
    except (ValueError, KeyError, TypeError, AttributeError, struct.error):
        raise DataError(f"{path}: not a whole SentencePiece model ({len(data)} bytes)") from None
    expectations = (
        ("model_type", trainer.get(3, 1), _BPE),
        ("byte_fallback", trainer.get(35, 0), 1),
        ("remove_extra_whitespaces", normalizer.get(4, 1), 0),
        ("size of precompiled_charsmap", len(normalizer.get(2, b"")), 0),
    )
    for name, found, expected in expectations:
        if found != expected:
            raise DataError(f"{path}: {name}: found {found}, expected {expected} as in LLaMA's")

    def special(number: int, default: int) -> int | None:
        found = trainer.get(number, default)
        return found if found < len(names) else None  # −1, "none", is stored as 2⁶⁴ − 1

    none = 1 << 63
    return SentencePiece(
        names,
        scores,
        [piece.get(3, 1) for piece in pieces],
        bool(normalizer.get(3, 1)),
        bos=special(41, 1),
        eos=special(42, 2),
        unk=special(40, 0),
        pad=special(43, none),
    )


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of every field of a message: an int, or bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            found, at = _varint(data, at)
        else:
            if kind == 2:
                size, at = _varint(data, at)
            elif kind in (1, 5):
                size = 8 if kind == 1 else 4
            else:
                raise ValueError(f"wire type {kind}")
            found, at = data[at : at + size], at + size
            if at > len(data):
                raise ValueError("cut short")
        yield tag >> 3, found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    found = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("cut short")
        byte = data[at]
        found |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return found, at
