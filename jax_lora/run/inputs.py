"""What a run reads: tasks, rows, base, adapters. Cached for the next run of the same process.

Training and scoring read the same things, and the cells of a study share them: what is equal is
read, encoded and put on the device once.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jax_lora.config import DataConfig, RunConfig
from jax_lora.data.example import Example
from jax_lora.data.hub import read_hub
from jax_lora.data.instructions import Checkout, read_checkout
from jax_lora.data.packing import bucket_for
from jax_lora.data.prompts import TEMPLATES, Encoder, Row, RowTooLong
from jax_lora.data.sources import user_data
from jax_lora.data.sources.tables import format_of, is_natural_instructions
from jax_lora.data.sources.user_data import HELD_OUT, UserData
from jax_lora.data.tasksets import TaskSet, draw
from jax_lora.errors import ConfigError
from jax_lora.generation import stop_texts
from jax_lora.weights import base as base_weights
from jax_lora.weights.tokenizers import base_end_ids, check_vocabulary, load_tokenizer

logger = logging.getLogger(__name__)
_ROWS = 2**17  # encoded examples that are kept: more than Tall and both test sets have
TESTS = ("seen", "unseen", "test")  # the first two of Natural Instructions, the last of own data


def data(config: RunConfig, verify: bool = False) -> Checkout | UserData:
    """What `config.data.path` names: Natural Instructions, or data of one's own.

    Raises:
      ConfigError, DataError, OSError: one line with the key, or with the file and row.
    """
    d = config.data
    if not is_natural_instructions(d.path, d.format):
        keys = ("path", "format", "columns", "strict")
        keys += tuple(key for name in HELD_OUT for key in (name, f"{name}_path"))
        only = DataConfig(**{key: getattr(d, key) for key in keys})
        stamps = tuple(map(_stamp, (d.path, d.validation_path, d.test_path)))
        return _user_data(only, config.seed if d.validation or d.test else 0, stamps)
    for key in ("columns", "validation_path", "test_path", "validation", "test"):
        if found := getattr(d, key):
            raise ConfigError(
                f"config.data.{key}: found {found!r} with Natural Instructions, which has test "
                "sets of its own; expected none"
            )
    return open_checkout(d.path, d.categories, verify)


@functools.lru_cache(maxsize=2)
def _user_data(d: DataConfig, seed: int, stamps: tuple[str, ...]) -> UserData:
    return user_data.read(d, seed)


def _stamp(path: str) -> str:
    """What tells a file from the same one before it was edited; "" for anything else."""
    if not path or not Path(path).is_file():
        return ""
    found = Path(path).stat()
    return f"{found.st_size} {found.st_mtime_ns}"


def fingerprint(config: RunConfig, verify: bool = False) -> str:
    """sha256 of the data, and of a Jinja file that is `config.data.template`."""
    found, template = data(config, verify).fingerprint, Path(config.data.template)
    if config.data.template in (*TEMPLATES, "chat") or not template.is_file():
        return found
    return hashlib.sha256(found.encode() + template.read_bytes()).hexdigest()


def open_checkout(source: str, categories: str = "", verify: bool = False) -> Checkout:
    """The tasks of a checkout folder, or of a data set in the hub's format.

    Args:
      source: a folder with `tasks/` and `splits/`, else the hub data set's id or a copy of it.
      categories: for the hub data set, which names none: a JSON file, task → category.
      verify: read every file again, whatever its size and time say, and remember them so.
    """
    if verify and _is_checkout(source):
        read_checkout(Path(source), verify=True)
    return _open_checkout(source, categories)


def _is_checkout(source: str) -> bool:
    folder = Path(source)
    if folder.is_dir():
        return format_of(folder) == "ni"
    return source.count("/") != 1  # no hub id: read_checkout says that there is no such folder


@functools.lru_cache(maxsize=2)
def _open_checkout(source: str, categories: str) -> Checkout:
    if _is_checkout(source):
        return read_checkout(Path(source))
    return read_hub(source, categories=categories or None)


def task_sets(config: RunConfig) -> dict[str, TaskSet]:
    """All sets by name: of Natural Instructions those of the config's round, see `tasksets.draw`;
    of one's own data "train" and, where there are any, "validation" and "test"."""
    found, d = data(config), config.data
    if isinstance(found, UserData):
        return found.sets
    return _task_sets(
        d.path, d.categories, config.round, d.sizes, d.train_per_task, d.test_per_task
    )


@functools.lru_cache(maxsize=8)
def _task_sets(
    source: str, categories: str, round: int, sizes: tuple[int, int, int], train: int, test: int
) -> dict[str, TaskSet]:
    checkout = open_checkout(source, categories)
    return draw(checkout, round, sizes=sizes, train_per_task=train, test_per_task=test)


def training_set(config: RunConfig) -> TaskSet:
    """The set that a run trains on.

    Raises:
      ConfigError: no set of that name.
    """
    sets = task_sets(config)
    if "train" in sets:
        return sets["train"]
    names = [name for name in sets if name not in TESTS]
    if config.data.set not in names:
        raise ConfigError(
            f"config.data.set: found {config.data.set!r}, expected one of {', '.join(names)}"
        )
    return sets[config.data.set]


def examples(config: RunConfig) -> dict[str, TaskSet]:
    """The sets of a run: "train", "validation" where there is one, and those of `TESTS`."""
    sets = task_sets(config)
    held_out = {name: sets[name] for name in ("validation", *TESTS) if name in sets}
    return {"train": training_set(config), **held_out}


def test_sets(config: RunConfig, names: Sequence[str] | None = None) -> dict[str, TaskSet]:
    """The test sets of a run by name.

    Args:
      config: of the run.
      names: some of them; None is all.

    Raises:
      ConfigError: a set that is not there, or none.
    """
    sets = {name: one for name, one in task_sets(config).items() if name in TESTS}
    if not sets:
        raise ConfigError(
            "config.data: found no test set, expected test_path, or a share such as test=0.1"
        )
    for name in names or ():
        if name not in sets:
            raise ConfigError(f"--sets: found {name!r}, expected some of {', '.join(sets)}")
    return {name: sets[name] for name in names or sets}


def encoder(config: RunConfig) -> Encoder:
    """The encoder with the base's own tokenizer.

    Raises:
      DataError: a special token that the base's embeddings do not have. Looked up on a device it
        would become NaN; the encoder refuses any other such id where it occurs.
    """
    d = config.data
    stamp = f"{_stamp(d.template)} {base_weights.stamp(config.model)}"
    return _encoder(config.model, d.template, d.source_length, d.target_length, stamp)


@functools.lru_cache(maxsize=2)
def _encoder(
    model: str, template: str, source_length: int, target_length: int, stamp: str
) -> Encoder:
    tokenizer, size = load_tokenizer(model), base_weights.read_config(model).vocab_size
    check_vocabulary(tokenizer, size, model)
    return Encoder(tokenizer, template, source_length, target_length, size)


def end_ids(config: RunConfig) -> tuple[int, ...]:
    """The stop tokens, ids that end an answer: those that the base's files name, and what is
    taught."""
    one = encoder(config)
    assert one.vocab_size is not None
    known = base_end_ids(one.tokenizer, one.vocab_size, config.model)
    return tuple(dict.fromkeys((*known, *one.end_ids)))


def stop_rule(config: RunConfig) -> stop_texts.Stop | None:
    """The rule of the texts that end an answer; None where there are none."""
    one = encoder(config)
    return stop_texts.stop_rule(config.eval.stop, one.decode_all, one.byte_ids)


def base_digest(model: str) -> str:
    """The identity of a base's files, wherever they lie, see `base.digest`."""
    return _base_digest(model, base_weights.stamp(model))


@functools.lru_cache(maxsize=8)
def _base_digest(model: str, stamp: str) -> str:
    return base_weights.digest(model)


def is_strict(config: RunConfig) -> bool:
    """Whether examples that do not fit into a row are refused, and not left out."""
    return config.data.strict or isinstance(data(config), Checkout)


@functools.lru_cache(maxsize=_ROWS)
def _training_row(encoder: Encoder, example: Example, answer: str) -> Row:
    return encoder.training_row(example, answer)


def training_rows(
    encoder: Encoder, taskset: TaskSet, answer: str, seed: int, strict: bool = True
) -> list[tuple[Example, Row]]:
    """Every example that is trained on and its row: on its first reference or, where `answer` is
    "random", on one drawn by (seed, task, id). Nested task sets share their rows.

    Args:
      encoder: of the run.
      taskset: what is trained on.
      answer, seed: see above.
      strict: refuse an example that does not fit into a row; False leaves it out and logs it.

    Raises:
      RowTooLong: see `strict`.
    """

    def encode(example: Example) -> Row:
        gold = example.references[0]
        if answer == "random":
            chance = random.Random(f"{seed} {example.task} {example.id}")
            gold = chance.choice(example.references)
        return _training_row(encoder, example, gold)

    return fitting(encode, taskset, strict)


def is_dated(config: RunConfig) -> bool:
    """Whether the chat template of a run writes the date of today, as Llama 3.2's does."""
    is_chat = config.data.template == "chat"
    return is_chat and "strftime_now" in str(encoder(config).tokenizer.chat_template)


def rows_digest(rows: Sequence[Row]) -> str:
    """The identity of rows: their ids, and which of these are of an answer."""
    found = hashlib.sha256()
    for row in rows:
        for part in (row.ids, row.loss_mask(answer_only=True)):
            found.update(np.ascontiguousarray(part).tobytes())
            found.update(b"|")
    return found.hexdigest()


@functools.lru_cache(maxsize=_ROWS)
def _prompt_row(encoder: Encoder, example: Example) -> Row:
    return encoder.prompt_row(example)


def prompt_rows(
    encoder: Encoder, taskset: TaskSet, strict: bool = True
) -> list[tuple[Example, Row]]:
    """What is to be answered: every example with its prompt; for `strict` see `training_rows`."""
    return fitting(functools.partial(_prompt_row, encoder), taskset, strict)


def fitting(
    encode: Callable[[Example], Row], taskset: TaskSet, strict: bool
) -> list[tuple[Example, Row]]:
    """The examples of a set with their rows; for `strict` see `training_rows`."""
    found, too_long = [], []
    for example in taskset.examples:
        try:
            found.append((example, encode(example)))
        except RowTooLong as error:
            if strict:
                raise
            too_long.append(str(error))
    if too_long:
        logger.warning(
            "%s: %d rows left out that are longer than a row; the first is %s",
            taskset.name,
            len(too_long),
            too_long[0],
        )
    return found


class Asked(NamedTuple):
    """What scoring asks a model.

    Attributes:
      rows: of each test set, its examples with their prompts.
      end_ids: any of which ends an answer.
    """

    rows: dict[str, list[tuple[Example, Row]]]
    end_ids: tuple[int, ...]


def asked(config: RunConfig, encoder: Encoder, sets: Mapping[str, TaskSet]) -> Asked:
    """All that scoring reads but the weights, checked; training calls it too, before it trains.

    Args:
      config, encoder: of the run.
      sets: test sets by name.

    Raises:
      ConfigError, DataError: a prompt that cannot be encoded, or whose row the model cannot take.
    """
    shape, strict = base_weights.read_config(config.model), is_strict(config)
    rows = {name: prompt_rows(encoder, one, strict) for name, one in sets.items()}
    for found in filter(None, rows.values()):
        bucket = bucket_for(max(len(row.ids) for _, row in found), config.eval.buckets)
        shape.check_length(bucket + config.eval.max_new_tokens)
    return Asked(rows, end_ids(config))


def check_tests(config: RunConfig, encoder: Encoder) -> None:
    """Ask before training what scoring will ask, and warn of test sets that are empty.

    Raises:
      ConfigError, DataError: see `asked`.
    """
    sets = {name: one for name, one in examples(config).items() if name in TESTS}
    for name, rows in asked(config, encoder, sets).rows.items():
        if not rows:
            logger.warning(
                "%s: no example is left to score; tasks of a single distinct input have none "
                "besides those that are trained on",
                name,
            )
