"""What the cells of a study cost, before and after they are trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jax_lora.config import RunConfig
from jax_lora.files import read_json
from jax_lora.planning.memory import memory
from jax_lora.planning.operations import ceiling, operations
from jax_lora.planning.steps import PlannedStep, planned, planned_steps
from jax_lora.planning.targets import Target
from jax_lora.planning.targets import target as hardware
from jax_lora.run import inputs
from jax_lora.study import TESTS, grid, results, spec
from jax_lora.study.config import StudyConfig
from jax_lora.study.grid import Cell
from jax_lora.weights import base as base_weights


def operations_per_token(run: RunConfig) -> tuple[float, float]:
    """Operations of a training step and of the base's forward pass, per token.

    They are planning's count (`planning.operations`) at the longest row: both passes, with the
    deltas that a step materializes, and without what the backward pass computes again. So they
    depend neither on the remat policy nor on the device.

    Args:
      run: the config of a run.
    """
    parts = operations(_step(run))
    training = sum(work.forward + work.backward for work in parts.values())
    return training, sum(work.forward for name, work in parts.items() if name != "adapters")


def _step(run: RunConfig) -> PlannedStep:
    # The causal half of the pairs of tokens is counted, whichever kernel runs: as cuDNN does.
    typical = run.replace(attention="cudnn", dtype="bfloat16", remat="none")
    typical = typical.replace(
        model_quantization="none",  # the same products
        **{"mesh.data": 1, "mesh.fsdp": 1, "mesh.tensor": 1},  # DoRA's norms are once per device
    )
    shape = base_weights.known_or_read_config(run.model)
    return planned(typical, shape, "cuda", 1, length=max(run.data.buckets))


def _steps(run: RunConfig, where: Target) -> tuple[PlannedStep, ...]:
    shape = base_weights.known_or_read_config(run.model)
    kinds = base_weights.known_or_read_kinds(run.model, run.model_quantization)
    return tuple(planned_steps(run, shape, where, kinds))


def estimate(run: RunConfig) -> float:
    """What orders the cells: operations if every example had one token. Reads no example."""
    starred = "*" in run.data.set  # as many examples as the set of middle size
    tasks = run.data.sizes[1] if starred else len(inputs.training_set(run).tasks)
    examples = tasks * run.data.train_per_task * run.epochs
    limit = run.max_steps * run.batch_size or examples
    return min(examples, limit) * operations_per_token(run)[0]


def facts(run: RunConfig, folder: Path) -> dict[str, object]:
    """The columns of the results that are the same in all rows of a trained cell."""
    parameters, tasks = read_json(folder / "parameters.json"), inputs.training_set(run)
    tokens, (training, forward) = spec.train_tokens(run), operations_per_token(run)
    return {
        "model": Path(run.model).name,
        "set_tasks": len(tasks.tasks),
        "train_examples": len(tasks.examples),
        "trainable": parameters["trainable"],
        "frozen": parameters["frozen"],
        "train_tokens": tokens,
        "train_operations": tokens * training,
        "base_operations": tokens * forward,
    }


def scoring(config: StudyConfig, folder: Path, cells: Sequence[Cell]) -> str:
    """What is asked of the cells that are scored, in words.

    Args:
      config: of the study.
      folder: of the toy tasks and base.
      cells: those that are scored.
    """
    prompts = tokens = 0
    for cell in cells:
        run = spec.run_config(config, folder, cell)
        encoder = inputs.encoder(run)
        for taskset in inputs.test_sets(run, TESTS).values():
            lengths = [len(row.ids) for _, row in inputs.prompt_rows(encoder, taskset)]
            prompts, tokens = prompts + len(lengths), tokens + sum(lengths)
    return f"scoring: {len(cells)} cells answer {prompts:,} prompts of {tokens:,} tokens in all"


def dry_run(
    config: StudyConfig,
    folder: Path,
    workdir: Path,
    cells: Sequence[Cell],
    scored: Sequence[Cell],
    target: Target | None = None,
    tokens_per_second: float | None = None,
) -> tuple[tuple[str, ...], list[tuple[object, ...]], str]:
    """The cells with their tokens, operations, hours and memory.

    Args:
      config: of the study.
      folder: of the toy tasks and base.
      workdir: of the study.
      cells: of it, or some of them.
      scored: those among them that are scored.
      target: hardware; None is this machine.
      tokens_per_second: of training the cheapest cell.

    Returns:
      The header of a table, its rows and a line below it.
    """
    where = target or hardware("cpu")
    runs = {cell.id: spec.run_config(config, folder, cell) for cell in cells}
    tokens = {name: spec.train_tokens(run) for name, run in runs.items()}
    per_token = {name: operations_per_token(run)[0] for name, run in runs.items()}
    steps = {name: _steps(run, where) for name, run in runs.items()}
    peaks = {of_run: max(memory(step).peak for step in of_run) for of_run in set(steps.values())}

    estimated = {name: estimate(run) for name, run in runs.items()}
    took = results.finished(workdir, estimated)
    seconds = results.seconds(estimated, {cell.id for cell in scored}, took)
    if speed := tokens_per_second:
        source = "of training, by --tokens-per-second and operations"
        cheapest = min(per_token.values())
        seconds = {n: tokens[n] / speed * per_token[n] / cheapest for n in runs}
    elif seconds:
        source = "by the cells that are finished"
    elif target:
        source = f"of training at the ceiling of {where.kind}'s arithmetic"
        seconds = {n: tokens[n] / ceiling(steps[n][-1], where.device) for n in runs}
    else:
        source = "give --tokens-per-second or --target, or finish a cell"

    rows: list[tuple[object, ...]] = []
    for name in (cell.id for cell in grid.cheap_first(cells, estimated)):
        peak = peaks[steps[name]]
        hours = f"{seconds[name] / 3600:.2f}" if seconds else None
        fits = ("yes" if peak <= where.device.usable else "no") if target else None
        work = f"{tokens[name] * per_token[name]:.2e}"
        rows.append((name, tokens[name], work, hours, f"{peak / 2**30:.2f}", fits))
    hours = f"{sum(seconds.values()) / 3600:.2f}" if seconds else None
    work = f"{sum(tokens[n] * per_token[n] for n in runs):.2e}"
    rows.append((f"{len(cells)} cells", sum(tokens.values()), work, hours, None, None))
    header = ("cell", "training tokens", "operations", "hours", "peak GiB", "fits")
    note = f"hours: {source}; peak: of a step of training, on one device, by formula"
    return header, rows, note
