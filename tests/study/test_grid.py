"""Cells, their costs and filters, against counts and comparisons made by hand."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_lora.errors import ConfigError
from jax_lora.study import Study, grid
from jax_lora.study.grid import cells, cheap_first, choose
from tests.study.test_tables import results

RATES = {"lora": (5e-5,), "full": (3e-5,)}
PAPER = cells(
    (*(2**i for i in range(2, 13)), "full"),
    ("T100", "T250", "T500", "Tall", "T*100", "T*500"),
    (0, 1, 2),
    RATES,
    {},
)


def test_the_papers_grid():
    assert len(PAPER) == 12 * 6 * 3
    assert len({cell.id for cell in PAPER}) == len(PAPER)
    assert all(re.fullmatch(r"[\w.-]+", cell.id) for cell in PAPER)  # names of folders
    first, last = PAPER[0], PAPER[-1]
    assert (first.id, first.rank, first.learning_rate) == ("r4-T100-round0", 4, 5e-5)
    assert (last.id, last.rank, last.method) == ("full-Tx500-round2", None, "full")
    assert (last.set, last.learning_rate) == ("T*500", 3e-5)


def test_rates_and_variants_are_axes():
    rates = {"lora": (1e-4, 1e-3), "full": (1e-5,)}
    variants = {"rslora": {"lora": {"scaling": "alpha/sqrt(r)"}}, "answers": {"data": {}}}
    found = [cell.id for cell in cells((4, "full"), ("T2",), (0,), rates, variants)]
    names = ["", "rslora-", "answers-"]
    assert found[:6] == [f"r4-{v}T2-round0-lr{r}" for v in names for r in ("0.0001", "0.001")]
    # rsLoRA is nothing to full fine-tuning, a loss on answers alone is.
    assert found[6:] == ["full-T2-round0", "full-answers-T2-round0"]


def test_a_report_takes_the_grid_as_what_it_expects():
    def values(*_):
        return {}

    expected = grid.frame(PAPER)
    tasks = {test: [{"task": f"{test}{i}"} for i in range(2)] for test in ("seen", "unseen")}
    study = Study.of(results(expected, tasks, values), expected)
    assert study.configs()[0] == "rank 4" and study.configs()[-1] == "full"


# ---------------------------------------------------------------- costs


def test_cheap_cells_come_first():
    three = PAPER[:3]
    order = cheap_first(three, dict(zip((c.id for c in three), (2.0, 1.0, 2.0), strict=True)))
    assert order == [three[1], three[0], three[2]]


# ---------------------------------------------------------------- filters


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ('rank<=64 and set=="T100"', lambda c: c.rank and c.rank <= 64 and c.set == "T100"),
        ('method == "full"', lambda c: c.rank is None),
        ("rank >= 0", lambda c: c.rank is not None),
        ("rank != 4", lambda c: c.rank != 4),
        ("rank>1024", lambda c: c.rank and c.rank > 1024),
        ("8 <= rank < 64", lambda c: c.rank and 8 <= c.rank < 64),
        ("set=='T*100' or set=='Tall'", lambda c: c.set in ("T*100", "Tall")),
        ("set in ['T*100', 'Tall']", lambda c: c.set in ("T*100", "Tall")),
        ("round not in (0, 1)", lambda c: c.round == 2),
        ('not (round==0 or method=="full")', lambda c: c.round and c.method == "lora"),
        (
            "round==0 or round==1 and rank==4",
            lambda c: c.round == 0 or c.round == 1 and c.rank == 4,
        ),
        ("variant=='' and learning_rate<4e-5", lambda c: c.learning_rate < 4e-5),
        ("round > -1", lambda c: True),
    ],
)
def test_filters(text, holds):
    assert choose(PAPER, text) == [cell for cell in PAPER if holds(cell)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "found ''"),
        ("rank<=", "expected comparisons of rank, round"),
        ("rank=4", 'rank <= 64 and set == "T100"'),
        ("rank == full", 'method == "full"'),
        ("set < 4", "expected comparisons"),
        ("rnak == 4", "found 'rnak == 4'"),
        ("rank == 4 set == 'T100'", "expected comparisons"),
        ("(rank == 4", "expected comparisons"),
        ("set == 'T100", "expected comparisons"),
        ("rank", "expected comparisons"),
        ("not rank", "expected comparisons"),
        ("-(rank == 4)", "expected comparisons"),
        ("rank == 4 and 1", "expected comparisons"),
        ("rank == @cells", "expected comparisons"),
        ("`rank` == 4", "expected comparisons"),
        ("set.str.len() == 4", "expected comparisons"),
        ("rank == 2 + 2", "expected comparisons"),
        ("rank == True", "expected comparisons"),
        ("__import__('os').getpid() == 1", "expected comparisons"),
        ("set == '@x'", "holds for none of 216 cells"),
        ("rank == 3", "holds for none of 216 cells"),
    ],
)
def test_refused_filters(text, words):
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        choose(PAPER, text)
    assert str(caught.value).startswith("--only: ") and "\n" not in str(caught.value)


COMPARISONS = st.sampled_from(["rank<=64", "rank>4", "round==1", "round!=2", "set=='Tall'"])
TREES = st.recursive(
    COMPARISONS,
    lambda part: st.one_of(
        st.tuples(part, st.sampled_from([" and ", " or "]), part).map("".join),
        part.map(lambda text: f"({text})"),
        part.map(lambda text: f"not ({text})"),
    ),
    max_leaves=6,
)


@given(TREES)
def test_filters_mean_what_python_means(text):
    code = compile(text, "", "eval")

    def holds(cell):
        rank = float("nan") if cell.rank is None else cell.rank
        return eval(code, {"rank": rank, "round": cell.round, "set": cell.set})

    wanted = [cell for cell in PAPER if holds(cell)]
    if wanted:
        assert choose(PAPER, text) == wanted
    else:
        with pytest.raises(ValueError, match="none of 216 cells"):
            choose(PAPER, text)
