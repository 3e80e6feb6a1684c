"""A study's report: every table and figure, and what they say, in words with intervals.

The report is a list of sections; report.md and index.html are two prints of it, so that a part
that is added here is in both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from jax_lora.config import flatten
from jax_lora.errors import DataError
from jax_lora.files import read_json, read_jsonl, write_text
from jax_lora.study import (
    METRICS,
    TESTS,
    Frame,
    Study,
    figures,
    grid,
    measure_figures,
    page,
    rates,
    read,
    set_order,
)
from jax_lora.study.case_studies import CaseStudies
from jax_lora.study.choice import Choices
from jax_lora.study.config import AXES, read_axes
from jax_lora.study.estimates import LEVEL, MARGIN
from jax_lora.study.findings import findings
from jax_lora.study.measure_tables import capacity_table, measures_table
from jax_lora.study.runner import cell_folder
from jax_lora.study.sections import Bullets, File, Paragraph, Part, Picture, Report, Section
from jax_lora.study.set_findings import fixed_size_sets, plain_sets
from jax_lora.study.statistics import comparisons, measured, summary
from jax_lora.study.tables import Table, behaviour_table, comparison_table, scores_table

_CAPTIONS = {
    "figure1": "Figure 1. Scores against the rank; bands: ± the standard deviation over rounds.",
    "figure4": "Figure 4. Closed-label categories of unseen tasks (number of tasks) after training "
    "on the largest of these sets.",
    "figure5": "Figure 5. As many training examples from more and more tasks.",
    "measures": "Forgetting, and the weight update: effective rank and intruder dimensions per "
    "matrix.",
    "spectra": "Singular values of the weight updates, means over the matrices that have most.",
    "capacity": "Bits of random pairs that were learned by heart; the sets are numbers of tasks.",
    "costs": "Scores against the trainable share and against training operations (analytic).",
    "learning_rates": "Validation loss by rank × learning rate, the chosen rates framed; shades "
    "are each rank's own, from its lowest loss to its highest. ×: it diverged; ?: the trial failed "
    "for another reason.",
}
_BRACKETS = f"""\
Brackets are {100 * LEVEL:.0f}% intervals over tasks, for the models as they were trained; the end
says how to read them. Where an answer rests on a difference of scores, yes and no need an interval
without zero and p < 0.05, which six tasks or fewer seldom reach, and equality within 1 point needs
one inside ±1 point. The other answers say what they rest on. EM is exact match and R-L is Rouge-L,
in points."""
_METHOD = f"""\
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
    chosen_rates: Frame | None = None,
    updates: Frame | None = None,
    config: Mapping[str, object] | None = None,
    failures: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Path:
    """Write a study's tables, figures, case studies and findings.

        <folder>/report.md            findings in words, tables, figures, missing cells
                 index.html           the same as one page that needs no other file, for people
                 tables/*.md|tex|csv  summary.csv has every number, of all learning rates
                 figures/*.png|pdf    7 inches wide, and *_column 3.4
                 case_studies.html    where there are cases

    Args:
      results: `jax_lora.study.COLUMNS`.
      expected: the grid's cells, `jax_lora.study.GRID`.
      folder: made where it is missing; files of the same names are replaced.
      cases: see `CaseStudies.of`.
      chosen_rates: where learning rates were chosen, `choice.COLUMNS`.
      updates: updates.parquet, where there is one; its spectra are drawn.
      config: the study's, nested; the page shows it.
      failures: why a cell failed, by its id.
      seed: of the bootstrap and the sign flips; the same one gives the same files.

    Returns:
      The path of report.md.

    Raises:
      DataError: damaged results (see `jax_lora.study.check`) or cases.
    """
    study, folder = Study.of(results, expected), Path(folder)
    numbers, compared = summary(study, seed=seed), comparisons(study, seed=seed)
    measures, shown = measured(study), CaseStudies.of(cases)
    pictures = _pictures(study, numbers, measures, updates, chosen_rates)
    tried = rates.chosen_on(chosen_rates) if chosen_rates is not None else []
    found = findings(study, numbers, compared, seed=seed, chosen_on=tried)
    answers: list[Part] = [Paragraph(_BRACKETS), *found]
    if chosen_rates is not None:
        answers.append(rates.rank_or_rate(chosen_rates))
    made = Report(
        f"Rank × task set × round: {study.model}",
        _lead(study),
        [
            Section("Findings", answers),
            *([] if chosen_rates is None else [_learning_rates(study, chosen_rates)]),
            Section("Tables", _tables(study, numbers, compared, measures)),
            Section("Figures", [*pictures, *([shown] if cases else [])]),
            Section("Missing cells", [_missing(study, failures or {})]),
            Section("How to read the numbers", [Paragraph(_METHOD)]),
        ],
    )
    drawn = {}
    for part in (part for section in made.sections for part in section.parts):
        if isinstance(part, Table):
            part.write(folder / "tables")
        elif isinstance(part, Picture):
            drawn[part.name] = part.write(folder / "figures")
    numbers.to_csv(folder / "tables" / "summary.csv", index=False, lineterminator="\n")
    if cases:
        write_text(folder / "case_studies.html", page.case_page(made.title, shown))
    settings = [Section("Config", [_settings(config)])] if config else []
    write_text(folder / "index.html", page.page(made, drawn, settings))
    write_text(folder / "report.md", made.markdown())
    return folder / "report.md"


def write(workdir: Path) -> Path:
    """Write the report of a study from its results.parquet, study.json and cases.jsonl alone, and
    from rates.parquet and updates.parquet, where it chose learning rates and kept updates."""
    saved, cases = read_json(workdir / "study.json", dict), workdir / "cases.jsonl"
    axes = saved.get("config")
    if not isinstance(axes, dict) or not axes.keys() >= {*AXES}:
        raise DataError(f"{workdir / 'study.json'}: expected a config with {', '.join(AXES)}")
    chosen, updates = (
        pd.read_parquet(path) if path.is_file() else None
        for path in (workdir / "rates.parquet", workdir / "updates.parquet")
    )
    config = read_axes(axes)
    cells = grid.cells_of(config) if chosen is None else Choices.in_table(config, chosen).scored()
    cells = [cell for cell in cells if not cell.repeat]
    return report(
        read(workdir / "results.parquet"),
        grid.frame(cells),
        workdir / "report",
        cases=read_jsonl(cases) if cases.is_file() else [],
        chosen_rates=chosen,
        updates=updates,
        config=axes,
        failures=dict(_failures(workdir, cells)),
    )


def _failures(workdir: Path, cells: Iterable[grid.Cell]) -> Iterator[tuple[str, str]]:
    """The ids of those that failed and why, where the cells' folders are here."""
    for cell in cells:
        path = cell_folder(workdir, cell) / "failed.json"
        if path.is_file():
            yield cell.id, str(read_json(path, dict).get("reason", ""))


def _lead(study: Study) -> str:
    tests = study.rows.groupby("cell")["test"].nunique()
    finished = study.grid["cell"].isin(tests.index[tests == len(TESTS)])
    end = "." if finished.all() else ", the end lists what is missing."
    return f"{finished.sum()} of {len(finished)} cells are there{end}"


def _largest_set(study: Study) -> str:
    """The largest set that has results, one without a star if there is one."""
    plain = plain_sets(study)
    return max(study.rows["set"].unique(), key=lambda name: (name in plain, set_order(name)))


def _tables(study: Study, numbers: Frame, compared: Frame, measures: Frame) -> list[Part]:
    """All tables, and where their numbers are."""
    plain, fixed, largest = plain_sets(study), fixed_size_sets(study), _largest_set(study)
    made: list[Part] = []
    for number, test in enumerate(TESTS, 1):
        name, title = f"table{number}", f"Table {number}"
        made.append(scores_table(study, numbers, test, plain, name, title))
    for test in TESTS:
        if not figures.with_results(numbers, fixed).empty:
            name, title = f"table3_{test}", "As many examples of more and more tasks"
            made.append(scores_table(study, numbers, test, fixed, name, title))
        made.append(behaviour_table(study, test, largest))
        if not compared.empty:
            made += [comparison_table(study, compared, test, metric) for metric in METRICS]
    found = (capacity_table(study, measures), measures_table(study, measures, largest))
    made += [table for table in found if table]
    return [*made, File("All numbers, in full precision", "tables/summary.csv")]


def _learning_rates(study: Study, found: Frame) -> Section:
    """The learning rates that were chosen."""
    made = rates.choices(found)
    parts: list[Part] = [rates.choices_table(made, study.model)]
    lines = [*rates.statements(found, made)]
    return Section("Learning rates", [*([Bullets(lines)] if lines else []), *parts])


def _pictures(
    study: Study,
    numbers: Frame,
    measures: Frame,
    updates: Frame | None,
    chosen_rates: Frame | None,
) -> list[Picture]:
    """All figures that the study has results for."""
    largest, fixed = _largest_set(study), fixed_size_sets(study)
    has_plain = not figures.with_results(numbers, plain_sets(study)).empty
    drawings = {"figure1": partial(figures.scaling, study, numbers)} if has_plain else {}
    closed = study.scores(largest, "unseen", "exact_match", closed=True)
    if {*closed.columns} & {*study.configs(variant="")}:
        drawings["figure4"] = partial(figures.categories, study, "unseen", largest)
    if len(fixed) > 1 and not figures.with_results(numbers, fixed, [""]).empty:
        drawings["figure5"] = partial(figures.fixed_size, study, numbers, fixed)
    if has_plain:
        drawings["costs"] = partial(figures.costs, study, numbers)
    drawings |= _drawings_of_measures(study, measures, updates, largest)
    made = [Picture(name, _CAPTIONS[name], draw) for name, draw in drawings.items()]
    for name in _sets_with_rates(chosen_rates):
        draw = partial(figures.learning_rates, chosen_rates, name)
        file = f"learning_rates_{name.replace('*', 'x')}"
        made.append(Picture(file, _CAPTIONS["learning_rates"], draw))
    return made


def _drawings_of_measures(
    study: Study, measures: Frame, updates: Frame | None, largest: str
) -> dict[str, partial[Figure]]:
    drawings: dict[str, partial[Figure]] = {}
    if measures["memorized_bits"].notna().any():
        drawings["capacity"] = partial(measure_figures.capacity, study, measures)
    if measures[["forgetting", "effective_rank"]].notna().any(axis=None):
        drawings["measures"] = partial(measure_figures.measures, study, measures)
    if updates is not None and measure_figures.mean_spectra(study, updates, largest):
        drawings["spectra"] = partial(measure_figures.spectra, study, updates, largest)
    return drawings


def _sets_with_rates(chosen_rates: Frame | None) -> list[str]:
    """The sets on which the plain recipe has tried rates."""
    if chosen_rates is None:
        return []
    tried = chosen_rates[(chosen_rates["variant"] == "") & (chosen_rates["repeat"] == 0)]
    for name in tried["set"]:
        if not re.fullmatch(r"T\*?(\d+|all)", name):  # it becomes the name of a file
            raise DataError(f"rates: found the set {name!r}, expected names such as T100 or T*100")
    return sorted({*tried["set"]}, key=set_order)


def _missing(study: Study, failures: Mapping[str, str]) -> Part:
    there = {test: set(study.rows[study.rows["test"] == test]["cell"]) for test in TESTS}
    lines = []
    for name in study.sets:
        cells = study.grid[study.grid["set"] == name]["cell"]
        for test in TESTS:
            if absent := [cell for cell in cells if cell not in there[test]]:
                lines.append(f"{name}, {test}: {', '.join(absent)}")
    known = [cell for cell in study.grid["cell"] if cell in failures]
    lines += [f"{cell} failed: {failures[cell]}" for cell in known]
    return Bullets(lines) if lines else Paragraph("None.")


def _settings(config: Mapping[str, object]) -> Table:
    rows = [(key, json.dumps(value, ensure_ascii=False)) for key, value in flatten(dict(config))]
    columns = [("", "Key"), ("", "Value")]
    caption = "The study's config, as study.json has it: config.run is what all cells share."
    return Table("settings", caption, columns, rows, pd.DataFrame(rows))
