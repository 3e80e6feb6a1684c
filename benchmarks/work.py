"""What is measured: sizes, random batches, the real task mix, and the operations of a step."""

from __future__ import annotations

import random
import tempfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from jax_lora.config import RunConfig
from jax_lora.data.loader import MicroBatch

LEARNING_RATE = 1e-4  # of both sides
REPOSITORY = Path(__file__).resolve().parents[1]
SLICE = REPOSITORY.parent / "shared" / "data" / "niv2-slice"
GGUF = REPOSITORY / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
NAMES = {"smollm2": "smollm2-135m", "7b": "llama-7b", "8b": "llama-3-8b"}
FULL = {"method": "full", "trainable": (r"params/.*",), "frozen": ()}
DEFAULTS = {"dtype": "float32", "remat": "none", "lora.dropout": 0.0, "loss_chunk": 256}


@dataclass(frozen=True)
class Case:
    """A training step of ours or of a peer; from `case`.

    Attributes:
      config: of the run: rank, dtype, remat and dropout are of both sides, the rest is of ours.
      size: "tiny", or among `NAMES`.
      rows, length: of the batch, no padding.
      loss: on "all" tokens, or on the last eighth of each row, its "answer".
      layers: in place of the size's own number; 0 keeps it.
    """

    config: RunConfig
    size: str
    rows: int
    length: int
    loss: str
    layers: int

    @property
    def rank(self) -> int | None:
        """Of the adapters; None in full fine-tuning."""
        return self.config.lora.rank if self.config.method == "lora" else None

    @property
    def shape(self) -> Any:
        """The model's shape, a `LlamaConfig`."""
        from jax_lora.model.config import LlamaConfig
        from jax_lora.model.families import CONFIGS

        if self.size == "tiny":
            found = LlamaConfig(512, 64, 128, 2, 4, 2, 16, tie_word_embeddings=True)
        else:
            found = CONFIGS[NAMES[self.size]]
        return replace(found, num_hidden_layers=self.layers or found.num_hidden_layers)

    @property
    def tokens(self) -> int:
        """Of a batch."""
        return self.rows * self.length

    def planned(self, platform: str) -> Any:
        """The step on one device, a `PlannedStep`."""
        from jax_lora.planning.steps import planned

        config = self.config.replace(batch_size=self.rows)
        share = float(np.mean(batch(self).loss_weights))
        return planned(config, self.shape, platform, 1, self.rows, self.length, share)

    def changed(self, axis: str, value: int) -> Case:
        """Another rank, or another number of rows, tokens per row or layers."""
        if axis == "rank":
            return replace(self, config=self.config.replace(**{"lora.rank": value}))
        return replace(self, **{axis: value})

    def record(self) -> dict[str, Any]:
        """What it is, as columns of a table of results."""
        found = {"size": self.size, "rank": self.rank, "rows": self.rows, "length": self.length}
        found |= {"loss": self.loss, "layers": self.layers}
        found |= {key: getattr(self.config, key) for key in ("dtype", "remat")}
        if self.rank is not None:
            targets = (name.removesuffix("_proj") for name in self.config.lora.targets)
            found |= {"targets": " ".join(targets), "dropout": self.config.lora.dropout}
        keys = ("attention", "unroll", "loss_chunk")
        return found | {key: getattr(self.config, key) for key in keys}


def case(
    size: str = "tiny",
    rank: int | None = 8,
    rows: int = 8,
    length: int = 128,
    loss: str = "all",
    layers: int = 0,
    **keys: Any,
) -> Case:
    """A case with LoRA of a rank, or fully fine-tuned with rank None.

    `keys` are of `RunConfig`; the defaults that differ from its own are those of `DEFAULTS`.
    """
    changes: dict[str, Any] = FULL if rank is None else {"lora.rank": rank}
    return Case(RunConfig().replace(**DEFAULTS | changes | keys), size, rows, length, loss, layers)


def batch(case: Case, seed: int = 0) -> MicroBatch:
    """A micro-batch of random tokens, numpy arrays, which is the whole global batch."""
    shape = (case.rows, case.length)
    tokens = np.random.default_rng(seed).integers(0, case.shape.vocab_size, shape, np.int32)
    weights = np.zeros(shape, np.float32)
    weights[:, 1 if case.loss == "all" else -max(1, case.length // 8) :] = 1
    segment_ids = np.broadcast_to(np.arange(case.rows, dtype=np.int32)[:, None], shape)
    return MicroBatch(tokens, weights, np.ascontiguousarray(segment_ids))


# ------------------------------------------------------------------ real tasks


class Words:
    """A stand-in for a tokenizer: every word is one token. It suffices to measure speed."""

    eos_token_id = 0

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary

    def __call__(self, text: str, **_: bool) -> Any:
        words = text.replace("\n", " \n ").split(" ")
        ids = [1 + zlib.crc32(word.encode()) % (self.vocabulary - 1) for word in words if word]
        return SimpleNamespace(input_ids=ids)


def task_rows(case: Case, count: int) -> tuple[list[Any], str]:
    """`count` training rows of the task mix, drawn at random, and where they come from.

    Tasks are those of ../shared/data/niv2-slice, tokens SmolLM2's; toy tasks where the slice is
    missing or the model tiny, words where the GGUF file is (`make base`).
    """
    from jax_lora.data.instructions import read_checkout
    from jax_lora.data.prompts import Encoder
    from jax_lora.data.tasksets import draw
    from jax_lora.data.toy import write_checkout

    real = case.size != "tiny" and SLICE.is_dir()
    tokenizer: Any = Words(case.shape.vocab_size)
    if case.size != "tiny" and GGUF.is_file():
        from jax_lora.weights.tokenizers import load_tokenizer

        tokenizer = load_tokenizer(GGUF)
    encoder = Encoder(tokenizer, "alpaca", 320, 64)  # lengths: those of configs/smollm2.py
    with tempfile.TemporaryDirectory() as folder:
        checkout = read_checkout(SLICE if real else write_checkout(folder))
        trained = len(checkout.train)
        sets = draw(checkout, 0, sizes=(trained - 2, trained - 1, trained))
        examples = list(sets["Tall"].examples)
    random.Random(0).shuffle(examples)
    source = f"{'Natural Instructions slice' if real else 'toy tasks'}, {trained} tasks"
    rows = [encoder.training_row(example) for example in examples[:count]]
    return rows, f"{source}, {'words' if isinstance(tokenizer, Words) else 'SmolLM2 tokens'}"


def made_up_rows(case: Case, count: int) -> list[Any]:
    """Rows of random lengths up to 384, log-normal about 190 as the slice's, and random tokens."""
    from jax_lora.data.prompts import Row

    dice = np.random.default_rng(0)
    lengths = np.clip(dice.lognormal(5.25, 0.45, count).astype(int), 16, 384)
    return [
        Row(dice.integers(1, case.shape.vocab_size, n, np.int32), n - n // 8, "", False)
        for n in lengths
    ]


# ------------------------------------------------------------------ operations


def operations(case: Case) -> tuple[float, float]:
    """Multiplications and additions of matrix products per token: what the step is worth (forward
    and backward), and what it computes, all that is recomputed included."""
    from jax_lora.planning.operations import operations as count

    parts = count(case.planned(_platform(case))).values()
    return sum(p.forward + p.backward for p in parts), sum(p.total for p in parts)


def planned_bytes(case: Case) -> int:
    """The peak of device memory that plan.py gives for the step on a card."""
    from jax_lora.planning.memory import memory

    return memory(case.planned(_platform(case))).peak


def _platform(case: Case) -> str:
    return "tpu" if case.config.attention == "flash" else "cuda"
