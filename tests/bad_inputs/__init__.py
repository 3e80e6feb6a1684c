"""Inputs that must be refused: a table of kinds, each with its variants.

A case writes what is wrong into a folder of its own and gives the arguments of a script. The script
must end with exit code 2 and one line that holds `words`, and leave the workdir as it was.
`test_bad_inputs.py` runs all of them; `reliability.py` measures time and memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_lora.data.toy import write_checkout
from jax_lora.weights import gguf, hf, peft
from jax_lora.weights.tokenizers import load_tokenizer
from tests.scripts import REPOSITORY
from tests.weights import builders


class Ground:
    """Good inputs, from which the cases make bad ones.

    Attributes:
      gguf: a tiny model; hf: the same as a Hugging Face folder.
      adapter: a PEFT folder that fits it.
      toy: a checkout of toy tasks; rows: a JSONL file.
      run: the folder of a run that trained, and was scored on one set.
    """

    def __init__(self, folder: Path):
        self.folder, self.gguf, self.hf = folder, folder / "tiny.gguf", folder / "hf"
        folder.mkdir(exist_ok=True)
        self.vocabulary = builders.tiny_bpe("gpt-2")
        weights = builders.hf_weights(len(self.vocabulary["tokens"]))
        self.weights = {k: v if v.ndim == 1 else 0.1 * v for k, v in weights.items()}
        builders.write_gguf(self.gguf, self.weights, tokenizer=self.vocabulary)
        model = gguf.load(self.gguf, "float32", put=lambda _, array: array)  # starts no device
        hf.save(self.hf, *model, load_tokenizer(self.gguf), "float32")
        rng = np.random.default_rng(0)
        leaf = {
            "a": rng.normal(size=(2, 64, 4)).astype(np.float32),
            "b": rng.normal(size=(2, 4, 64)).astype(np.float32),
            "scale": np.full(2, 2.0, np.float32),
        }
        self.adapter = folder / "adapter"
        peft.save(self.adapter, {"layers": {"self_attn": {"q_proj": leaf}}}, rank=4, alpha=8)
        self.toy = write_checkout(folder / "toy", instances_per_task=12)
        self.rows = folder / "rows.jsonl"
        row = {"instruction": "Say it.", "input": "a", "output": "b", "id": "1"}
        self.rows.write_text("".join(json.dumps(row | {"id": str(i)}) + "\n" for i in range(4)))
        self.run = folder / "run"

    def train(self, *more: str, **keys: object) -> list[str]:
        """Arguments of train.py, whose workdir is the last one."""
        given: dict[str, object] = {
            "model": self.gguf, "data.path": self.toy, "dtype": "float32", "max_steps": 2,
            "batch_size": 2, "optim.warmup_steps": 1, "data.test_per_task": 2,
            "data.train_per_task": 4, "data.buckets": "(384,)", "data.source_length": 320,
            "eval.buckets": "(384,)", "eval.max_new_tokens": 3, "tracker": "none",
        }  # fmt: skip
        flags = [f"--config.{key}={value}" for key, value in (given | keys).items()]
        return [f"--config={REPOSITORY}/configs/lora.py:rank=2", *flags, *more]


class Case(NamedTuple):
    """One bad input.

    Attributes:
      kind, variant: what is wrong.
      script: that is given it.
      make: (ground, folder) → the script's arguments; what it writes lies in the folder.
      words: of the line; "{folder}" is the case's folder.
    """

    kind: str
    variant: str
    script: str
    make: Callable[[Ground, Path], list[str]]
    words: tuple[str, ...]


def copy(source: Path, folder: Path) -> Path:
    """A file or folder, copied into the case's folder."""
    target = folder / source.name
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)
    return target


def edit_json(path: Path, **changes: Any) -> None:
    """Replace keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cases() -> Iterator[Case]:
    """All of them."""
    from tests.bad_inputs import adapters, configs, data, models, runs

    for module in (configs, models, adapters, data, runs):
        yield from module.cases()
