"""The container: a GGUF file's metadata and where its tensors lie.

The `gguf` package's own reader makes a numpy array of every string of the vocabulary, which takes
seconds; this one unpacks them directly and checks every length against the file. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from jax_lora.errors import DataError

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY, _FLOAT32 = 8, 9, 6
# What the largest vocabularies need several times over; a header may claim to be all of a file.
_MOST_BYTES, _MOST_ENTRIES = 1 << 26, 1 << 22
_MOST_DIMENSIONS = 4


class Tensor(NamedTuple):
    """One tensor in the file. `shape`: slowest axis first, as in numpy; `data`: its bytes."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    data: np.ndarray

    def read(self) -> np.ndarray:
        """De-quantise, float32.

        Raises:
          DataError: the package cannot read this kind.
        """
        try:
            return dequantize(self.data, self.kind).reshape(self.shape)
        except NotImplementedError:
            raise DataError(f"{self.name} is {self.kind.name}, which cannot be read") from None


class _Span(NamedTuple):
    """Where a tensor lies: from byte `first` on, as bytes of shape `bytes`."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    first: int
    bytes: tuple[int, ...]


_Header = tuple[dict[str, Any], list[_Span]]  # the metadata, and where the tensors lie
# Of the last two files, as they were. A run asks a file for its config, its tokenizer, its stop
# tokens and its weights, and the vocabulary is most of the time of each.
_HEADERS: dict[tuple[int, ...], _Header] = {}


class GGUFFile(NamedTuple):
    """Metadata by key, and tensors by the names of the file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Map a GGUF file and check that all of it is there.

    A 32-bit float in the metadata comes back as the shortest decimal that rounds to it: 1e-05,
    as config.json has it, rather than 9.999999747378752e-06.

    Raises:
      FileNotFoundError: no such file.
      DataError: not a GGUF file, cut short, big-endian, or one part of a split model.
    """
    path = Path(path)
    with path.open("rb") as file:
        magic = file.read(4)
        if magic != b"GGUF":
            raise DataError(f"{path}: not a GGUF file: starts with {magic!r}, expected b'GGUF'")
        data, found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), os.fstat(file.fileno())
    version = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
    if version not in _HEADERS:
        header = _header(path, data)
        if len(_HEADERS) == 2:
            del _HEADERS[next(iter(_HEADERS))]
        _HEADERS[version] = header
    metadata, spans = _HEADERS[version]
    content, tensors = np.frombuffer(data, np.uint8), {}
    for name, kind, shape, first, bytes_ in spans:
        part = content[first : first + math.prod(bytes_)].reshape(bytes_)
        tensors[name] = Tensor(name, kind, shape, part)
    return GGUFFile(path, dict(metadata), tensors)


def _header(path: Path, data: mmap.mmap) -> _Header:
    try:
        metadata, spans = _parse(data)
    except (ValueError, KeyError, OverflowError, RecursionError, struct.error) as error:
        # A struct.error is a number that lies past the end of the file.
        early = isinstance(error, struct.error)
        why = "its header ends early" if early else error
        if isinstance(error, RecursionError):
            why = "lists nested too deep"
        raise DataError(f"{path}: damaged or cut short at {len(data)} bytes: {why}") from None
    parts = metadata.get("split.count", 1)
    if type(parts) is not int or parts > 1:
        raise DataError(
            f"{path}: one of {parts!r:.60} parts, expected a file merged with gguf-split"
        )
    return metadata, spans


class _Reader:
    """Reads the header from front to back, and checks every length against the file."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at, self.entries = data, len(b"GGUF"), 0
        self.end = min(len(data), _MOST_BYTES)

    def count(self, found: int, size: int, what: str) -> int:
        """A number of things, each of at least so many bytes, that the header has room for."""
        self.entries += found
        if found * size > self.end - self.at or self.entries > _MOST_ENTRIES:
            raise ValueError(f"{found} {what} at byte {self.at}")
        return found

    def number(self, code: str) -> Any:
        """One scalar of a type of `struct`."""
        (found,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return found

    def texts(self, size: int) -> list[str]:
        """So many texts; in one loop, since a vocabulary and its merges have 100,000."""
        found, unpack, at = [], struct.Struct("<Q").unpack_from, self.at
        for _ in range(size):
            start = at + 8
            at = start + unpack(self.data, at)[0]
            if at > self.end:
                raise ValueError(f"a text of {at - start} bytes at byte {start}")
            found.append(self.data[start:at].decode())
        self.at = at
        return found

    def text(self) -> str:
        """One text."""
        return self.texts(1)[0]

    def value(self, kind: int) -> Any:
        """A value of the metadata; an array is a list."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, size = self.number("I"), self.number("Q")
            if inner in _SCALARS:
                return self._numbers(np.dtype("<" + _SCALARS[inner]), size)
            size = self.count(size, 8, "entries of a list")
            if inner == _STRING:
                return self.texts(size)
            return [self.value(inner) for _ in range(size)]
        if kind not in _SCALARS:
            raise ValueError(f"unknown type {kind} at byte {self.at}")
        found = self.number(_SCALARS[kind])
        return float(str(np.float32(found))) if kind == _FLOAT32 else found

    def _numbers(self, dtype: np.dtype, size: int) -> list[Any]:
        start = self.at
        self.at += self.count(size, dtype.itemsize, "numbers of a list") * dtype.itemsize
        return np.frombuffer(self.data, dtype, size, start).tolist()


def _parse(data: mmap.mmap) -> _Header:
    reader = _Reader(data)
    version = reader.number("I")
    if version not in (2, 3):
        raise ValueError(f"version: found {version}, expected 2 or 3, little-endian")
    tensor_count, key_count = reader.number("Q"), reader.number("Q")
    metadata = {}
    for _ in range(reader.count(key_count, 13, "keys")):
        key = reader.text()
        metadata[key] = reader.value(reader.number("I"))
    headers = []
    for _ in range(reader.count(tensor_count, 32, "tensors")):
        name, dimensions = reader.text(), reader.number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"tensor {name}: {dimensions} dimensions")
        dims = [reader.number("Q") for _ in range(dimensions)]
        headers.append((name, dims, GGMLQuantizationType(reader.number("I")), reader.number("Q")))

    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment: found {alignment!r}, expected a positive integer")
    start = math.ceil(reader.at / alignment) * alignment
    spans, total = {}, 0
    for name, dims, kind, offset in headers:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if not dims or dims[0] % block:
            raise ValueError(f"tensor {name}: sizes {dims}, expected rows of {block} numbers each")
        size = math.prod(dims) * block_bytes // block
        first, total = start + offset, total + size
        if first + size > len(data):
            raise ValueError(f"tensor {name} would end at byte {first + size}")
        if name in spans:
            raise ValueError(f"tensor {name} is there twice")
        if total > len(data):  # many tensors of the same bytes would be many arrays
            raise ValueError(f"tensors up to {name} have {total} bytes, some of them twice")
        bytes_ = *dims[:0:-1], dims[0] * block_bytes // block
        spans[name] = _Span(name, kind, tuple(dims[::-1]), first, bytes_)
    return metadata, list(spans.values())
