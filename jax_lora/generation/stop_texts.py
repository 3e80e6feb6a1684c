"""Texts that end an answer, such as "\\n\\n": an answer is cut behind the token that completes one.

Greedy answers do not depend on when they are stopped, so they are generated as if there were no
such text and cut on the host. The rule is that of transformers' `stop_strings`: the text may begin
in the prompt and end anywhere in the last token, and it stays in the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

Ids = Sequence[int] | np.ndarray
Ended = Iterator[list[tuple[int, np.ndarray]]]
Decode = Callable[[list[int]], str]


def ends(prompt: Ids, answer: Ids, texts: Sequence[str], decode: Decode) -> bool:
    """Whether any of the texts has ended in an answer.

    Args:
      prompt, answer: ids.
      texts: none of them empty.
      decode: ids -> text, control tokens included.
    """
    if not texts:
        return False
    # What ends in the prompt ended before the answer began; a token has at least one character.
    before = [int(i) for i in prompt[-max(map(len, texts)) :]]
    start, text = len(decode(before)), decode([*before, *map(int, answer)])
    return any(one in text[max(0, start - len(one) + 1) :] for one in texts)


def cut(prompt: Ids, answer: Ids, texts: Sequence[str], decode: Decode) -> int:
    """How many tokens of an answer are left, see `ends`."""
    if not ends(prompt, answer, texts, decode):
        return len(answer)
    low, high = 0, len(answer)  # not ended at `low`, ended at `high`
    while high - low > 1:
        middle = (low + high) // 2
        is_ended = ends(prompt, answer[:middle], texts, decode)
        low, high = (low, middle) if is_ended else (middle, high)
    return high


def stopped(
    generate: Callable[..., Ended], texts: Sequence[str], decode: Decode
) -> Callable[..., Ended]:
    """`scheduler.answers` whose answers also end at `texts`, see `cut`."""

    def answers(prompts: Sequence[Ids], groups: object = None, **options: object) -> Ended:
        for ended in generate(prompts, groups, **options):
            yield [(i, ids[: cut(prompts[i], ids, texts, decode)]) for i, ids in ended]

    return answers if texts else generate
