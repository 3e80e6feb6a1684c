"""What a run validates on."""

from __future__ import annotations

from jax_lora.config import RunConfig
from jax_lora.data.example import Example
from jax_lora.data.instructions import Checkout
from jax_lora.data.loader import Batches
from jax_lora.data.prompts import Encoder, Row
from jax_lora.data.tasksets import TaskSet, validation_set
from jax_lora.errors import ConfigError, DataError
from jax_lora.run import inputs
from jax_lora.training.validation import ValidationData

AT_ONCE = 1024  # examples that are sorted by length together and put into micro-batches


def examples(config: RunConfig) -> TaskSet | None:
    """The set that a run validates on, None where there is none.

    Raises:
      ConfigError: `data.validation_per_task` of data that is not Natural Instructions.
    """
    data, count = inputs.data(config), config.data.validation_per_task
    if not isinstance(data, Checkout):
        if count:
            raise ConfigError(
                f"config.data.validation_per_task: found {count} with data of one's own, expected "
                "validation_path, or a share such as validation=0.02"
            )
        return inputs.examples(config).get("validation")
    if not count:
        return None
    sets = inputs.examples(config)
    return validation_set(data, config.round, sets["train"], sets["seen"], count)


def read(config: RunConfig, encoder: Encoder, row_groups: int = 1) -> ValidationData | None:
    """The rows that a run validates on, each on its first accepted answer.

    Args:
      config: of the run.
      encoder: of the run.
      row_groups: as for `Batches`.

    Returns:
      None where there is no validation set.

    Raises:
      ConfigError: see `examples`; or none where `validate_every` is set.
      DataError: a set without an example.
    """
    taskset = examples(config)
    if taskset is None:
        if config.validate_every:
            raise ConfigError(
                f"config.validate_every: found {config.validate_every} and no validation data; "
                "expected data.validation_per_task of Natural Instructions, else "
                "data.validation_path, or a share such as data.validation=0.02"
            )
        return None
    found = inputs.fitting(encoder.training_row, taskset, inputs.is_strict(config))
    if not found:
        raise DataError(f"{config.data.path}: found no example to validate on, expected some")
    rows = [row for _, row in found]
    answer_bytes = sum(_answer_bytes(example, encoder) for example, _ in found)
    return ValidationData(_batches(config, rows, row_groups), answer_bytes)


def _batches(config: RunConfig, rows: list[Row], row_groups: int) -> Batches:
    """As in training, but for the loss, which is on the answers with the same weight per token."""
    return Batches(
        rows,
        batch_size=min(len(rows), AT_ONCE),
        seed=0,
        buckets=config.data.buckets,
        micro_tokens=config.micro_tokens,
        answer_only=True,
        pad_id=0,
        packed=config.data.packed,
        row_groups=row_groups,
    )


def _answer_bytes(example: Example, encoder: Encoder) -> int:
    # Of a chat, all of the assistant's turns have a loss.
    answer = example.references[0]
    texts = [answer]
    if encoder.template == "chat":
        turns = example.conversation(answer)
        texts = [message.content for message in turns if message.role == "assistant"]
    return sum(len(text.encode(errors="surrogatepass")) for text in texts)
