"""What a model is trained on, to be looked at before it trains."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator

from jax_lora.config import RunConfig
from jax_lora.data.prompts import Encoder, Row
from jax_lora.data.tasksets import TaskSet
from jax_lora.errors import ConfigError
from jax_lora.run import inputs


def samples(config: RunConfig, count: int) -> str:
    """Tokens, loss mask and lengths of training rows, spread evenly over the training set.

    Args:
      config: of the run.
      count: how many rows.

    Returns:
      Text: of each row its name and lengths, then its tokens as `id:token` in spans that are in
      the loss or not.

    Raises:
      ConfigError, DataError, OSError: as training would.
    """
    for key, value in (("model", config.model), ("data.path", config.data.path)):
        if not value:
            raise ConfigError(f"config.{key}: found none, expected a path or a hub id")
    if count < 1:
        raise ConfigError(f"--show: found {count}, expected at least 1")
    encoder, taskset = inputs.encoder(config), inputs.training_set(config)
    total = len(taskset.examples)
    lines = [f"{taskset.name}: {total} examples; template {config.data.template}"]
    chosen = TaskSet(taskset.name, taskset.tasks, lambda: taskset.examples[:: -(-total // count)])
    answer, strict = config.data.answer, inputs.is_strict(config)
    for example, row in inputs.training_rows(encoder, chosen, answer, config.seed, strict):
        mask = row.loss_mask(config.data.answer_only)
        note = ", input cut to fit" if row.truncated else ""
        lines.append(
            f"\n{example.name}: {len(row.ids)} tokens, {mask.sum()} in the loss; "
            f"a prompt of {row.prompt_length}{note}"
        )
        lines += _spans(encoder, row, config.data.answer_only)
    return "\n".join(lines)


def _spans(encoder: Encoder, row: Row, answer_only: bool) -> Iterator[str]:
    """The tokens, in spans of equal mask."""
    tokens = encoder.tokenizer.convert_ids_to_tokens(row.ids.tolist())
    shown = zip(row.loss_mask(answer_only).tolist(), row.ids.tolist(), tokens, strict=True)
    start = 0
    for in_loss, group in itertools.groupby(shown, lambda item: item[0]):
        words = [f"{i}:{token}" for _, i, token in group]
        label = "in the loss" if in_loss else "not in the loss"
        yield f"  [{start}, {start + len(words)}) {label}"
        yield textwrap.fill(
            " ".join(words), 100, initial_indent="    ", subsequent_indent="    ",
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
        start += len(words)
