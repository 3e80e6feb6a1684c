"""Checked results, statistics and tables, against figures worked out by hand and the paper's own.

`grid`, `results` and `linear` make studies for the other tests of this folder too.
"""

import itertools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from jax_lora.evaluation import metrics
from jax_lora.study import Study, is_papers_model, paper
from jax_lora.study.estimates import contrast, contrasts, lead, slope
from jax_lora.study.statistics import behaviour, summary
from jax_lora.study.tables import (
    behaviour_table,
    scores_table,
    tex_set,
)

PAPER_RANKS = [2**i for i in range(2, 13)]
PAPER_SETS = ["T100", "T250", "T500", "Tall"]
RATES = {"lora": 5e-5, "full": 3e-5}


def grid(
    ranks: Sequence[int | None] = (4, 16, 64, None),
    sets: Sequence[str] = ("T2", "T4"),
    rounds: int = 3,
    variant: str = "",
    rate: float | None = None,
) -> pd.DataFrame:
    """A grid's cells; rank None is full fine-tuning."""
    cells = []
    for rank, name, round_ in itertools.product(ranks, sets, range(rounds)):
        method = "full" if rank is None else "lora"
        parts = [method, f"r{rank}" if rank else "", variant, name, str(round_)]
        parts += [f"{rate:g}"] if rate else []
        cell = "-".join(filter(None, parts))
        cells.append((cell, method, rank, variant, name, round_, rate or RATES[method]))
    names = ["cell", "method", "rank", "variant", "set", "round", "learning_rate"]
    return pd.DataFrame(cells, columns=names).astype({"rank": "Int64"})


def results(
    cells: pd.DataFrame,
    tasks: dict[str, list[dict[str, Any]]],
    values: Callable[[dict[str, Any], str, dict[str, Any]], dict[str, Any]],
    model: str = "toy",
) -> pd.DataFrame:
    """Rows of every cell: `values(cell, test, task)` over zeros, tasks open unless they say so."""
    rows = []
    for cell in cells.to_dict("records"):
        rank = None if pd.isna(cell["rank"]) else int(cell["rank"])
        number = int("".join(filter(str.isdigit, cell["set"])) or 756)
        base, adapter = 6_738_415_616, 32 * 4 * (rank or 0) * 8192
        examples = 25_000 if "*" in cell["set"] else 100 * number
        whole = {
            **cell, "rank": rank, "model": model, "set_tasks": number, "train_examples": examples,
            "trainable": adapter if rank else base, "frozen": base if rank else 0,
            "train_tokens": 600 * examples, "base_operations": 1.0 * examples * base,
            "train_operations": 1.0 * examples * (4 * base + 6 * adapter if rank else 6 * base),
        }  # fmt: skip
        for test in tasks:
            for task in tasks[test]:
                row = {
                    "test": test, "category": "c", "examples": 100, "exact_match": 0.0,
                    "rougeL": 0.0, "closed_label": False, "majority_baseline": None,
                    "out_of_options": None, "top_answer_share": 0.0, "answer_entropy": 0.0,
                    "exact_match_given_valid": None, "empty": 0.0, "copies": 0.0,
                    "unfinished": 0.0,
                }  # fmt: skip
                rows.append(whole | row | task | values({**cell, "rank": rank}, test, task))
    return pd.DataFrame(rows).astype({"rank": "Int64"})


def tasks(count: int, **fields: Any) -> dict[str, list[dict[str, Any]]]:
    """As many tasks of either test set."""
    return {
        test: [{"task": f"t{i}", **fields} for i in range(count)] for test in ("seen", "unseen")
    }


def linear(cell: dict[str, Any], test: str, task: dict[str, Any]) -> dict[str, Any]:
    """20 points, two more per doubling of the rank, full as much as rank 64; a round adds one."""
    score = 20.0 + 2 * np.log2(cell["rank"] or 64) + cell["round"]
    return {"exact_match": score, "rougeL": score + 10}


def cells_of(table: str) -> list[list[str]]:
    """The cells of a Markdown table below its header."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


# Means and spreads


def test_means_are_the_official_ones():
    answers = {"t0": ["a", "b", "b"], "t1": ["a"]}
    rows = [
        dict(task=task, category="c", prediction=answer, references=["a"])
        for task, own in answers.items()
        for answer in own
    ]
    official = metrics.aggregate(rows)
    names = ("exact_match", "rougeL")
    scored = [
        dict(task=task, examples=len(own)) | {n: official[f"{n}_for_{task}"] for n in names}
        for task, own in answers.items()
    ]
    cells = grid([4], ["T2"], rounds=1)
    study = Study.of(results(cells, {"seen": scored}, lambda *_: {}), cells)
    numbers = summary(study).set_index("test").loc["seen"]
    for name in names:
        assert numbers[name] == pytest.approx(official[name], abs=1e-4)
        assert numbers[f"{name}_over_tasks"] == pytest.approx(official[f"{name}_over_tasks"])
    assert numbers["exact_match"] == pytest.approx(50.0, abs=1e-4)  # (1 + 1) of 4 answers
    assert numbers["exact_match_over_tasks"] == pytest.approx((100 / 3 + 100) / 2, abs=1e-4)


def test_rounds_by_hand():
    cells = grid([16, None], ["T2"])
    scores = {0: 40.0, 1: 42.0, 2: 47.0}
    rows = results(cells, tasks(2), lambda cell, *_: {"exact_match": scores[cell["round"]]})
    numbers = summary(Study.of(rows, cells)).set_index(["config", "test"])
    row = numbers.loc[("rank 16", "seen")]
    assert row["exact_match"] == pytest.approx(43.0)
    assert row["exact_match_std"] == pytest.approx(13**0.5)  # (9 + 1 + 16) / 2
    assert row["rounds"] == row["expected_rounds"] == 3
    assert row["trainable_percent"] == pytest.approx(0.24836, abs=1e-5)
    adapter = 32 * 4 * 16 * 8192
    assert row["relative_operations"] == pytest.approx(2 / 3 + adapter / 6_738_415_616)
    assert numbers.loc[("full", "seen"), "relative_operations"] == 1.0


def test_exact_match_among_valid_answers_weighs_valid_answers():
    two = [
        dict(out_of_options=50.0, exact_match_given_valid=80.0, top_answer_share=90.0),
        dict(out_of_options=0.0, exact_match_given_valid=20.0, top_answer_share=30.0),
        dict(out_of_options=100.0, exact_match_given_valid=None, top_answer_share=60.0),
    ]
    closed = dict(closed_label=True, majority_baseline=40.0)
    own = [dict(task=f"t{i}", **closed, **values) for i, values in enumerate(two)]
    own += [dict(task="open", top_answer_share=0.0, empty=8.0)]
    cells = grid([4], ["T2"], rounds=1)
    study = Study.of(results(cells, {"unseen": own}, lambda *_: {}), cells)
    row = behaviour(study).iloc[0]
    assert row["exact_match_given_valid"] == pytest.approx(40.0)  # (50 · 80 + 100 · 20) / 150
    assert row["out_of_options"] == pytest.approx(50.0)
    assert row["top_answer_share"] == pytest.approx(60.0)  # the open task is left out
    assert row["empty"] == pytest.approx(2.0)  # here it is not
    assert behaviour_table(study, "unseen", "T2").rows == [
        ["rank 4", "50.0", "0.0", "40.0", "40.0", "60.0", "0.00", "2.0", "0.0", "0.0"]
    ]


# Contrasts


def scores_of(values: np.ndarray, examples: int = 100) -> pd.DataFrame:
    """`Study.scores` of values (rounds, tasks, configurations)."""
    rounds, tasks, configs = values.shape
    index = pd.MultiIndex.from_product([range(rounds), range(tasks), [examples]])
    frame = pd.DataFrame(values.reshape(rounds * tasks, configs), index=index)
    frame.columns = [f"c{i}" for i in range(configs)]
    return frame.rename_axis(index=["round", "task", "examples"])


def test_a_difference_by_hand():
    scores = scores_of(np.array([[[3.0, 1.0], [5.0, 4.0], [9.0, 6.0]]]))
    one = contrast(scores, {"c0": 1, "c1": -1})
    assert one is not None
    assert one.value == pytest.approx(2.0)
    assert one.p == 2 / 8  # all three signs agree: two of eight sign vectors do as well
    assert 1.0 <= one.low < 2.0 < one.high <= 3.0
    assert (one.tasks, one.rounds) == (3, 1)
    assert str(one).endswith("p = 0.250 (3 tasks, 1 round)")
    assert contrast(scores, {"c0": 1, "absent": -1}) is None


def test_tasks_weigh_their_examples_and_missing_rounds_leave_the_pairing():
    values = np.arange(8.0).reshape(2, 2, 2) ** 2  # round, task, configuration
    scores = scores_of(values)
    index = scores.index.to_frame()
    index["examples"] = [100, 50, 100, 50]
    scores.index = pd.MultiIndex.from_frame(index)
    first, second = (2 * (1 - 0) + (9 - 4)) / 3, (2 * (25 - 16) + (49 - 36)) / 3
    both = contrast(scores, {"c1": 1, "c0": -1})
    assert both is not None and both.value == pytest.approx((first + second) / 2)
    scores.iloc[2:, 0] = np.nan
    one = contrast(scores, {"c1": 1, "c0": -1})
    assert one is not None and one.value == pytest.approx(first) and one.rounds == 1
    scores["c0"] = np.nan
    assert contrast(scores, {"c1": 1, "c0": -1}) is None


def test_sign_flips_against_scipy():
    rng = np.random.default_rng(0)
    for count, tolerance in ((8, 0.0), (40, 0.02)):
        differences = rng.normal(0.4, 1.0, count)
        one = contrast(scores_of(differences[None, :, None]), {"c0": 1})
        reference = scipy.stats.permutation_test(
            (differences,), np.mean, permutation_type="samples", n_resamples=20_000, rng=1
        )
        assert one is not None and one.p == pytest.approx(reference.pvalue, abs=tolerance)


def test_the_bootstrap_against_the_normal_interval():
    values = np.random.default_rng(0).normal(30.0, 8.0, 400)
    one = contrast(scores_of(values[None, :, None]), {"c0": 1})
    half = 1.96 * values.std(ddof=1) / 20
    assert one is not None
    assert one.value == pytest.approx(values.mean())
    assert [one.low, one.high] == pytest.approx([one.value - half, one.value + half], abs=0.1)


def test_rounds_of_a_task_are_no_new_evidence():
    values = np.random.default_rng(0).normal(0.5, 1.0, (1, 30, 1))
    one, three = (contrast(scores_of(np.repeat(values, n, axis=0)), {"c0": 1}) for n in (1, 3))
    assert one is not None and three is not None
    assert (three.low, three.high, three.p) == pytest.approx((one.low, one.high, one.p))
    assert (one.rounds, three.rounds) == (1, 3)


def test_sums_made_together_equal_sums_made_alone_and_the_seed_decides():
    scores = scores_of(np.random.default_rng(0).normal(0, 1, (2, 20, 3)))
    scores.iloc[3, 2] = np.nan
    wanted = {"a": {"c0": 1.0}, "b": {"c1": 1.0, "c0": -1.0}, "c": {"c2": 1.0}, "d": {"x": 1.0}}
    together = contrasts(scores, wanted)
    assert list(together) == ["a", "b", "c"]
    for key, one in together.items():
        alone = contrast(scores, wanted[key])
        assert alone is not None
        for name in ("value", "low", "high", "p", "tasks", "rounds"):
            assert getattr(one, name) == pytest.approx(getattr(alone, name), abs=1e-12)
    assert contrasts(scores, wanted, seed=1)["b"].low != together["b"].low


def test_a_slope_is_points_a_doubling():
    ranks = {"c0": 4, "c1": 16, "c2": 32}
    values = np.array([7 + 1.5 * np.log2(list(ranks.values()))] * 6)
    one = contrast(scores_of(values[None]), slope(ranks))
    assert one is not None
    assert [one.value, one.low, one.high] == pytest.approx([1.5] * 3)


def test_a_lead_by_hand():
    out = scores_of(np.tile([40.0, 10.0, 10.0, 0.0], (1, 6, 1)))  # 3/4 done at the inner ranks
    right = scores_of(np.tile([20.0, 20.0, 25.0, 40.0], (1, 6, 1)))  # 0 and 1/4
    configs = list(out.columns)
    one = lead(out, right, configs)
    assert one is not None
    assert [one.value, one.low, one.high] == pytest.approx([(0.75 + 0.5) / 2] * 3)
    back = lead(right, out, configs)
    assert back is not None and back.value == pytest.approx(-one.value)
    assert lead(out, scores_of(np.full((1, 6, 4), 20.0)), configs) is None  # nothing rises
    assert lead(out, right, [*configs, "c9"]) is None


def test_a_lead_has_an_interval_where_few_tasks_change():
    """Of eight tasks three rise; a resample in 43 has none of them, and no progress."""
    out, right = np.full((1, 8, 3), 40.0), np.full((1, 8, 3), 20.0)
    out[0, :3], right[0, :3] = [40.0, 10.0, 0.0], [20.0, 25.0, 40.0]
    one = lead(scores_of(out), scores_of(right), ["c0", "c1", "c2"])
    assert one is not None
    assert [one.value, one.low, one.high] == pytest.approx([0.5] * 3)


# Tables


@pytest.fixture(scope="module")
def papers_study() -> Study:
    """The paper's numbers as results: tasks and rounds scatter about them and cancel."""
    known = {(row["test"], row["method"], row["rank"]): row for row in paper()["rows"]}
    cells = grid([*PAPER_RANKS, None], PAPER_SETS)

    def values(cell, test, task):
        means = known[test, cell["method"], cell["rank"]][cell["set"]]
        away = (cell["round"] - 1) * 0.5 + task["away"]
        return {"exact_match": means[0] + away, "rougeL": means[1] + away}

    own = [dict(task=f"t{away}", away=away) for away in (-3, 1, 2)]
    rows = results(cells, {"seen": own, "unseen": own}, values, "huggyllama/llama-7b")
    return Study.of(rows, cells)


@pytest.mark.parametrize(("test", "table"), [("seen", "table1"), ("unseen", "table2")])
def test_the_papers_numbers_make_the_papers_tables(papers_study, shared, test, table):
    theirs = json.loads((shared / "data" / "paper_results.json").read_text("utf-8"))[table]
    made = scores_table(papers_study, summary(papers_study), test, PAPER_SETS, table, "Table")
    lines = cells_of(made.markdown())
    assert len(lines) == 2 * len(theirs["rows"]) == 24
    for ours, below, row in zip(lines[::2], lines[1::2], theirs["rows"], strict=True):
        scores = [row["scores"][name][metric] for name in PAPER_SETS for metric in ("em", "rougeL")]
        assert ours[0] == ("LoRA" if row["rank"] else "Full fine-tuning")
        assert ours[1] == below[1] == (str(row["rank"]) if row["rank"] else "")
        assert ours[4:] == [f"{score:.2f} ± 0.50" for score in scores]
        assert below[4:] == [f"{score:.2f} (+0.00)" for score in scores]
        share = row["trainable_percent"]
        assert below[2] == ("" if share is None else f"{share:.3f}%")
        # The paper rounds twice: its 0.496 and 13.745 are 0.4955 and 13.7445.
        assert float(ours[2].strip("%")) == pytest.approx(
            100 if share is None else share, abs=0.0011
        )
    assert lines[0][:5] == [
        "LoRA",
        "4",
        "0.062%",
        "67%",
        f"{(29.86, 23.75)[test != 'seen']} ± 0.50",
    ]
    assert lines[-2][2:4] == ["100%", "100%"]


def test_the_papers_numbers_are_the_shared_ones(shared):
    theirs = json.loads((shared / "data" / "paper_results.json").read_text("utf-8"))
    expected = [
        {"test": test, **{key: row[key] for key in ("method", "rank", "trainable_percent")}}
        | {name: [score["em"], score["rougeL"]] for name, score in row["scores"].items()}
        for test, table in (("seen", "table1"), ("unseen", "table2"))
        for row in theirs[table]["rows"]
    ]
    assert paper()["rows"] == expected
    assert paper()["learning_rate"] == {
        method: theirs["training"][method]["lr"] for method in ("lora", "full")
    }


def test_other_models_stand_alone():
    assert all(map(is_papers_model, ("llama-7b", "huggyllama/llama-7b", "x/LLaMA-7B-hf")))
    assert not any(map(is_papers_model, ("meta-llama/Llama-2-7b-hf", "llama-13b", "llama-7b-chat")))
    cells = grid([4, None], ["T100"])
    rows = results(cells, tasks(2), linear, "meta-llama/Llama-2-7b-hf")
    study = Study.of(rows, cells)
    table = scores_table(study, summary(study), "seen", ["T100"], "table1", "Table 1")
    assert "paper" not in table.markdown()
    assert [line[0] for line in cells_of(table.markdown())] == ["LoRA", "Full fine-tuning"]


def test_missing_cells_are_seen():
    cells = pd.concat([grid(), grid([8], ["T4"])], ignore_index=True)
    rows = results(cells, tasks(2), linear)
    gone = rows["cell"].isin(["lora-r16-T2-1", *(f"full-T4-{i}" for i in range(3))])
    gone |= (rows["cell"] == "lora-r64-T2-0") & (rows["test"] == "unseen")
    study = Study.of(rows[~gone], cells)
    numbers = summary(study)
    lines = {
        test: cells_of(scores_table(study, numbers, test, ["T2", "T4"], "t", "T").markdown())
        for test in ("seen", "unseen")
    }
    assert [line[1] for line in lines["seen"]] == ["4", "8", "16", "64", ""]
    assert lines["seen"][1][4:] == ["", "", "27.00 ± 1.00", "37.00 ± 1.00"]  # not planned on T2
    assert lines["seen"][2][4:6] == ["29.00 ± 1.41 (2/3)", "39.00 ± 1.41 (2/3)"]
    assert lines["seen"][3][4] == "33.00 ± 1.00"
    assert lines["unseen"][3][4] == "33.50 ± 0.71 (2/3)"
    assert lines["seen"][4][4:] == ["33.00 ± 1.00", "43.00 ± 1.00", "–", "–"]


def test_variants_and_learning_rates_are_told_apart():
    cells = pd.concat(
        [grid([4, None], ["T2"]), grid([4], ["T2"], variant="rslora"),
         grid([4], ["T2"], rounds=1, rate=1e-4)],
        ignore_index=True,
    )  # fmt: skip
    study = Study.of(results(cells, tasks(2), linear), cells)
    assert study.configs() == ["rank 4", "full", "rank 4, rslora"]
    numbers = summary(study)
    assert set(numbers["config"]) - set(study.configs()) == {"rank 4, rate 0.0001"}
    lines = cells_of(scores_table(study, numbers, "seen", ["T2"], "t", "T").markdown())
    assert [line[0] for line in lines] == ["LoRA", "Full fine-tuning", "LoRA, rslora"]
    assert lines[0][4] == "25.00 ± 1.00"


def test_latex_is_whole_and_csv_is_exact(papers_study, tmp_path):
    numbers = summary(papers_study)
    table = scores_table(
        papers_study, numbers, "unseen", PAPER_SETS, "table2", "50% & more_or_less"
    )
    table.write(tmp_path)
    text = (tmp_path / "table2.tex").read_text("utf-8")
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")
    assert text.count(r"\begin") == text.count(r"\end") == 3
    assert r"50\% \& more\_or\_less" in text and r"\multicolumn{2}{c}{$T_{\mathrm{all}}$}" in text
    rows = [line for line in text.splitlines() if line.startswith(("LoRA", "paper", "Full"))]
    assert len(rows) == 24 and {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {11}
    assert rows[0].endswith(r"25.96 $\pm$ 0.50 & 42.22 $\pm$ 0.50 \\")
    assert text.isascii() and tex_set("T*100") == r"$T^*_{\mathrm{100}}$"
    found = pd.read_csv(tmp_path / "table2.csv")
    expected = numbers[numbers["test"] == "unseen"]
    assert len(found) == 48
    for name in ("exact_match", "exact_match_std", "rougeL_paper", "trainable_percent"):
        np.testing.assert_array_equal(found[name], expected[name])
