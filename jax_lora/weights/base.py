"""A base model from wherever it lies: Hugging Face folder, hub id or GGUF file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from jax.typing import DTypeLike
from jaxtyping import PyTree

from jax_lora.errors import ConfigError
from jax_lora.model.config import LlamaConfig
from jax_lora.model.families import CONFIGS
from jax_lora.model.gguf_blocks import Kinds
from jax_lora.weights import gguf, gguf_kernels, hf, quantize
from jax_lora.weights.tree import DevicePut

_BLOCK, _BLOCKS = 1 << 16, 64  # bytes of a block, and how many of each file are read


def read_config(source: str | os.PathLike[str]) -> LlamaConfig:
    """The configuration alone; of a hub id, no weight is fetched.

    Raises:
      MissingFileError, DataError: as `load`.
    """
    path = hf.resolve(source, weights=False)
    if path.suffix == ".gguf":
        return gguf.read_config(gguf.open_gguf(path))
    return hf.read_config(path)


def known_or_read_config(model: str | os.PathLike[str]) -> LlamaConfig:
    """The configuration of a known model such as "llama-7b", or of a source as of `read_config`."""
    name = os.fspath(model)
    return CONFIGS[name] if name in CONFIGS else read_config(name)


def load(
    source: str | os.PathLike[str],
    dtype: DTypeLike = "bfloat16",
    put: DevicePut | None = None,
    quantization: str = "none",
) -> tuple[LlamaConfig, PyTree]:
    """Configuration and base tree of any source; see `hf.load` and `gguf.load`.

    Raises:
      ConfigError: as `check_quantization`.
      MissingFileError, DataError: one line that names the file, what was found and expected.
    """
    path = hf.resolve(source)
    return (gguf if path.suffix == ".gguf" else hf).load(path, dtype, put, quantization)


def check_quantization(source: str | os.PathLike[str], quantization: str) -> Kinds:
    """Make sure that the linear layers of a source can be stored so, before they are read.

    Args:
      source: of the base.
      quantization: "none", "int8", "nf4" or "gguf".

    Returns:
      For "gguf" the kinds of its blocks; else ().

    Raises:
      ConfigError: "gguf" for a source that is no GGUF file.
      DataError: a tensor that blocks do not divide, or in a kind of blocks that is not known.
    """
    if quantization == "none":
        return ()
    path = hf.resolve(source, weights=False)
    if quantization == "gguf":
        if path.suffix != ".gguf":
            raise ConfigError(
                f"config.model_quantization: found gguf for {source}, expected a GGUF file; int8 "
                "and nf4 quantize any base"
            )
        return gguf_kernels.kernel_kinds(gguf.open_gguf(path))
    quantize.check_shapes(quantization, read_config(path), source)
    return ()


def known_or_read_kinds(model: str | os.PathLike[str], quantization: str) -> Kinds:
    """For "gguf" the kinds of a source's blocks, see `check_quantization`; () for other forms, and
    for a known model, which has no file."""
    if quantization != "gguf" or os.fspath(model) in CONFIGS:
        return ()
    return check_quantization(model, quantization)


def check(source: str | os.PathLike[str]) -> None:
    """Make sure that a source has the tensors that its configuration names; reads headers alone.

    Raises:
      MissingFileError, DataError: as `load`.
    """
    path = hf.resolve(source)
    (gguf if path.suffix == ".gguf" else hf).check(path)


def stamp(source: str | os.PathLike[str]) -> str:
    """What tells the files of a base from others that lay there before, of which none is read; ""
    for a hub id."""
    path = Path(source).expanduser()
    files = sorted(path.glob("*")) if path.is_dir() else [path]
    found = [(file.name, file.stat()) for file in files if file.is_file()]
    return " ".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in found)


def digest(source: str | os.PathLike[str]) -> str:
    """What identifies a base by its content, wherever it lies: 64 hexadecimal digits.

    The sha256 of `config.json` and, for each weight file in the order of their names, of its
    name, its size and 64 evenly spread blocks of 64 KiB (all of a file of up to 4 MiB); of a GGUF
    file its size and blocks alone. It tells one base from another in the time of a few reads. It
    identifies and does not protect: a change between the blocks goes unseen.

    Raises:
      MissingFileError: no such source, or a folder without config.json or weights.
      DataError: an index of shards that is damaged.
    """
    path = hf.resolve(source)
    content = hashlib.sha256()
    if path.is_file():
        _add_blocks(content, path)
        return content.hexdigest()
    hf.read_config(path)  # its errors say what a folder without one lacks
    content.update((path / "config.json").read_bytes())
    for file in sorted(hf.weight_files(path)):
        content.update(f"\0{file.name}\0".encode())
        _add_blocks(content, file)
    return content.hexdigest()


def _add_blocks(content: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    content.update(f"{size}\0".encode())
    with path.open("rb") as file:
        if size <= _BLOCK * _BLOCKS:
            content.update(file.read())
            return
        for i in range(_BLOCKS):
            file.seek((size - _BLOCK) * i // (_BLOCKS - 1))
            content.update(file.read(_BLOCK))
