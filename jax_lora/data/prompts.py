"""Instructions as text, and text as token ids.

Two templates (sources in the docstrings): `alpaca`, of the code that the paper builds on, and
`tk`, of Tk-Instruct, both with the task definition alone. A training row is the very prompt ids
that decoding will see, followed by the ids of the answer and the end token: prompt and answer
are tokenised apart, so no token spans their boundary.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_lora.data.instructions import Example
from jax_lora.errors import ConfigError, DataError

_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA_BARE = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


def alpaca(definition: str, text: str) -> str:
    """The prompt of tloen/alpaca-lora (`templates/alpaca.json`); it has a form without input."""
    template = _ALPACA_INPUT if text else _ALPACA_BARE
    return template.format(instruction=definition, input=text)


def tk(definition: str, text: str) -> str:
    """The definition-only encoding of yizhongw/Tk-Instruct (`src/ni_collator.py`)."""
    prompt = "Definition: " + _stopped(definition.strip())
    prompt += "\n\nNow complete the following example -\n"
    return prompt + "Input: " + _stopped(text.strip()) + "\nOutput: "


def _stopped(text: str) -> str:
    return text if text and text[-1] in string.punctuation else text + "."


TEMPLATES: dict[str, Callable[[str, str], str]] = {"alpaca": alpaca, "tk": tk}


@dataclass(frozen=True)
class Row:
    """One example as ids. `ids[:prompt_length]` is the prompt; `truncated` inputs were cut."""

    ids: np.ndarray
    prompt_length: int
    prompt: str
    truncated: bool


@dataclass(frozen=True)
class Encoder:
    """Turns examples into rows of ids.

    Attributes:
      tokenizer: a transformers tokenizer; BOS is prepended exactly when its own encoding does.
      template: name among `TEMPLATES`.
      source_length: most tokens of a prompt. What is longer loses the end of its input field,
        never the definition, the response header or the answer.
      target_length: tokens set aside for the answer and its end token. A longer answer stays
        whole and takes its room from the input field.
      vocab_size: rows of the model's embedding table; None checks no ids.
    """

    tokenizer: Any
    template: str = "alpaca"
    source_length: int = 1024
    target_length: int = 128
    vocab_size: int | None = None

    def __post_init__(self):
        if self.template not in TEMPLATES:
            raise ConfigError(
                f"template: found {self.template!r}, expected one of {', '.join(TEMPLATES)}"
            )
        if self.tokenizer.eos_token_id is None:
            raise DataError("tokenizer: found no end-of-sequence token, expected one")

    @property
    def row_length(self) -> int:
        """Most tokens of a training row."""
        return self.source_length + self.target_length

    def prompt_row(self, example: Example) -> Row:
        """The ids that decoding starts from.

        Raises:
          ConfigError: a definition that alone exceeds `source_length`.
          DataError: an id of `vocab_size` or more.
        """
        row = self._fit(example, self.source_length)
        self._check_ids(example, row.ids)
        return row

    def training_row(self, example: Example, answer: str | None = None) -> Row:
        """Prompt, answer (by default the first reference) and the end token.

        Raises:
          ConfigError: definition and answer that do not fit in a row even without an input.
          DataError: an id of `vocab_size` or more.
        """
        answer_ids = self._answer_ids(example.references[0] if answer is None else answer)
        room = min(self.source_length, self.row_length - len(answer_ids))
        row = self._fit(example, room)
        ids = np.concatenate([row.ids, np.asarray(answer_ids, np.int32)])
        self._check_ids(example, ids)
        return Row(ids, row.prompt_length, row.prompt, row.truncated)

    def _check_ids(self, example: Example, ids: np.ndarray) -> None:
        # A gather beyond the table gives NaN, not an error.
        if self.vocab_size is not None and ids.max() >= self.vocab_size:
            i = int(ids.max())
            token = self.tokenizer.convert_ids_to_tokens(i)
            raise DataError(
                f"{example.task} {example.id}: token {token!r} has id {i}, expected below the "
                f"model's vocab_size {self.vocab_size}; the tokenizer is another model's"
            )

    def _answer_ids(self, answer: str) -> list[int]:
        tok = self.tokenizer
        # A sentencepiece tokenizer puts a space before the first word of any text. The answer
        # follows the newline of the response header, so it is encoded behind one, which is then
        # removed; for byte-level tokenizers this is the plain encoding.
        newline = tok("\n", add_special_tokens=False).input_ids
        ids = tok("\n" + answer, add_special_tokens=False).input_ids
        if ids[: len(newline)] == newline:
            ids = ids[len(newline) :]
        else:  # the newline merged with the answer's own first characters
            ids = tok(answer, add_special_tokens=False).input_ids
        return [*ids, tok.eos_token_id]

    def _fit(self, example: Example, room: int) -> Row:
        def encode(text: str) -> tuple[str, list[int]]:
            prompt = TEMPLATES[self.template](example.definition, text)
            return prompt, self._prompt_ids(prompt)

        prompt, ids = encode(example.input)
        if len(ids) <= room:
            return Row(np.asarray(ids, np.int32), len(ids), prompt, False)
        # The longest beginning of the input that fits, by bisection on its characters.
        fits, too_long = 0, len(example.input)
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if len(encode(example.input[:middle])[1]) <= room:
                fits = middle
            else:
                too_long = middle
        prompt, ids = encode(example.input[:fits])
        if len(ids) > room:
            raise ConfigError(
                f"{example.task} {example.id}: the prompt has {len(ids)} tokens without its "
                f"input, expected at most {room}; raise source_length"
            )
        return Row(np.asarray(ids, np.int32), len(ids), prompt, True)

    def _prompt_ids(self, prompt: str) -> list[int]:
        ids = list(self.tokenizer(prompt).input_ids)
        # Tokenizers that close every text with EOS would end the prompt before its answer.
        return ids[:-1] if ids[-1] == self.tokenizer.eos_token_id else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of newly generated ids: no special tokens, stripped."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()
