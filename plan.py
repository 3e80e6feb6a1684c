"""Say before the launch whether a run fits, how fast it could be, and how long it takes.

    python plan.py --config=configs/lora_7b_a100.py:rank=2048 --target=a100-80gb
    python plan.py --config=configs/full_7b_8xa100.py --target=a100-80gb-8 --compile

Of the model only its config is read; no data and no accelerator is needed. --config.model may be
a known name such as llama-13b; where it is empty, the model is llama-7b. --compile also asks the
compiler of the target: it takes a minute or so, and the extra cuda12 or cuda13, or tpu.
"""

from __future__ import annotations

import functools
import os

from jax_lora import signals

signals.stop_on_signals()
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs here: take no accelerator

import jax
from absl import app, flags
from ml_collections import config_flags

from jax_lora import cli
from jax_lora.config import RunConfig
from jax_lora.planning import report
from jax_lora.planning.targets import DEVICES
from jax_lora.weights import base as base_weights

_CONFIG = config_flags.DEFINE_config_file("config", help_string="configs/*.py", lock_config=True)
_TARGET = flags.DEFINE_string("target", None, f"{', '.join(DEVICES)}; or N of them: NAME-N")
_TOKENS = flags.DEFINE_integer(
    "tokens", None, "of an example on average, for speed and days; by default the most"
)
_COMPILE = flags.DEFINE_boolean("compile", False, "compile the step for the target as well")


def main(_):
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot read such programs back
    with cli.exit_codes():
        cli.require("config", _CONFIG.value, "a file such as configs/lora.py")
        target = cli.require("target", _TARGET.value, f"one of {', '.join(DEVICES)}")
        config = RunConfig.from_config_dict(_CONFIG.value)
        model = config.model or "llama-7b"
        shape = base_weights.known_or_read_config(model)
        kinds = base_weights.known_or_read_kinds(model, config.model_quantization)
        options = target, _TOKENS.value, _COMPILE.value, kinds
        for text in report.plan(config, shape, model, *options):
            cli.say(text)


if __name__ == "__main__":
    app.run(main, flags_parser=functools.partial(cli.parse_flags, flags.FLAGS))
