"""Conversations through the tokenizer's own chat template, as transformers renders it.

Training is on a whole conversation, the loss with `answer_only` on the assistant's turns alone:
where the template marks them with `{% generation %}`, by its own mask, else on the text of each
and the control token that ends it. What decoding starts from has to be what a training row begins
with: templates of models that think are rendered with `enable_thinking=False`, as they are in
transformers, and one that still begins answers otherwise is refused for training.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import tokenizers

from jax_lora.data import control_tokens
from jax_lora.data.control_tokens import Mark, Span
from jax_lora.data.example import Example, Message
from jax_lora.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TURNS = [Message("user", "question"), Message("assistant", "answer")]  # to ask a template with


@dataclass(frozen=True)
class Chat:
    """The chat template of a tokenizer.

    Raises:
      ConfigError: the tokenizer has none.
    """

    tokenizer: PreTrainedTokenizerFast

    def __post_init__(self):
        if not self.tokenizer.chat_template:
            raise ConfigError(
                "config.data.template: found chat, but the model's tokenizer has no chat template; "
                "expected another template, or the instruct model's tokenizer"
            )

    def prompt(self, example: Example) -> tuple[str, list[int]]:
        """The text and ids up to the last answer: what decoding starts from.

        Raises:
          DataError: the template refuses the conversation.
        """
        text, encoding, _ = self._encode(example, example.conversation(), prompt=True)
        return text, control_tokens.with_bos(self.tokenizer, encoding.ids)

    def row(self, example: Example, answer: str) -> tuple[list[int], np.ndarray]:
        """The ids of the whole conversation, and a mask (T,) of those that the assistant says.

        Raises:
          DataError: the template refuses the conversation, or no token is the assistant's.
          ConfigError: the template begins answers otherwise when it generates.
        """
        _, encoding, answers = self._encode(example, example.conversation(answer))
        if self._begins_otherwise:
            raise ConfigError(
                "config.data.template: found chat, whose template writes before an answer what "
                "decoding does not start from, or the reverse; expected a Jinja file, docs/data.md"
            )
        mask = np.zeros(len(encoding.ids), bool)
        starts, stops = np.asarray(encoding.offsets).T
        for start, stop, _ in answers:
            found = np.flatnonzero((starts < stop) & (stops > start))
            if len(found):
                mask[found[0] : found[-1] + 1] = True
        if not mask.any():
            raise DataError(
                f"{example.name}: the chat template leaves no token of the assistant's in the "
                "loss, expected at least one"
            )
        ids = control_tokens.with_bos(self.tokenizer, encoding.ids)
        mask = np.concatenate([np.zeros(len(ids) - len(mask), bool), mask])
        if self._end_token is None and not self._has_mask:
            ids, mask = [*ids, self.end_id], np.append(mask, True)
        return ids, mask

    @cached_property
    def end_id(self) -> int:
        """The id that ends an assistant's turn, else the tokenizer's end token."""
        token = self._end_token
        found = control_tokens.token_id(self.tokenizer, "eos")
        if token is not None:
            found = self.tokenizer.convert_tokens_to_ids(token)
        assert isinstance(found, int)
        return found

    @cached_property
    def _has_mask(self) -> bool:
        template = self.tokenizer.chat_template
        return isinstance(template, str) and bool(_GENERATION.search(template))

    @cached_property
    def _end_token(self) -> str | None:
        """The control token that the template writes behind an assistant's turn, if any."""
        import jinja2

        def render(mark: Mark) -> str:
            return self._render([Message(role, mark(role, text)) for role, text in _TURNS], False)

        try:
            text, spans = control_tokens.rendered(render), control_tokens.locate(render)
        except (DataError, jinja2.TemplateError):  # said of the first conversation, by its name
            return None
        found = [self._end.match(text, span.stop) for span in spans if span.is_answer]
        return found[0].group().strip() if found and found[0] else None

    @cached_property
    def _begins_otherwise(self) -> bool:
        """Whether the prompt that decoding starts from is not how the template writes a turn."""
        import jinja2

        try:
            prompt, turns = self._render(_TURNS[:1], True), self._render(_TURNS, False)
        except jinja2.TemplateError:  # said of the first conversation, by its name
            return False
        answer = turns[len(prompt) :].lstrip()
        return not (turns.startswith(prompt) and answer.startswith(_TURNS[1].content))

    @cached_property
    def _end(self) -> re.Pattern[str]:
        names = sorted(control_tokens.special_tokens(self.tokenizer), key=len, reverse=True)
        return re.compile(r"\s*(?:" + "|".join(map(re.escape, names)) + ")" if names else r"(?!)")

    def _render(self, messages: Sequence[Message], prompt: bool) -> str:
        text = self.tokenizer.apply_chat_template(
            [message._asdict() for message in messages],
            tokenize=False,
            add_generation_prompt=prompt,
            enable_thinking=False,
        )
        assert isinstance(text, str)
        return text

    def _encode(
        self, example: Example, messages: Sequence[Message], prompt: bool = False
    ) -> tuple[str, tokenizers.Encoding, list[Span]]:
        """The text, its tokens, and where the assistant's turns are."""
        import jinja2

        def render(mark: Mark) -> str:
            return self._render([Message(r, mark(r, text)) for r, text in messages], prompt)

        try:
            text = control_tokens.rendered(render)
            names = control_tokens.special_tokens(self.tokenizer)
            has_names = any(name in content for _, content in messages for name in names)
            spans = []
            if has_names or not (prompt or self._has_mask):
                spans = control_tokens.locate(render)
            answers = []
            if not prompt:
                answers = self._masked(messages) if self._has_mask else self._ended(text, spans)
        except jinja2.TemplateError as error:
            raise DataError(f"{example.name}: refused by the chat template: {error}") from None
        except DataError as error:
            raise DataError(f"{example.name}: {error}") from None
        return text, control_tokens.encode(self.tokenizer, text, spans), answers

    def _masked(self, messages: Sequence[Message]) -> list[Span]:
        """The template's own `{% generation %}` blocks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self.tokenizer.chat_template
        assert isinstance(template, str)
        render: Callable = render_jinja_template  # its annotations are not what it takes
        _, found = render(
            conversations=[[message._asdict() for message in messages]],
            chat_template=template,
            return_assistant_tokens_mask=True,
            enable_thinking=False,
            **self.tokenizer.special_tokens_map,
        )
        return [Span(start, stop, True) for start, stop in found[0]]

    def _ended(self, text: str, spans: Sequence[Span]) -> list[Span]:
        """The assistant's texts, each with the control token that ends it."""
        answers = []
        for span in spans:
            if span.is_answer:
                end = self._end.match(text, span.stop)
                answers.append(Span(span.start, end.end() if end else span.stop, True))
        return answers


def taught_end_ids(tokenizer: PreTrainedTokenizerFast, template: str | None) -> tuple[int, ...]:
    """What ends an answer besides the base's own end ids, after training.

    Args:
      tokenizer: of the model.
      template: `data.template` of the run; None where it is not known.
    """
    is_chat = template == "chat" and tokenizer.chat_template
    return (Chat(tokenizer).end_id,) if is_chat else ()
