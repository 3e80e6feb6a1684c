"""Control tokens: what a template writes is a control token, what data holds is text.

A `</s>` in a text that somebody wrote must not end an answer. The built-in templates write no
control token, so all of their text is encoded with `split_special_tokens`. A chat template or a
Jinja file does, so the data's part of its text must be known: its strings are rendered a second
time between two noncharacters, which the template copies.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import tokenizers

from jax_lora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Noncharacters of Unicode, which no text holds.
_DATA, _ANSWER, _END = "\ufdd0", "\ufdd1", "\ufdd2"
_ROLES = ("system", "user", "assistant")
Mark = Callable[[str, str], str]  # (role or field, text) -> the text that is rendered


class Span(NamedTuple):
    """Characters `start` to `stop` of a text; `is_answer`: they are an assistant's."""

    start: int
    stop: int
    is_answer: bool


def rendered(render: Callable[[Mark], str]) -> str:
    """The text of `render`, which calls its argument for each string of the data."""
    return render(lambda _, text: text)


def locate(render: Callable[[Mark], str]) -> list[Span]:
    """Where in the text of `render` the strings of the data are.

    Templates may remove the white space around them, some of them in certain roles alone.

    Raises:
      DataError: the template changes them in another way.
    """
    plain = rendered(render)
    for stripped in ((), _ROLES, ("assistant",), ("system", "user")):

        def mark(role: str, text: str, stripped: Sequence[str] = stripped) -> str:
            start = _ANSWER if role == "assistant" else _DATA
            return f"{start}{text.strip() if role in stripped else text}{_END}"

        spans, text = [], ""
        for piece in _pieces(render(mark)):
            if piece[:1] in (_DATA, _ANSWER):
                spans.append(Span(len(text), len(text) + len(piece) - 1, piece[0] == _ANSWER))
                piece = piece[1:]
            text += piece
        if text == plain:
            return spans
    raise DataError("the template changes the text of its messages, expected it to copy them")


def _pieces(text: str) -> Iterator[str]:
    """The text cut at the marks: data begins with its mark, the template's own text with none."""
    for part in text.split(_END):
        starts = [i for i in (part.find(_DATA), part.find(_ANSWER)) if i >= 0]
        start = min(starts, default=len(part))
        yield part[:start]
        yield part[start:]


@functools.lru_cache(maxsize=8)
def special_tokens(tokenizer: PreTrainedTokenizerFast) -> frozenset[str]:
    """The texts that the tokenizer reads as control tokens."""
    added = tokenizer.added_tokens_decoder.values()
    return frozenset(token.content for token in added if token.special and token.content)


def encode(
    tokenizer: PreTrainedTokenizerFast, text: str, data: Sequence[Span] = ()
) -> tokenizers.Encoding:
    """Encode a rendered text, without adding BOS or EOS.

    Args:
      tokenizer: of the model.
      text: of a template that may write control tokens.
      data: where the text is the data's; needed where that holds the text of a control token.
    """
    names = special_tokens(tokenizer)
    if not any(name in text[span.start : span.stop] for span in data for name in names):
        encodings = tokenizer(text, add_special_tokens=False, split_special_tokens=False).encodings
        assert encodings  # of every tokenizer that has a Rust backend
        return encodings[0]
    backend, private = _private_names(tokenizer)
    pieces, end = [], 0
    for span in (*data, Span(len(text), len(text), False)):
        piece = text[end : span.start]
        for name in sorted(private, key=len, reverse=True):
            piece = piece.replace(name, private[name])
        pieces += [piece, text[span.start : span.stop]]
        end = span.stop
    return backend.encode("".join(pieces), add_special_tokens=False)


@functools.lru_cache(maxsize=8)
def _private_names(
    tokenizer: PreTrainedTokenizerFast,
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The tokenizer with other texts for its control tokens, each as long as its own, so that
    positions in a text stay; and these texts by token."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    private: dict[str, str] = {}
    for i, token in enumerate(state["added_tokens"]):
        if token["special"]:
            content = token["content"]
            # Private use, the first character its own.
            private[content] = chr(0xF0000 + i) + "\ue000" * (len(content) - 1)
            token["content"] = private[content]
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {private.get(k, k): v for k, v in model["vocab"].items()}
    else:  # Unigram's pairs of a piece and its score
        model["vocab"] = [[private.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in private:
        model["unk_token"] = private[model["unk_token"]]
    return tokenizers.Tokenizer.from_str(json.dumps(state)), private


def with_bos(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[int]:
    """`ids` with one BOS before them, where the tokenizer puts one before any text and the
    template has not written it already."""
    bos = token_id(tokenizer, "bos")
    if bos is None or list(ids[:1]) == [bos] or not _adds_bos(tokenizer):
        return list(ids)
    return [bos, *ids]


def token_id(tokenizer: PreTrainedTokenizerFast, name: str) -> int | None:
    """The id of "bos" or "eos", which transformers' own annotations leave open."""
    return getattr(tokenizer, f"{name}_token_id")


@functools.lru_cache(maxsize=8)
def _adds_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    return tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
