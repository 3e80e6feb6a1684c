"""Folders of runs and studies, and what eval.py, train.py and study.py are asked about them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.bad_inputs import Case, Ground, copy, edit_json
from tests.bad_inputs.models import TEXTS

ASKED = {
    "an unknown set": (["--sets=all"], "'all'"),
    "a set that is a path": (["--sets=../../x"], "'../../x'"),
    "an unknown checkpoint": (["--checkpoint=99"], "'99'"),
    "a checkpoint that is a path": (["--checkpoint=../2"], "'../2'"),
    "a best that nothing chose": (["--checkpoint=best"], "best, which no validation chose"),
    "an adapter that is not there": (["--adapter=no-such-folder"], "no-such-folder"),
    "a checkpoint of an adapter": (["--checkpoint=2", "--adapter=none"], "--checkpoint"),
    "an unknown metric": (["--metrics=bleu"], "bleu"),
    "no tokens": (["--max_new_tokens=0"], "max_new_tokens"),
    "devices that do not divide": (["--devices_per_copy=7"], "devices_per_copy"),
    "products of integers without any": (["--int8_products"], "config.eval.int8_products"),
    "an unknown flag": (["--set=seen"], "set"),
    "a config that a run has of its own": (["--config=configs/lora.py"], "--config"),
    "metrics that a check has none of": (["--check", "--metrics=exact_match"], "--metrics"),
    "baselines that no adapter changes": (["--baselines", "--max_new_tokens=2"], "max_new_tokens"),
    "tokens without end": ([f"--max_new_tokens={2**21}"], "config.eval.max_new_tokens"),
}


def _no_checkpoint(run: Path) -> None:
    for path in (run / "checkpoints").iterdir():
        path.rename(run / path.name)


def _older(run: Path) -> None:
    saved = json.loads((run / "config.json").read_text())
    del saved["base_digest"]
    (run / "config.json").write_text(json.dumps(saved))


def _config(key: str, value: object) -> Callable[[Path], None]:
    def apply(run: Path) -> None:
        saved = json.loads((run / "config.json").read_text())["config"]
        group, _, name = key.rpartition(".")
        (saved[group] if group else saved)[name] = value
        edit_json(run / "config.json", config=saved)

    return apply


FOLDERS = {
    "no config": (lambda r: (r / "config.json").unlink(), "config.json"),
    "no checkpoint": (_no_checkpoint, "no checkpoint"),
    "a config of an older version": (_older, "older version"),
    "a config that is a text": (lambda r: edit_json(r / "config.json", config="x"), "config.json"),
    "other data": (lambda r: edit_json(r / "config.json", data_fingerprint="x"), "fingerprint"),
    "another base": (lambda r: edit_json(r / "config.json", base_digest="x"), "base_digest"),
    "an unknown key": (_config("lora.rnak", 4), "config.lora.rnak"),
    "a rank that is a text": (_config("lora.rank", "x"), "config.lora.rank"),
    "a rank of 10^12": (_config("lora.rank", 10**12), "config.lora.rank"),
    "buckets of 10^12": (_config("eval.buckets", [10**12]), "config.eval.buckets"),
    "a model that is gone": (_config("model", "/no/such/model"), "/no/such/model"),
    "data that is gone": (_config("data.path", "/no/such/data"), "/no/such/data"),
}
STUDY_JSON = {
    "no config": {},
    "a config that is a list": {"config": []},
    "ranks that are a text": {"config": {"ranks": "x"}},
    "sets that are paths": {"config": {"sets": ["../../x"]}},
    "an unknown rank": {"config": {"ranks": [{}]}},
}


def _run(change: Callable[[Path], object]) -> Callable[[Ground, Path], list[str]]:
    def make(ground: Ground, folder: Path) -> list[str]:
        run = copy(ground.run, folder)
        change(run)
        return [f"--workdir={run}", "--sets=unseen"]

    return make


def cases() -> Iterator[Case]:
    """The cases of this module."""
    for kind, (flags, word) in ASKED.items():
        yield Case(
            f"eval.py is asked for {kind}", "", "eval.py",
            lambda g, f, flags=flags: [f"--workdir={g.run}", *flags], (word,),
        )  # fmt: skip
    for kind, (change, word) in FOLDERS.items():
        yield Case(f"a run with {kind}", "", "eval.py", _run(change), (word,))
    for variant, content in TEXTS.items():
        make = _run(lambda run, content=content: (run / "config.json").write_bytes(content))
        yield Case("config.json of a run as a text", variant, "eval.py", make, ("config.json",))
    yield Case(
        "a run of another rank", "", "train.py",
        lambda g, f: g.train(f"--workdir={g.run}", **{"lora.rank": 3}), ("config.lora.rank",),
    )  # fmt: skip
    for script in ("train.py", "study.py"):
        yield Case(
            "the status of no folder", script, script,
            lambda g, f: [f"--status={f}/none"], ("{folder}/none",),
        )  # fmt: skip
        name = "config.json" if script == "train.py" else "study.json"
        for variant, content in TEXTS.items():

            def make(g: Ground, f: Path, name=name, content=content) -> list[str]:
                (f / name).write_bytes(content)
                return [f"--status={f}"]

            yield Case(f"{name} of a status as a text", variant, script, make, (name,))
    for variant, saved in STUDY_JSON.items():

        def make(g: Ground, f: Path, saved=saved) -> list[str]:
            (f / "study.json").write_text(json.dumps(saved))
            return [f"--status={f}"]

        yield Case("study.json of other things", variant, "study.py", make, ())
