"""The one type that every source of data gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Message(NamedTuple):
    """One turn of a conversation; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One question with its accepted answers: all that a prompt and a score need.

    Attributes:
      instruction: what is to be done; of a conversation, the user's last turn.
      input: what it is to be done with, or "".
      references: accepted answers, at least one. Training is on one of them.
      task, category: the groups that scores are reported by.
      id: unique in its task.
      messages: of a conversation, the turns before `instruction`: a system message, earlier
        questions and answers.
    """

    instruction: str
    input: str
    references: tuple[str, ...]
    task: str
    category: str
    id: str
    messages: tuple[Message, ...] = ()

    @property
    def name(self) -> str:
        """The example in a message to the user."""
        return f"{self.task} {self.id}"

    @property
    def key(self) -> tuple[str, ...]:
        """What makes a question distinct: all of its text without the white space around it."""
        turns = (text.strip() for message in self.messages for text in message)
        return (*turns, self.instruction.strip(), self.input.strip())

    @property
    def keys(self) -> tuple[tuple[str, ...], ...]:
        """The `key` of each question in a conversation, its own the last: the turns before are
        trained on, too."""
        found: list[tuple[str, ...]] = []
        before: list[str] = []
        for role, text in self.messages:
            if role == "user":
                found.append((*before, text.strip(), ""))
            before += [role.strip(), text.strip()]
        return (*found, self.key)

    def conversation(self, answer: str | None = None) -> list[Message]:
        """All turns, the question's user turn included, and the answer's where it is given."""
        question = "\n\n".join(filter(None, (self.instruction, self.input)))
        last = [] if answer is None else [Message("assistant", answer)]
        return [*self.messages, Message("user", question), *last]
