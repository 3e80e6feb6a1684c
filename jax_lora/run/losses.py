"""The losses of a run's model per token: of references under their prompts, and of a text.

Each loss is that of predicting a token from those before it, without dropout, in the arithmetic of
the run's dtype, the logits in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from jax.sharding import Mesh
from jaxtyping import PyTree

from jax_lora import sharding
from jax_lora.config import MeshSizes, RunConfig
from jax_lora.data import control_tokens
from jax_lora.data.example import Example
from jax_lora.data.packing import bucket_for
from jax_lora.data.prompts import Encoder, Row
from jax_lora.data.tasksets import TaskSet
from jax_lora.errors import DataError
from jax_lora.model.transformer import Llama
from jax_lora.model.xla_cpu import bitcast_bf16
from jax_lora.run import inputs, scoring


@dataclass(frozen=True)
class Losses:
    """One model of a run, on this process's devices as long as this object lives.

    Attributes:
      config: of the run.
      model: gives the forward pass.
      variables: {"params": base, "lora": adapters}.
      mesh: of the devices; None where there is one.
    """

    config: RunConfig
    model: Llama
    variables: PyTree
    mesh: Mesh | None

    def references(self, taskset: TaskSet, per_task: int = 0) -> pd.DataFrame:
        """The losses of the examples' first references, their end tokens included.

        Args:
          taskset: such as those of `inputs.examples`.
          per_task: the first so many examples of each task; 0: all.

        Returns:
          One row per example: task, id; loss, the mean per token in nats; tokens of the loss.
          Examples that do not fit with their whole reference are left out, with a warning.
        """
        encoder = inputs.encoder(self.config)
        chosen = TaskSet(taskset.name, taskset.tasks, lambda: _first(taskset, per_task))
        found = inputs.fitting(encoder.training_row, chosen, strict=False)
        answers = [np.flatnonzero(_reference_mask(row)[1:]) for _, row in found]
        losses = self._of_rows([row.ids for _, row in found], answers)
        return pd.DataFrame(
            {
                "task": [example.task for example, _ in found],
                "id": [example.id for example, _ in found],
                "loss": [of_row.mean(dtype=float) for of_row in losses],
                "tokens": [len(of_row) for of_row in losses],
            }
        )

    def text(self, text: str) -> float:
        """The mean loss per token of a text, in nats.

        The text is cut into windows of the longest row, see `windows`; the first token of a window
        is not predicted.

        Raises:
          DataError: a text of fewer than two tokens.
        """
        rows = windows(text, inputs.encoder(self.config), max(self.config.data.buckets))
        every = [np.arange(len(row) - 1) for row in rows]
        return float(np.concatenate(self._of_rows(rows, every)).mean(dtype=float))

    def _of_rows(
        self, rows: Sequence[np.ndarray], chosen: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """For each row of ids the losses of the chosen predictions: t predicts id t + 1."""
        found: list[np.ndarray] = [np.empty(0)] * len(rows)
        # The product with the vocabulary is of the chosen positions alone, in few shapes.
        width = -(-max(map(len, chosen), default=0) // 32) * 32
        for members, tokens in self._batches(rows):
            positions = np.zeros((len(tokens), width), np.int32)
            for row, i in zip(positions, members, strict=False):
                row[: len(chosen[i])] = chosen[i]
            put = sharding.shard_batch((tokens, positions), self.mesh)
            losses = np.asarray(_token_losses(self.model, self.variables, *put))
            for i, row in zip(members, losses, strict=False):
                found[i] = row[: len(chosen[i])]
        return found

    def _batches(self, rows: Sequence[np.ndarray]) -> Iterator[tuple[list[int], np.ndarray]]:
        """Which rows, and their ids padded to a bucket; one shape per bucket."""
        groups = sharding.row_groups(self.mesh)
        longest = inputs.encoder(self.config).row_length  # of test rows
        buckets = (*self.config.eval.buckets, *self.config.data.buckets, longest)
        by_bucket: dict[int, list[int]] = {}
        for i, ids in enumerate(rows):
            by_bucket.setdefault(bucket_for(len(ids), buckets), []).append(i)
        for bucket, members in sorted(by_bucket.items()):
            size = groups * max(1, self.config.micro_tokens // bucket)
            for start in range(0, len(members), size):
                chosen = members[start : start + size]
                tokens = np.zeros((size, bucket), np.int32)
                for row, i in zip(tokens, chosen, strict=False):
                    row[: len(rows[i])] = rows[i]
                yield chosen, tokens


def _reference_mask(row: Row) -> np.ndarray:
    mask = row.loss_mask(answer_only=True)
    mask[: row.prompt_length] = False  # earlier answers of a conversation are in the prompt
    return mask


def load(workdir: Path, config: RunConfig, adapter: str, checkpoint: str = "last") -> Losses:
    """The model of a run; for the arguments see `scoring.load`."""
    scored = scoring.load(workdir, config, adapter, None, checkpoint)
    devices = jax.local_devices()
    mesh = sharding.make_mesh(MeshSizes(fsdp=-1), devices) if len(devices) > 1 else None
    model = Llama(scored.shape, dtype=jnp.dtype(config.dtype), platform=jax.default_backend())
    return Losses(config, model, sharding.shard(scored.variables, mesh), mesh)


def windows(text: str, encoder: Encoder, length: int) -> list[np.ndarray]:
    """A text as rows of ids, each with the start token where the tokenizer puts one before a text.

    Args:
      text: any.
      encoder: with the tokenizer.
      length: most ids of a row; a last one of a single token of the text is left out.

    Raises:
      DataError: a text of fewer than two tokens.
    """
    tokenizer = encoder.tokenizer
    ids = tokenizer(text, split_special_tokens=True, add_special_tokens=False).input_ids
    start = control_tokens.with_bos(tokenizer, [])
    size = length - len(start)
    parts = [ids[i : i + size] for i in range(0, len(ids), size)]
    rows = [np.asarray([*start, *part], np.int32) for part in parts if len(part) > 1]
    if not rows:
        raise DataError(f"text: found {text!r:.60}, expected one of at least two tokens")
    return rows


def _first(taskset: TaskSet, per_task: int) -> tuple[Example, ...]:
    """The first examples of each task, all for 0."""
    count: dict[str, int] = {}
    chosen = []
    for example in taskset.examples:
        count[example.task] = count.get(example.task, 0) + 1
        if not per_task or count[example.task] <= per_task:
            chosen.append(example)
    return tuple(chosen)


@functools.partial(jax.jit, static_argnames="model")
def _token_losses(
    model: Llama, variables: PyTree, tokens: jax.Array, positions: jax.Array
) -> jax.Array:
    """The loss (B, N) of predicting the token after each of (B, N) positions of rows (B, T).

    The logits of one row exist at a time.
    """
    params = bitcast_bf16(variables["params"], model.platform)
    hidden = model.apply({**variables, "params": params}, tokens, method="hidden")

    def of_row(row: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        states, ids, at = row
        logits = model.apply(variables, states[at][None], method="head")[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[at + 1])

    return jax.lax.map(of_row, (hidden, tokens, positions))
