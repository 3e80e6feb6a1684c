"""What study.py runs: the checks of a study's input, its dry run, its launcher and its workers."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from jax_lora import distributed
from jax_lora.config import RunConfig
from jax_lora.errors import RunFailed
from jax_lora.planning.targets import target as hardware
from jax_lora.run.training import running
from jax_lora.study import choice, costs, grid, slurm, spec
from jax_lora.study.config import StudyConfig
from jax_lora.study.team import Team
from jax_lora.study.worker import Worker
from jax_lora.text import table

logger = logging.getLogger(__name__)
RESUME = "rerun the same command to resume with what is missing"


class Command:
    """A study's config and folder, and what can be done with them.

    Args:
      config: of the study.
      workdir: the study's folder.
      only: an expression that chooses cells, see `grid.choose`; all by default.
      say: gets tables and results.
      train: trains a run in a folder to its end.

    Every method first checks the study's input, and raises ConfigError, DataError or OSError where
    it is wrong, see `jax_lora.errors`.
    """

    def __init__(
        self,
        config: StudyConfig,
        workdir: Path,
        only: str | None,
        say: Callable[[str], None],
        train: Callable[[RunConfig, Path], None],
    ):
        self._config, self._workdir, self._only = config, workdir, only
        self._say, self._train = say, train

    def _check(self) -> tuple[list[grid.Cell], dict[str, str]]:
        """The cells that are chosen, and the digests of data and base."""
        config, path = self._config, self._workdir / "study.json"
        cells = grid.cells_of(config)
        chosen = grid.choose(cells, self._only) if self._only else cells
        spec.check_same_study(path, config)
        with spec.inputs_of(config, self._workdir) as folder:
            digests = spec.check_input(config, folder, chosen)
        spec.check_same_study(path, config, digests)
        choice.Choices.in_folder(config, self._workdir).check_only(chosen)
        return chosen, digests

    def dry_run(self, target: str | None, tokens_per_second: float | None) -> None:
        """Say what the cells cost, see `costs.dry_run`."""
        where = hardware(target) if target else None  # before the data is read
        cells, _ = self._check()
        with spec.inputs_of(self._config, self._workdir) as folder:
            choices = choice.Choices.in_folder(self._config, self._workdir)
            planned, scored = choices.planned(cells), choices.scored(cells)
            header, rows, note = costs.dry_run(
                self._config, folder, self._workdir, planned, scored, where, tokens_per_second
            )
            note += f"\n{costs.scoring(self._config, folder, scored)}"
        self._say(f"{table(header, rows)}\n{note}")

    def launch(
        self, script: str, workers: int, hosts: int, options: Sequence[str], submit: bool
    ) -> None:
        """Say, and perhaps submit, a SLURM job array of workers that run this very command."""
        words = [sys.executable, os.path.abspath(script), *slurm.worker_arguments(sys.argv[1:])]
        words += ["--coordinator=auto"] if hosts > 1 else []
        options = [f"--chdir={os.getcwd()}", *options]
        text = slurm.script(words, workers, options, self._workdir, hosts)
        self._check()  # last: it may have to write toy tasks
        self._say(text.removesuffix("\n"))
        if submit:
            self._say(f"# job {slurm.submit(text, self._workdir)}")

    def work(self, retry_failed: bool) -> None:
        """Work on the cells as one worker, or as one of its processes, until none is left.

        Raises:
          RunFailed: some cells failed, or this worker cannot go on.
        """
        store = distributed.key_value_store()
        with Team(store, jax.process_index(), jax.process_count()) if store else Team() as team:
            cells, digests = self._check()  # one that fails here lets the other processes end
            if not team.leads:  # the leader ends as the script does
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    signal.signal(number, lambda *_: team.stop())
            worker = Worker(self._config, self._workdir, team, self._train, logger.info)
            if not team.leads:
                worker.follow()
                return
            worker.prepare(digests)
            with running(lambda _: RESUME):
                state, failed = worker.run(cells, retry_failed)
        self._say(f"{state}\npython study.py --workdir={self._workdir} --report   # the report")
        if failed:
            raise RunFailed("; ".join(failed))
