"""A base model from wherever it lies: Hugging Face folder, hub id or GGUF file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from jax_lora.model.config import LlamaConfig
from jax_lora.weights import gguf, hf
from jax_lora.weights.tree import Place


def read_config(source: str | os.PathLike[str]) -> LlamaConfig:
    """The configuration alone.

    Raises:
      MissingFileError, DataError: as `load`.
    """
    path = hf.resolve(source)
    if path.suffix == ".gguf":
        return gguf.read_config(gguf.open_gguf(path))
    return hf.read_config(path)


def load(
    source: str | os.PathLike[str], dtype: Any = "bfloat16", place: Place | None = None
) -> tuple[LlamaConfig, dict[str, Any]]:
    """Configuration and base tree of any source; see `hf.load` and `gguf.load`.

    Raises:
      MissingFileError, DataError: one line that names the file, what was found and expected.
    """
    path = hf.resolve(source)
    return (gguf if path.suffix == ".gguf" else hf).load(path, dtype, place)


BLOCK, BLOCKS = 1 << 16, 64


def digest(source: str | os.PathLike[str]) -> str:
    """The identity of a base by content, wherever it lies: 16 hex digits.

    Over config.json and, of every weight file, its size and 64 evenly spread blocks of 64 KiB; a
    folder's files with their names. It tells models apart; it does not find a damaged byte.

    Raises:
      DataError, OSError: as `load`.
    """
    path = hf.resolve(source)
    found = hashlib.sha256()
    if path.is_dir():
        found.update((path / "config.json").read_bytes())
        for file in sorted(path.glob("*.safetensors")):
            found.update(file.name.encode())
            _sample(file, found)
    else:
        _sample(path, found)
    return found.hexdigest()[:16]


def _sample(path: Path, found: Any) -> None:
    size = path.stat().st_size
    found.update(str(size).encode())
    with path.open("rb") as file:
        for i in range(BLOCKS):
            file.seek(i * max(BLOCK, (size - BLOCK) // (BLOCKS - 1)))
            found.update(file.read(BLOCK))
