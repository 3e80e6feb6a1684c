"""What is said of chosen learning rates, against sentences and distances worked out by hand."""

import numpy as np
import pandas as pd
import pytest

from jax_lora.study import rates
from jax_lora.study.choice import COLUMNS
from jax_lora.study.report import report
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
            "validation_tokens": 9, "chosen": best.get(rank) == rate,
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
    assert made["tried"].to_list() == [3, 3, 2] and made["failed"].to_list() == [0, 1, 0]


def test_what_is_missing_is_a_dash():
    found = trials({(4, 1e-4): None, (4, 1e-3): None, (16, 1e-3): 2.0}, {})
    made = rates.choices(found)
    rows = cells_of(rates.choices_table(made, "toy").markdown())
    assert rows[0] == ["rank 4", "T2", "–", "–", "–", "–", "2 (2 failed)"]
    assert rows[1] == ["rank 16", "T2", "0.001", "2.0000", "–", "–", "1"]


def test_the_sentences():
    said = list(rates.statements(FOUND, rates.choices(FOUND)))
    assert said == [
        "In 1 of 3 choices the runner-up's loss is no farther away than another seed moves it: "
        "rank 4 on T2.",
        "At the end of the rates that were tried, so a better one may lie beyond: rank 4 on T2 "
        "(the highest), full on T2 (the lowest).",
        # At 1e-3, the rate that all ranks finished with the lowest mean; then 1.875 less 2.
        "T2: from rank 4 to rank 64 the validation loss changes by −0.2500 at one learning rate "
        "for all ranks, 0.001, and by −0.1250 where each rank has its own; a second seed moves a "
        "loss by up to 0.2500.",
    ]
    alone = trials({(4, 1e-4): 2.0, (4, 1e-3): 1.0, (4, 1e-2): 2.0}, {4: 1.0})
    assert list(rates.statements(alone, rates.choices(alone))) == [
        "In 0 of 1 choices the runner-up's loss is no farther away than another seed moves it."
    ]


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
    assert "- T2: from rank 4 to rank 64 the validation loss changes by" in section
    assert "| rank 4 | T2 | 0.01, the highest | 2.0000 | 0.001 (+0.1250) | +0.2500 | 3 |" in section
    assert (tmp_path / "figures" / "learning_rates_T2.png").is_file()
    assert (tmp_path / "tables" / "learning_rates.csv").is_file()
    assert "figures/learning_rates_T2.png" in text
