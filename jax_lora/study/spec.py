"""What the cells of a study are: their runs' configs, their data and their base."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from jax_lora.config import SPEED, RunConfig, flatten, read_typed
from jax_lora.data.tasksets import set_names
from jax_lora.errors import ConfigError
from jax_lora.files import read_json
from jax_lora.model.config import LlamaConfig
from jax_lora.run import inputs, prepare
from jax_lora.study import measures, runner, small
from jax_lora.study.config import FULL, Changes, StudyConfig
from jax_lora.study.grid import Cell, cells_of
from jax_lora.weights import base as base_weights

TOY = "toy"  # the name of the training that makes the toy base, beside the cells' ids


def run_config(config: StudyConfig, workdir: Path, cell: Cell) -> RunConfig:
    """The config of a cell's run."""
    axes: dict[str, object] = {
        "data": {"set": cell.set},
        "round": cell.round,
        "optim": {"learning_rate": cell.learning_rate},
    }
    if cell.rank:
        axes["lora"] = {"rank": cell.rank}
    run = config.run_with(
        config.full if cell.method == FULL else {},
        config.variants[cell.variant] if cell.variant else {},
        axes,
        _toy_paths(workdir, "toy-llama", "grid") if config.toy.instances else {},
    )
    plain = config.run.lora.targets
    if cell.rank and config.match_parameters and set(run.lora.targets) != {*plain}:
        shape = base_weights.known_or_read_config(run.model)
        rank = matched_rank(shape, cell.rank, plain, run.lora.targets)
        run = run.replace(**{"lora.rank": rank})
    return run.replace(seed=run.seed + cell.repeat)


def matched_rank(
    shape: LlamaConfig, rank: int, targets: Sequence[str], others: Sequence[str]
) -> int:
    """The rank at which adapters of other targets have most nearly as many parameters.

    Args:
      shape: of the base.
      rank: of the adapters of `targets`.
      targets, others: linear layers; an adapter of rank r has r · (in + out) parameters per layer.
    """
    sizes = {name: n * (a + b) for name, (n, a, b) in shape.stack_shapes().items()}
    one, other = (sum(sizes[name] for name in names) for names in (targets, others))
    return max(1, round(rank * one / other))


def run_of(config: StudyConfig, workdir: Path, name: str) -> tuple[RunConfig, Path]:
    """The config and the folder of what is trained under a name: a cell's id, or TOY."""
    if name != TOY:
        (cell,) = (cell for cell in cells_of(config) if cell.id == name)
        return run_config(config, workdir, cell), runner.cell_folder(workdir, cell)
    paths = _toy_paths(workdir, "untrained", "outside")
    return config.run_with(config.full, config.toy.run, paths), workdir / "toy" / "run"


def _toy_paths(workdir: Path, base: str, tasks: str) -> Changes:
    toy = workdir / "toy"
    return {"model": str(toy / base), "data": {"path": str(toy / "tasks" / tasks)}}


@contextmanager
def inputs_of(config: StudyConfig, workdir: Path) -> Iterator[Path]:
    """The folder with the toy tasks and base; before they are made, a temporary one with a base
    of the same shape."""
    if config.toy.instances:  # before its tasks are written
        _check_sets(config.sets, set_names(config.run.data.sizes))
    if not config.toy.instances or (workdir / "toy" / "toy-llama").is_dir():
        yield workdir
        return
    with tempfile.TemporaryDirectory() as scratch:
        write_start(config, Path(scratch), "toy-llama")
        yield Path(scratch)


def write_start(config: StudyConfig, workdir: Path, name: str) -> None:
    """Write the toy tasks, and a base of random weights under a name."""
    c, toy = config.toy, workdir / "toy"
    if not (toy / "tasks").is_dir():
        small.write_tasks(toy / "tasks", c.instances, c.outside, c.unseen, c.codebooks)
    if not (toy / name).is_dir():
        template, seed = config.run.data.template, config.run.seed
        small.write_base(toy / name, toy / "tasks", template, c.vocabulary, seed, c.shape)


# What study.json knows by its digest → the key of its place, which another machine may change.
DIGESTS = {"data_fingerprint": "config.run.data.path", "base_digest": "config.run.model"}


def check_same_study(
    path: Path, config: StudyConfig, digests: Mapping[str, str] | None = None
) -> None:
    """Make sure that a study's folder is new or belongs to the same study.

    What changes no result of a run, such as its micro-batch or its mesh, may differ, and so may the
    places of the base and the data. A key that study.json lacks, because an older version wrote
    it, has its default there; a digest that it lacks is known by the place.

    Args:
      path: of study.json.
      config: of the study.
      digests: of its data and its base by the names of `DIGESTS`, once they are known.

    Raises:
      ConfigError: the first key that differs, or one that study.json has under an old name.
    """
    if not path.is_file():
        return
    saved = read_json(path, dict)
    try:
        there: StudyConfig = read_typed(StudyConfig, saved.get("config"), "")
    except ConfigError as error:
        raise ConfigError(f"{path} belongs to another version: {error}") from None
    found, wanted = dict(_identity(there)), dict(_identity(config))
    for name, key in DIGESTS.items():
        if name in saved:
            del found[key], wanted[key]
            if digests is not None:
                found[name], wanted[name] = saved[name], digests.get(name)
    for key in dict.fromkeys((*wanted, *found)):
        one, other = (
            repr(values[key]) if key in values else "not set" for values in (found, wanted)
        )
        if one != other:
            raise ConfigError(
                f"{path} belongs to another study: {key} is {one} there and {other} here; "
                "expected the same config, or an empty --workdir"
            )


def _identity(config: StudyConfig) -> Iterator[tuple[str, object]]:
    """The keys that decide a study's results, and their values."""
    for key, value in flatten(config.to_dict()):
        name = key.removeprefix("run.")
        if name == key or not (name.startswith("mesh.") or name in SPEED):
            yield f"config.{key}", value


def check_input(config: StudyConfig, folder: Path, cells: Sequence[Cell]) -> dict[str, str]:
    """The digests of the data and, but for a toy, of the base by the names of `DIGESTS`, where
    every cell finds its base and its task set.

    Raises:
      ConfigError: a cell without a base, data or its task set; or two that would train the same.
      DataError, OSError: `measure.text` that is no text file.
    """
    measures.text_of(config.measure.text)
    _check_matched(config, folder, cells)
    for cell in cells:
        run = run_config(config, folder, cell)
        for key, value in (("model", run.model), ("data.path", run.data.path)):
            if not value:
                raise ConfigError(f"--config.run.{key}: found none, expected a folder or a hub id")
        sets = [name for name in inputs.task_sets(run) if name not in inputs.TESTS]
        _check_sets([cell.set], sets)
        base_weights.read_config(run.model)
    found = {"data_fingerprint": _fingerprint(config, folder)}
    if config.run.model:
        found["base_digest"] = inputs.base_digest(config.run.model)
    return found


def _fingerprint(config: StudyConfig, folder: Path) -> str:
    """That of the data and the prompt template of all cells, those that `--only` leaves out too."""
    firsts = {(cell.method, cell.variant): cell for cell in cells_of(config)}
    runs = (run_config(config, folder, cell) for cell in firsts.values())
    found = sorted({inputs.fingerprint(run) for run in runs})
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


def _check_matched(config: StudyConfig, folder: Path, cells: Sequence[Cell]) -> None:
    found: dict[tuple[str, int], int] = {}
    for cell in cells if config.match_parameters else ():
        if cell.rank:
            rank = run_config(config, folder, cell).lora.rank
            first = found.setdefault((cell.variant, rank), cell.rank)
            if first != cell.rank:
                raise ConfigError(
                    f"config.match_parameters: ranks {first} and {cell.rank} of the variant "
                    f"{cell.variant} would both be rank {rank}, expected ranks further apart"
                )


def _check_sets(found: Sequence[str], expected: Sequence[str]) -> None:
    for name in found:
        if name not in expected:
            raise ConfigError(
                f"config.sets: found {name!r}, expected some of {', '.join(expected)}"
            )


def train_tokens(run: RunConfig) -> int:
    """Tokens of a complete training, without padding."""
    taskset = inputs.training_set(run)
    pairs = inputs.training_rows(inputs.encoder(run), taskset, run.data.answer, run.seed)
    rows = [row for _, row in pairs]
    batches, steps = prepare.batches_of(run, rows)
    lengths = np.array([len(row.ids) for row in rows])
    return sum(int(lengths[batches.indices(step)].sum()) for step in range(steps))
