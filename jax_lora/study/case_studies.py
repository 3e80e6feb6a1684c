"""Case studies of a study: the same inputs answered by several models, as a page of HTML."""

from __future__ import annotations

import difflib
import html
import re
from collections.abc import Mapping, Sequence

from jax_lora.errors import DataError
from jax_lora.evaluation.metrics import exact_match, normalize

_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff;
  max-width: 75rem; margin: 2rem auto; padding: 0 1rem }}
h2 {{ font-size: 1rem; margin: 2rem 0 .4rem }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; background: #f4f4f4;
  padding: .6rem .8rem; margin: 0 0 .5rem }}
div {{ overflow-x: auto }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ text-align: left; vertical-align: top; padding: .4rem .6rem; border: 1px solid #ccc;
  min-width: 7rem; overflow-wrap: anywhere; white-space: pre-wrap }}
th {{ background: #eaf1f7 }}
mark {{ background: none; color: #b02a00; text-decoration: underline }}
.yes {{ color: #00684a }} .no {{ color: #b02a00 }} .none, i {{ color: #5c5c5c }}
</style></head>
<body>
<h1>{title}</h1>
<p>✓ exact match, ✗ none. <mark>Underlined</mark>: words that the nearest reference has not, or not
in this order.</p>
{body}
</body>
</html>
"""


def case_studies(cases: Sequence[Mapping], title: str = "Case studies") -> str:
    """Figure 3: the same inputs answered by several models, side by side, as one HTML page.

    Words of an answer that its nearest reference has in the same order are plain, the others are
    underlined in red; a mark says whether the answer is an exact match.

    Args:
      cases: each with `task`, `input`, `references` and `answers`, the last by cell.
      title: of the page.

    Returns:
      A page that needs nothing else: no script, no other file.

    Raises:
      DataError: a case without one of these, or without references.
    """
    cells = list(dict.fromkeys(cell for case in cases for cell in case.get("answers", ())))
    for index, case in enumerate(cases):
        if absent := sorted({"task", "input", "references", "answers"} - case.keys()):
            raise DataError(
                f"case {index}: no {', '.join(absent)}; expected task, input, references, answers"
            )
    body = "\n".join(_section(case, cells) for case in cases)
    return _PAGE.format(title=html.escape(title), body=body)


def _section(case: Mapping, cells: Sequence[str]) -> str:
    """One case as HTML: the input, and a table of references and answers."""
    references = "<br>".join(map(html.escape, case["references"]))
    names = "".join(f"<th>{html.escape(cell)}</th>" for cell in cells)
    answers = "".join(_answer(case["answers"].get(cell), case["references"]) for cell in cells)
    return (
        f"<section><h2>{html.escape(case['task'])}</h2>"
        f"<pre>{html.escape(case['input'])}</pre><div><table>"
        f"<tr><th>reference</th>{names}</tr>"
        f"<tr><td>{references}</td>{answers}</tr></table></div></section>"
    )


def _answer(answer: str | None, references: Sequence[str]) -> str:
    """The cell of one answer, with a mark that says whether it is an exact match."""
    if answer is None:
        return '<td class="none">– (missing)</td>'
    right = exact_match(answer, references) == 1
    mark = '<b class="yes">✓</b>' if right else '<b class="no">✗</b>'
    text = html.escape(answer) if right else _marked(answer, references)
    return f"<td>{mark} {text if answer.strip() else '<i>(nothing)</i>'}</td>"


def _marked(answer: str, references: Sequence[str]) -> str:
    """The answer's words as HTML, those marked that its nearest reference does not have."""
    pieces = re.split(r"(\s+)", answer)  # words at even places, what is between them at odd ones
    words = [normalize(word) for word in pieces[::2]]
    matchers = [
        difflib.SequenceMatcher(None, words, normalize(reference).split(), autojunk=False)
        for reference in references
    ]
    nearest = max(matchers, key=lambda matcher: matcher.ratio())
    shared = {block.a + i for block in nearest.get_matching_blocks() for i in range(block.size)}
    for i in range(len(words)):
        piece = html.escape(pieces[2 * i])
        plain = i in shared or not piece
        pieces[2 * i] = piece if plain else f"<mark>{piece}</mark>"
    return "".join(pieces)
