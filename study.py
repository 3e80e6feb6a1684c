"""Run a study: train and score every cell of a grid, in any number of processes.

    python study.py --config=configs/study_mini.py --workdir=studies/mini
    python study.py --workdir=studies/mini --report

Every process that runs the first command, on any machine that sees the folder, takes cells from
it; the same command goes on where an interrupted one stopped. The second one writes tables,
figures and findings from results.parquet alone, and a page of answers from cases.jsonl.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from shutil import rmtree
from typing import Any

import jax
import pandas as pd
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

import eval as scoring
import train
from jax_lora import cli, inputs, sharding, study
from jax_lora.evaluation import evaluate
from jax_lora.study import costs, grid, locks, results, runner, slurm, small, view
from jax_lora.study.grid import Cell
from jax_lora.study.team import Team, fault
from jax_lora.weights import base as base_weights
from jax_lora.weights import hf
from jax_lora.weights.tokenizers import load_tokenizer

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="configs/study_*.py", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "the study's folder")
_ONLY = flags.DEFINE_string("only", None, "some cells, such as 'rank <= 64 and set == \"T100\"'")
_RETRY = flags.DEFINE_boolean("retry-failed", False, "take cells that failed once more")
_REPORT = flags.DEFINE_boolean("report", False, "tables and figures of what is there")
_DRY_RUN = flags.DEFINE_boolean("dry-run", False, "print the cells and their costs")
_SPEED = flags.DEFINE_float(
    "tokens-per-second", None, "of training the cheapest cell, for --dry-run", lower_bound=1e-9
)
_TARGET = flags.DEFINE_string("target", None, "hardware for --dry-run, see plan.py")
_LAUNCHER = flags.DEFINE_enum("launcher", None, ["slurm"], "print a job array of workers")
_SUBMIT = flags.DEFINE_boolean("submit", False, "submit the job array")
_WORKERS = flags.DEFINE_integer("workers", 1, "tasks of the job array")
_HOSTS = flags.DEFINE_integer("hosts", 1, "nodes of each task of the job array")
_SBATCH = flags.DEFINE_multi_string("sbatch", [], "an option for the job array: --gres=gpu:1")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "where many processes are one worker: see train.py, as for the other two"
)
_PROCESSES = flags.DEFINE_integer("processes", -1, "how many processes there are")
_PROCESS = flags.DEFINE_integer("process", -1, "which of them this is, from 0")

TOY = "toy"  # what is trained where it is no cell: the base of the study's own


def main(_):
    logging.set_verbosity(logging.WARNING)
    cli.keep_memory()
    cli.keep_programs()
    with cli.exit_codes():
        if not _WORKDIR.value:
            raise ValueError("--workdir: found none, expected the study's folder")
        workdir = Path(_WORKDIR.value).resolve()  # one name from wherever a worker is started
        if _REPORT.value:
            print(write_report(workdir))
            return
        if _CONFIG.value is None:
            raise ValueError("--config: found none, expected a file such as configs/study_mini.py")
        if _LAUNCHER.value or _DRY_RUN.value:
            jax.config.update("jax_platforms", "cpu")  # nothing runs here: take no accelerator
        else:
            sharding.join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    store = sharding.store()
    team = Team(store, jax.process_index(), jax.process_count()) if store else Team()
    with team:
        work(_CONFIG.value, workdir, team)


def work(config: Any, workdir: Path, team: Team) -> None:
    """What one worker does, or one of its processes."""
    with cli.exit_codes():
        # -------------------------------------------------------------- input, before any compute
        cells = cells_of(config)
        chosen = grid.choose(cells, _ONLY.value) if _ONLY.value else cells
        resolved = {"config": json.loads(config.to_json_best_effort())}
        cli.check_same_run(workdir / "study.json", resolved)
        with inputs_of(config, workdir) as place:
            resolved["data_fingerprint"] = check_input(config, place, chosen)
            cli.check_same_run(workdir / "study.json", resolved)
            if _LAUNCHER.value:
                launch(workdir)
            if _DRY_RUN.value:
                dry_run(config, place, workdir, chosen)
        if _LAUNCHER.value or _DRY_RUN.value:
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stopped if team.leads else lambda *_: team.stop())
        if not team.leads:
            team.follow(lambda name: train.run(*run_of(config, workdir, name)))
            return
        team.gather()
        if not (workdir / "study.json").is_file():
            workdir.mkdir(parents=True, exist_ok=True)
            runner.write_json(workdir / "study.json", resolved)

        # -------------------------------------------------------------- a base of our own
        if config.toy.instances:
            made = (workdir / "toy" / "toy-llama").is_dir
            make = functools.partial(make_base, config, workdir, team)
            runner.once(workdir, TOY, made, make)

    # ------------------------------------------------------------------ the cells
    operations = {c.id: estimated_operations(run_config(config, workdir, c)) for c in chosen}
    ordered = grid.cheap_first(chosen, operations)
    look = functools.partial(view.look, workdir, ordered, operations)
    live = view.Live(look, sys.stderr) if sys.stderr.isatty() else None

    def tell(cell: Cell, what: str) -> None:
        if what == "done":
            results.gather(cells, workdir)
        if not live:
            train.said(f"{look()[0]} | {cell.id} {what}")
        if team.discord:
            raise SystemExit(f"{team.discord}; this worker ends, the same command goes on")

    with (
        cli.running(lambda: "the same command goes on with what is missing"),
        live or nullcontext(),
    ):
        runner.pull(
            ordered,
            workdir,
            functools.partial(run_cell, config, workdir, team),
            retry_failed=_RETRY.value,
            tell=tell,
        )
        results.gather(cells, workdir)
        results.write_cases(cells, workdir)
    print(look()[0])
    print(f"python study.py --workdir={workdir} --report   # writes tables and figures")
    failed = [runner.place(workdir, cell) / "failed.json" for cell in chosen]
    failed = [path for path in failed if path.is_file()]
    for path in failed:
        sys.stderr.write(f"error: {path}: {hf.read_json(path)['reason']}\n")
    if failed:
        raise SystemExit(1)


def stopped(*_: Any) -> None:
    """Ctrl-C or SIGTERM outside of training: leave, and leave no lock."""
    raise SystemExit("stopped; the same command goes on with what is missing")


# ---------------------------------------------------------------------- what a cell is


def cells_of(config: Any) -> list[Cell]:
    """All cells of a study."""
    rates, variants = config.learning_rates.to_dict(), config.variants.to_dict()
    return grid.cells(config.ranks, config.sets, config.rounds, rates, variants)


def run_config(config: Any, workdir: Path, cell: Cell) -> Any:
    """The config of a cell's run."""
    run = config.run.copy_and_resolve_references()
    try:
        if cell.method == "full":
            run.update(config.full)
        if cell.variant:
            run.update(config.variants[cell.variant])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{cell.id}, what it changes in run: {error.args[0]}") from None
    if cell.rank:
        run.lora.rank = cell.rank
    run.data.set, run.round, run.optim.learning_rate = cell.set, cell.round, cell.learning_rate
    if config.toy.instances:
        run.model = str(workdir / "toy" / "toy-llama")
        run.data.path = str(workdir / "toy" / "tasks" / "grid")
    return run


@contextmanager
def inputs_of(config: Any, workdir: Path) -> Iterator[Path]:
    """The folder where a study's own tasks and base lie; before they are made, a temporary one
    with a base of the same shape."""
    if not config.toy.instances or (workdir / "toy" / "toy-llama").is_dir():
        yield workdir
        return
    with tempfile.TemporaryDirectory() as scratch:
        write_start(config, Path(scratch), "toy-llama")
        yield Path(scratch)


def check_input(config: Any, place: Path, cells: Sequence[Cell]) -> str:
    """The fingerprint of the data, where every cell finds its base and its task set."""
    for cell in cells:
        run = run_config(config, place, cell)
        for key in ("model", "data.path"):
            if not run[key]:
                raise ValueError(f"--config.run.{key}: found none, expected a folder or a hub id")
        sets = inputs.task_sets(*cli.data_options(run))
        if cell.set not in sets:
            raise ValueError(f"sets: found {cell.set!r}, expected some of {', '.join(sets)}")
    base_weights.read_config(run.model)
    return inputs.open_checkout(run.data.path, run.data.categories).fingerprint


# ---------------------------------------------------------------------- work


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


def make_base(config: Any, workdir: Path, team: Team) -> None:
    """Write the toy tasks, and a base that learns fully on those outside of the grid."""
    write_start(config, workdir, "untrained")
    run, folder = run_of(config, workdir, TOY)
    with output(workdir, TOY):
        train_together(config, workdir, team, TOY)
    model_config, variables, _ = scoring.load_variables(folder, run, "last")
    tokenizer = load_tokenizer(workdir / "toy" / "untrained")
    hf.save(workdir / "toy" / "toy-llama", model_config, variables["params"], tokenizer, run.dtype)


def run_of(config: Any, workdir: Path, name: str) -> tuple[Any, Path]:
    """The config and the folder of what is trained under a name."""
    if name != TOY:
        (cell,) = (cell for cell in cells_of(config) if cell.id == name)
        return run_config(config, workdir, cell), runner.place(workdir, cell)
    run, toy = config.run.copy_and_resolve_references(), workdir / "toy"
    run.update(config.full)
    run.update(config.toy.run)
    run.model, run.data.path = str(toy / "untrained"), str(toy / "tasks" / "outside")
    return run, toy / "run"


def train_together(config: Any, workdir: Path, team: Team, name: str) -> None:
    """Train in all processes of this worker; this one leads."""
    run, folder = run_of(config, workdir, name)

    def lost(reason: str) -> None:
        if name != TOY:
            runner.fail(folder, reason)
        sys.stderr.write(f"\nerror: {name}: {reason}; the others wait for it, this worker ends\n")

    with team.together(name, lost):
        train.run(run, folder)


def run_cell(config: Any, workdir: Path, team: Team, cell: Cell, folder: Path) -> dict[str, Any]:
    """Train and score a cell, or go on with it; what its done.json holds."""
    run = run_config(config, workdir, cell)
    if not any(path.name.isdigit() for path in (folder / "checkpoints").glob("*")):
        rmtree(folder, ignore_errors=True)  # answers of a model that is gone
    began = time.perf_counter()
    with output(workdir, cell.id), faults():
        train_together(config, workdir, team, cell.id)
        trained = time.perf_counter()
        scoring.run(folder, study.TESTS, "last", {})
    results.share_examples(cell, folder, workdir / "examples")
    taskset, parameters = taskset_of(run), hf.read_json(folder / "parameters.json")
    tokens, (training, forward) = train_tokens(run), costs.operations_per_token(run)
    facts = {
        "model": Path(run.model).name,
        "set_tasks": len(taskset.tasks),
        "train_examples": len(taskset.examples),
        "trainable": parameters["trainable"],
        "frozen": parameters["frozen"],
        "train_tokens": tokens,
        "train_operations": tokens * training,
        "base_operations": tokens * forward,
    }
    timings = {"training": trained - began, "scoring": time.perf_counter() - trained}
    return {"timings": locks.owner() | timings, "rows": results.rows(cell, folder, facts)}


@contextmanager
def output(workdir: Path, name: str) -> Iterator[None]:
    """What the enclosed scripts print goes to a file; their progress stays on stderr."""
    path = workdir / "logs" / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file, redirect_stdout(file):
        yield


@contextmanager
def faults() -> Iterator[None]:
    """A script that ends over a fault is a cell that failed; one that was stopped ends us too."""
    try:
        yield
    except SystemExit as end:
        if failure := fault(end):
            raise failure from None
        raise


def taskset_of(run: Any) -> Any:
    return inputs.task_sets(*cli.data_options(run))[run.data.set]


def train_tokens(run: Any) -> int:
    """Real tokens of a whole training."""
    encoder = inputs.encoder(*cli.encoder_options(run))
    rows = inputs.training_rows(encoder, taskset_of(run), run.data.answer, run.seed)
    batches, total = train.batches_of(run, rows)
    lengths = pd.Series([len(row.ids) for row in rows])
    return sum(int(lengths[batches.indices(step)].sum()) for step in range(total))


# ---------------------------------------------------------------------- costs


def estimated_operations(run: Any) -> float:
    """What orders the cells: operations if every example had one token. Reads no example."""
    starred = "*" in run.data.set  # as many examples as the set of middle size
    tasks = run.data.sizes[1] if starred else len(taskset_of(run).tasks)
    examples = tasks * run.data.train_per_task * run.epochs
    limit = run.max_steps * run.batch_size or examples
    return min(examples, limit) * costs.operations_per_token(run)[0]


def dry_run(config: Any, place: Path, workdir: Path, cells: Sequence[Cell]) -> None:
    """Print the cells with their tokens, operations, hours and memory."""
    import plan

    where = plan.target(_TARGET.value or "cpu")
    runs = {cell.id: run_config(config, place, cell) for cell in cells}
    tokens = {name: train_tokens(run) for name, run in runs.items()}
    per_token = {name: costs.operations_per_token(run)[0] for name, run in runs.items()}
    setups = {name: tuple(plan.setups(run, where)) for name, run in runs.items()}
    peaks = {own: max(plan.memory(one).peak for one in own) for own in set(setups.values())}

    estimated = {name: estimated_operations(run) for name, run in runs.items()}
    took = results.finished(workdir, estimated)
    known = [(estimated[name], seconds) for name, seconds in took.items()]
    found = results.seconds(list(estimated.values()), known)
    seconds: dict[str, float] = {}
    if speed := _SPEED.value:
        source = "of training, by --tokens-per-second and operations"
        cheapest = min(per_token.values())
        seconds = {n: tokens[n] / speed * per_token[n] / cheapest for n in runs}
    elif found:
        source, seconds = "by the cells that are finished", dict(zip(runs, found, strict=True))
    elif _TARGET.value:
        source = f"of training at the ceiling of {where.kind}'s arithmetic"
        seconds = {n: tokens[n] / plan.ceiling(setups[n][-1], where.device) for n in runs}
    else:
        source = "give --tokens-per-second or --target, or finish a cell"

    rows: list[tuple[Any, ...]] = []
    for name in (cell.id for cell in grid.cheap_first(cells, estimated)):
        peak = peaks[setups[name]]
        hours = f"{seconds[name] / 3600:.2f}" if seconds else None
        fits = ("yes" if peak <= where.device.usable else "no") if _TARGET.value else None
        work = f"{tokens[name] * per_token[name]:.2e}"
        rows.append((name, tokens[name], work, hours, f"{peak / 2**30:.2f}", fits))
    hours = f"{sum(seconds.values()) / 3600:.2f}" if seconds else None
    work = f"{sum(tokens[n] * per_token[n] for n in runs):.2e}"
    rows.append((f"{len(cells)} cells", sum(tokens.values()), work, hours, None, None))
    header = ("cell", "training tokens", "operations", "hours", "peak GiB", "fits")
    print(cli.table(header, rows))
    print(f"hours: {source}; peak: of a step of training, on one device, by formula")


# ---------------------------------------------------------------------- report and launcher


def write_report(workdir: Path) -> Path:
    """Write the report of a study from its results.parquet, study.json and cases.jsonl alone."""
    from jax_lora.study.report import report  # matplotlib, which no worker needs

    said = hf.read_json(workdir / "study.json")
    cells = grid.frame(cells_of(ConfigDict(said["config"])))
    found, cases = study.read(workdir / "results.parquet"), workdir / "cases.jsonl"
    asked = evaluate.read_jsonl(cases) if cases.is_file() else []
    return report(found, cells, workdir / "report", cases=asked)


def launch(workdir: Path) -> None:
    """Print, and perhaps submit, a job array whose tasks run this very command."""
    kept, words = [], iter(sys.argv[1:])
    for word in words:
        name, equals, _ = word.lstrip("-").partition("=")
        if name in ("launcher", "workers", "hosts", "sbatch"):
            _ = equals or next(words)
        elif name != "submit":
            kept.append(word)
    command = [sys.executable, str(Path(__file__).resolve()), *kept]
    command += ["--coordinator=auto"] if _HOSTS.value > 1 else []
    options = [f"--chdir={os.getcwd()}", *_SBATCH.value]
    text = slurm.script(command, _WORKERS.value, options, workdir, _HOSTS.value)
    print(text, end="")
    if _SUBMIT.value:
        print(f"# job {slurm.submit(text, workdir)}")


if __name__ == "__main__":
    app.run(main, flags_parser=functools.partial(cli.parse_flags, flags.FLAGS))
