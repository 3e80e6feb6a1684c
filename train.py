"""Fine-tune a LLaMA on instructions, with LoRA or fully.

    python train.py --config=configs/lora.py:rank=16 --workdir=runs/r16

The work folder then holds the resolved config, parameter counts, metrics, TensorBoard events,
checkpoints and, for LoRA, the adapter in PEFT's format. Rerun the same command to resume an
interrupted run. `--show=3` prints what three rows look like to the model, and trains nothing.

    python train.py --status=runs/r16
"""

import functools

from jax_lora import signals

signals.stop_on_signals()

from absl import app, flags
from ml_collections import config_flags

from jax_lora import cli
from jax_lora.config import RunConfig

_CONFIG = config_flags.DEFINE_config_file("config", help_string="configs/*.py", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "the run's folder")
_STATUS = flags.DEFINE_string("status", None, "a run's folder: print how far it is, and end")
_VERIFY = flags.DEFINE_boolean(
    "verify", False, "read every file of a large checkout, whatever its size and time say"
)
_SHOW = flags.DEFINE_integer(
    "show", 0, "print tokens, loss mask and lengths of so many training rows, and train nothing"
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "with several processes: host:port of the first; auto where a cluster knows"
)
_PROCESSES = flags.DEFINE_integer("processes", -1, "how many processes there are")
_PROCESS = flags.DEFINE_integer("process", -1, "which of them this is, from 0")


def main(_):
    if _STATUS.value:
        with cli.exit_codes():
            from jax_lora.run.status import status

            return cli.say(status(_STATUS.value))
    cli.configure_process(trains=True)
    with cli.exit_codes():
        cli.require("config", _CONFIG.value, "a file such as configs/lora.py")
        config = RunConfig.from_config_dict(_CONFIG.value)
        if _SHOW.value:
            from jax_lora.run.show import samples

            cli.log_progress()
            cli.say(samples(config, _SHOW.value))
            return
        workdir = cli.require("workdir", _WORKDIR.value, "the run's folder")
        from jax_lora import distributed

        distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
        cli.log_progress()

        with cli.fast_imports():
            from jax_lora.run import Run

        with cli.StopRequest() as stop:
            run = Run.open(config, workdir, say=cli.say)
            run.train(verify=_VERIFY.value, asked_to_stop=stop)


if __name__ == "__main__":
    app.run(main, flags_parser=functools.partial(cli.parse_flags, flags.FLAGS))
