"""The work of one worker of a study: it makes the toy base, then trains and scores cells."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree

from jax_lora import locks, study
from jax_lora.config import RunConfig
from jax_lora.errors import DataError
from jax_lora.files import fresh_file, read_json, write_json_once
from jax_lora.run import Run
from jax_lora.run import folder as run_folder
from jax_lora.study import choice, costs, grid, measures, results, runner, spec, view
from jax_lora.study.config import StudyConfig
from jax_lora.study.grid import Cell
from jax_lora.study.team import Team, fault
from jax_lora.text import print_line
from jax_lora.weights import hf
from jax_lora.weights.tokenizers import load_tokenizer


@dataclass(frozen=True)
class Worker:
    """One worker of a study, or one of its processes.

    Attributes:
      config: of the study.
      workdir: the study's folder.
      team: this process among those of its worker.
      train: (config, folder): trains a run to its end, or resumes it.
      say: shows a line of progress.
    """

    config: StudyConfig
    workdir: Path
    team: Team
    train: Callable[[RunConfig, Path], None]
    say: Callable[[str], None]

    def follow(self) -> None:
        """Train what the leader of this worker trains, until it ends."""
        self.team.follow(lambda name: self.train(*spec.run_of(self.config, self.workdir, name)))

    def prepare(self, digests: Mapping[str, str]) -> None:
        """Write study.json and, where the study has one, the toy base."""
        self.team.gather()
        path = self.workdir / "study.json"
        if not path.is_file():
            self.workdir.mkdir(parents=True, exist_ok=True)
            write_json_once(path, {"config": self.config.to_dict(), **digests})
            # Another worker may have begun another study here since this one looked.
            spec.check_same_study(path, self.config, digests)
        if self.config.toy.instances:
            is_made = (self.workdir / "toy" / "toy-llama").is_dir
            runner.once(self.workdir, spec.TOY, is_made, self._make_base)

    def run(self, chosen: Sequence[Cell], retry_failed: bool) -> tuple[str, list[str]]:
        """Train and score cells until none is left.

        Returns:
          How far the study is, and a line per cell that failed and per choice that cannot be made.
        """
        workdir = self.workdir
        choices = choice.Choices.in_folder(self.config, workdir)
        if retry_failed:
            choices.forget_failures(workdir, chosen)
        runs = {cell.id: spec.run_config(self.config, workdir, cell) for cell in chosen}
        operations = {name: costs.estimate(run) for name, run in runs.items()}
        ordered = grid.cheap_first(chosen, operations)
        operations |= {choice.without_rate(cell): operations[cell.id] for cell in chosen}

        def look() -> tuple[str, list[view.Row]]:
            return view.look(workdir, choices.planned(ordered), operations, choices.stage)

        live = view.Live(look, sys.stderr) if sys.stderr.isatty() else None

        def on_change(cell: Cell, what: str) -> None:
            if what in (runner.DONE, runner.TRIED):
                choices.write_table(workdir)
                results.gather(choices.scored(), workdir)
            if not live:
                self.say(f"{look()[0]} | {cell.id} {what}")
            if self.team.disagreement:
                raise OSError(f"{self.team.disagreement}; this worker ends")

        with live or nullcontext():
            runner.run_cells(
                choices.unsettled(workdir, ordered),
                workdir,
                lambda cell, folder: self._run_cell(cell, folder, choices.stage(cell)),
                stage=choices.stage,
                retry_failed=retry_failed,
                on_change=on_change,
            )
            choices.write_table(workdir)
            results.gather(choices.scored(), workdir)
            results.write_cases(choices.scored(), workdir)
        failed = [
            runner.cell_folder(workdir, cell) / "failed.json"
            for cell in choices.unsettled(workdir, chosen)
        ]
        lines = [f"{path}: {read_json(path)['reason']}" for path in failed if path.is_file()]
        return look()[0], [*lines, *choices.blocked(workdir)]

    def _train(self, name: str, sets: Sequence[str] = ()) -> float:
        """Train in all processes of this worker and score test sets here; seconds of training."""
        run, folder = spec.run_of(self.config, self.workdir, name)

        def lost(reason: str) -> None:
            if name != spec.TOY:
                runner.fail(folder, reason)
            self.say(f"\nerror: {name}: {reason}; the others wait for it, this worker ends")

        began = time.perf_counter()
        with _output(self.workdir, name):
            with self.team.together(name, lost):
                self.train(run, folder)
            trained = time.perf_counter()
            if sets:  # cells share a base that is on the device, where one device can hold it
                Run.open(run, folder, say=print_line).score(sets, base_on_host=False)
        return trained - began

    def _make_base(self) -> None:
        """Write the toy tasks, and a base that is fully trained on those outside of the grid."""
        spec.write_start(self.config, self.workdir, "untrained")
        run, folder = spec.run_of(self.config, self.workdir, spec.TOY)
        self._train(spec.TOY)
        shape, params = Run.open(run, folder).weights()
        path = self.workdir / "toy" / "toy-llama"
        hf.save(path, shape, params, load_tokenizer(run.model), run.dtype)

    def _run_cell(self, cell: Cell, folder: Path, end: str) -> dict[str, object]:
        """Train a cell, or resume it, and score it; what the file of its end holds."""
        if not any(path.name.isdigit() for path in (folder / "checkpoints").glob("*")):
            rmtree(folder, ignore_errors=True)  # answers of a model that was deleted
        tried = folder / f"{runner.TRIED}.json"
        before = read_json(tried)["timings"]["training"] if tried.is_file() else 0.0
        began = time.perf_counter()
        with _faults():
            training = self._train(cell.id, study.TESTS if end == runner.DONE else ())
        timings = {"training": before + training, "scoring": time.perf_counter() - began - training}
        run, validation = spec.run_config(self.config, self.workdir, cell), _validation(folder)
        if run.validate_every and validation is None:  # which the choice of a rate would miss
            raise DataError(f"{folder / 'metrics.jsonl'}: found no validation, expected the last")
        found: dict[str, object] = {"validation": validation}
        if end == runner.DONE:
            results.share_examples(cell, folder, self.workdir / "examples")
            began = time.perf_counter()
            measured = self._measure(cell, run, folder)
            timings["measuring"] = time.perf_counter() - began
            facts = costs.facts(run, folder) | measured.columns
            found["rows"] = results.rows(
                cell, folder, facts, run.eval.metrics, measured.reference_losses
            )
        return {"timings": locks.owner() | timings} | found

    def _measure(self, cell: Cell, run: RunConfig, folder: Path) -> measures.Measured:
        """Measure a cell, and write what changed in its weights beside its checkpoints."""
        is_probe = self.config.toy.codebooks > 0
        with _output(self.workdir, cell.id), _faults():
            opened = Run.open(run, folder, say=print_line)
            measured = measures.measure(self.config.measure, opened, is_probe)
        if measured.update is not None:
            with fresh_file(folder / results.UPDATE) as fresh:
                measured.update.to_parquet(fresh, index=False)
        return measured


def _validation(run: Path) -> dict[str, float | None] | None:
    """The last validation in the folder of a run that trained; None where there was none."""
    rows = [row for row in run_folder.read_metrics(run) if "validation_loss" in row]
    names = ("step", "validation_loss", "validation_tokens")
    return {name: rows[-1][name] for name in names} if rows else None


@contextmanager
def _output(workdir: Path, name: str) -> Iterator[None]:
    """What the enclosed block prints goes to a file; its progress stays on stderr."""
    path = workdir / "logs" / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file, redirect_stdout(file):
        yield


@contextmanager
def _faults() -> Iterator[None]:
    """A script that ends over a fault is a cell that failed; one that was stopped ends us too."""
    try:
        yield
    except SystemExit as end:
        if failure := fault(end):
            raise failure from failure.__cause__
        raise
