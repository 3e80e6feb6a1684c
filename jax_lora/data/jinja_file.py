"""Prompt templates in Jinja files of one's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from jax_lora.data.control_tokens import Mark
from jax_lora.data.example import Example
from jax_lora.errors import DataError


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or a DataError that names it."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error}") from None


def jinja_template(text: str, path: str) -> Callable[[Example, Mark], str]:
    """A prompt template in the text of a Jinja file; `path` names it in messages.

    It is rendered in jinja2's sandbox as transformers renders chat templates, and gets
    `instruction`, `input`, `task`, `category`, `id` and `messages`, but no answer.

    Returns:
      A function of an example and of what is done to the strings that the text shows.

    Raises:
      DataError: the file is no template; the function, that it cannot render an example.
    """
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    settings = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, **settings)
    try:
        template = environment.from_string(text)
    except jinja2.TemplateError as error:
        raise DataError(f"{path}: not a Jinja template: {error}") from None

    def render(example: Example, mark: Mark) -> str:
        fields = dataclasses.asdict(example) | {
            name: mark("user", text) if (text := getattr(example, name)) else ""
            for name in ("instruction", "input")
        }
        del fields["references"]
        fields["messages"] = [
            {"role": role, "content": mark("user", text)} for role, text in example.messages
        ]
        try:
            return template.render(fields)
        except Exception as error:  # what a template computes may raise anything
            raise DataError(f"{path}: {example.name}: {error}") from None

    return render
