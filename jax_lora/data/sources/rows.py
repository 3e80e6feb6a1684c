"""A row of a table -> `Example`, or one line that names the file and the row.

Three shapes of rows, each with optional `task`, `category` and `id`:

    instruction, input (optional), output      as Stanford's alpaca_data.json has them
    prompt, completion                         as OpenAI's and TRL's files have them
    messages, of role and content              or ShareGPT's conversations, of from and value

`output` and `completion` may be lists of accepted answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from jax_lora.data.example import Example, Message
from jax_lora.data.instructions import check_unicode
from jax_lora.data.sources.tables import Table
from jax_lora.errors import ConfigError, DataError

SHAPES = {  # shape -> the columns that it must have
    "messages": ("messages",),
    "conversations": ("conversations",),
    "instruction": ("instruction", "output"),
    "prompt": ("prompt", "completion"),
}
OPTIONAL = ("input", "task", "category", "id")
COLUMNS = tuple(dict.fromkeys((*(c for names in SHAPES.values() for c in names), *OPTIONAL)))
MOST_CHARACTERS = 1_000_000  # of one text; more is no instruction, and takes minutes to encode
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


class Unusable(DataError):
    """A well-formed row that nothing can be learned from."""


@dataclass
class Unused:
    """Rows that are left out, or with `strict` refused.

    Attributes:
      strict: raise at the first one.
      reasons: of the rows left out, and how often.
      first: the first of them, with file and row.
    """

    strict: bool = False
    reasons: Counter[str] = field(default_factory=Counter)
    first: str = ""

    def add(self, where: str, reason: str) -> None:
        """Count a row.

        Raises:
          DataError: with `strict`.
        """
        if self.strict:
            raise DataError(f"{where}: {reason}; config.data.strict=False leaves such rows out")
        self.first = self.first or f"{where}: {reason}"
        self.reasons[reason.partition(" (")[0]] += 1

    def __str__(self) -> str:
        counts = ", ".join(f"{count} with {reason}" for reason, count in self.reasons.items())
        return f"{self.reasons.total()} rows left out ({counts}); the first is {self.first}"


def parse_columns(text: str) -> dict[str, str]:
    """`config.data.columns`, "instruction=question,output=answer": their name -> ours.

    Raises:
      ConfigError: something else.
    """
    found = {}
    for part in filter(None, text.split(",")):
        ours, equals, theirs = (x.strip() for x in part.partition("="))
        if not equals or not theirs or ours not in COLUMNS or theirs in found:
            raise ConfigError(
                f"config.data.columns: found {text!r}, expected name=column pairs with the names "
                f"{', '.join(COLUMNS)}, such as instruction=question,output=answer"
            )
        found[theirs] = ours
    return found


def read_examples(
    table: Table, columns: Mapping[str, str], unused: Unused, needs_all: bool = True
) -> Iterator[Example]:
    """The examples of a table.

    Args:
      table: its rows.
      columns: see `parse_columns`.
      unused: counts the rows that are left out.
      needs_all: some row must have each column that is renamed.

    Raises:
      DataError: a row that is malformed, has another shape than the first one, or another's id.
    """
    shape, seen, empty, absent = "", set(), True, set(columns)
    for number, found in table.rows:
        where, empty = f"{table.source}: row {number}", False
        absent -= found.keys()
        # A column that is renamed stands in for one that has the name already.
        renamed = {ours: found[name] for name, ours in columns.items() if name in found}
        renamed = {name: value for name, value in found.items() if name not in columns} | renamed
        row = {name: value for name, value in renamed.items() if value is not None}
        fits = [name for name, needed in SHAPES.items() if all(c in row for c in needed)]
        shape = shape or next(iter(fits), "")
        if not shape or not all(column in row for column in SHAPES[shape]):
            expected = [SHAPES[shape]] if shape else list(SHAPES.values())
            names = ", ".join(sorted(map(str, row))) or "none"
            raise DataError(
                f"{where}: found columns {names:.200}, expected "
                f"{' or '.join(map(' and '.join, expected))}"
                + (", as in the rows before" if shape else "; config.data.columns renames them")
            )
        try:
            example = _example(row, shape, where, number)
        except Unusable as error:
            unused.add(where, str(error))
            continue
        if (example.task, example.id) in seen:
            raise DataError(f"{where}: id: found {example.id!r} again, expected distinct ids")
        seen.add((example.task, example.id))
        yield example
    if empty:
        raise DataError(f"{table.source}: found no rows, expected at least one")
    if absent and needs_all:
        raise DataError(
            f"{table.source}: found no column {', '.join(sorted(absent))}, expected all that "
            "config.data.columns renames"
        )


def _example(row: Mapping[str, object], shape: str, where: str, number: int) -> Example:
    task, category = (
        _text(row, name, where) if name in row else default
        for name, default in (("task", "all"), ("category", "unknown"))
    )
    given = row.get("id", "")
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise DataError(f"{where}: id: found {given!r:.60}, expected a text or a whole number")
    name = _unicode(str(given), "id", where).strip() or f"row {number}"
    task, category = task.strip(), category.strip()
    if not task or not category:
        raise Unusable("an empty task or category")
    for column, text in (("task", task), ("category", category), ("id", name)):
        if text.splitlines() != [text]:  # it is a line of tables and messages
            raise DataError(f"{where}: {column}: found {text!r:.60}, expected one line")
    if shape in ("messages", "conversations"):
        turns = _turns(row[shape], shape, where)
        *before, question, answer = turns
        return Example(question.content, "", (answer.content,), task, category, name, tuple(before))
    ask, reply = SHAPES[shape]
    instruction = _text(row, ask, where)
    text = _text(row, "input", where) if "input" in row and shape == "instruction" else ""
    if not instruction.strip() and not text.strip():
        raise Unusable(f"an empty {ask}")
    return Example(instruction, text, _answers(row[reply], reply, where), task, category, name)


def _text(row: Mapping[str, object], name: str, where: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise DataError(f"{where}: {name}: found {value!r:.60}, expected a text")
    return _unicode(value, name, where)


def _unicode(value: str, name: str, where: str) -> str:
    if len(value) > MOST_CHARACTERS:
        raise Unusable(f"a text of more than {MOST_CHARACTERS:,} characters ({name})")
    check_unicode(value, f"{where}: {name}")
    return value


def _answers(value: object, name: str, where: str) -> tuple[str, ...]:
    answers = []
    for one in value if isinstance(value, list) else [value]:
        if not isinstance(one, str):
            raise DataError(
                f"{where}: {name}: found {value!r:.60}, expected a text or a list of texts"
            )
        if _unicode(one, name, where).strip():
            answers.append(one)
    if not answers:
        raise Unusable("an empty answer")
    return tuple(answers)


def _turns(value: object, shape: str, where: str) -> list[Message]:
    """The turns of a conversation: perhaps a system message, then users and assistants in turn."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {shape}: found {value!r:.60}, expected a list of turns")
    turns: list[Message] = []
    for i, turn in enumerate(value):
        at = f"{where}: {shape}[{i}]"
        message = _turn(turn, at)
        expected = "assistant" if turns and turns[-1].role == "user" else "user"
        if message.role != expected and not (message.role == "system" and not turns):
            raise DataError(f"{at}: found a turn of the {message.role}, expected the {expected}'s")
        if not message.content.strip() and message.role != "system":
            raise Unusable("an empty turn")
        turns.append(message)
    if turns[-1].role != "assistant":
        raise DataError(
            f"{where}: {shape}: found a last turn of the {turns[-1].role}, expected the assistant's"
        )
    return turns


def _turn(turn: object, at: str) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"{at}: found {turn!r:.60}, expected an object")
    keys = next((k for k in (("role", "content"), ("from", "value")) if set(k) <= turn.keys()), ())
    if not keys:
        found = ", ".join(map(str, turn)) or "no keys"
        raise DataError(f"{at}: found {found:.200}, expected role and content, or from and value")
    role, content = (turn[key] for key in keys)
    if not isinstance(role, str) or role not in _ROLES:
        raise DataError(f"{at}: role: found {role!r:.60}, expected one of {', '.join(_ROLES)}")
    if turn.get("tool_calls"):
        raise DataError(f"{at}: found tool_calls, expected turns of text")
    return Message(_ROLES[role], _text(turn, keys[1], at))
