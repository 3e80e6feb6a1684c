"""Run a study: train and score every cell of a grid, in any number of processes.

    python study.py --config=configs/study_mini.py --workdir=studies/mini
    python study.py --workdir=studies/mini --report   # or how far it is: --status=studies/mini

Every process that runs the first command takes cells from the folder; rerun it to resume.
"""

import functools

from jax_lora import signals

signals.stop_on_signals()

import jax
from absl import app, flags
from ml_collections import config_flags

import jax_lora
from jax_lora import cli, distributed
from jax_lora.files import local_path

_CONFIG = config_flags.DEFINE_config_file("config", help_string="configs/*.py", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "the study's folder")
_ONLY = flags.DEFINE_string("only", None, "some cells, such as 'rank <= 64 and set == \"T100\"'")
_RETRY = flags.DEFINE_boolean("retry-failed", False, "take cells that failed once more")
_REPORT = flags.DEFINE_boolean("report", False, "tables and figures of what is there")
_STATUS = flags.DEFINE_string("status", None, "a study's folder: print how far it is, and end")
_DRY_RUN = flags.DEFINE_boolean("dry-run", False, "print the cells and their costs")
_SPEED = flags.DEFINE_float("tokens-per-second", None, "of training the cheapest cell", 1e-9)
_TARGET = flags.DEFINE_string("target", None, "hardware for --dry-run, see plan.py")
_LAUNCHER = flags.DEFINE_enum("launcher", None, ["slurm"], "print a job array of workers")
_SUBMIT = flags.DEFINE_boolean("submit", False, "submit the job array")
_WORKERS = flags.DEFINE_integer("workers", 1, "tasks of the job array")
_HOSTS = flags.DEFINE_integer("hosts", 1, "nodes of each task of the job array")
_SBATCH = flags.DEFINE_multi_string("sbatch", [], "an option for the job array: --gres=gpu:1")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "of one worker's processes: see train.py")
_PROCESSES = flags.DEFINE_integer("processes", -1, "how many processes there are")
_PROCESS = flags.DEFINE_integer("process", -1, "which of them this is, from 0")


def main(_):
    cli.configure_process(trains=True)
    with cli.exit_codes():
        if _STATUS.value:
            from jax_lora.study.status import status

            return cli.say(status(_STATUS.value))
        folder = cli.require("workdir", _WORKDIR.value, "the study's folder")
        workdir = local_path(folder).resolve()  # one name from wherever a worker is started
        if _REPORT.value:
            from jax_lora.study import report  # matplotlib, which no worker needs

            return cli.say(report.write(workdir))
        cli.require("config", _CONFIG.value, "a file such as configs/study_mini.py")
        if _LAUNCHER.value or _DRY_RUN.value:
            jax.config.update("jax_platforms", "cpu")  # nothing runs here: take no accelerator
        else:
            distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
        cli.log_progress()
        with cli.fast_imports():
            from jax_lora.study import command  # what it imports may start the devices
        config = command.StudyConfig.from_config_dict(_CONFIG.value)
        study = command.Command(config, workdir, _ONLY.value, cli.say, train)
        if _LAUNCHER.value:
            study.launch(__file__, _WORKERS.value, _HOSTS.value, _SBATCH.value, _SUBMIT.value)
        elif _DRY_RUN.value:
            study.dry_run(_TARGET.value, _SPEED.value)
        else:
            study.work(_RETRY.value)


def train(config, folder):
    """Train a cell; its faults and stops end as train.py's do."""
    with cli.exit_codes(), cli.StopRequest(goes_on=True) as stop:
        jax_lora.Run.open(config, folder, say=cli.say).train(asked_to_stop=stop)


if __name__ == "__main__":
    app.run(main, flags_parser=functools.partial(cli.parse_flags, flags.FLAGS))
