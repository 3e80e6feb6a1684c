"""What a study says in words, its report and its case studies, and what damaged results say."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from jax_lora.study import Study, paper, paper_findings, read
from jax_lora.study.case_studies import CaseStudies
from jax_lora.study.estimates import Estimate, verdict
from jax_lora.study.findings import findings
from jax_lora.study.report import report, write
from jax_lora.study.set_findings import (
    fixed_size_sets,
    more_examples,
    more_tasks,
    set_findings,
)
from jax_lora.study.statistics import comparisons, summary
from jax_lora.study.tables import comparison_table
from tests.conftest import REPOSITORY
from tests.study.test_tables import PAPER_SETS, cells_of, grid, linear, results, tasks

RANKS = [4, 8, 16, 32, 64, None]
SETS = ["T2", "T4", "T8", "T*2", "T*8"]
CLOSED = dict(closed_label=True, majority_baseline=40.0)


def form_first(cell, test, task):
    """On unseen tasks out-of-options answers fall at once, and accuracy rises from rank 16 on."""
    doublings = np.log2((cell["rank"] or 64) / 4)
    found = linear(cell, test, task)
    if test == "unseen":
        found["exact_match"] = [20.0, 20.0, 20.0, 26.0, 30.0][int(doublings)]
        found["out_of_options"] = 40.0 / 4**doublings
        found["top_answer_share"] = 90.0 - 10 * doublings
    else:
        found["out_of_options"] = 5.0
        found["exact_match"] -= {"T*8": 3.0}.get(cell["set"], 0.0)
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    cells = grid(RANKS, SETS)
    varied = grid([4, 64], ["T2"], rounds=1, rate=1e-3)
    cells = pd.concat([cells, varied], ignore_index=True)
    rows = results(cells, tasks(8, **CLOSED), form_first)
    rows = rows[(rows["cell"] != "lora-r8-T4-1") & ~rows["cell"].str.startswith("full-T8")]
    rows = rows[(rows["cell"] != "lora-r32-T2-0") | (rows["test"] == "seen")]
    folder = tmp_path_factory.mktemp("report") / "new"
    path = report(rows, cells, folder, cases=[case()])
    return folder, path.read_text("utf-8"), Study.of(rows, cells)


def words(study: Study) -> dict[str, list[str]]:
    """The findings' lines by question."""
    found = findings(study, summary(study), comparisons(study))
    for one in found:
        lines = one.markdown().replace("\\", "").splitlines()
        wanted = [f"**{one.question}**", "", *(f"- {answer}" for answer in one.answers)]
        if one.paper:
            wanted += ["", "The paper, LLaMA-7B", "", *(f"- {line}" for line in one.paper)]
        assert lines == wanted
    return {one.question: [f"- {answer}" for answer in one.answers] for one in found}


def test_everything_is_written_and_what_is_linked_exists(written):
    folder, text, _ = written
    names = {path.stem for path in (folder / "figures").iterdir()}
    pictures = {"figure1", "figure4", "figure5", "costs"}
    assert names == pictures | {f"{name}_column" for name in pictures}
    assert len(list((folder / "figures").iterdir())) == 16
    tables = [path.name for path in (folder / "tables").iterdir()]
    for stem in ("table1", "table2", "table3_seen", "behaviour_unseen"):
        assert {f"{stem}.md", f"{stem}.tex", f"{stem}.csv"} <= {*tables}
        assert (folder / "tables" / f"{stem}.md").read_text("utf-8") in text
    assert len(pd.read_csv(folder / "tables" / "summary.csv")) == 2 * (6 * 5 + 2)
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert "case_studies.html" in links and len(links) == 5
    assert all((folder / link).is_file() for link in links)


def test_missing_cells_are_listed(written):
    _, text, _ = written
    assert "87 of 92 cells are there, the end lists" in text
    missing = text.partition("## Missing cells\n\n")[2].partition("\n\n")[0].splitlines()
    assert missing == [
        "- T2, unseen: lora-r32-T2-0",
        "- T4, seen: lora-r8-T4-1",
        "- T4, unseen: lora-r8-T4-1",
        "- T8, seen: full-T8-0, full-T8-1, full-T8-2",
        "- T8, unseen: full-T8-0, full-T8-1, full-T8-2",
    ]
    assert "27.00 ± 1.41 (2/3)" in text


def test_a_missing_cell_says_why_it_failed(tmp_path):
    cells = grid([4, 8], ["T2"], rounds=1)
    rows = results(cells, tasks(2), linear)
    rows = rows[rows["cell"] != "lora-r8-T2-0"]
    failures = {"lora-r8-T2-0": "the loss of step 7 is not finite", "elsewhere": "-"}
    text = report(rows, cells, tmp_path, failures=failures).read_text("utf-8")
    missing = text.partition("## Missing cells\n\n")[2].partition("\n\n")[0].splitlines()
    assert missing[2:] == ["- lora-r8-T2-0 failed: the loss of step 7 is not finite"]


def test_sets_are_compared_at_rates_that_one_of_them_chose():
    cells = grid([4], ["T2", "T*2"], rounds=1)
    own = Study.of(results(cells, tasks(8), linear), cells)
    last = "The learning rates were chosen on T2 and not on T*2, so a difference may in part be one"
    for chosen_on, said in (((), False), (("T2",), True), (("T2", "T*2"), False)):
        (found,) = set_findings(own, 0, chosen_on)
        assert found.answers[-1].startswith(last) is said


def test_findings_by_hand(written):
    said = words(written[2])
    assert list(said)[4:] == [
        "Do more tasks with as many examples of each help, T2 to T8?",
        "Do more tasks with as many examples in all help, T*2 to T*8?",
        "Do more examples of the same tasks help, T2 to T*2?",
        "Do more examples of the same tasks help, T8 to T*8?",
    ]
    helps, capacity, form, reach, _, more, *_ = said.values()
    assert helps[0] == (
        "- T2: yes. EM +8.00 [+8.00, +8.00] from rank 4 to rank 64, +2.00 [+2.00, +2.00] per "
        "doubling, up in 4 of 4 steps; R-L +8.00 [+8.00, +8.00] from rank 4 to rank 64, +2.00 "
        "[+2.00, +2.00] per doubling, up in 4 of 4 steps (8 tasks, 3 rounds)."
    )
    assert helps[1].endswith("(8 tasks, 2 rounds).")  # T4 lacks a round of rank 8
    assert capacity[2] == (
        "- T8: yes, the larger ranks bring more. EM +0.00 [+0.00, +0.00] per doubling up to rank "
        "16, +5.00 [+5.00, +5.00] above; difference +5.00 [+5.00, +5.00], p = 0.008 (8 tasks, 3 "
        "rounds). On seen tasks +2.00 [+2.00, +2.00] and +2.00 [+2.00, +2.00]."
    )
    # Progress at ranks 8, 16, 32: 192/255, 240/255, 252/255 against 0, 0 and 3/5.
    lead = (192 + 240 + 252) / 255 / 3 - 0.6 / 3
    assert form[2] == (
        f"- T8: yes: they are ahead by +{lead:.2f} [+{lead:.2f}, +{lead:.2f}] of the whole way, "
        "half of it done by rank 8 and rank 32. From rank 4 to rank 64 out of options −39.84 "
        "[−39.84, −39.84], EM +10.00 [+10.00, +10.00] (8 tasks, 3 rounds). Levels: rank 4 40.0% "
        "out of options, EM 20.0, most frequent answer 90.0%; rank 64 0.2% out of options, EM "
        "30.0, most frequent answer 50.0%. Always the majority label: EM 40.0."
    )
    assert reach[0] == (
        "- T2, seen: yes at rank 64. EM lower at 4, 8, 16, 32, equal within 1 point at 64; R-L "
        "lower at 4, 8, 16, 32, equal within 1 point at 64; rank 64 less full EM +0.00 [+0.00, "
        "+0.00], p = 1.000 (8 tasks, 3 rounds): equal within 1 point."
    )
    assert reach[2] == (
        "- T8, seen: cannot be said, LoRA and full fine-tuning have no round in common."
    )
    assert more[-1] == (
        "- full: on seen tasks no, it harms by EM, no, equal within 1 point by R-L: EM −3.00 "
        "[−3.00, −3.00], R-L +0.00 [+0.00, +0.00] (8 tasks, 3 rounds); on unseen tasks no, equal "
        "within 1 point: EM +0.00 [+0.00, +0.00], R-L +0.00 [+0.00, +0.00] (8 tasks, 3 rounds)."
    )


def test_findings_say_no_as_readily():
    def falls(cell, test, task):
        doublings = np.log2((cell["rank"] or 64) / 4)
        score = 50.0 - 3 * doublings if test == "seen" else 20.0 + 6 * doublings**0.5
        return {"exact_match": score, "rougeL": score, "out_of_options": 5 + doublings}

    cells = grid(RANKS, ["T2"])
    said = words(Study.of(results(cells, tasks(8, **CLOSED), falls), cells))
    helps, capacity, form, reach = said.values()
    assert helps[0].startswith("- T2: no, it harms. EM −12.00 ")
    assert capacity[0].startswith("- T2: no, the smaller bring more. EM +4.24 ")
    assert form[0].startswith("- T2: no, out-of-options answers do not fall while accuracy rises.")
    reached = "yes at rank 4, rank 8, rank 16, rank 32, rank 64"
    assert reach[0].startswith(
        f"- T2, seen: {reached}. EM higher at 4, 8, 16, 32, equal within 1 point at 64"
    )


def test_findings_do_not_say_what_the_data_do_not():
    def same(cell, test, task):
        """Half of the tasks rise with the rank as the other half falls."""
        sign = 1 if int(task["task"][1:]) % 2 else -1
        score = 30.0 + 3 * sign * np.log2((cell["rank"] or 64) / 4)
        return {"exact_match": score, "rougeL": score, "out_of_options": score}

    cells = grid(RANKS, ["T2"], rounds=1)
    said = words(Study.of(results(cells, tasks(8, **CLOSED), same), cells))
    helps, capacity, form, _ = said.values()
    assert helps[0].startswith("- T2: undecided. ")
    assert capacity[0].startswith("- T2: undecided whether more rank helps at all (")
    assert form[0].startswith("- T2: cannot be said, one of the two may not change")
    few = words(Study.of(results(cells, tasks(3), linear), cells))
    assert next(iter(few.values()))[0].startswith("- T2: too few tasks to tell. ")


def test_one_starred_set_goes_with_the_plain_one_of_its_size():
    cells = grid([4, None], ["T100", "T250", "T*100"])
    study = Study.of(results(cells, tasks(8), linear), cells)
    assert fixed_size_sets(study) == ["T*100", "T250"]  # 25,000 examples each
    assert more_examples(study) == [("T100", "T*100")]
    said = words(study)
    assert "Do more tasks with as many examples in all help, T*100 to T250?" in said
    same = "tasks no, equal within 1 point: EM +0.00 [+0.00, +0.00], R-L +0.00 [+0.00, +0.00]"
    assert said["Do more examples of the same tasks help, T100 to T*100?"][0] == (
        f"- rank 4: on seen {same} (8 tasks, 3 rounds); on unseen {same} (8 tasks, 3 rounds)."
    )


def test_only_sets_with_results_and_as_many_examples_of_each_task_are_compared():
    cells = grid([4, None], ["T100", "T250", "T500", "T*100"])
    rows = results(cells, tasks(8), linear)
    assert more_tasks(Study.of(rows, cells)) == ("T100", "T500")
    assert more_tasks(Study.of(rows[rows["set"] != "T500"], cells)) == ("T100", "T250")
    alone = Study.of(rows[rows["set"] == "T100"], cells)
    assert more_tasks(alone) is None and not any("more tasks" in name for name in words(alone))
    doubled = rows["train_examples"] * (1 + (rows["set"] == "T250"))
    assert more_tasks(Study.of(rows.assign(train_examples=doubled), cells)) == ("T100", "T500")
    half = rows[(rows["set"] == "T100") & (rows["method"] == "lora") | (rows["method"] == "full")]
    half = half[(half["set"] == "T100") | (half["set"] == "T500")]
    (said,) = [v for k, v in words(Study.of(half, cells)).items() if k.endswith("T100 to T500?")]
    assert [line[:7] for line in said] == ["- full:"]  # rank 4 lacks T500


def test_what_covers_zero_is_undecided():
    """Half of the tasks gain as much from more examples as the other half loses."""

    def mixed(cell, test, task):
        sign = 1 if int(task["task"][1:]) % 2 else -1
        score = 40.0 + 5 * sign * ("*" in cell["set"])
        return {"exact_match": score, "rougeL": score}

    cells = grid([4, None], ["T2", "T*2"])
    (said,) = [
        lines
        for question, lines in words(Study.of(results(cells, tasks(8), mixed), cells)).items()
        if question == "Do more examples of the same tasks help, T2 to T*2?"
    ]
    assert [line.partition(": ")[2].partition(":")[0] for line in said] == [
        "on seen tasks undecided"
    ] * 2


def test_the_smallest_study(tmp_path):
    cells = grid([4], ["T2"], rounds=1)
    text = report(results(cells, tasks(1), linear), cells, tmp_path).read_text("utf-8")
    assert text.count("cannot be said") == 5 and "## Missing cells\n\nNone." in text
    assert not (tmp_path / "case_studies.html").exists()
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {
        "figure1", "figure1_column", "costs", "costs_column"
    }  # fmt: skip


def test_the_paper_is_compared_with_where_it_can_be():
    cells = grid([4, 4096, None], PAPER_SETS[:1])
    shift = {4: 1.0, 4096: -2.0, None: 0.0}
    papers = {4: (29.86, 43.59), 4096: (50.55, 64.74), None: (51.57, 64.70)}

    def near(cell, test, task):
        means = papers[cell["rank"]]
        return dict(zip(("exact_match", "rougeL"), np.add(means, shift[cell["rank"]]), strict=True))

    rows = results(cells, {"seen": tasks(8)["seen"]}, near, "llama-7b")
    assert words(Study.of(rows, cells))["How far from the paper?"] == [
        "- seen: EM 1.00 points away on average, 2 of 2 orders of LoRA and full as in the paper; "
        "R-L 1.00 points away on average, 1 of 2 orders of LoRA and full as in the paper."
    ]


@pytest.mark.slow
def test_the_committed_report_is_the_one_that_is_written(tmp_path):
    committed = REPOSITORY / "docs" / "study_mini"
    for name in ("study.json", "results.parquet", "cases.jsonl"):
        shutil.copy(committed / name, tmp_path / name)
    again = write(tmp_path)
    assert again.read_text("utf-8") == (committed / "report" / "report.md").read_text("utf-8")
    for path in (committed / "report" / "tables").glob("*.md"):
        assert (again.parent / "tables" / path.name).read_text("utf-8") == path.read_text("utf-8")


def test_damaged_results_leave_nothing_behind(tmp_path):
    cells = grid([4, None], ["T2"], rounds=1)
    rows = results(cells, tasks(2), linear)
    with pytest.raises(ValueError, match="1 tasks where round 0 has 2"):
        report(rows.iloc[:-1], cells, tmp_path / "new")
    with pytest.raises(ValueError, match="case 0: no answers, input, references, task; exp"):
        report(rows, cells, tmp_path / "new", cases=[{}])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("estimate", "said"),
    [
        (Estimate(2.0, 1.0, 3.0, 0.001, 50, 3), "higher"),
        (Estimate(-2.0, -3.0, -1.0, 0.001, 50, 3), "lower"),
        (Estimate(0.2, -0.4, 0.8, 0.6, 50, 3), "equal within 1 point"),
        (Estimate(0.2, 0.1, 0.3, 0.001, 50, 3), "higher"),
        (Estimate(0.9, -0.4, 2.2, 0.2, 50, 3), "undecided"),
        (Estimate(2.0, 0.1, 3.0, 0.07, 50, 3), "undecided"),
        (Estimate(2.0, 1.0, 3.0, 0.0625, 5, 3), "too few tasks"),
    ],
)
def test_verdicts(estimate, said):
    assert verdict(estimate) == said


def test_lora_against_full_in_words():
    cells = grid()
    rows = results(cells, tasks(8), linear)
    rows = rows[rows["cell"] != "lora-r16-T2-1"]
    data = comparisons(Study.of(rows, cells))
    row = data[(data["config"] == "rank 16") & (data["set"] == "T2")].iloc[0]
    assert row["statement"] == (
        "rank 16 less full EM −4.00 [−4.00, −4.00], p = 0.008 (8 tasks, 2 rounds): lower"
    )
    equal = data[data["config"] == "rank 64"]
    assert set(equal["verdict"]) == {"equal within 1 point"} and (equal["difference"] == 0).all()
    table = comparison_table(Study.of(rows, cells), data, "unseen", "exact_match")
    assert cells_of(table.markdown())[1:] == [
        ["rank 16", "−4.00 [−4.00, −4.00] ↓ (2/3)", "−4.00 [−4.00, −4.00] ↓"],
        ["rank 64", "+0.00 [+0.00, +0.00] =", "+0.00 [+0.00, +0.00] ="],
    ]


def case(**fields: Any) -> dict[str, Any]:
    whole = dict(task="t", input="i", references=["a b c"], answers={"full": "a b c"})
    return whole | fields


def answers_of(one: dict[str, Any]) -> dict[str, tuple[str, list[str]]]:
    """By model the kind of its answer, and the words that are marked."""
    (found,) = CaseStudies.of([one]).cases
    return {
        answer.model: (answer.kind, [text for text, marked in answer.pieces if marked])
        for answer in found.answers
    }


def test_case_studies_mark_what_the_reference_lacks():
    said = {
        "full": "a x c", "rank 4": "A, b c!", "rank 8": " ", "rank 16": "d & <e>", "rank 32": "I.",
    }  # fmt: skip
    assert answers_of(case(answers=said)) == {
        "full": ("part", ["x"]),
        "rank 4": ("exact", []),
        "rank 8": ("empty", []),
        "rank 16": ("other", ["d", "&", "<e>"]),
        "rank 32": ("copy", ["I."]),
    }
    nearest = case(references=["z z", "a q"], answers={"full": "a b"})
    assert answers_of(nearest) == {"full": ("part", ["b"])}
    assert (
        answers_of(case(references=["a"], input="a", answers={"full": "a"}))["full"][0] == "exact"
    )


def test_a_case_that_lacks_a_model_says_so():
    studies = CaseStudies.of([case(answers={"full": "a"}), case(answers={"rank 32": "b"})])
    kinds = [[answer.kind for answer in one.answers] for one in studies.cases]
    assert studies.models == ["full", "rank 32"]
    assert kinds == [["part", "missing"], ["missing", "part"]]
    with pytest.raises(ValueError, match="case 1: no input; expected"):
        CaseStudies.of([case(), {"task": "t", "references": ["a"], "answers": {}}])
    with pytest.raises(ValueError, match="case 0: no references; expected"):
        CaseStudies.of([case(references=[])])


def test_the_papers_own_answers_are_its_tables():
    rows = {(row["test"], row["rank"]): row for row in paper()["rows"]}
    ranks = [2**i for i in range(2, 13)]
    yes, em, _ = paper_findings.rank_helps()
    assert yes == "Yes." and em.startswith("EM from rank 4 to rank 4096: +20.69 (T100), +20.31 (T2")
    slopes = re.findall(r"([+−]\d\.\d\d) \((\w+)\)", em.partition("per doubling")[2])
    for slope, name in slopes:
        scores = [rows["seen", rank][name][0] for rank in ranks]
        assert float(slope) == pytest.approx(np.polyfit(range(11), scores, 1)[0], abs=0.005)
    assert [name for _, name in slopes] == PAPER_SETS
    assert re.search(r"up in (\d+) of 40 steps", em)

    _, unseen, _ = paper_findings.capacity()
    scores = [rows["unseen", rank]["Tall"][0] for rank in ranks]
    low, high = (np.polyfit(range(6), part, 1)[0] for part in (scores[:6], scores[5:]))
    parts = [re.findall(r"([+−]\d\.\d\d) \(Tall\)", half)[0] for half in unseen.split("above")]
    assert [float(part) for part in parts] == [pytest.approx(x, abs=0.005) for x in (low, high)]
    assert "up to rank 128" in unseen

    _, seen, unseen = paper_findings.reaches()
    assert "EM −1.02 (T100), −0.82 (T250), +0.13 (T500), −0.41 (Tall), the first" in seen
    assert "as good as full: none (T100), none (T250), 4096 (T500), none (Tall)" in seen
    assert "EM +2.61 (T100), +1.02 (T250), +1.20 (T500), +0.54 (Tall)" in unseen


def test_the_main_rate_is_the_commonest_then_the_papers_then_the_lowest():
    def main(*rates: tuple[float, int]) -> float:
        parts = [grid([4], ["T2"], rounds=n, rate=rate) for rate, n in rates]
        cells = pd.concat(parts, ignore_index=True)
        found = Study.of(results(cells, tasks(1), linear), cells).grid
        return found[found["main"]]["learning_rate"].iloc[0]

    assert main((1e-5, 1), (5e-5, 1), (1e-4, 2)) == 1e-4
    assert main((1e-5, 2), (5e-5, 2), (1e-4, 2)) == 5e-5
    assert main((2e-4, 1), (1e-4, 1)) == 1e-4


def put(name: str, value: Any, row: int = 0) -> Callable[[pd.DataFrame, pd.DataFrame], Any]:
    def change(rows, cells):
        rows = rows.astype({name: object})
        rows.loc[row, name] = value
        return rows

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda rows, cells: rows.drop(columns=["rougeL", "task"]), "no column task, rougeL;"),
        (lambda rows, cells: (rows, cells.drop(columns="set")), "expected cells: no column set"),
        (lambda rows, cells: rows.iloc[:0], "found 0 results of 2 cells"),
        (put("exact_match", 101.0), "r4-T2-0, seen, t0: exact_match is 101.0, expected percent"),
        (put("exact_match", None), "exact_match is None"),
        (put("rougeL", "high"), "rougeL is 'high'"),
        (put("rank", None), "rank is None, expected a whole number"),
        (put("rank", 4.5), "rank is 4.5"),
        (put("rank", 4, row=4), "full-T2-0, seen, t0: rank is 4"),
        (put("method", "dora"), "method is 'dora', expected lora or full"),
        (put("test", "dev"), "test is 'dev'"),
        (put("examples", 0), "examples is 0"),
        (put("closed_label", None), "closed_label is None"),
        (put("majority_baseline", None), "majority_baseline is None, expected 0 to 100, or null"),
        (put("closed_label", False), "majority_baseline is 40.0"),
        (put("model", "other"), "models other, toy"),
        (put("train_tokens", 7), "cell lora-r4-T2-0: train_tokens is 7 and"),
        (put("category", "d"), "round 0, seen, t0: category differs"),
        (put("examples", 99), "round 0, seen, t0: examples differs"),
        (put("task", "t1"), "seen: t1 is there twice"),
        (lambda rows, cells: rows.iloc[:-1], "cell full-T2-0, unseen: 1 tasks where round 0 has 2"),
        (lambda rows, cells: (rows, cells.iloc[:1]), "cell full-T2-0 is not in the grid"),
        (
            lambda rows, cells: (rows, cells.assign(learning_rate=1e-4)),
            "lora-r4-T2-0: learning_rate is 5e-05, expected 0.0001",
        ),
        (
            lambda rows, cells: (rows, pd.concat([cells, cells.assign(cell=["a", "b"])])),
            "the same configuration, set and round",
        ),
        (lambda rows, cells: (rows, pd.concat([cells, cells])), "the same cell"),
        (lambda rows, cells: (rows, cells.assign(method="x")), "lora-r4-T2-0: method is 'x'"),
    ],
)  # fmt: skip
def test_damage_is_one_line(change, match):
    cells = grid([4, None], ["T2"], rounds=1)
    closed = dict(closed_label=True, majority_baseline=40.0, out_of_options=10.0)
    rows = results(cells, tasks(2, **closed), linear)
    changed = change(rows, cells)
    rows, cells = changed if isinstance(changed, tuple) else (changed, cells)
    with pytest.raises(ValueError, match=match) as caught:
        Study.of(rows, cells)
    assert "\n" not in str(caught.value)


def test_reading_a_file(tmp_path: Path):
    cells = grid([4, None], ["T2"], rounds=1)
    rows = results(cells, tasks(2, closed_label=False), linear)
    path = tmp_path / "results.parquet"
    rows.to_parquet(path)
    again = Study.of(read(path), cells)
    pd.testing.assert_frame_equal(summary(again), summary(Study.of(rows, cells)), check_dtype=False)
    with pytest.raises(FileNotFoundError, match="absent.parquet: no such file"):
        read(tmp_path / "absent.parquet")
    content = path.read_bytes()
    for damage in (content[: len(content) // 2], b"", b"task,exact_match\n"):
        path.write_bytes(damage)
        with pytest.raises(
            ValueError, match="results.parquet: .* expected a whole parquet"
        ) as caught:
            read(path)
        assert "\n" not in str(caught.value)
    rows.drop(columns="model").to_parquet(path)
    with pytest.raises(ValueError, match="results.parquet: no column model"):
        read(path)
