"""A base model from wherever it lies: Hugging Face folder, hub id or GGUF file."""

from __future__ import annotations

import os
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
