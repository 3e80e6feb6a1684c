"""Texts that end an answer, such as "\\n\\n": an answer is cut behind the token that completes one.

The rule is that of transformers' `stop_strings`: the text may begin in the prompt and end anywhere
in the last token, and it stays in the answer. Greedy answers do not depend on when they are
stopped, so the host looks at them now and then while they are generated.

The rule is of the text of all tokens, and only the last ones are decoded. That is the same: a text
is cut only before a token that is no part of a character. A byte-level decoder decodes what is
behind it by itself; so does one of SentencePiece, where single bytes are tokens, unless that token
is a byte, since an unfinished character makes all bytes beside it "\\ufffd". Of the first token of
a text, such decoders drop a space, so one more character is decoded than texts could need.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

Ids = Sequence[int] | np.ndarray
Decode = Callable[[list[int]], str]
Stop = Callable[[Ids, Ids, int], int | None]  # see `StopRule.__call__`
STRIDE = 32  # tokens that are checked together
_BROKEN = "\ufffd"  # what decoders write for bytes that are no character


def stop_rule(texts: Sequence[str], decode: Decode, byte_ids: Collection[int] = ()) -> Stop | None:
    """The rule for `scheduler.answers`, see `StopRule`; None where there are no texts."""
    return StopRule(texts, decode, byte_ids) if texts else None


class StopRule:
    """Finds the token at which the first of several texts is complete, and the answer ends.

    Args:
      texts: none of them empty.
      decode: ids -> text, control tokens included.
      byte_ids: the tokens that are single bytes, in the vocabularies of SentencePiece.
    """

    def __init__(self, texts: Sequence[str], decode: Decode, byte_ids: Collection[int] = ()):
        self.texts, self.decode, self.byte_ids = tuple(texts), decode, byte_ids
        self.longest = max(map(len, texts))
        self.has_whole_texts = not any(_BROKEN in one for one in texts)
        self._known: dict[int, bool] = {}

    def __call__(self, prompt: Ids, answer: Ids, checked: int = 0, /) -> int | None:
        """How many tokens of an answer there are up to the first one whose text completes one.

        Args:
          prompt, answer: ids.
          checked: so many tokens of the answer are known to complete none.

        Returns:
          None where no token does.
        """
        # What ends in the prompt ended before the answer began; a token has a character or more.
        cut = max(0, len(prompt) - self.longest)
        while cut and not self._is_text(int(prompt[cut])):
            cut -= 1
        before = np.asarray(prompt[cut:], np.int64)
        ids, first = np.concatenate([before, np.asarray(answer, np.int64)]), len(before)
        for start in range(first + checked, len(ids), STRIDE):
            stop = min(start + STRIDE, len(ids))
            cut = self._cut(ids, first, start)
            offset = 0 if cut else len(self.decode(before.tolist()))
            text = self.decode(ids[cut:stop].tolist())
            # Where all characters are whole, texts that were there before still are.
            if not self._has(text, offset) and _BROKEN not in text and self.has_whole_texts:
                continue
            for end in range(start + 1, stop + 1):
                if self._has(self.decode(ids[cut:end].tolist()), offset):
                    return end - first
        return None

    def _has(self, text: str, offset: int) -> bool:
        return any(text.find(one, max(0, offset - len(one) + 1)) >= 0 for one in self.texts)

    def _cut(self, ids: np.ndarray, first: int, start: int) -> int:
        """The index of a token of the answer, from which on the text has all that can complete a
        text at `start` or later; 0 where there is none."""
        settled = start  # the text before is not changed by what comes
        while settled > first and not self._is_text(int(ids[settled])):
            settled -= 1
        length = self.longest // 3 + 2
        while (cut := settled - length) > first:
            while cut > first and not self._is_text(int(ids[cut])):
                cut -= 1
            if cut > first and len(self.decode(ids[cut:settled].tolist())) >= self.longest:
                return cut
            length *= 2
        return 0

    def _is_text(self, token: int) -> bool:
        if token not in self._known:
            text = self.decode([token])
            is_whole = bool(text) and _BROKEN not in text
            self._known[token] = is_whole and token not in self.byte_ids
        return self._known[token]
