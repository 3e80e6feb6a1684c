"""Run a study: train and score every cell of a grid, in any number of processes.

    python study.py --config=configs/study_mini.py --workdir=studies/mini
    python study.py --workdir=studies/mini --report

Every process that runs the first command, on any machine that sees the folder, takes cells from
it; rerun the same command to resume. The second one writes tables,
figures and findings from results.parquet alone, and a page of answers from cases.jsonl.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

import eval as scoring
import plan
import train
from jax_lora import cli, sharding
from jax_lora.study import costs, grid, slurm, spec
from jax_lora.study.team import Team
from jax_lora.study.worker import Worker, resolve
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

ON = "the same command goes on with what is missing"


def main(_):
    logging.set_verbosity(logging.WARNING)
    cli.keep_memory()
    cli.keep_programs()
    config, offline = _CONFIG.value, bool(_LAUNCHER.value or _DRY_RUN.value)
    with cli.input_errors():
        if not _WORKDIR.value:
            raise ValueError("--workdir: found none, expected the study's folder")
        workdir = Path(_WORKDIR.value).resolve()  # one name from wherever a worker is started
        if _REPORT.value:
            from jax_lora.study.report import write  # matplotlib, which no worker needs

            return print(write(workdir))
        if config is None:
            raise ValueError("--config: found none, expected a file such as configs/study_mini.py")
        if offline:
            jax.config.update("jax_platforms", "cpu")  # nothing runs here: take no accelerator
        else:
            sharding.join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    store = sharding.store()
    with Team(store, jax.process_index(), jax.process_count()) if store else Team() as team:
        with cli.input_errors():
            cells = grid.cells_of(config)
            cells = grid.choose(cells, _ONLY.value) if _ONLY.value else cells
            resolved = resolve(config)
            cli.check_same_run(workdir / "study.json", resolved)
            with spec.inputs_of(config, workdir) as folder:
                resolved["data_fingerprint"] = spec.check_input(config, folder, cells)
                cli.check_same_run(workdir / "study.json", resolved)
                if _LAUNCHER.value:
                    launch(workdir)
                if _DRY_RUN.value:
                    options = (_TARGET.value, _SPEED.value)
                    *table, note = costs.dry_run(config, folder, workdir, cells, plan, *options)
                    print(f"{cli.table(*table)}\n{note}")
            if offline:
                return
            stop = stopped if team.leads else lambda *_: team.stop()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, stop)
            worker = Worker(config, workdir, team, train.run, score, export, train.said)
            worker.prepare(resolved) if team.leads else worker.follow()
        if team.leads:
            with cli.running(lambda: ON):
                state, failed = worker.run(cells, _RETRY.value)
            print(f"{state}\npython study.py --workdir={workdir} --report   # tables and figures")
            sys.stderr.writelines(f"error: {line}\n" for line in failed)
            sys.exit(1 if failed else 0)


def score(folder, names):
    scoring.run(folder, names, "last", {})


def export(folder, run, destination):
    shape, variables, _ = scoring.load_variables(folder, run, "last")
    hf.save(destination, shape, variables["params"], load_tokenizer(run.model), run.dtype)


def launch(workdir):
    command = [sys.executable, os.path.abspath(__file__), *slurm.worker_arguments(sys.argv[1:])]
    command += ["--coordinator=auto"] if _HOSTS.value > 1 else []
    options = [f"--chdir={os.getcwd()}", *_SBATCH.value]
    text = slurm.script(command, _WORKERS.value, options, workdir, _HOSTS.value)
    print(text, end="")
    if _SUBMIT.value:
        print(f"# job {slurm.submit(text, workdir)}")


def stopped(*_):
    """Ctrl-C or SIGTERM outside of training: leave, and leave no lock."""
    raise SystemExit(f"stopped; {ON}")


if __name__ == "__main__":
    app.run(main, flags_parser=functools.partial(cli.parse_flags, flags.FLAGS))
