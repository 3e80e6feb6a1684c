"""The report as a page: what report.md says is there, what a model wrote does nothing."""

import base64
import hashlib
import html
import html.parser
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from jax_lora.study import Study, figures, page, svg
from jax_lora.study.case_studies import CaseStudies
from jax_lora.study.report import report
from jax_lora.study.sections import Bullets, Paragraph, Report, Section
from jax_lora.study.statistics import summary
from jax_lora.study.tables import Table, scores_table
from jax_lora.text import markdown
from tests.study.test_tables import PAPER_SETS, cells_of, grid, linear, results, tasks

EVIL = [
    "<script>alert(1)</script>",
    "</style></script><img src=http://x.test/a.png onerror=alert(1)>",
    "\"'><svg onload=alert(1)><a href=javascript:alert(1)>",
    "--><iframe src=//x.test></iframe> {{ 7 * 7 }} {% raw %}",
    "[a](javascript:alert(1)) ![b](http://x.test/b.png) | `c`",
]
VOID = {"meta", "link", "br", "input"}


class Page(html.parser.HTMLParser):
    """What a browser would make of a page: elements, attributes, texts, tables."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text, self.inside = "", [""]
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.tables: dict[str, list[list[tuple[str, dict[str, str], str]]]] = {}
        self.feed(text)
        self.close()
        assert self.inside == [""]  # every element was closed, in order

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        found = {name: value or "" for name, value in attrs}
        assert len(found) == len(attrs)
        self.elements.append((tag, found))
        if tag == "table":
            self.tables[found.get("id", "")] = []
        elif tag == "tr":
            next(reversed(self.tables.values())).append([])
        elif tag in ("th", "td"):
            next(reversed(self.tables.values()))[-1].append((tag, found, ""))
        if tag not in VOID:
            self.inside.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.inside.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.inside[-1] in ("script", "style"):
            {"script": self.scripts, "style": self.styles}[self.inside[-1]].append(data)
            return
        self.text += data
        if {"th", "td"} & {*self.inside}:
            row = next(reversed(self.tables.values()))[-1]
            tag, attrs, text = row[-1]
            row[-1] = (tag, attrs, text + data)

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] for _, attrs in self.elements if name in attrs]


def case(**fields: Any) -> dict[str, Any]:
    whole = dict(task="t, seen: on T2", input="i", references=["a b"], answers={"full": "a b"})
    return whole | fields


def evil_report(folder: Path) -> Path:
    """A study whose names, texts and config are attacks, in a folder; with the paper's figures."""
    cells = grid([4, 64, None], ["T2", "T4", "T8", "T*2", "T*8"], rounds=2)
    cells["cell"] += EVIL[0]
    others = grid([4], ["T2"], rounds=1, variant=EVIL[1])
    more = grid([4, 64], ["T2"], rounds=1, rate=1e-3)
    cells = pd.concat([cells, others, more], ignore_index=True)
    closed = dict(closed_label=True, majority_baseline=40.0, out_of_options=10.0)
    rows = results(cells, tasks(7, category=EVIL[2], **closed), linear, model=EVIL[3])
    rows = rows[rows["cell"] != rows["cell"].iloc[0]]
    cases = [
        case(),
        *(
            case(task=f"{one}, seen: {one}", input=one, references=[one], answers={one: f"{one} b"})
            for one in EVIL
        ),
        case(answers={"full": "\x1b[2J\u202eb\u2066\x00 a\udce9"}),
    ]
    config = {"run": {"model": EVIL[1], EVIL[2]: [1, EVIL[0]]}, "ranks": [4, 64, "full"]}
    report(rows, cells, folder, cases=cases, config=config)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return evil_report(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def text(folder) -> str:
    return (folder / "index.html").read_text("utf-8")


@pytest.fixture(scope="module")
def parsed(text) -> Page:
    return Page(text)


@pytest.mark.parametrize("name", ["index.html", "case_studies.html"])
def test_what_was_planted_does_nothing(folder, name):
    text = (folder / name).read_text("utf-8")
    parsed = Page(text)
    count = Counter(tag for tag, _ in parsed.elements)
    assert count["script"] == count["style"] == 1
    own = {"html", "head", "meta", "link", "title", "style", "body", "header", "main", "nav"}
    own |= {
        "h2",
        "h3",
        "h4",
        "p",
        "ul",
        "li",
        "a",
        "section",
        "article",
        "div",
        "span",
        "mark",
        "b",
    }
    own |= {"table", "caption", "thead", "tbody", "tr", "th", "td", "br", "form", "label", "select"}
    own |= {"option", "output", "figure", "figcaption", "script", "h1", "mark"}
    svg = {"svg", "g", "path", "defs", "clippath", "use", "text", "tspan", "rect", "image"}
    assert count.keys() <= own | svg
    for tag, attrs in parsed.elements:
        assert not [key for key in attrs if key.startswith("on") or key == "style"], tag
        assert tag == "meta" or "http-equiv" not in attrs
    reached = [value for key in ("href", "src", "xlink:href") for value in parsed.attributes(key)]
    files = {value for value in reached if not re.match(r"#|data:(,|image/png;base64,)", value)}
    assert files <= {"tables/summary.csv"}
    assert {*parsed.attributes("data"), *parsed.attributes("action")} == set()
    for one in EVIL:  # shown as it was written
        assert one in parsed.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", text)
    assert r"\x1b[2J\u202eb\u2066\x00 a\udce9" in parsed.text


@pytest.mark.parametrize("name", ["index.html", "case_studies.html"])
def test_the_policy_allows_this_style_and_script_alone(folder, name):
    parsed = Page((folder / name).read_text("utf-8"))
    (policy,) = [attrs["content"] for _, attrs in parsed.elements if "http-equiv" in attrs]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    digests = [
        "'sha256-" + base64.b64encode(hashlib.sha256("".join(one).encode()).digest()).decode() + "'"
        for one in (parsed.styles, parsed.scripts)
    ]
    assert [rules.pop("style-src"), rules.pop("script-src")] == digests
    assert rules == {
        "default-src": "'none'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'"
    }  # fmt: skip


def test_nothing_names_an_address(folder, text):
    assert not re.search(r"url\((?!#)", text) and "@import" not in text
    planted = "http://x.test/"
    assert {match for match in re.findall(r"https?://\S{,7}", text)} == {planted}
    assert (folder / "tables" / "summary.csv").is_file() and len(text.encode()) < 5e6


def test_ids_are_unique_and_what_is_pointed_at_exists(parsed):
    ids = Counter(parsed.attributes("id"))
    assert max(ids.values()) == 1
    pointed = {value[1:] for value in parsed.attributes("href") if value.startswith("#")}
    pointed |= {*parsed.attributes("aria-labelledby")}
    for key in ("clip-path", "fill"):
        pointed |= {value[5:-1] for value in parsed.attributes(key) if value.startswith("url(#")}
    assert {"findings", "tables", "figures", "case-studies", "config"} <= pointed <= ids.keys()


def leaves(table: list[list[tuple[str, dict[str, str], str]]]) -> list[str]:
    """The full names of a table's columns, from one or two rows of header."""
    first, *second = [row for row in table if all(tag == "th" for tag, _, _ in row)][:2]
    below, names = iter(second[0] if second else []), []
    for _, attrs, text in first:
        if attrs["scope"] == "col":
            names.append((attrs, text))
            continue
        for _ in range(int(attrs["colspan"])):
            _, inner, name = next(below)
            names.append((inner, f"{text} {name}"))
    assert [int(attrs["data-column"]) for attrs, _ in names] == [*range(len(names))]
    return [text for _, text in names]


def test_every_table_of_the_report_is_there_with_the_same_values(folder, parsed):
    said = (folder / "report.md").read_text("utf-8")
    blocks = re.findall(r"(?:^\|.*\n)+", said, re.M)
    found = [table for name, table in parsed.tables.items() if name and name != "settings"]
    assert len(blocks) == len(found) == 10
    for block, table in zip(blocks, found, strict=True):
        rows = [[text for _, _, text in row] for row in table if row[0][1].get("scope") == "row"]
        plain = [[re.sub(r"\\(.)", r"\1", cell) for cell in row] for row in raw_cells(block)]
        assert [leaves(table), *rows] == plain
    captions = [attrs["id"] for tag, attrs in parsed.elements if tag == "caption"]
    assert captions == [f"{name}-caption" for name in parsed.tables if name]


def raw_cells(block: str) -> list[list[str]]:
    """All cells of a Markdown table, the rule left out; a bar that is escaped ends none."""
    lines = [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in block.splitlines()]
    return [[cell.strip() for cell in line] for line in lines[:1] + lines[2:]]


def test_every_word_of_the_report_is_there(folder, parsed):
    said = (folder / "report.md").read_text("utf-8")
    page_text = " ".join(parsed.text.split())
    for line in said.splitlines():
        if line.startswith(("|", "![", "[", "#")) or not line:
            continue
        plain = re.sub(r"\\(.)", r"\1", line.removeprefix("- ").replace("**", ""))
        plain = plain.replace("`", "") if "summary.csv`" in plain else plain
        assert " ".join(plain.split()) in page_text, line
    assert "The paper, LLaMA-7B" in page_text and "+20.69 (T100)" in page_text
    assert "run.model" in page_text


def test_tables_can_be_sorted_and_read(parsed):
    for name, rows in parsed.tables.items():
        for row in rows if name else []:
            for tag, attrs, text in row:
                assert "scope" in attrs if tag == "th" else "scope" not in attrs
                found = re.match(r"[+−]?\d+(\.\d+)?", text)
                if tag == "td" and found and name != "settings":
                    assert float(attrs["data-value"]) == float(found[0].replace("−", "-"))
                elif tag == "td" and name != "settings":
                    assert "data-value" not in attrs and text in ("", "–", "paper")
    assert {attrs["lang"] for tag, attrs in parsed.elements if tag == "html"} == {"en"}


def test_all_of_it_is_there_without_the_script(parsed):
    hidden = [(tag, attrs) for tag, attrs in parsed.elements if "hidden" in attrs]
    assert hidden == [("form", {"class": "filters", "hidden": ""})]
    rows = [attrs for tag, attrs in parsed.elements if tag == "tr" and "data-model" in attrs]
    assert len(rows) == (1 + len(EVIL)) * (2 + len(EVIL))  # a row per model of each case
    offered = [attrs.get("value") for tag, attrs in parsed.elements if tag == "option"]
    assert {"failure", "exact", "part", "other", "copy", "empty", "missing"} <= {*offered}
    articles = [attrs["data-task"] for tag, attrs in parsed.elements if tag == "article"]
    assert {*articles} == {"seen: t", *(f"seen: {one.split(', ')[0]}" for one in EVIL)}


def test_figures_are_drawn_for_both_widths_and_their_text_is_text(parsed):
    images = [attrs for _, attrs in parsed.elements if attrs.get("role") == "img"]
    assert [attrs["class"] for attrs in images] == ["wide", "narrow"] * 4
    assert sum(tag == "svg" for tag, _ in parsed.elements) == 8
    assert "LoRA rank" in parsed.text and "Exact match (%)" in parsed.text
    sizes = [float(size.removesuffix("px")) for size in parsed.attributes("font-size")]
    assert min(sizes) >= 4.5  # the exponents of powers of ten


@pytest.mark.parametrize(
    "style",
    [
        "font: oblique 700 7.5px 'DejaVu Sans', sans-serif; fill: #ffffff",  # matplotlib 3.10
        "font-style: oblique; font-weight: 700; font-size: 7.5px; font-family: 'a'; fill: #ffffff",
    ],
)
def test_styles_of_figures_become_attributes(style):
    found = svg._attributes({"style": style, "id": "a"}, "figure1", set())
    wanted = {"font-style": "oblique", "font-weight": "700", "font-size": "7.5px"}
    assert found == wanted | {"fill": "#ffffff"}


def test_the_same_figure_gives_the_same_element():
    cells = grid([4, 64, None], ["T2", "T4"])
    study = Study.of(results(cells, tasks(2), linear), cells)
    numbers = summary(study)
    twice = [svg.element(figures.scaling(study, numbers), "f") for _ in range(2)]
    assert twice[0] == twice[1] and len(twice[0]) < 100_000


def test_the_papers_rows_stay_below_ours():
    cells = grid([4, 4096, None], PAPER_SETS[:1], rounds=1)
    study = Study.of(results(cells, tasks(2), linear, "llama-7b"), cells)
    table = scores_table(study, summary(study), "seen", PAPER_SETS[:1], "n", "t")
    text = page.page(Report("t", "l", [Section("s", [table])]), {})
    groups = re.findall(r"<tbody>(.*?)</tbody>", text, re.S)
    assert len(groups) == 3
    for group in groups:
        ours, papers = re.findall(r'<th scope="row"[^>]*>(.*?)</th>', group)
        assert ours in ("LoRA", "Full fine-tuning") and papers == "paper"


def test_many_long_cases_are_cut_and_thinned_out():
    long = "word " * 20_000
    cases = [case(task=f"t{i}, seen", input=long, answers={"full": "a b"}) for i in range(2_500)]
    studies = CaseStudies.of(cases)
    text = page.page(Report("t", "l", [Section("Figures", [studies])]), {})
    assert len(text.encode()) < page.LIMIT + 300_000
    shown = re.findall(r'data-task="seen: t(\d+)"', text)
    steps = np.diff(np.array(shown, int))
    assert len(shown) > 500 and (steps == steps[0]).all() and steps[0] > 1
    assert f"{len(shown)} of 2500 cases" in text and 'href="case_studies.html"' in text
    whole = page.case_page("t", CaseStudies.of(cases[:2]))
    assert whole.count(long) == 2


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ([("", "Model"), ("T4", ""), ("T8", "")], [["Model", "T4", "T8"]]),
        (
            [("", "Model"), ("T4", "EM"), ("T4", "R-L"), ("T8", "")],
            [["Model:2", "T4/2", "T8:2"], ["EM", "R-L"]],
        ),
    ],
)
def test_headers_span_their_groups(columns, said):
    table = Table("n", "c", columns, [], pd.DataFrame())
    text = page.page(Report("t", "l", [Section("s", [table])]), {})
    rows = [
        [
            text
            + (f"/{attrs['colspan']}" if "colspan" in attrs else "")
            + (f":{attrs['rowspan']}" if "rowspan" in attrs else "")
            for _, attrs, text in row
        ]
        for row in Page(text).tables["n"]
    ]
    assert rows == said


@pytest.mark.parametrize(
    ("wrote", "shown"),
    [
        ("T*100 | a", r"T\*100 \| a"),
        ("`code` ~~no~~ $x$", r"\`code\` \~\~no\~\~ \$x\$"),
        ("<script>a</script> p < 0.05", r"\<script>a\</script> p < 0.05"),
        ("<!-- a -->", r"\<!-- a -->"),
        ("&lt;b&gt; a & b", r"\&lt;b\&gt; a & b"),
        ("[a](javascript:b) [0.1, 0.2]", r"[a\](javascript:b) [0.1, 0.2]"),
        ("![a][b]", r"![a\][b]"),
        ("http://a.b www.a.b", r"http\://a.b www\.a.b"),
        ("_a_ task_one __init__", r"\_a\_ task_one \_\_init\_\_"),
        (r"a\|b", r"a\\\|b"),
        ("a\n# b\r\nc\td\u2028", r"a\\n# b\\r\\nc\\td\\u2028"),
        ("\x1b[31m\u202eb\x00", r"\\x1b[31m\\u202eb\\x00"),
        ("# a", r"\# a"),
        ("> a", r"\> a"),
        ("- a", r"\- a"),
        ("+ a", r"\+ a"),
        ("+4.50 [+1.00, +2.00]", "+4.50 [+1.00, +2.00]"),
        ("---", r"\---"),
        ("===", r"\==="),
        ("10. a", r"10\. a"),
        ("1.5", "1.5"),
    ],
)
def test_markdown_shows_what_was_written(wrote, shown):
    assert markdown(wrote) == shown


def test_a_reader_of_markdown_sees_what_was_written():
    """Random texts in paragraphs, lists and tables, as a CommonMark parser shows them."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark")
    parser.enable(["table", "strikethrough"])
    pieces = [
        *"*_`~[]()<>!&;#-+=.1|\\:/ $\"'ab\n\t",
        "&lt;",
        "www.",
        "http://",
        "<b>",
        "</b>",
        "<!--",
    ]
    pieces += ["![", "](", "---", "10. ", "    "]
    rng = np.random.default_rng(0)
    for _ in range(2_000):
        text = "".join(rng.choice(pieces, rng.integers(1, 12)))
        wanted = " ".join(text.replace("\n", "\\n").replace("\t", "\\t").split())
        if not wanted:
            continue
        cell = Table("n", "c", [("", "a"), ("", "b")], [["q", text]], pd.DataFrame()).markdown()
        said = {
            Paragraph(text.replace("\n", "\\n")).markdown(): r"<p>(.*)</p>\n",
            Bullets([text, "z"]).markdown(): r"<ul>\n<li>(.*)</li>\n<li>z</li>\n</ul>\n",
            cell: r".*<td>q</td>\n<td[^>]*>(.*)</td>\n</tr>\n</tbody>\n</table>\n",
        }
        for source, pattern in said.items():
            shown = re.fullmatch(pattern, parser.render(source), re.S)
            assert shown and "<" not in shown[1], (text, source)
            assert " ".join(html.unescape(shown[1]).split()) == wanted, (text, source)


def test_a_table_in_markdown_keeps_its_cells(tmp_path):
    rows = [["a | b", "1\n2", "`|`"], [r"\|", "<b>", "|"]]
    table = Table("n", "c", [("", "x"), ("", "y"), ("", "z")], rows, pd.DataFrame())
    text = table.markdown()
    assert len(text.splitlines()) == 2 + 4
    assert [len(row) for row in raw_cells("\n".join(text.splitlines()[2:]))] == [3] * 3
    assert len(cells_of(text)) == 2
