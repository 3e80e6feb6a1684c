"""Examples as text, and text as token ids.

A template is a function of the whole example; those in `TEMPLATES` have their source in the
docstring. A Jinja file of one's own and the tokenizer's chat template (chat.py) do the same. A
training row is the very prompt ids that decoding will see, followed by the ids of the answer and
the end token: prompt and answer are encoded one by one, so no token spans their boundary.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jax_lora.data import control_tokens
from jax_lora.data.chat import Chat
from jax_lora.data.control_tokens import Mark
from jax_lora.data.example import Example
from jax_lora.data.jinja_file import jinja_template, read_text
from jax_lora.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# ---------------------------------------------------------------- templates

_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA_BARE = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


def alpaca(example: Example) -> str:
    """The prompt of tloen/alpaca-lora (`templates/alpaca.json`); it has a form without input."""
    template = _ALPACA_INPUT if example.input else _ALPACA_BARE
    return template.format(instruction=example.instruction, input=example.input)


def tk(example: Example) -> str:
    """The definition-only encoding of yizhongw/Tk-Instruct (`src/ni_collator.py`)."""
    prompt = "Definition: " + _stopped(example.instruction.strip())
    prompt += "\n\nNow complete the following example -\n"
    return prompt + "Input: " + _stopped(example.input.strip()) + "\nOutput: "


def _stopped(text: str) -> str:
    return text if text and text[-1] in string.punctuation else text + "."


def plain(example: Example) -> str:
    """The instruction, a blank line and the input, as they are; the answer follows directly."""
    return "\n\n".join(filter(None, (example.instruction, example.input)))


Template = Callable[[Example], str]
TEMPLATES: dict[str, Template] = {"alpaca": alpaca, "tk": tk, "plain": plain}


# ---------------------------------------------------------------- token ids


class RowTooLong(ConfigError):
    """An example that does not fit into a row, even without its input."""


@dataclass(frozen=True)
class Row:
    """One example as ids.

    Attributes:
      ids: (T,) of the prompt, the answer and the end token, or of the prompt alone.
      prompt_length: `ids[:prompt_length]` is what decoding would start from.
      prompt: its text.
      truncated: the input was cut.
      answers: (T,) bool, the tokens that `answer_only` has losses of, where they are not all that
        follow the prompt: the assistant's in a conversation.
    """

    ids: np.ndarray
    prompt_length: int
    prompt: str
    truncated: bool
    answers: np.ndarray | None = None

    def loss_mask(self, answer_only: bool) -> np.ndarray:
        """(T,) bool, the tokens to predict: never the first one.

        Args:
          answer_only: the answers with their end tokens; otherwise the prompt too.
        """
        mask = np.ones(len(self.ids), bool)
        if answer_only:
            mask[: self.prompt_length] = False
            mask = mask if self.answers is None else self.answers.copy()
        mask[0] = False
        return mask


@dataclass(frozen=True)
class Encoder:
    """Turns examples into rows of ids.

    Attributes:
      tokenizer: a transformers tokenizer; BOS is prepended exactly when its own encoding does.
      template: name among `TEMPLATES`, "chat" (see chat.py) or the path of a Jinja file.
      source_length: most tokens of a prompt. What is longer loses the end of its input field,
        never the instruction, the response header or the answer.
      target_length: tokens set aside for the answer and its end token. A longer answer stays
        whole and takes its room from the input field.
      vocab_size: rows of the model's embedding table; None checks no ids.
      template_text: of the Jinja file when it was read; encoders that differ in it are different.

    Raises:
      ConfigError: no such template.
      DataError: a tokenizer without an end token, a file that is no template.
    """

    tokenizer: PreTrainedTokenizerFast
    template: str = "alpaca"
    source_length: int = 1024
    target_length: int = 128
    vocab_size: int | None = None
    template_text: str = dataclasses.field(default="", init=False, repr=False)

    def __post_init__(self):
        _ = self.eos_id
        if self.template == "chat":
            _ = self._chat  # checks that there is a template
        elif self.template not in TEMPLATES:
            if not Path(self.template).is_file():
                raise ConfigError(
                    f"config.data.template: found {self.template!r}, expected one of "
                    f"{', '.join(TEMPLATES)}, chat, or a Jinja file"
                )
            object.__setattr__(self, "template_text", read_text(Path(self.template)))
            _ = self._file  # checks it

    @property
    def row_length(self) -> int:
        """Most tokens of a training row."""
        return self.source_length + self.target_length

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """What ends an answer by training: the tokenizer's end token, or the chat template's."""
        ids = [self.eos_id, *([self._chat.end_id] if self._chat else [])]
        return tuple(dict.fromkeys(ids))

    @cached_property
    def eos_id(self) -> int:
        """The tokenizer's end token, which training teaches behind every answer."""
        found = control_tokens.token_id(self.tokenizer, "eos")
        if found is None:
            raise DataError("tokenizer: found no end-of-sequence token, expected one")
        return found

    def prompt_row(self, example: Example) -> Row:
        """The ids that decoding starts from.

        Raises:
          RowTooLong: a prompt that exceeds `source_length` without its input.
          DataError: an id of `vocab_size` or more, or a conversation that the template refuses.
        """
        cut, prompt, ids = self._fit(example, lambda _, ids: len(ids) <= self.source_length)
        row = Row(np.asarray(ids, np.int32), len(ids), prompt, cut is not example)
        self._check_ids(example, row.ids)
        return row

    def training_row(self, example: Example, answer: str | None = None) -> Row:
        """Prompt, answer (by default the first reference) and the end token.

        Raises:
          RowTooLong: prompt and answer that do not fit in a row even without an input.
          DataError: as `prompt_row`; or a conversation without a token in the loss.
        """
        answer = example.references[0] if answer is None else answer
        chat = self._chat
        end = [] if chat else self._answer_ids(answer)

        ids: list[int] = []
        answers: np.ndarray | None = None

        def fits(cut: Example, prompt: list[int]) -> bool:  # the last call is of what is returned
            nonlocal ids, answers
            ids, answers = chat.row(cut, answer) if chat else ([*prompt, *end], None)
            return len(prompt) <= self.source_length and len(ids) <= self.row_length

        cut, prompt, start = self._fit(example, fits, len(end))
        row = Row(np.asarray(ids, np.int32), len(start), prompt, cut is not example, answers)
        self._check_ids(example, row.ids)
        return row

    def decode(self, ids: Sequence[int]) -> str:
        """Text of newly generated ids: no special tokens, stripped."""
        return self._decode(ids, True).strip()

    def decode_all(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens included."""
        return self._decode(ids, False)

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        """The tokens of the vocabulary that are single bytes, as SentencePiece has them."""
        found = self.tokenizer.get_vocab()
        names = (f"<0x{byte:02X}>" for byte in range(256))
        return frozenset(found[name] for name in names if name in found)

    def _decode(self, ids: Sequence[int], skip: bool) -> str:
        # Versions of transformers differ in whether they remove spaces unless they are told.
        text = self.tokenizer.decode(
            ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    @cached_property
    def _chat(self) -> Chat | None:
        return Chat(self.tokenizer) if self.template == "chat" else None

    @cached_property
    def _file(self) -> Callable[[Example, Mark], str] | None:
        is_file = self.template != "chat" and self.template not in TEMPLATES
        return jinja_template(self.template_text, self.template) if is_file else None

    def _check_ids(self, example: Example, ids: np.ndarray) -> None:
        # A gather beyond the table gives NaN, not an error.
        if self.vocab_size is not None and ids.max() >= self.vocab_size:
            i = int(ids.max())
            token = self.tokenizer.convert_ids_to_tokens(i)
            raise DataError(
                f"{example.name}: token {token!r} has id {i}, expected below the "
                f"model's vocab_size {self.vocab_size}; the tokenizer is another model's"
            )

    def _answer_ids(self, answer: str) -> list[int]:
        # A sentencepiece tokenizer puts a space before the first word of any text. The answer
        # follows the newline of the response header, so it is encoded behind one, which is then
        # removed; for byte-level tokenizers this is the plain encoding.
        newline, ids = self._newline, self._text_ids("\n" + answer)
        if ids[: len(newline)] == newline:
            ids = ids[len(newline) :]
        else:  # the newline merged with the answer's own first characters
            ids = self._text_ids(answer)
        return [*ids, self.eos_id]

    @cached_property
    def _newline(self) -> list[int]:
        return self._text_ids("\n")

    def _text_ids(self, text: str) -> list[int]:
        tok = self.tokenizer
        return tok(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def _fit(
        self,
        example: Example,
        fits: Callable[[Example, list[int]], bool],
        answer_length: int | None = None,
    ) -> tuple[Example, str, list[int]]:
        """The example, its input as long as fits, with its prompt as text and as ids."""
        prompt, ids = self._encode(example)
        if fits(example, ids):
            return example, prompt, ids
        # The longest beginning of the input that fits, by bisection on its characters.
        shortest, too_long = 0, len(example.input)
        while too_long - shortest > 1:
            middle = (shortest + too_long) // 2
            cut = dataclasses.replace(example, input=example.input[:middle])
            if fits(cut, self._encode(cut)[1]):
                shortest = middle
            else:
                too_long = middle
        cut = dataclasses.replace(example, input=example.input[:shortest])
        prompt, ids = self._encode(cut)
        if not fits(cut, ids):
            raise RowTooLong(
                f"{example.name}: the prompt has {len(ids)} tokens without its input"
                + (f" and the answer {answer_length}" if answer_length else "")
                + f", expected at most {self.source_length}, and {self.row_length} with the "
                "answer; raise source_length or target_length in config.data"
            )
        return cut, prompt, ids

    def _encode(self, example: Example) -> tuple[str, list[int]]:
        """The prompt as text and as ids."""
        if self._chat:
            return self._chat.prompt(example)
        if self._file:
            return self._encode_file(self._file, example)
        if example.messages:
            raise ConfigError(
                f"config.data.template: found {self.template} and a conversation, "
                f"{example.name}; expected chat or a Jinja file"
            )
        prompt = TEMPLATES[self.template](example)
        ids = list(self.tokenizer(prompt, split_special_tokens=True).input_ids)
        # Tokenizers that close every text with EOS would end the prompt before its answer.
        return prompt, ids[:-1] if ids[-1:] == [self.eos_id] else ids

    def _encode_file(
        self, template: Callable[[Example, Mark], str], example: Example
    ) -> tuple[str, list[int]]:
        def render(mark: Mark) -> str:
            return template(example, mark)

        prompt, spans = control_tokens.rendered(render), []
        if any(name in prompt for name in control_tokens.special_tokens(self.tokenizer)):
            spans = control_tokens.locate(render)
        ids = control_tokens.encode(self.tokenizer, prompt, spans).ids
        return prompt, control_tokens.with_bos(self.tokenizer, ids)
