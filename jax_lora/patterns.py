"""Regular expressions that others wrote (of an adapter's file, of a config), under a limit.

Python's `re` may take hours over a short text, as with `(a+)+b`, and cannot be interrupted. What
could do so is matched by the package `regex`, which can; it reads the same expressions.
"""

from __future__ import annotations

import re
import time
import warnings
from functools import lru_cache

import regex

from jax_lora.errors import DataError

LONGEST = 10_000  # characters of an expression, as of all modules of a large model in one
ONE_MATCH, ALL_MATCHES = 0.5, 10.0  # seconds of this thread, for all that one `Matcher` is asked
_SPECIAL = re.compile(r"[^\w.-]")  # an expression without: every character stands for one


@lru_cache(maxsize=4096)
def _compiled(expression: str) -> regex.Pattern[str]:
    """Raises ValueError: no regular expression; says why."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about expressions that will mean something else
            re.compile(expression)  # whose reading of an expression is the one that counts
            return regex.compile(expression)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from None


@lru_cache(maxsize=4096)
def _is_plain(expression: str) -> bool:
    return not _SPECIAL.search(expression)


class Matcher:
    """Whether regular expressions match, in a limited time each and together.

    Args:
      where: file and key that they are from, for messages.
      error: the class of what is raised.
    """

    def __init__(self, where: str, error: type[ValueError] = DataError):
        self._where, self._error, self._left = where, error, ALL_MATCHES

    def check(self, expression: str, key: str = "") -> None:
        """Raise the error where this is no regular expression; names `key` beside `where`."""
        try:
            if len(expression) > LONGEST:
                raise ValueError(f"{len(expression)} characters, more than {LONGEST}")
            _compiled(expression)
        except ValueError as error:
            at = ": ".join(filter(None, (self._where, key)))
            text = f"{at}: found {expression!r:.60}, expected a regular expression: {error}"
            raise self._error(text) from None

    def fullmatch(self, expression: str, text: str) -> regex.Match[str] | None:
        """`re.fullmatch`.

        Raises:
          DataError (or `error`): no regular expression, or the time is up.
        """
        self.check(expression)
        return self._fullmatch(expression, text)

    def _fullmatch(self, expression: str, text: str) -> regex.Match[str] | None:
        began, limit = time.thread_time(), max(min(self._left, ONE_MATCH), 0.001)
        try:
            found = _compiled(expression).fullmatch(text, timeout=limit)
        except TimeoutError:
            found = None
            self._left = 0.0
        self._left -= time.thread_time() - began
        if self._left <= 0:
            raise self._error(
                f"{self._where}: found {expression!r:.60}, expected regular expressions that are "
                f"matched within {ONE_MATCH:g} s each and {ALL_MATCHES:g} s together"
            )
        return found

    def matches_end(self, expression: str, name: str) -> bool:
        """Whether an expression matches a dotted name or a dotted end of it, as PEFT's patterns
        do: `re.match(rf"(.*\\.)?({expression})$", name)`."""
        if _is_plain(expression):  # it can but match as many characters as it has
            start = len(name) - len(expression)
            if start < 0 or (start and name[start - 1] != "."):
                return False
        self.check(expression)
        return self._fullmatch(rf"(.*\.)?({expression})$", name) is not None
