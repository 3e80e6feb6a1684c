"""Rows of files, of folders that `datasets` reads, and of the hub; the format by the content.

jsonl     one row per line: {"instruction": ..., "input": ..., "output": ...}
json      a list of rows
csv       a header line, then rows of texts; between commas, semicolons or tabs
parquet
datasets  a folder made by `save_to_disk`
hub       what `load_dataset` takes: an id, or a folder of files
"""

from __future__ import annotations

import csv
import errno
import functools
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jax_lora.errors import ConfigError, DataError, MissingFileError, first_line

if TYPE_CHECKING:
    import datasets

FILES = ("jsonl", "json", "csv", "parquet")


@dataclass(frozen=True)
class Table:
    """Rows as they are read.

    Attributes:
      source: the file, or the data set and its split, for messages.
      rows: (number, row): counted from 1, in a JSONL file the line.
    """

    source: str
    rows: Iterable[tuple[int, Mapping[str, object]]]


def format_of(path: Path) -> str:
    """The format of a file or folder, by its content: one of `FILES`, "ni", "datasets" or "hub".

    Raises:
      DataError: an empty file.
    """
    if path.is_dir():
        if any((path / part).is_dir() for part in ("tasks", "splits")):
            return "ni"
        saved = ("state.json", "dataset_dict.json")
        return "datasets" if any((path / name).is_file() for name in saved) else "hub"
    with path.open("rb") as file:
        head = file.read(4096)
    if head.startswith(b"PAR1"):
        return "parquet"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if not start:
        raise DataError(f"{path}: found an empty file, expected rows")
    return {b"[": "json", b"{": "jsonl"}.get(start, "csv")


def read_tables(source: str, format: str = "auto") -> dict[str, Table]:
    """The tables of a source by split; what has no splits is "train".

    Args:
      source: a file, a folder that `datasets` saved or can load, or a hub id.
      format: one of `FILES`, "datasets", "hub"; "auto" looks at the content.

    Raises:
      MissingFileError, DataError: one line that names the source.
    """
    path = Path(source)
    if not path.exists():
        if format not in ("auto", "hub") or source.count("/") != 1 or path.suffix[1:] in FILES:
            text = "no such file or folder, and no hub id"
            raise MissingFileError(errno.ENOENT, text, source)
        format = "hub"
    if format == "auto":
        format = format_of(path)
    if format in FILES:
        if path.is_dir():
            raise DataError(f"{source}: found a folder, expected a {format} file")
        reader = {"jsonl": _jsonl, "json": _json, "csv": _csv, "parquet": _parquet}[format]
        return {"train": Table(source, reader(path))}
    if format == "ni":
        raise ConfigError(f"{source}: found Natural Instructions, expected one table")
    loaded = load(source, format)
    return {
        split: Table(f"{source}:{split}", _numbered(loaded[split], f"{source}:{split}"))
        for split in loaded
    }


NI_COLUMNS = {"task_name", "definition", "inputs", "targets"}


def is_natural_instructions(source: str, format: str = "auto") -> bool:
    """Whether a source is a Natural Instructions checkout, or the hub's copy of it (hub.py)."""
    if format != "auto":
        return format == "ni"
    path = Path(source)
    if path.exists():
        found = format_of(path)
        if found != "hub":
            return found == "ni"
    elif source.count("/") != 1 or path.suffix[1:] in FILES:
        return False  # read_tables says that there is no such file
    return _has_ni_columns(source)


@functools.lru_cache(maxsize=8)
def _has_ni_columns(source: str) -> bool:
    loaded = load(source, "hub")
    return all(NI_COLUMNS <= set(table.column_names) for table in loaded.values())


def load(source: str, format: str, cache: str | None = None) -> Mapping[str, datasets.Dataset]:
    """What `datasets` makes of a folder or hub id, by split.

    Args:
      source: the folder or hub id.
      format: "datasets", a folder made by `save_to_disk`; or "hub".
      cache: where `datasets` keeps its Arrow files; None is its own default.
    """
    import datasets  # here and not above: it takes a second, and a file needs none of it

    try:
        if format == "datasets":
            loaded = datasets.load_from_disk(source)
        else:
            with nullcontext() if Path(source).exists() or _hub_answers(source) else _offline():
                loaded = datasets.load_dataset(source, cache_dir=cache)
    except Exception as error:  # datasets, pyarrow and the hub's client have a hundred kinds
        reason = first_line(error)
        text = f"datasets cannot load it ({reason})"
        if isinstance(error, FileNotFoundError):
            raise MissingFileError(errno.ENOENT, text, source) from error
        raise DataError(f"{source}: {text}") from error
    if isinstance(loaded, datasets.Dataset):
        return {"train": loaded}
    return {str(split): table for split, table in loaded.items()}


def _hub_answers(source: str) -> bool:
    """Whether the hub can be asked; where it cannot, `datasets` would ask for half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().dataset_info(source, timeout=5)
    except (HfHubHTTPError, HFValidationError):
        return True  # it answers, and `datasets` says what
    except Exception as error:  # of the hub's client, which has many kinds
        return "Timeout" in type(error).__name__  # slow, but there
    return True


@contextmanager
def _offline() -> Iterator[None]:
    """Let `datasets` look into its cache alone."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _numbered(rows: datasets.Dataset, source: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    try:
        for number, row in enumerate(rows, 1):
            assert isinstance(row, dict)
            yield number, row
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8: {error}") from None


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raw = path.read_bytes()
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}: row {line}: found bytes that are not UTF-8 ({error.reason}), expected UTF-8"
        ) from None


def _jsonl(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            yield number, _object(_parse(line, f"{path}: row {number}"), path, number)


def _json(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    rows = _parse(_text(path), str(path))
    if not isinstance(rows, list):
        found = type(rows).__name__
        raise DataError(f"{path}: found a JSON {found}, expected a list of rows")
    for number, row in enumerate(rows, 1):
        yield number, _object(row, path, number)


def _parse(text: str, where: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}") from None


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object, of which Python would keep the last of several equal keys in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r:.60} is there twice")
    return found


def _object(row: object, path: Path, number: int) -> Mapping[str, object]:
    if not isinstance(row, dict):
        raise DataError(f"{path}: row {number}: found {row!r:.60}, expected an object")
    return row


def _csv(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    text = _text(path)
    header = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count)
    # Python's own limit is 131,072 characters; it is one for the whole process.
    csv.field_size_limit(max(len(text), csv.field_size_limit()))
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    number, names = 0, []
    try:
        names = next(rows)
        counts = Counter(filter(None, names))
        if twice := [name for name, count in counts.items() if count > 1]:
            raise DataError(f"{path}: found the column {twice[0]!r:.60} twice, expected it once")
        for number, row in enumerate(rows, 1):
            if len(row) != len(names):
                raise DataError(
                    f"{path}: row {number}: found {len(row)} fields, expected the "
                    f"{len(names)} of the header"
                )
            yield number, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}: row {number + 1}: not valid CSV: {error}") from None


def _parquet(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = [batch.to_pylist() for batch in file.iter_batches()]
    except Exception as error:  # pyarrow raises what it likes over a damaged file
        reason = first_line(error)
        raise DataError(f"{path}: not valid Parquet: {reason}") from None
    yield from enumerate((row for batch in batches for row in batch), 1)
