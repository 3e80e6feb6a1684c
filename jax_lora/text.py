"""Text for people: lines on a terminal; tables for it, as GitHub's Markdown, and as LaTeX."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Literal

Style = Literal["plain", "markdown", "latex"]
# What is a mark of GitHub's Markdown in any place, and at the start of a line.
_MARKS = re.compile(
    r"[*|`\\~$]|<(?=[A-Za-z/!?])|&(?=#?\w+;)|\](?=[(\[:])|:(?=//)|(?<=www)\."
    r"|(?<![^\W_])_|_(?![^\W_])"
    r"|^(?:>|#(?=#{0,5}(?:\s|$))|[-+](?=\s|$)|-(?=-+\s*$)|=(?==*\s*$))"
)
_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$",
    "{": r"\{", "}": r"\}", "^": r"\^{}", "~": r"\~{}", "±": r"$\pm$", "–": "--", "−": "$-$",
    "↑": r"$\uparrow$", "↓": r"$\downarrow$",
}  # fmt: skip


def print_line(text: object) -> None:
    """Print a line on standard output, see `printable`."""
    sys.stdout.write(f"{printable(str(text))}\n")
    sys.stdout.flush()


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[object]],
    style: Style = "plain",
    groups: Sequence[str] = (),
) -> str:
    """A table: the first column to the left, the others to the right, floats to one place.

    Args:
      header: a name per column.
      rows: cells; None is a dash.
      style: "plain" for terminals, "markdown", or "latex", a `tabular` of the package booktabs.
      groups: in LaTeX, what stands above each column; neighbours of one group share it.

    Returns:
      Lines, all but plain ones with a newline at the end.
    """
    cells = [[_text(cell) for cell in row] for row in rows]
    if style == "plain":
        return "\n".join(_aligned(header, cells))
    if style == "markdown":
        rule = ["---"] + ["---:"] * (len(header) - 1)
        lines = [[*map(markdown, header)], rule, *([*map(markdown, row)] for row in cells)]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)
    body = "".join(" & ".join(map(tex, row)) + " \\\\\n" for row in cells)
    return (
        f"\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}\n\\toprule\n{_tex_groups(groups)}"
        f"{' & '.join(map(tex, header))} \\\\\n\\midrule\n{body}\\bottomrule\n\\end{{tabular}}\n"
    )


def markdown(text: str) -> str:
    """A text as a line of GitHub's Markdown that shows it letter by letter, also in a table.

    T*100 and T*500 frame no emphasis, a bar ends no cell, a tag is no HTML, an address no link; a
    line end is the letters \\n.
    """
    line = re.sub(r"[\t\n\u2028\u2029]", lambda found: ascii(found[0])[1:-1], printable(text))
    marked = _MARKS.sub(r"\\\g<0>", line.strip(" "))  # four spaces would be code
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", marked)  # no list of numbers


def tex(text: str) -> str:
    """A text for LaTeX."""
    return "".join(_TEX.get(letter, letter) for letter in text)


def _text(cell: object) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.1f}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def _aligned(header: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    lines = []
    for row in (header, ["-" * width for width in widths], *cells):
        first, *others = zip(row, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        lines.append("  ".join(padded).rstrip())
    return lines


def _tex_groups(groups: Sequence[str]) -> str:
    """The line of groups above a header, each with a rule below it; they are LaTeX already."""
    spans: list[tuple[str, int, int]] = []  # group, first column, number of columns
    for i, group in enumerate(groups, 1):
        if spans and spans[-1][0] == group:
            spans[-1] = (group, spans[-1][1], spans[-1][2] + 1)
        else:
            spans.append((group, i, 1))
    if not spans:
        return ""
    top = " & ".join(rf"\multicolumn{{{n}}}{{c}}{{{group}}}" for group, _, n in spans)
    rules = " ".join(rf"\cmidrule(lr){{{i}-{i + n - 1}}}" for group, i, n in spans if group)
    return f"{top} \\\\\n{rules}\n"


# Control characters but newline and tab, what reorders the letters of a line, and halves of
# surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """A text for a terminal: control characters, with which a file could move its cursor or write
    over what stands there, become escapes such as \\x1b; newlines and tabs stay."""
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)
