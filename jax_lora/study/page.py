"""A report as one page of HTML for people: page.html, page.css and page.js of this package.

The page needs nothing from elsewhere, and its policy forbids it: figures are inline SVG, style and
script are inline and allowed by their digests. All content is in the HTML; the script only sorts
tables and filters case studies. Every text is escaped, whoever wrote it.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import resources

import jinja2

from jax_lora.study.case_studies import KINDS, Case, CaseStudies
from jax_lora.study.sections import Report, Section
from jax_lora.study.tables import MISSING, Table
from jax_lora.text import printable

LIMIT = 2_500_000  # bytes of case studies on the page of a report, about half of what it may have
LONGEST = 2_000  # characters of one text of a case there
_NUMBER = re.compile(r"[+−-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


def page(report: Report, drawn: Mapping[str, tuple[str, str]], more: Sequence[Section] = ()) -> str:
    """A report as a page.

    Args:
      report: its sections.
      drawn: by the name of a `Picture` the elements that its `write` returns.
      more: sections for the page alone, at its end.

    Returns:
      HTML, case studies at its end. Long texts of cases are cut, and of more cases than LIMIT has
      room for, every second, third, … is left; the page says so.
    """
    sections = [*report.sections, *more]
    parts = (part for section in sections for part in section.parts)
    cases = next((part for part in parts if isinstance(part, CaseStudies)), None)
    return _render(report.title, report.lead, sections, drawn, cases, LONGEST, LIMIT)


def case_page(title: str, cases: CaseStudies) -> str:
    """Case studies alone as a page, all of them and whole."""
    return _render(title, "", [], {}, cases, None, None)


def _render(
    title: str,
    lead: str,
    sections: Sequence[Section],
    drawn: Mapping[str, tuple[str, str]],
    cases: CaseStudies | None,
    longest: int | None,
    limit: int | None,
) -> str:
    style, script = _file("page.css"), _file("page.js")
    template = _environment().get_template("page.html")

    def cut(text: str) -> str:
        return text if longest is None or len(text) <= longest else text[:longest] + " …"

    def fitting(render_case: Callable[[Case], str], every: Sequence[Case]) -> list[str]:
        """The cases as HTML, evenly thinned out where they are more than `limit` bytes."""
        texts = [render_case(case) for case in every]
        size = sum(len(text.encode()) for text in texts)
        return texts[:: -(-size // limit) if limit and size else 1]

    return template.render(
        title=title,
        lead=lead,
        sections=sections,
        drawn=drawn,
        cases=cases,
        cut=cut,
        fitting=fitting,
        kinds=KINDS,
        style=style,
        script=script,
        style_digest=_digest(style),
        script_digest=_digest(script),
    )


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_file),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_finalize,
    )
    environment.filters |= {"anchor": _anchor, "number": _number}
    environment.globals |= {"kind": lambda part: type(part).__name__, "head": _head, "body": _body}
    environment.globals |= {"numeric": _numeric}
    return environment


def _file(name: str) -> str:
    return resources.files("jax_lora.study").joinpath(name).read_text("utf-8")


def _digest(text: str) -> str:
    """How a Content-Security-Policy names an inline script or style."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"sha256-{digest}"


def _finalize(value: object) -> object:
    """What a page prints of a value: no control characters but line ends, no turned-around text."""
    is_html = hasattr(value, "__html__")  # made of escaped texts already
    return printable(value) if isinstance(value, str) and not is_html else value


def _anchor(title: str) -> str:
    """An id of a title: letters, digits and "-"."""
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def _number(text: str) -> float | None:
    """The number that the text of a table's cell begins with, by which its column is sorted."""
    match = _NUMBER.match(text)
    return float(match[0].replace("−", "-").replace(",", "")) if match else None


def _numeric(table: Table) -> list[bool]:
    """By column, whether all that is there are numbers."""
    columns = zip(*table.rows, strict=True) if table.rows else [()] * len(table.columns)
    return [
        all(_number(cell) is not None for cell in column if cell not in ("", MISSING))
        for column in columns
    ]


def _head(table: Table) -> list[list[tuple[str, int, int, int]]]:
    """The rows of a table's header: (text, column, columns, rows) of each cell.

    Neighbours of one group share a cell above their names; a column that has only one of the two
    has one cell, as high as the header.
    """
    if not any(group and name for group, name in table.columns):
        return [[(group or name, i, 1, 1) for i, (group, name) in enumerate(table.columns)]]
    above, below = [], []
    for group, columns in itertools.groupby(enumerate(table.columns), lambda one: one[1][0]):
        found = [(i, name) for i, (_, name) in columns]
        if group and any(name for _, name in found):
            above.append((group, -1, len(found), 1))
            below += [(name, i, 1, 1) for i, name in found]
        else:
            above += [(group or name, i, 1, 2) for i, name in found]
    return [above, below]


def _body(table: Table) -> list[list[Sequence[str]]]:
    """The rows of a table in groups that stay together when it is sorted."""
    groups: list[list[Sequence[str]]] = []
    for i, row in enumerate(table.rows):
        if i in table.beneath:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups
