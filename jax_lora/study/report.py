"""A study's report: every table and figure, and what they say, in words with intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from jax_lora.errors import DataError
from jax_lora.files import read_json, read_jsonl
from jax_lora.study import METRICS, TESTS, Frame, Study, figures, grid, plotting, read, set_order
from jax_lora.study.case_studies import case_studies
from jax_lora.study.config import AXES, read_axes
from jax_lora.study.estimates import LEVEL, MARGIN
from jax_lora.study.findings import findings, fixed_size_sets, plain_sets
from jax_lora.study.statistics import comparisons, summary
from jax_lora.study.tables import Table, behaviour_table, comparison_table, scores_table
from jax_lora.text import markdown

_CAPTIONS = {
    "figure1": "Figure 1. Scores against the rank; bands: ± the standard deviation over rounds.",
    "figure4": "Figure 4. Closed-label categories of unseen tasks (number of tasks) after training "
    "on the largest of these sets.",
    "figure5": "Figure 5. As many training examples from more and more tasks.",
    "costs": "Scores against the trainable share and against training operations (analytic).",
    "learning_rates": "Rank × learning rate, each rank's best rate framed, or all that tie: the "
    "best on the very test set shown, so its score is no fair estimate. \\*: rounds are missing.",
}
_METHOD = f"""## How to read the numbers

Scores are percentages and means over examples; tables/summary.csv also has means over tasks.
± is the sample standard deviation over rounds. Brackets are {100 * LEVEL:.0f}% bootstrap intervals
over tasks and p-values come from flipping the signs of tasks, the rounds of a task kept together:
they say how far a difference between these trained models carries over to other tasks, not what
training once more would change. Comparisons are paired over the tasks and rounds that both sides
have, and are not corrected for their number. Equal means that the whole interval lies within
{MARGIN:g} point; an undecided difference is no proof of equality. Each round has seen test tasks of
its own, so ± on seen tasks is largely theirs. In figures a gap is a missing cell, a hollow marker a
mean of fewer rounds than planned."""


def report(
    results: Frame,
    expected: Frame,
    folder: str | Path,
    *,
    cases: Sequence[Mapping] = (),
    seed: int = 0,
) -> Path:
    """Write a study's tables, figures, case studies and findings.

        <folder>/report.md            findings in words, tables, figures, missing cells
                 tables/*.md|tex|csv  summary.csv has every number, of all learning rates
                 figures/*.png|pdf    7 inches wide, and *_column 3.4
                 case_studies.html    where there are cases

    Args:
      results: `jax_lora.study.COLUMNS`.
      expected: the grid's cells, `jax_lora.study.GRID`.
      folder: made where it is missing; files of the same names are replaced.
      cases: see `case_studies`.
      seed: of the bootstrap and the sign flips; the same one gives the same files.

    Returns:
      The path of report.md.

    Raises:
      DataError: damaged results (see `jax_lora.study.check`) or cases.
    """
    study, folder = Study.of(results, expected), Path(folder)
    page = case_studies(cases) if cases else ""
    numbers, compared = summary(study, seed=seed), comparisons(study, seed=seed)
    sections = [
        _head(study),
        "## Findings",
        *findings(study, numbers, compared, seed=seed),
        "## Tables",
        _write_tables(study, numbers, compared, folder / "tables"),
        "## Figures",
        _write_figures(study, numbers, folder / "figures"),
    ]
    if page:
        (folder / "case_studies.html").write_text(page, encoding="utf-8")
        sections.append("[Case studies](case_studies.html)")
    sections += ["## Missing cells", _missing(study), _METHOD]
    path = folder / "report.md"
    path.write_text("\n\n".join(part.rstrip() for part in sections) + "\n", encoding="utf-8")
    return path


def write(workdir: Path) -> Path:
    """Write the report of a study from its results.parquet, study.json and cases.jsonl alone."""
    saved, cases = read_json(workdir / "study.json", dict), workdir / "cases.jsonl"
    axes = saved.get("config")
    if not isinstance(axes, dict) or not axes.keys() >= {*AXES}:
        raise DataError(f"{workdir / 'study.json'}: expected a config with {', '.join(AXES)}")
    cells = grid.frame(grid.cells_of(read_axes(axes)))
    answers = read_jsonl(cases) if cases.is_file() else []
    found = read(workdir / "results.parquet")
    return report(found, cells, workdir / "report", cases=answers)


def _head(study: Study) -> str:
    tests = study.rows.groupby("cell")["test"].nunique()
    finished = study.grid["cell"].isin(tests.index[tests == len(TESTS)])
    end = "." if finished.all() else ", the end lists what is missing."
    return (
        f"# Rank × task set × round: {study.model}\n\n"
        f"{finished.sum()} of {len(finished)} cells are there{end}"
    )


def _largest_set(study: Study) -> str:
    """The largest set that has results, one without a star if there is one."""
    plain = plain_sets(study)
    return max(study.rows["set"].unique(), key=lambda name: (name in plain, set_order(name)))


def _write_tables(study: Study, numbers: Frame, compared: Frame, folder: Path) -> str:
    """Write all tables; those of the report as Markdown."""
    plain, fixed, largest = plain_sets(study), fixed_size_sets(study), _largest_set(study)
    written: list[Table] = []
    for number, test in enumerate(TESTS, 1):
        name, title = f"table{number}", f"Table {number}"
        written.append(scores_table(study, numbers, test, plain, name, title))
    for test in TESTS:
        if fixed:
            name, title = f"table3_{test}", "As many examples of more and more tasks"
            written.append(scores_table(study, numbers, test, fixed, name, title))
        written.append(behaviour_table(study, test, largest))
        written += [comparison_table(study, compared, test, metric) for metric in METRICS]
    for table in written:
        table.write(folder)
    numbers.to_csv(folder / "summary.csv", index=False, lineterminator="\n")
    texts = [table.markdown().rstrip() for table in written]
    return "\n\n".join([*texts, "All numbers, in full precision: `tables/summary.csv`."])


def _write_figures(study: Study, numbers: Frame, folder: Path) -> str:
    """Draw all figures, at both widths; their images and captions as Markdown."""
    largest, fixed = _largest_set(study), fixed_size_sets(study)
    pictures: dict[str, Callable[..., Figure]] = {
        "figure1": partial(figures.scaling, study, numbers)
    }
    if not study.scores(largest, "unseen", "exact_match", closed=True).empty:
        pictures["figure4"] = partial(figures.categories, study, "unseen", largest)
    if fixed:
        pictures["figure5"] = partial(figures.fixed_size, study, numbers, fixed)
    pictures["costs"] = partial(figures.costs, study, numbers)
    for name in _sets_with_rates(study):
        draw = partial(figures.learning_rates, study, numbers, name)
        pictures[f"learning_rates_{name.replace('*', 'x')}"] = draw
    texts = []
    for name, draw in pictures.items():
        plotting.save(draw(width=plotting.TEXT), folder / name)
        plotting.save(draw(width=plotting.COLUMN), folder / f"{name}_column")
        caption = _CAPTIONS.get(name, _CAPTIONS["learning_rates"])
        texts.append(f"![{name}](figures/{name}.png)\n\n{caption}")
    return "\n\n".join(texts)


def _sets_with_rates(study: Study) -> list[str]:
    recipe = study.grid[study.grid["variant"] == ""]
    rates = recipe.groupby(["set", "method", "rank"], dropna=False)["learning_rate"].nunique()
    varied = rates.groupby("set").max()
    return [name for name in study.sets if varied.get(name, 0) > 1]


def _missing(study: Study) -> str:
    there = {test: set(study.rows[study.rows["test"] == test]["cell"]) for test in TESTS}
    lines = []
    for name in study.sets:
        cells = study.grid[study.grid["set"] == name]["cell"]
        for test in TESTS:
            if absent := [cell for cell in cells if cell not in there[test]]:
                lines.append(f"- {markdown(f'{name}, {test}: ' + ', '.join(absent))}")
    return "\n".join(lines) or "None."
