"""Score a run: greedy answers, exact match and Rouge-L on its seen and unseen tasks.

    python eval.py --workdir=runs/r16 --sets=seen,unseen

`seen` has held-out examples of the tasks in the run's smallest task set, whichever set was trained
on, `unseen` those of the official test tasks. Rerun the same command to resume. `--baselines`
scores copying, the majority label and an empty answer, without a model.
"""

import functools

from jax_lora import signals

signals.stop_on_signals()

from absl import app, flags
from ml_collections import config_flags

from jax_lora import cli
from jax_lora.errors import RunFailed

_WORKDIR = flags.DEFINE_string("workdir", None, "the run's folder, made by train.py")
_SETS = flags.DEFINE_list(
    "sets", None, "test sets: seen, unseen; of data of one's own: test; by default all"
)
_ADAPTER = flags.DEFINE_string(
    "adapter", "last", "last: the latest checkpoint; none: the untuned base; or a PEFT folder"
)
_ANY_BASE = flags.DEFINE_boolean("any_base", False, "take an adapter of another base, too")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "last", "of the run: last; best, by the validation loss; or a step"
)
_METRICS = flags.DEFINE_list(
    "metrics", None, "in place of the config's, such as exact_match,rougeL,token_f1"
)
_OVERWRITE = flags.DEFINE_boolean("overwrite", False, "make answers that are there again")
_DEVICES_PER_COPY = flags.DEFINE_integer(
    "devices_per_copy", None, "devices of each copy of the weights; see config.eval", 1
)
_INT8_PRODUCTS = flags.DEFINE_boolean("int8_products", None, "see config.eval")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", None, "in place of the config's", 1)
_CHECK = flags.DEFINE_boolean("check", False, "do answers and updates depend on how work is cut?")
_CHECK_PROMPTS = flags.DEFINE_integer("check_prompts", 64, "of --check; a quarter of them train", 4)
_BASELINES = flags.DEFINE_boolean("baselines", False, "score what needs no model")
_CONFIG = config_flags.DEFINE_config_file("config", help_string="of --baselines without a run")


def main(_):
    cli.configure_process(trains=False)
    with cli.exit_codes():
        if _BASELINES.value:
            from jax_lora.run import baselines

            unread = "adapter any_base check checkpoint check_prompts devices_per_copy overwrite"
            unread = *unread.split(), "int8_products", "max_new_tokens"
            cli.refuse_unread(flags.FLAGS, "--baselines", *unread)
            given = _CONFIG.value, _WORKDIR.value, _SETS.value, _METRICS.value
            return cli.say(baselines.score(*given))
        cli.refuse_unread(flags.FLAGS, "--workdir", "config")
        workdir = cli.require("workdir", _WORKDIR.value, "a folder that train.py made")
        cli.log_progress()
        with cli.fast_imports():
            from jax_lora.run import Run
        named = _MAX_NEW_TOKENS, _DEVICES_PER_COPY, _INT8_PRODUCTS, _METRICS
        options: dict = {flag.name: flag.value for flag in named if flag.value is not None}
        options |= {"any_base": _ANY_BASE.value}
        run = Run.open(None, workdir, say=cli.say)
        if _CHECK.value:
            cli.refuse_unread(flags.FLAGS, "--check", "checkpoint", "sets", "overwrite", "metrics")
            if not run.check(_ADAPTER.value, _CHECK_PROMPTS.value, **options):
                raise RunFailed("results depend on how work is cut, or the compiler is wrong")
        else:
            options |= {"checkpoint": _CHECKPOINT.value, "overwrite": _OVERWRITE.value}
            run.score(_SETS.value, _ADAPTER.value, **options)


if __name__ == "__main__":
    app.run(main, flags_parser=functools.partial(cli.parse_flags, flags.FLAGS))
