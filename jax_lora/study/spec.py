"""What the cells of a study are: their runs' configs, their data and their base."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jax_lora.config import SPEED, RunConfig, flatten
from jax_lora.errors import ConfigError
from jax_lora.files import read_json
from jax_lora.run import inputs, prepare
from jax_lora.study import runner, small
from jax_lora.study.grid import Cell, cells_of
from jax_lora.weights import base as base_weights

TOY = "toy"  # the name of the training that makes the toy base, beside the cells' ids


def run_config(config: Any, workdir: Path, cell: Cell) -> RunConfig:
    """The config of a cell's run.

    Raises:
      ConfigError: a key or a value that no run has.
    """
    run = config.run.copy_and_resolve_references()
    try:
        if cell.method == "full":
            run.update(config.full)
        if cell.variant:
            run.update(config.variants[cell.variant])
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{cell.id}, what it changes in run: {error.args[0]}") from None
    if cell.rank:
        run.lora.rank = cell.rank
    run.data.set, run.round, run.optim.learning_rate = cell.set, cell.round, cell.learning_rate
    if config.toy.instances:
        run.model = str(workdir / "toy" / "toy-llama")
        run.data.path = str(workdir / "toy" / "tasks" / "grid")
    return RunConfig.from_config_dict(run)


def run_of(config: Any, workdir: Path, name: str) -> tuple[RunConfig, Path]:
    """The config and the folder of what is trained under a name: a cell's id, or TOY."""
    if name != TOY:
        (cell,) = (cell for cell in cells_of(config) if cell.id == name)
        return run_config(config, workdir, cell), runner.cell_folder(workdir, cell)
    run, toy = config.run.copy_and_resolve_references(), workdir / "toy"
    run.update(config.full)
    run.update(config.toy.run)
    run.model, run.data.path = str(toy / "untrained"), str(toy / "tasks" / "outside")
    return RunConfig.from_config_dict(run), toy / "run"


@contextmanager
def inputs_of(config: Any, workdir: Path) -> Iterator[Path]:
    """The folder with the toy tasks and base; before they are made, a temporary one with a base
    of the same shape."""
    if not config.toy.instances or (workdir / "toy" / "toy-llama").is_dir():
        yield workdir
        return
    with tempfile.TemporaryDirectory() as scratch:
        write_start(config, Path(scratch), "toy-llama")
        yield Path(scratch)


def write_start(config: Any, workdir: Path, name: str) -> None:
    """Write the toy tasks, and a base of random weights under a name."""
    c, toy = config.toy, workdir / "toy"
    if not (toy / "tasks").is_dir():
        small.write_tasks(toy / "tasks", c.instances, c.outside, c.unseen)
    if not (toy / name).is_dir():
        template, shape = config.run.data.template, c.shape.to_dict()
        small.write_base(
            toy / name, toy / "tasks", template, c.vocabulary, config.run.seed, **shape
        )


def check_same_study(path: Path, resolved: Mapping[str, Any]) -> None:
    """Make sure that a study's folder is new or belongs to the same study.

    What changes no result of a run, such as its micro-batch or its mesh, may differ.

    Args:
      path: of study.json.
      resolved: "config" and, once it is known, "data_fingerprint".

    Raises:
      ConfigError: the first key that differs.
    """
    if not path.is_file():
        return
    saved = read_json(path, dict)
    there, here = (dict(flatten(dict(one))) for one in (saved, resolved))
    keys = [key for key in there if key.startswith("config.")]
    for key in dict.fromkeys((*here, *keys)):
        name = key.removeprefix("config.run.")
        if name.startswith("mesh.") or (name in SPEED and name != key):
            continue
        found, wanted = (repr(one[key]) if key in one else "not set" for one in (there, here))
        if found != wanted:
            raise ConfigError(
                f"{path} belongs to another study: {key} is {found} there and {wanted} here; "
                "expected the same config, or an empty --workdir"
            )


def check_input(config: Any, folder: Path, cells: Sequence[Cell]) -> str:
    """The fingerprint of the data, where every cell finds its base and its task set.

    Raises:
      ConfigError: a cell without a base, data or its task set.
    """
    for cell in cells:
        run = run_config(config, folder, cell)
        for key, value in (("model", run.model), ("data.path", run.data.path)):
            if not value:
                raise ConfigError(f"--config.run.{key}: found none, expected a folder or a hub id")
        if cell.set not in (sets := inputs.task_sets(run)):
            raise ConfigError(f"sets: found {cell.set!r}, expected some of {', '.join(sets)}")
    base_weights.read_config(run.model)
    return inputs.open_checkout(run.data.path, run.data.categories).fingerprint


def train_tokens(run: RunConfig) -> int:
    """Tokens of a whole training, without padding."""
    taskset = inputs.training_set(run)
    rows = inputs.training_rows(inputs.encoder(run), taskset, run.data.answer, run.seed)
    batches, steps = prepare.batches_of(run, rows)
    lengths = np.array([len(row.ids) for row in rows])
    return sum(int(lengths[batches.indices(step)].sum()) for step in range(steps))
