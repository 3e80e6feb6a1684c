"""What a run reads: tasks, rows, base, adapters. Cached for the next run of the same process.

Training and scoring read the same things, and the cells of a study share them: what is equal is
read, encoded and put on the device once.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from jax_lora import sharding
from jax_lora.config import DataConfig, RunConfig
from jax_lora.data.example import Example
from jax_lora.data.hub import read_hub
from jax_lora.data.instructions import Checkout, read_checkout
from jax_lora.data.prompts import TEMPLATES, Encoder, Row, RowTooLong
from jax_lora.data.sources import user_data
from jax_lora.data.sources.tables import is_natural_instructions
from jax_lora.data.sources.user_data import HELD_OUT, UserData
from jax_lora.data.tasksets import TaskSet, draw
from jax_lora.errors import ConfigError
from jax_lora.model import lora, variants
from jax_lora.model.config import LlamaConfig
from jax_lora.weights import base as base_weights
from jax_lora.weights import peft
from jax_lora.weights.tokenizers import check_vocabulary, load_tokenizer
from jax_lora.weights.tokenizers import end_ids as base_end_ids

logger = logging.getLogger(__name__)
Put = Callable[..., PyTree]  # (path, numpy array) → the array on its device or devices
VARIANTS = ("lora", "dora")
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
    return any((folder / part).is_dir() for part in ("tasks", "splits")) or (
        not folder.is_dir() and source.count("/") != 1
    )


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
    if config.data.set not in sets:
        raise ConfigError(
            f"config.data.set: found {config.data.set!r}, expected one of {', '.join(sets)}"
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
    stamp = _stamp(d.template)
    return _encoder(config.model, d.template, d.source_length, d.target_length, stamp)


@functools.lru_cache(maxsize=2)
def _encoder(
    model: str, template: str, source_length: int, target_length: int, stamp: str
) -> Encoder:
    tokenizer, size = load_tokenizer(model), base_weights.read_config(model).vocab_size
    check_vocabulary(tokenizer, size, model)
    return Encoder(tokenizer, template, source_length, target_length, size)


def end_ids(config: RunConfig) -> tuple[int, ...]:
    """Every id that ends an answer: those that the base's files name, and what is taught."""
    one = encoder(config)
    assert one.vocab_size is not None
    known = base_end_ids(one.tokenizer, one.vocab_size, config.model)
    return tuple(dict.fromkeys((*known, *one.end_ids)))


@functools.lru_cache(maxsize=8)
def base_digest(model: str) -> str:
    """The identity of a base's files, wherever they lie, see `base.digest`."""
    return base_weights.digest(model)


def is_strict(config: RunConfig) -> bool:
    """Whether examples that do not fit into a row are refused, and not left out."""
    return config.data.strict or isinstance(data(config), Checkout)


@functools.cache
def _training_row(encoder: Encoder, example: Example, answer: str) -> Row:
    return encoder.training_row(example, answer)


def training_rows(
    encoder: Encoder, taskset: TaskSet, answer: str, seed: int, strict: bool = True
) -> list[Row]:
    """One row per example, on its first reference or, where `answer` is "random", on one drawn by
    (seed, task, id). Nested task sets share their rows.

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

    return [row for _, row in _fitting(encode, taskset, strict)]


@functools.cache
def _prompt_row(encoder: Encoder, example: Example) -> Row:
    return encoder.prompt_row(example)


def prompt_rows(
    encoder: Encoder, taskset: TaskSet, strict: bool = True
) -> list[tuple[Example, Row]]:
    """What is to be answered: every example with its prompt; for `strict` see `training_rows`."""
    return _fitting(functools.partial(_prompt_row, encoder), taskset, strict)


def _fitting(
    encode: Callable[[Example], Row], taskset: TaskSet, strict: bool
) -> list[tuple[Example, Row]]:
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


def check_tests(config: RunConfig, encoder: Encoder) -> None:
    """Ask before training what scoring will ask: that every test prompt can be encoded.

    Raises:
      ConfigError, DataError: as `Encoder.prompt_row`.
    """
    for name, taskset in examples(config).items():
        if name in TESTS and not prompt_rows(encoder, taskset, is_strict(config)):
            logger.warning(
                "%s: no example is left to score; tasks of a single distinct input have none "
                "besides those that are trained on",
                name,
            )


def load_base(source: str, dtype: str, trains: PyTree, put: Put | None = None) -> PyTree:
    """Base parameters: float32 for what trains (its master copy), `dtype` for what is frozen.

    A base that stays frozen is cached for the next call.

    Args:
      source: folder, hub id or GGUF file.
      dtype: of the arithmetic.
      trains: the mask's part for the base, one boolean per leaf.
      put: (path, numpy array) → the array on its device or devices.
    """
    if not any(jax.tree.leaves(trains)):
        return _frozen_base(source, dtype, put)

    def cast(path, array):
        trained = trains
        for key in path:
            trained = trained[key]
        return (put or _put_on_device)(path, array if trained else array.astype(dtype))

    return base_weights.load(source, "float32", cast)[1]


@functools.lru_cache(maxsize=1)
def _frozen_base(source: str, dtype: str, put: Put | None) -> PyTree:
    return base_weights.load(source, dtype, put or _put_on_device)[1]


def _put_on_device(_, array: np.ndarray) -> jax.Array:
    return jnp.asarray(array)


def adapters_of(config: RunConfig, shape: LlamaConfig, mesh: Mesh | None = None) -> PyTree:
    """The adapters that a run starts from, see `new_adapters`; drawn ones made on the mesh."""
    c = config.lora
    draw = functools.partial(
        new_adapters,
        shape,
        seed=config.seed,
        rank=c.rank,
        alpha=c.alpha,
        targets=c.targets,
        scaling=c.scaling,
        init=c.init,
        variant=c.variant,
    )
    drawn = c.init in (*lora.INITS, "pissa")  # else read from a folder
    return sharding.init_sharded(draw, mesh) if drawn else draw()


def new_adapters(
    config: LlamaConfig,
    *,
    seed: int,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    scaling: str,
    init: str,
    variant: str,
) -> PyTree:
    """Adapters before the first step, but for what needs the base (see `on_base`).

    Args:
      seed, rank, alpha, targets, scaling: as for `lora.init`.
      init: "kaiming" or "gaussian" (see `lora.init`), "pissa", or the folder of a PEFT adapter to
        go on from, whose rank, α, targets and variant must be these.
      variant: "lora" or "dora".

    Raises:
      ConfigError: an unknown choice, an `init` that is neither a choice nor a folder, or an adapter
        of another shape, scale or variant.
    """
    if variant not in VARIANTS:
        raise ConfigError(f"lora variant: found {variant!r}, expected one of {', '.join(VARIANTS)}")
    if variant == "dora" and init == "pissa":
        raise ConfigError("lora variant and init: found dora and pissa, expected one of the two")
    drawn = lora.init(
        lora.seed_keys(seed).adapters,
        config,
        rank,
        alpha=alpha,
        targets=targets,
        a_init=init if init in lora.INITS else "kaiming",
        scaling=scaling,
    )
    if variant == "dora":
        for members in drawn["layers"].values():
            for leaf in members.values():
                leaf["m"] = jnp.zeros((leaf["b"].shape[0], leaf["b"].shape[2]), jnp.float32)
    if init in (*lora.INITS, "pissa"):
        return drawn
    if not Path(init).is_dir():
        choices = ", ".join((*lora.INITS, "pissa"))
        raise ConfigError(f"lora init: found {init!r}, expected {choices} or a PEFT folder")
    found = peft.load(init).adapters
    lora.check(found, config)
    there, here = (
        {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (found, drawn))
    )
    for name in sorted(there.keys() | here.keys()):
        shapes = [jnp.shape(part[name]) if name in part else None for part in (there, here)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"{init}: {name} is {shapes[0]}, expected {shapes[1]}: "
                "give the adapter's own lora.rank, targets and variant"
            )
        if name.endswith("/scale") and not jnp.allclose(there[name], here[name]):
            raise ConfigError(
                f"{init}: {name} is {there[name]}, expected {here[name][0]}: "
                "give the adapter's own lora.alpha_per_rank and scaling"
            )
    return jax.tree.map(jnp.asarray, found)


def on_base(
    adapters: PyTree, params: PyTree, config: LlamaConfig, *, init: str, variant: str, folder: Path
) -> tuple[PyTree, PyTree]:
    """Finish what starts from the base: DoRA's magnitudes, PiSSA's principal parts.

    Args:
      adapters: from `new_adapters`.
      params: the base.
      config: its shape.
      init, variant: as there.
      folder: keeps PiSSA's start, which a resumed or scored run must find unchanged.

    Returns:
      The adapters, and the base that they belong to: PiSSA's lacks what they hold.
    """
    if variant == "dora" and init in lora.INITS:
        return variants.with_magnitudes(adapters, params), params
    if init != "pissa":
        return adapters, params
    if not (folder / "adapter_config.json").is_file():  # which `save` writes last
        leaf = next(iter(next(iter(adapters["layers"].values())).values()))
        rank, factor = leaf["a"].shape[-1], float(leaf["scale"][0])
        made = variants.pissa(params, config, adapters)
        peft.save(folder, jax.device_get(made), rank=rank, alpha=factor * rank)
    start = jax.tree.map(jnp.asarray, peft.load(folder).adapters)
    return start, variants.without(params, start)
