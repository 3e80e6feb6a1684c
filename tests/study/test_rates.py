"""What is said of chosen learning rates, against sentences and distances worked out by hand."""

import numpy as np
import pandas as pd
import pytest

from jax_lora.errors import DataError
from jax_lora.study import rates
from jax_lora.study.choice import COLUMNS
from jax_lora.study.report import _sets_with_rates, report
from tests.study.test_tables import cells_of, grid, linear, results, tasks


def trials(
    losses: dict[tuple[int | None, float], float | None],
    seeds: dict[int | None, float],
    name: str = "T2",
    variant: str = "",
) -> pd.DataFrame:
    """A rates.parquet: losses by rank (None: full) and rate, and those of the second seed."""
    rows = []
    best = {
        rank: min((loss, rate) for (r, rate), loss in losses.items() if r == rank and loss)[1]
        for rank in {rank for rank, _ in losses}
        if any(loss for (r, _), loss in losses.items() if r == rank)
    }
    for (rank, rate), loss in losses.items():
        row = {
            "cell": f"{rank}-{variant}-{name}-{rate}", "method": "lora" if rank else "full",
            "rank": rank, "variant": variant, "set": name, "round": 0, "learning_rate": rate,
            "repeat": 0, "step": 5, "validation_loss": np.nan if loss is None else loss,
            "validation_tokens": 9, "outcome": "validated" if loss else "diverged",
            "chosen": best.get(rank) == rate,
        }  # fmt: skip
        rows.append(row)
        if row["chosen"] and rank in seeds:
            again = {"repeat": 1, "validation_loss": seeds[rank], "chosen": False}
            rows.append(row | again | {"cell": f"{row['cell']}-seed1"})
    return pd.DataFrame(rows)[COLUMNS].astype({"rank": "Int64"})


LOSSES = {
    (4, 1e-4): 2.5, (4, 1e-3): 2.125, (4, 1e-2): 2.0,
    (64, 1e-4): 2.25, (64, 1e-3): 1.875, (64, 1e-2): None,
    (None, 1e-5): 1.5, (None, 1e-4): 1.75,
}  # fmt: skip
FOUND = trials(LOSSES, {4: 2.25, 64: 1.8125, None: 1.625})


def test_the_choice_the_runner_up_and_the_second_seed():
    made = rates.choices(FOUND).set_index("config")
    assert list(made.index) == ["rank 4", "rank 64", "full"]
    assert made["learning_rate"].to_list() == [1e-2, 1e-3, 1e-5]
    assert made["runner_up"].to_list() == [1e-3, 1e-4, 1e-4]
    assert made["runner_up_distance"].to_list() == [0.125, 0.375, 0.25]
    assert made["seed_distance"].to_list() == [0.25, -0.0625, 0.125]
    assert made["end"].to_list() == ["highest", "", "lowest"]
    assert made["tried"].to_list() == [3, 3, 2] and made["diverged"].to_list() == [0, 1, 0]
    assert made["failed"].to_list() == [0, 0, 0]


def test_what_is_missing_is_a_dash():
    found = trials({(4, 1e-4): None, (4, 1e-3): None, (16, 1e-3): 2.0}, {})
    made = rates.choices(found)
    rows = cells_of(rates.choices_table(made, "toy").markdown())
    assert rows[0] == ["rank 4", "T2", "–", "–", "–", "–", "2 (2 diverged)"]
    assert rows[1] == ["rank 16", "T2", "0.001", "2.0000", "–", "–", "1"]


def test_the_sentences():
    said = list(rates.statements(FOUND, rates.choices(FOUND)))
    assert said == [
        "In 2 of 3 choices the runner-up's loss is no farther away than another seed moves a loss, "
        "by up to 0.2500: rank 4 on T2, full on T2.",
        "At the end of the rates that were tried, so a better one may lie beyond: rank 4 on T2 "
        "(the highest), full on T2 (the lowest).",
    ]
    alone = trials({(4, 1e-4): 2.0, (4, 1e-3): 1.0, (4, 1e-2): 2.0}, {4: 1.0})
    assert list(rates.statements(alone, rates.choices(alone))) == [
        "In 0 of 1 choices the runner-up's loss is no farther away than another seed moves a loss, "
        "by up to 0.0000."
    ]


def test_a_second_seed_that_diverged_is_no_missing_one():
    found = trials(LOSSES, {4: 2.25, 64: 1.875})
    found.loc[(found["rank"] == 64) & (found["repeat"] > 0), "outcome"] = "diverged"
    found.loc[(found["rank"] == 64) & (found["repeat"] > 0), "validation_loss"] = np.nan
    made = rates.choices(found)
    assert cells_of(rates.choices_table(made, "toy").markdown())[1][5] == "diverged"
    said = list(rates.statements(found, made))
    assert "by up to 0.2500: rank 4 on T2, full on T2." in said[0]
    assert said[1] == "With another seed the chosen rate diverged: rank 64 on T2."
    answer = rates.rank_or_rate(found).answers[0]
    assert answer.startswith("T2: undecided, a chosen learning rate diverged with a second seed.")
    assert "a second seed moves a loss by up to 0.2500" in answer


def rank_or_rate(losses: dict[tuple[int | None, float], float | None], seeds: float | None) -> str:
    """The answer for T2, every rank's second seed being so far away."""
    best = {rank: min(x for (r, _), x in losses.items() if r == rank and x) for rank, _ in losses}
    found = trials(losses, {} if seeds is None else {r: x + seeds for r, x in best.items()})
    one = rates.rank_or_rate(found)
    assert "one learning rate, 5e-05, and full fine-tuning at 3e-05" in one.paper[0]
    (line, scores) = one.answers
    assert scores == (
        "Scores: all in this report are of rates that were chosen by the loss on tasks that are "
        "trained on (T2, round 0). For unseen tasks, for forgetting and for other sets and rounds "
        "none was chosen, so a difference between ranks there may be one of rates."
    )
    return line


def test_is_it_the_rank_or_the_learning_rate():
    """By differences between powers of two: 1/8 at the ranks' own rates, 1/4 at one for all."""
    losses = {key: loss for key, loss in LOSSES.items() if key[0]}
    assert rank_or_rate(losses, 0.0625) == (
        "T2: the rank, and in part the learning rate. From rank 4 to rank 64 the validation loss "
        "changes by −0.1250 where each rank has its own learning rate (rank 4 0.01, rank 64 "
        # At 1e-3, the rate that all ranks finished with the lowest mean; then 1.875 less 2.
        "0.001); −0.2500 at one learning rate for all ranks, 0.001; a second seed moves a loss by "
        "up to 0.0625, which is all that is known of chance here. A better rate may lie beyond "
        "those tried for rank 4."
    )
    # A repeat of a rate that was chosen before the grid grew says nothing of chance.
    found = trials(losses, {4: 2.0625})
    repeat = found[found["repeat"] > 0].assign(learning_rate=1e-3, validation_loss=9.0)
    one, both = (rates.rank_or_rate(t).answers[0] for t in (found, pd.concat([found, repeat])))
    assert one == both and "by up to 0.0625, which" in one
    assert rank_or_rate(losses, 0.1875).startswith("T2: the learning rate: where each rank has its")
    assert rank_or_rate(losses, 0.5).startswith("T2: undecided, ranks differ no more than seeds do")
    assert rank_or_rate(losses, None).startswith("T2: undecided, no second seed is there")
    even = losses | {(64, 1e-3): 1.875, (4, 1e-3): 2.0, (4, 1e-2): None}
    assert rank_or_rate(even, 0.0625).startswith("T2: the rank. From")
    worse = losses | {(64, 1e-3): 3.0, (64, 1e-4): 3.0}
    assert rank_or_rate(worse, 0.0625).startswith("T2: not the rank, whose highest value has")
    # A rank between that is better than both ends: ranks differ, though the ends do not.
    between = {(4, 1e-3): 2.0, (16, 1e-3): 1.75, (64, 1e-3): 2.0}
    assert rank_or_rate(between, 0.125).startswith(
        "T2: undecided, the lowest and the highest rank differ no more than seeds do, but the loss "
        "of rank 16 is 0.2500 below that of rank 4. From rank 4 to rank 64 the validation loss"
    )
    assert rank_or_rate(between, 0.25).startswith("T2: undecided, ranks differ no more than seeds")
    apart = {(4, 1e-3): 2.0, (4, 1e-2): None, (64, 1e-3): None, (64, 1e-2): 1.0}
    assert "; no learning rate was validated at all ranks; a second" in rank_or_rate(apart, 0.0625)
    lost = losses | {key: None for key in losses if key[0] == 64}
    assert rates.rank_or_rate(trials(lost, {})).answers[0] == (
        "T2: cannot be said, no learning rate is chosen for rank 64."
    )
    assert len(rates.rank_or_rate(trials({(4, 1e-3): 2.0}, {})).answers) == 1  # nothing to compare


@pytest.mark.parametrize("name", ["../T2", "T2/x", "T", "x](http://a)", ""])
def test_the_name_of_a_set_is_no_path(name):
    with pytest.raises(DataError, match="rates: found the set .*, expected names such as T100"):
        _sets_with_rates(trials(LOSSES, {}, name=name))


def test_what_is_not_chosen_says_why():
    """Of trials that failed without diverging, of ranks that diverged at all rates, and of the
    rest; a table of an older version tells no divergence."""
    losses = {(rank, rate): None for rank in (4, 8) for rate in (1e-3, 1e-2)} | {(16, 1e-3): 2.0}
    found = trials(losses, {})
    found["chosen"] = False
    found.loc[0, "outcome"] = "failed"
    made = rates.choices(found)
    rows = cells_of(rates.choices_table(made, "toy").markdown())
    assert rows[0][-1] == "2 (1 diverged, 1 failed)"
    assert list(rates.statements(found, made)) == [
        "No learning rate is chosen yet, since a trial failed without having diverged; "
        "--retry-failed tries it again: rank 4 on T2.",
        "No learning rate is chosen yet, since every rate that was tried diverged: rank 8 on T2.",
        "No learning rate is chosen yet, since not all rates are tried: rank 16 on T2.",
    ]
    older = rates.choices(found.drop(columns="outcome"))
    assert older["failed"].to_list() == [2, 2, 0] and not older["diverged"].any()


@pytest.mark.parametrize("variant", ["", "rslora"])
def test_sets_and_variants_are_choices_of_their_own(variant):
    other = trials({(4, 1e-4): 1.0, (4, 1e-3): 2.0}, {}, "T*4", variant)
    made = rates.choices(pd.concat([FOUND, other], ignore_index=True))
    assert len(made) == 4
    last = made.iloc[-1]
    assert last["config"] == "rank 4" + (", rslora" if variant else "")
    assert (last["set"], last["learning_rate"]) == ("T*4", 1e-4)


def test_the_report_has_a_section_a_table_and_a_picture(tmp_path):
    cells = grid([4, 64, None], ["T2"])
    rows = results(cells, tasks(8), linear)
    text = report(rows, cells, tmp_path, chosen_rates=FOUND).read_text("utf-8")
    section = text.partition("## Learning rates\n")[2].partition("\n## Tables")[0]
    asked = text.partition("**Is it the rank or the learning rate?**")[2].partition("\n## ")[0]
    assert "- T2: undecided, ranks differ no more than seeds do." in asked
    assert "The paper, LLaMA-7B\n\n- Not asked" in asked
    assert "| rank 4 | T2 | 0.01, the highest | 2.0000 | 0.001 (+0.1250) | +0.2500 | 3 |" in section
    assert (tmp_path / "figures" / "learning_rates_T2.png").is_file()
    assert (tmp_path / "tables" / "learning_rates.csv").is_file()
    assert "figures/learning_rates_T2.png" in text
