"""Instruction tasks, and a checkout of Natural Instructions on disk (the hub's copy: hub.py).

    <checkout>/tasks/<name>.json                                   one task per file
    <checkout>/splits/default/{train,test}_tasks.txt               one task name per line

A full checkout holds 2.8 million instances, so a `Task` keeps only what sampling needs (category,
definition, counts, a content hash) and reads its instances anew whenever they are asked for. What
it keeps is remembered between programs, and so are the examples that tasksets.py draws.

Source of the layout: allenai/natural-instructions, README and tasks/README.
"""

import errno
import hashlib
import json
import os
import posixpath
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from jax_lora.data.cache import cache_folder, remembered
from jax_lora.data.example import Example
from jax_lora.errors import ConfigError, DataError, MissingFileError

FORMAT = 1  # raise it when what is remembered changes: a task's facts, or the way of drawing
_LARGE = 32_000_000  # bytes; a smaller checkout is read in a second, and leaves no trace


class Instance(NamedTuple):
    """One question of a task with its accepted answers (at least one, possibly empty strings)."""

    id: str
    input: str
    outputs: tuple[str, ...]

    @property
    def key(self) -> str:
        """What makes an input distinct: its text without the white space around it."""
        return self.input.strip()


@dataclass(frozen=True)
class Task:
    """A task without its instances.

    Arguments:
        name: the file's name without `.json`; the only unique key (task numbers repeat).
        category: the first entry of `Categories`.
        definition: the instruction, shared by all instances.
        count: number of instances.
        distinct: number of distinct inputs, `distinct <= count`.
        content: sha256 of what was read.
        path: the file (or hub data set) it was read from, for messages.
        read: returns the instances in file order; called anew by every `instances()`.
    """

    name: str
    category: str
    definition: str
    count: int
    distinct: int
    content: str
    path: str
    read: Callable[[], tuple[Instance, ...]] = field(repr=False, compare=False)

    def instances(self) -> tuple[Instance, ...]:
        """All instances in file order, read from the source; nothing is kept."""
        return self.read()

    def example(self, instance: Instance) -> Example:
        """The instance as a self-contained example."""
        return Example(
            instruction=self.definition,
            input=instance.input,
            references=instance.outputs,
            task=self.name,
            category=self.category,
            id=instance.id,
        )


@dataclass(frozen=True)
class Checkout:
    """The train and the test tasks, each sorted by name.

    Arguments:
        train: tasks to sample from.
        test: tasks that are never trained on.
        cache: folder for what was drawn from these tasks, or None.
    """

    train: tuple[Task, ...]
    test: tuple[Task, ...]
    cache: Path | None = field(default=None, repr=False, compare=False)

    @cached_property
    def _by_name(self) -> dict[str, Task]:
        return {task.name: task for task in (*self.train, *self.test)}

    def task(self, name: str) -> Task:
        """The task of that name, train or test. Raises ConfigError where there is none."""
        if name not in self._by_name:
            raise ConfigError(
                f"no task {name!r} among {len(self.train)} train and {len(self.test)} test tasks"
            )
        return self._by_name[name]

    def answers(self, name: str) -> Iterable[Sequence[str]]:
        """The accepted answers of all instances of a task."""
        return (instance.outputs for instance in self.task(name).instances())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over every task's split, name, category and content; names the data in a run."""
        lines = [
            f"{split}\t{task.name}\t{task.category}\t{task.content}\n"
            for split, tasks in (("train", self.train), ("test", self.test))
            for task in sorted(tasks, key=lambda task: task.name)
        ]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


# ---------------------------------------------------------------- a checkout on disk


def read_checkout(
    path: str | Path, *, cache: str | Path | None = None, verify: bool = False
) -> Checkout:
    """Reads and checks every task that the default split lists.

    `excluded_tasks.txt` is not needed and not read: membership is decided by the two lists alone.
    A file whose size and modification time are those of the last reading is not opened again.

    Arguments:
        path: folder with `tasks/` and `splits/default/{train,test}_tasks.txt`; never written to.
        cache: folder that remembers what was read and drawn. None is `cache.cache_folder()` for a
            checkout of 32 MB or more, and no cache for a smaller one.
        verify: read and hash every file again, whatever its size and time say.
    Returns:
        The tasks; instances stay on disk.
    Raises:
        MissingFileError, DataError: one line with the file, what was found and what is expected.
    """
    root = Path(path)
    tasks, splits = root / "tasks", root / "splits" / "default"
    for folder in (root, tasks, splits):
        if not folder.is_dir():
            text = "no such folder; expected a checkout with tasks/ and splits/default/"
            raise MissingFileError(errno.ENOENT, text, str(folder))
    train, test = _read_split(splits / "train_tasks.txt"), _read_split(splits / "test_tasks.txt")
    both = sorted(set(train) & set(test))
    if both:
        raise DataError(
            f"{splits}: {len(both)} task(s) in both train_tasks.txt and test_tasks.txt, "
            f"expected none, first {both[0]!r}"
        )
    stamps, size = {}, 0
    for name in (*train, *test):  # all names before any parsing: a missing file shows at once
        file = tasks / f"{name}.json"
        if not file.is_file():
            split = "train" if name in train else "test"
            text = f"no such file, but {split}_tasks.txt lists {name!r}"
            raise MissingFileError(errno.ENOENT, text, str(file))
        found = file.stat()
        stamps[name] = f"{found.st_size} {found.st_mtime_ns}"
        size += found.st_size
    if cache is None and size >= _LARGE:
        cache = cache_folder()
    folder = None if cache is None else _folder_in(cache, root.resolve())
    facts = remembered(
        folder and folder / "tasks.json",
        stamps,
        lambda name: _read_facts(tasks / f"{name}.json"),
        verify=verify,
    )

    def task(name: str) -> Task:
        file, known = tasks / f"{name}.json", facts[name]
        return Task(
            name=name, path=str(file), read=partial(_reread, file, known["content"]), **known
        )

    return Checkout(tuple(map(task, train)), tuple(map(task, test)), folder)


def _folder_in(cache: str | Path, root: Path) -> Path:
    """A checkout's own folder in the cache; the digest tells checkouts of one name apart."""
    digest = hashlib.sha256(os.fsencode(root)).hexdigest()
    return Path(cache) / f"checkouts-{FORMAT}" / f"{root.name}-{digest[:12]}"


def _read_split(path: Path) -> list[str]:
    """Sorted unique task names of a split file."""
    if not path.is_file():
        text = "no such file, expected one task name a line"
        raise MissingFileError(errno.ENOENT, text, str(path))
    try:
        names = [line.strip() for line in path.read_bytes().decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error}), expected one task name a line") from None
    unique = sorted({name for name in names if name})
    if not unique:
        raise DataError(f"{path}: no task names found, expected one a line")
    for name in unique:
        # Another spelling of a path would be the same task under two names; `..` leaves tasks/.
        written = PurePosixPath(name)
        outside = written.is_absolute() or ".." in written.parts
        if "\0" in name or outside or posixpath.normpath(name) != name:
            raise DataError(f"{path}: found {name!r:.60}, expected a task's name in UTF-8")
    return unique


def _read_facts(path: Path) -> dict:
    """What a `Task` says about its file."""
    record, content = parse_object(path)
    instances = _instances(record, path)
    return {
        "category": first_text(record, "Categories", path),
        "definition": first_text(record, "Definition", path),
        "count": len(instances),
        "distinct": len({instance.key for instance in instances}),
        "content": content,
    }


def positive_outputs(task: Task) -> tuple[str, ...]:
    """The outputs of a task's positive examples, which are demonstrations and no instances.

    Arguments:
        task: of a checkout on disk; the hub's copy has no positive examples.
    Returns:
        The first accepted output of each, in file order.
    """
    path = Path(task.path)
    if not path.is_file():
        return ()
    examples = parse_object(path)[0].get("Positive Examples")
    outputs = [one.get("output") for one in examples or () if isinstance(one, dict)]
    firsts = [one[0] if isinstance(one, list) and one else one for one in outputs]
    return tuple(text for text in firsts if isinstance(text, str))


def _reread(path: Path, content: str) -> tuple[Instance, ...]:
    record, now = parse_object(path)
    if now != content:
        raise DataError(
            f"{path}: changed since the checkout was read (sha256 now {now[:12]}, "
            f"expected {content[:12]}); read the checkout again, with verify where its time "
            "stayed the same"
        )
    return _instances(record, path)


def parse_object(path: Path) -> tuple[dict, str]:
    """The file's JSON object and the sha256 of its bytes."""
    raw = path.read_bytes()
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError) as error:  # cut in the middle, or not UTF-8
        raise DataError(f"{path}: not valid JSON ({error}), expected one whole object") from None
    if not isinstance(record, dict):
        raise DataError(f"{path}: found a JSON {type(record).__name__}, expected an object")
    return record, hashlib.sha256(raw).hexdigest()


def first_text(record: dict, key: str, path: Path) -> str:
    """A text field that the wild writes as a list of one string or as a plain string."""
    value = record.get(key)
    text = value[0] if isinstance(value, list) and value else value
    if not isinstance(text, str) or not text.strip():
        raise DataError(
            f"{path}: {key} is {value!r:.60}, expected a non-empty string or a list of one"
        )
    check_unicode(text, f"{path}: {key}")
    return text


def check_unicode(text: str, where: str) -> None:
    """Refuse half of a surrogate pair, which JSON can hold, but no file and no tokenizer.

    Raises:
      DataError: names `where`.
    """
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{where}: found {text!r:.60}, which has half of a surrogate pair, expected "
                "Unicode text"
            ) from None


def _instances(record: dict, path: Path) -> tuple[Instance, ...]:
    rows = record.get("Instances")
    if not isinstance(rows, list) or not rows:
        found = f"{type(rows).__name__} of length {len(rows)}" if isinstance(rows, list) else rows
        raise DataError(f"{path}: Instances is {found!r:.60}, expected a list of at least one")
    seen: set[str] = set()
    task = path.stem
    return tuple(_instance(row, index, path, task, seen) for index, row in enumerate(rows))


def _instance(row: object, index: int, path: Path, task: str, seen: set[str]) -> Instance:
    if not isinstance(row, dict):
        raise DataError(f"{path}: instance {index} is {row!r:.60}, expected an object")
    text, outputs = row.get("input"), row.get("output")
    if not isinstance(text, str):
        raise DataError(f"{path}: instance {index} has input {text!r:.60}, expected a string")
    outputs = [outputs] if isinstance(outputs, str) else outputs
    if not isinstance(outputs, list) or set(map(type, outputs)) != {str}:
        raise DataError(
            f"{path}: instance {index} has output {outputs!r:.60}, "
            "expected a string or a non-empty list of strings"
        )
    name = unique_id(row.get("id"), index, task, seen)
    for one in (name, text, *outputs):
        check_unicode(one, f"{path}: instance {index}")
    return Instance(name, text, tuple(outputs))


def unique_id(given: object, index: int, task: str, seen: set[str]) -> str:
    """The given id; `<task>-<index>` where there is none; a repeated one gets `-<index>`."""
    name = str(given) if given not in (None, "") else f"{task}-{index}"
    while name in seen:
        name = f"{name}-{index}"
    seen.add(name)
    return name
