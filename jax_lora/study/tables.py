"""Tables of a study as Markdown, LaTeX and CSV.

Tables 1 and 2 have the paper's layout. A mean of fewer rounds than the grid plans says so: (2/3).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from jax_lora.study import METRICS, Frame, Study, paper
from jax_lora.study.estimates import FEWEST_TASKS, MARGIN, signed
from jax_lora.study.statistics import ALL_TASKS, CLOSED_LABEL, behaviour
from jax_lora.text import markdown, table, tex

MISSING = "–"
MARKS = {"higher": " ↑", "lower": " ↓", "undecided": "", "too few tasks": ""}  # else equal
LABELS = {
    "out_of_options": "out of options", "exact_match": "EM",
    "exact_match_given_valid": "EM if valid", "majority_baseline": "majority label",
    "top_answer_share": "top answer", "answer_entropy": "entropy (bits)",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A table for reading, and the numbers behind it.

    `columns` are pairs of a group ("" for none) and a name; `rows` hold finished text; `data` is
    what the CSV file has, in full precision and often with more rows. `beneath` are rows, counted
    from 0, that belong to the one above, wherever a reader sorts it.
    """

    name: str
    caption: str
    columns: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[str]]
    data: Frame = field(repr=False)
    beneath: Collection[int] = ()

    def markdown(self) -> str:
        """The table as GitHub's Markdown, its caption above it."""
        header = [f"{group} {name}".strip() for group, name in self.columns]
        return f"{markdown(self.caption)}\n\n{table(header, self.rows, 'markdown')}"

    def latex(self) -> str:
        """The table as a `table*` environment; it needs the packages booktabs and adjustbox."""
        groups = [tex_set(group) for group, _ in self.columns]
        tabular = table([name for _, name in self.columns], self.rows, "latex", groups)
        return (
            "\\begin{table*}\n\\centering\\small\n\\begin{adjustbox}{max width=\\textwidth}\n"
            f"{tabular}\\end{{adjustbox}}\n\\caption{{{tex(self.caption)}}}\n"
            f"\\label{{tab:{self.name}}}\n\\end{{table*}}\n"
        )

    def write(self, folder: Path) -> None:
        """Write NAME.md, NAME.tex and NAME.csv."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.md").write_text(self.markdown(), encoding="utf-8")
        (folder / f"{self.name}.tex").write_text(self.latex(), encoding="utf-8")
        self.data.to_csv(folder / f"{self.name}.csv", index=False, lineterminator="\n")


def scores_table(
    study: Study, numbers: Frame, test: str, sets: Sequence[str], name: str, title: str
) -> Table:
    """Exact match and Rouge-L of all configurations at their main rates: the paper's Tables 1, 2.

    Args:
      study: checked rows and grid.
      numbers: `statistics.summary`.
      test: "seen" or "unseen".
      sets: what was trained on, the groups of columns.
      name: of the files.
      title: the caption's first words.
    """
    shown = numbers[(numbers["test"] == test) & numbers["set"].isin(sets)]
    main = shown[shown["main"]]
    papers = main["exact_match_paper"].notna().any()
    rows: list[list[str]] = []
    beneath = []
    for config in study.configs():
        group = main[main["config"] == config].set_index("set")
        if group.empty:
            continue
        first = group.iloc[0]
        row = [_method(first), "" if pd.isna(first["rank"]) else str(first["rank"])]
        share = _number(group["trainable_percent"].mean(), ".3f", "%")
        row += [share.replace("100.000", "100")]
        row += [_number(100 * group["relative_operations"].mean(), ".0f", "%")]
        below = ["paper" if papers else "", row[1], _papers_share(first), ""]
        for name_of_set in sets:
            cell = group.loc[name_of_set] if name_of_set in group.index else None
            row += [_score(cell, metric) for metric in METRICS]
            below += [_beside(cell, metric) for metric in METRICS]
        rows.append(row)
        if any(below[4:]):
            beneath.append(len(rows))
            rows.append(below)
    columns = [("", "Method"), ("", "Rank"), ("", "Trainable"), ("", "Operations")]
    columns += [(name_of_set, label) for name_of_set in sets for label in METRICS.values()]
    found = main[main["rounds"] > 0].groupby("method", sort=False)["learning_rate"].unique()
    rates_text = "; ".join(
        f"{m} {', '.join(f'{r:g}' for r in sorted(f))}" for m, f in found.items()
    )
    caption = (
        f"{title}: exact match (EM) and Rouge-L (R-L) on the {test} test set, {study.model}. Means "
        "over examples, ± the standard deviation over rounds. (2/3): two of three planned rounds "
        f"are there; {MISSING}: none is. Trainable: of all parameters. Operations: of training, "
        "analytic, relative to full fine-tuning."
    )
    caption += f" Learning rates: {rates_text}." if rates_text else ""
    if papers:
        rates = "; ".join(f"{k} {v:g}" for k, v in paper()["learning_rate"].items())
        caption += (
            f" Below each row the paper's figures (ours less the paper's; its rates: {rates})."
        )
    return Table(name, caption, columns, rows, shown, beneath)


def behaviour_table(study: Study, test: str, name_of_set: str) -> Table:
    """What the answers of the models of one set are like; the CSV has all sets and tests."""
    data = behaviour(study)
    cells = data[(data["test"] == test) & (data["set"] == name_of_set)].set_index("config")
    planned = study.grid[study.grid["set"] == name_of_set].groupby("config").size()
    rows = []
    for config in study.configs():
        if config in planned.index:
            cell = cells.loc[config] if config in cells.index else None
            rounds = 0 if cell is None else cell["rounds"]
            few = f" ({rounds}/{planned[config]})" if 0 < rounds < planned[config] else ""
            values = [
                MISSING if cell is None else _number(cell[n], ".2f" if "entropy" in n else ".1f")
                for n in (*CLOSED_LABEL, *ALL_TASKS)
            ]
            rows.append([config + few, *values])
    caption = (
        f"Answers on the {test} test set after training on {name_of_set}, {study.model}: percent "
        "of answers, and the entropy of a task's answers in bits; means over examples, then "
        "rounds. Left: closed-label tasks only; right: all tasks."
    )
    columns = [("", "Model")]
    columns += [("closed-label tasks:", LABELS[name]) for name in CLOSED_LABEL]
    columns += [("all tasks:", name) for name in ALL_TASKS]
    return Table(f"behaviour_{test}", caption, columns, rows, data)


def comparison_table(study: Study, data: Frame, test: str, metric: str) -> Table:
    """LoRA less full fine-tuning with intervals, one column per set.

    Args:
      study: checked rows and grid.
      data: `statistics.comparisons`.
      test: "seen" or "unseen".
      metric: "exact_match" or "rougeL".
    """
    compared = data[(data["test"] == test) & (data["metric"] == metric)]
    found = compared.set_index(["config", "set"]).to_dict("index")
    planned = study.grid.groupby(["config", "set"]).size()
    rows = []
    for config in study.configs("lora"):
        keys = [(config, name) for name in study.sets]
        rows.append([config, *(_difference(found.get(k), planned.get(k)) for k in keys)])
    caption = (
        f"LoRA less full fine-tuning, {METRICS[metric]} on the {test} test set, {study.model}: "
        "points with 95% intervals, paired over tasks and rounds. ↑ higher, ↓ lower (p < 0.05 by "
        "sign flips over tasks, not corrected for the number of comparisons); = equal within "
        f"{MARGIN:g} point; no mark: undecided, or fewer than {FEWEST_TASKS} tasks."
    )
    columns = [("", "Model")] + [(name, "") for name in study.sets]
    return Table(f"lora_against_full_{test}_{metric}", caption, columns, rows, compared)


def tex_set(name: str) -> str:
    """A set's name as mathematics: T*100 becomes $T^*_{100}$."""
    if not name.startswith("T") or " " in name:
        return tex(name)
    star, rest = ("^*", name[2:]) if name[1:2] == "*" else ("", name[1:])
    return f"$T{star}_{{\\mathrm{{{tex(rest)}}}}}$"


def _method(row: Mapping) -> str:
    name = "LoRA" if row["method"] == "lora" else "Full fine-tuning"
    return f"{name}, {row['variant']}" if row["variant"] else name


def _number(value: float, form: str, unit: str = "") -> str:
    return MISSING if pd.isna(value) else f"{value:{form}}{unit}"


def _score(cell: Mapping | None, metric: str) -> str:
    """Empty where the grid plans nothing, a dash where it does and nothing is there."""
    if cell is None:
        return ""
    text = _number(cell[metric], ".2f")
    if not pd.isna(cell[f"{metric}_std"]):
        text += f" ± {cell[f'{metric}_std']:.2f}"
    if 0 < cell["rounds"] < cell["expected_rounds"]:
        text += f" ({cell['rounds']}/{cell['expected_rounds']})"
    return text


def _beside(cell: Mapping | None, metric: str) -> str:
    if cell is None or pd.isna(there := cell[f"{metric}_paper"]):
        return ""
    difference = cell[f"{metric}_difference"]
    return f"{there:.2f}" + ("" if pd.isna(difference) else f" ({signed(difference)})")


def _papers_share(row: Mapping) -> str:
    for known in paper()["rows"]:
        if known["method"] == row["method"] == "lora" and known["rank"] == row["rank"]:
            return f"{known['trainable_percent']:.3f}%"
    return ""


def _difference(found: Mapping | None, planned: int | None) -> str:
    if not planned:
        return ""
    if found is None:
        return MISSING
    few = f" ({found['rounds']}/{planned})" if found["rounds"] < planned else ""
    interval = f"[{signed(found['low'])}, {signed(found['high'])}]"
    return f"{signed(found['difference'])} {interval}{MARKS.get(found['verdict'], ' =')}{few}"
