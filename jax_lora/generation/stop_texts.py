"""Texts that end an answer, such as "\\n\\n": an answer is cut behind the token that completes one.

The rule is that of transformers' `stop_strings`: the text may begin in the prompt and end anywhere
in the last token, and it stays in the answer. Greedy answers do not depend on when they are
stopped, so the host looks at them now and then while they are generated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

Ids = Sequence[int] | np.ndarray
Decode = Callable[[list[int]], str]
Stop = Callable[[Ids, Ids], int | None]  # a prompt and its answer so far; see `stop_length`


def stop_rule(texts: Sequence[str], decode: Decode) -> Stop | None:
    """`stop_length` of these texts, for `scheduler.answers`; None where there are none."""
    return partial(stop_length, texts=texts, decode=decode) if texts else None


def ends(prompt: Ids, answer: Ids, texts: Sequence[str], decode: Decode) -> bool:
    """Whether any of the texts has ended in an answer.

    Args:
      prompt, answer: ids.
      texts: none of them empty.
      decode: ids -> text, control tokens included.
    """
    # What ends in the prompt ended before the answer began; a token has at least one character.
    before = [int(i) for i in prompt[-max(map(len, texts)) :]]
    start, text = len(decode(before)), decode([*before, *map(int, answer)])
    return any(one in text[max(0, start - len(one) + 1) :] for one in texts)


def stop_length(prompt: Ids, answer: Ids, texts: Sequence[str], decode: Decode) -> int | None:
    """How many tokens of an answer there are up to the one that completes a text, None where none
    does; see `ends`."""
    if not ends(prompt, answer, texts, decode):
        return None
    low, high = 0, len(answer)  # not ended at `low`, ended at `high`
    while high - low > 1:
        middle = (low + high) // 2
        is_ended = ends(prompt, answer[:middle], texts, decode)
        low, high = (low, middle) if is_ended else (middle, high)
    return high
