"""What a report is made of: sections of paragraphs, findings, tables, pictures and lists.

The parts are data. Each says itself in Markdown; `page` prints the same parts as HTML.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from matplotlib.figure import Figure

from jax_lora.study import plotting, svg
from jax_lora.text import markdown


class Part(Protocol):
    """Anything that a section holds."""

    def markdown(self) -> str:
        """The part as blocks of GitHub's Markdown."""
        ...


@dataclass(frozen=True)
class Paragraph:
    """Sentences; their line ends stay in Markdown and mean nothing."""

    text: str

    def markdown(self) -> str:
        """The text, line by line."""
        return "\n".join(map(markdown, self.text.splitlines()))


@dataclass(frozen=True)
class Bullets:
    """A list."""

    lines: Sequence[str]

    def markdown(self) -> str:
        """One line per item."""
        return "\n".join(f"- {markdown(line)}" for line in self.lines)


@dataclass(frozen=True)
class Finding:
    """A question, what this study answers, and what the paper's own figures at 7B answer."""

    question: str
    answers: Sequence[str]
    paper: Sequence[str] = ()

    def markdown(self) -> str:
        """The question in bold, its answers as a list, then the paper's."""
        text = f"**{markdown(self.question)}**\n\n{Bullets(self.answers).markdown()}"
        if self.paper:
            text += f"\n\nThe paper, LLaMA-7B\n\n{Bullets(self.paper).markdown()}"
        return text


@dataclass(frozen=True)
class Picture:
    """A figure that can be drawn at any width in inches, `draw(width=7.0)`."""

    name: str
    caption: str
    draw: Callable[..., Figure]

    def markdown(self) -> str:
        """The image and its caption."""
        return f"![{self.name}](figures/{self.name}.png)\n\n{markdown(self.caption)}"

    def write(self, folder: Path) -> tuple[str, str]:
        """Write NAME.png and NAME.pdf, and the same as NAME_column for the width of a column.

        Returns:
          Both as elements of HTML, see `svg`: the wide one and the narrow one.
        """
        elements = []
        for name, width in ((self.name, plotting.TEXT), (f"{self.name}_column", plotting.COLUMN)):
            figure = self.draw(width=width)
            plotting.save(figure, folder / name)
            elements.append(svg.element(figure, name))
        return elements[0], elements[1]


@dataclass(frozen=True)
class File:
    """A file beside the report, and what it is."""

    text: str
    path: str

    def markdown(self) -> str:
        """The text and the path as code."""
        return f"{markdown(self.text)}: `{self.path}`."


@dataclass(frozen=True)
class Section:
    """A title and what stands below it."""

    title: str
    parts: Sequence[Part]

    def markdown(self) -> str:
        """The heading and all parts, a blank line between two."""
        return "\n\n".join([f"## {markdown(self.title)}", *_texts(self.parts)])


@dataclass(frozen=True)
class Report:
    """A title, a paragraph that says how far the study is, and sections."""

    title: str
    lead: str
    sections: Sequence[Section]

    def markdown(self) -> str:
        """The whole of report.md."""
        parts = [f"# {markdown(self.title)}", markdown(self.lead), *_texts(self.sections)]
        return "\n\n".join(parts) + "\n"


def _texts(parts: Sequence[Part]) -> Iterator[str]:
    return (part.markdown().rstrip() for part in parts)
