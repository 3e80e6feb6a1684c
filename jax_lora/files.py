"""Files that are there whole or not at all, and JSON: the one copy of each.

A file is written beside its place under a name that no other process uses, flushed to the disk,
and then renamed, and the rename is flushed: a reader finds the old file or the new one, and a full
disk or a loss of power leaves one of the two. Every `OSError` from here carries the path that the
caller gave.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jax_lora.errors import ConfigError, DataError

logger = logging.getLogger(__name__)
Json = Any  # what a JSON file holds: whoever reads one checks it
LARGEST_JSON = 16 << 20  # bytes of a file that is read at once; its values take many times more
_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")  # how JSON writes what may be half a surrogate pair

# ---------------------------------------------------------------- writing


@contextmanager
def fresh_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name beside `path` to write to; renamed to it at the end, or removed on an error.

    Raises:
      OSError: with the path, where the file cannot be written.
    """
    path = Path(path)
    partial = _beside(path)
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            _flush(partial)
            os.replace(partial, path)
            _flush(path.parent)
        finally:
            partial.unlink(missing_ok=True)  # not there after the rename
    except OSError as error:
        _name(error, partial, path)
        raise


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file whole; its folder is made if need be."""
    with fresh_file(path) as partial:
        partial.write_bytes(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write a JSON file whole."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_json_once(path: str | os.PathLike[str], value: object) -> None:
    """`write_json`, unless there is such a file: of several writers the first one counts."""
    path = Path(path)
    partial = _beside(path)
    try:
        write_json(partial, value)
        with suppress(FileExistsError):
            os.link(partial, path)
        _flush(path.parent)
    except OSError as error:
        _name(error, partial, path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def jsonl_line(row: Mapping[str, object]) -> str:
    """One line of a JSONL file, with its end."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def rename(source: Path, target: Path) -> None:
    """Give a file that is finished its name, both on the disk."""
    with naming(target):
        _flush(source)
        os.replace(source, target)
        _flush(target.parent)


def local_path(folder: str | os.PathLike[str]) -> Path:
    """The path of a folder to write on this machine; `~` is the user's home.

    Raises:
      ConfigError: an address such as gs://bucket/run, which a `Path` would make a folder `gs:`.
    """
    if re.match(r"[A-Za-z][\w+.-]*://", os.fspath(folder)):
        raise ConfigError(
            f"{folder}: found an address, expected a folder of this machine (a mounted bucket is "
            "one)"
        )
    return Path(folder).expanduser()


def check_vacant(folder: str | os.PathLike[str]) -> Path:
    """The path of a folder that may be created: not there yet, or there and empty.

    Raises:
      FileExistsError: it is a file, or a folder with something in it.
      ConfigError: see `local_path`.
    """
    path = local_path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        kind = "folder that is not empty" if path.is_dir() else "file"
        text = f"found a {kind}, expected a new or empty folder"
        raise FileExistsError(errno.EEXIST, text, str(path))
    return path


@contextmanager
def fresh_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder beside `folder` to write into; renamed to it at the end, or removed on an error.

    Raises:
      FileExistsError: see `check_vacant`.
      OSError: with the path, where something in it cannot be written.
    """
    path = check_vacant(folder)
    partial = _beside(path)
    try:
        try:
            partial.mkdir(parents=True)
            yield partial
            flush_folder(partial)
            os.rename(partial, path)
            _flush(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        _name(error, partial, path)
        raise


def flush_folder(folder: Path) -> None:
    """Have the disk hold all that lies in a folder, and the folder's own name."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            _flush(Path(parent, name))
        _flush(Path(parent))
    _flush(folder.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot flush a folder
            raise
    finally:
        os.close(handle)


def _beside(path: Path) -> Path:
    # The number tells processes of one machine apart, the random part those of several machines
    # that share the disk, and threads.
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.new")


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Give the path to an `OSError` of the block that has none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        _name(error, Path(path), Path(path))
        raise


def _name(error: OSError, partial: Path, path: Path) -> None:
    """Give an error the caller's path, where it names the temporary one, or none."""
    found = error.filename
    if found is not None and not str(found).startswith(str(partial)):
        return
    error.errno = errno.EIO if error.errno is None else error.errno
    error.strerror = error.strerror or str(error)
    error.filename = str(path) + ("" if found is None else str(found)[len(str(partial)) :])
    if error.filename2 is not None:
        del error.filename2


# ---------------------------------------------------------------- reading


def read_json(
    path: str | os.PathLike[str], kind: type = object, largest: int = LARGEST_JSON
) -> Json:
    """Parse a JSON file.

    Args:
      path: the file.
      kind: what it must hold, such as `dict` for an object.
      largest: bytes of a file that is read.

    Raises:
      DataError: not UTF-8, not JSON, too large, or something other than a `kind`; names the file.
      OSError: no such file, or one that cannot be read.
    """
    size = Path(path).stat().st_size
    if size > largest:
        raise DataError(f"{path}: found {size:,} bytes, expected at most {largest:,} of JSON")
    try:
        found = parse_json(Path(path).read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(found, kind):
        expected = {dict: "object", list: "array"}.get(kind, kind.__name__)
        raise DataError(f"{path}: found a {type(found).__name__}, expected a JSON {expected}")
    return found


def parse_json(content: bytes) -> Json:
    """What a JSON text holds.

    Raises:
      ValueError: not UTF-8, not JSON, nested too deep, or half of a surrogate pair, which no text
        may hold.
    """
    try:
        found = json.loads(content.decode())
        if _HALF_PAIR.search(content):
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deep") from None
    return found


def read_jsonl(
    path: str | os.PathLike[str], *, pass_over_damage: bool = False
) -> list[dict[str, Json]]:
    """The whole lines of a file, [] where it is missing; a last line cut in the middle is left.

    Args:
      path: the file.
      pass_over_damage: a line that is no JSON object is named in a warning and left out.

    Raises:
      DataError: a line that is no JSON object; names the file and the line.
    """
    path = Path(path)
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        if not line:
            continue
        try:
            rows.append(_object(line))
        except ValueError as error:
            text = f"{path}: line {number} is not valid JSON: {error}"
            if not pass_over_damage:
                raise DataError(text) from None
            logger.warning("%s; passed over", text)
    return rows


def _object(line: bytes) -> dict[str, Json]:
    row = parse_json(line)
    if not isinstance(row, dict):
        raise ValueError(f"found a {type(row).__name__}, expected an object")
    return row
