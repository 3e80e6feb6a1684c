"""Flags and configs of train.py, plan.py and study.py."""

from __future__ import annotations

from collections.abc import Iterator

from jax_lora.config import CHOICES, DOMAINS, RunConfig, flatten
from tests.bad_inputs import Case
from tests.scripts import REPOSITORY

# What no run can be: changes of keys that are in their domains, and words of the line.
TOGETHER = {
    "keep without validation": ({"keep": "best"}, "config.validate_every"),
    "stop without validation": ({"stop_after": 2}, "config.validate_every"),
    "two sizes": ({"data.sizes": "(1,2)"}, "config.data.sizes"),
    "sizes that fall": ({"data.sizes": "(3,2,1)"}, "sizes are (3, 2, 1)"),
    "momentum of adamw": ({"optim.momentum": 0.5}, "config.optim.momentum"),
    "decay of adam": (
        {"optim.name": "adam", "optim.weight_decay": 0.1},
        "config.optim.weight_decay",
    ),
    "an empty stop text": ({"eval.stop": "('',)"}, "config.eval.stop"),
    "no buckets": ({"data.buckets": "()"}, "config.data.buckets"),
    "no prompt buckets": ({"eval.buckets": "()"}, "config.eval.buckets"),
    "no metrics": ({"eval.metrics": "()"}, "config.eval.metrics"),
    "no targets": ({"lora.targets": "()"}, "config.lora.targets"),
    "1001 buckets": ({"data.buckets": tuple(range(1, 1002))}, "config.data.buckets: found 1001"),
    "1001 stops": ({"eval.stop": tuple("a" * 1001)}, "config.eval.stop: found 1001"),
    "an unknown target": ({"lora.targets": "('q_proj','query')"}, "found query"),
    "a target twice": ({"lora.targets": "('q_proj','q_proj')"}, "found a module twice"),
    "an unknown metric": ({"eval.metrics": "('bleu',)"}, "bleu"),
    "no expression": ({"trainable": "('lora/[ab',)"}, "'lora/[ab', expected a regular expression"),
    "an endless expression": (
        {"trainable": r"('(?:a|b|.|..|...)*[!?]',)"},
        "that are matched within 0.5 s",
    ),
    "a long expression": ({"frozen": f"('{'a' * 10_001}',)"}, "10001 characters"),
    "expressions that cover too little": ({"frozen": "('lora/.*/scale',)"}, "covers the leaf"),
    "an expression that decides nothing": ({"trainable": "('lora/.*/c',)"}, "lora/.*/c"),
    "a scale that trains": ({"trainable": "('lora/.*',)"}, "expected it to stay frozen"),
    "prompts longer than a bucket": ({"data.source_length": 385}, "config.data.source_length"),
    "rows longer than a bucket": ({"data.buckets": "(16,)"}, "16"),
    "an unknown set": ({"data.set": "T99"}, "config.data.set: found 'T99'"),
    "a set that is a path": ({"data.set": "../../T100"}, "config.data.set: found '../../T100'"),
    "a set that is a test": ({"data.set": "unseen"}, "config.data.set"),
    "a template that is not there": ({"data.template": "no/such.jinja"}, "no/such.jinja"),
    "shares that take all": ({"data.validation": 0.5, "data.test": 0.5}, "config.data.validation"),
    "an adapter that is not there": ({"lora.init": "no/such-folder"}, "no/such-folder"),
    "more steps than a run has": (
        {"epochs": 2**31 - 1, "max_steps": 0},
        "config.epochs and max_steps",
    ),
    "an attention of other devices": ({"attention": "cudnn"}, "cudnn"),
    "a mesh of other sizes": ({"mesh.fsdp": 3}, "config.mesh"),
    "a mesh of no size": ({"mesh.data": 0}, "config.mesh"),
    "two open sizes of a mesh": ({"mesh.data": -1}, "config.mesh"),
    "no model": ({"model": ""}, "config.model"),
    "no data": ({"data.path": ""}, "config.data.path"),
    "a key that is none": ({"lora.rnak": 4}, "config.lora.rnak"),
    "a group that is a value": ({"lora": 4}, "lora"),
    "a text for a number": ({"batch_size": "many"}, "batch_size"),
    "a number for a truth": ({"data.packed": "maybe"}, "data.packed"),
    "a fraction for a count": ({"batch_size": 1.5}, "batch_size"),
    "a columns text that is none": ({"data.columns": "instruction"}, "config.data.columns"),
    "columns of a checkout": ({"data.columns": "input=a"}, "config.data.columns"),
    "a hub id that is not cached": ({"model": "no-such-org/model"}, "no-such-org/model"),
    "a hub data set that is not cached": ({"data.path": "no-such-org/rows"}, "no-such-org/rows"),
    "a file that is no model": ({"model": REPOSITORY / "README.md"}, "README.md"),
}
FLAGS = {
    "an unknown flag": (["--rnak=4"], "rnak"),
    "an argument without a flag": (["runs/r"], "runs/r"),
    "no workdir": (["--workdir="], "--workdir"),
    "a bucket as a workdir": (["--workdir=gs://bucket/run"], "gs://bucket/run"),
    "a workdir that cannot be made": (["--workdir=/proc/no-such-run"], "/proc/no-such-run"),
    "a config that is not there": (["--config=no-such.py"], "no-such.py"),
    "fewer than one row": (["--show=-1"], "--show"),
}
STUDY = {
    "no ranks": (["--config.ranks=()"], "config.ranks"),
    "a rank of 0": (["--config.ranks=(0,)"], "config.ranks"),
    "a rank that is a word": (["--config.ranks=('half',)"], "config.ranks"),
    "a rank twice": (["--config.ranks=(2,2)"], "config.ranks"),
    "a round below 0": (["--config.rounds=(-1,)"], "config.rounds"),
    "an unknown set": (["--config.sets=('T99',)"], "config.sets"),
    "a set that is a path": (["--config.sets=('../../T2',)"], "config.sets"),
    "a set that is a root": (["--config.sets=('/tmp/T2',)"], "config.sets"),
    "more cells than anybody has": (
        [f"--config.rounds={tuple(range(400))}", f"--config.ranks={tuple(range(1, 400))}"],
        "cells, expected at most 100,000",
    ),
    "a filter that is none": (["--only=__import__('os')"], "--only"),
    "a filter of nothing": (["--only=rank > 9999"], "--only"),
    "no workers": (["--launcher=slurm", "--workers=0"], "--workers"),
    "an option of two lines": (["--launcher=slurm", "--sbatch=--a\nrm -rf x"], "--launcher"),
    "an option that is none": (["--launcher=slurm", "--sbatch=rm"], "--sbatch"),
    "a folder of two lines": (["--launcher=slurm", "--workdir=a\n#SBATCH --x"], "--launcher"),
    "metrics without the official ones": (["--config.run.eval.metrics=('token_f1',)"], "metrics"),
    "a target that is none": (["--dry-run", "--target=abacus"], "abacus"),
}


def _outside(key: str) -> Iterator[object]:
    """Values of a key that are just not in its domain."""
    low, high, _ = DOMAINS[key]
    default = dict(flatten(RunConfig().to_dict()))[key]
    if isinstance(default, float):
        yield from ("nan", "inf", -1.0)
        return
    for value in (int(low) - 1, int(high) + 1, 10**30):
        yield f"({value},)" if isinstance(default, list) else value


def cases() -> Iterator[Case]:
    """The cases of this module."""
    for key in DOMAINS:
        for value in _outside(key):
            keys = {key: value}
            if key == "data.sizes":
                keys[key] = f"(1,2,{str(value).strip('(),')})"
            yield Case(
                f"{key} outside of its domain", str(value), "train.py",
                lambda g, f, keys=keys: g.train(f"--workdir={f}/r", **keys), (f"config.{key}",),
            )  # fmt: skip
    for key in CHOICES:
        yield Case(
            f"{key} that is no choice", "nonsense", "train.py",
            lambda g, f, key=key: g.train(f"--workdir={f}/r", **{key: "nonsense"}),
            (f"config.{key}: found 'nonsense'",),
        )  # fmt: skip
    for kind, (keys, word) in TOGETHER.items():
        yield Case(
            kind, "", "train.py",
            lambda g, f, keys=keys: g.train(f"--workdir={f}/r", **keys), (word,),
        )  # fmt: skip
    for kind, (flags, word) in FLAGS.items():
        yield Case(
            kind, "", "train.py",
            lambda g, f, flags=flags: g.train(f"--workdir={f}/r", *flags), (word,),
        )  # fmt: skip
    config = f"--config={REPOSITORY}/configs/study_smoke.py"
    for kind, (flags, word) in STUDY.items():
        yield Case(
            f"a study with {kind}", "", "study.py",
            lambda g, f, flags=flags: [config, f"--workdir={f}/s", *flags], (word,),
        )  # fmt: skip
