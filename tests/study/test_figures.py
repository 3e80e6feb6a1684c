"""What the pictures show: lines, gaps, marks and words, all inside the frame at both widths."""

import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from jax_lora.study import Study, figures, plotting, svg
from jax_lora.study.statistics import summary
from tests.study.test_rates import trials
from tests.study.test_tables import PAPER_RANKS, grid, linear, results

REPOSITORY = Path(__file__).resolve().parents[2]
SETS = ("T100", "T250", "T500", "Tall", "T*100", "T*500")
CATEGORIES = (
    "Answerability Classification", "Cause Effect Classification", "A $5 Category",
    "Dialogue Act Recognition",
)  # fmt: skip


def values(cell, test, task):
    found = linear(cell, test, task)
    if task["closed_label"]:
        found["out_of_options"] = 100.0 - 8 * np.log2(cell["rank"] or 64)
    return found


@pytest.fixture(scope="module")
def drawn() -> tuple[Study, pd.DataFrame]:
    """The paper's grid, scores as in `linear`; T500 lacks rank 16, Tall two rounds."""
    closed = dict(closed_label=True, majority_baseline=35.0)
    own = [{"task": f"c{i}", "category": name, **closed} for i, name in enumerate(CATEGORIES)]
    own += [{"task": f"o{i}", "closed_label": False} for i in range(2)]
    cells = grid([*PAPER_RANKS, None], SETS)
    rows = results(cells, {"seen": own, "unseen": own}, values)
    gone = rows["cell"].str.startswith(("lora-r16-T500", "full-T100"))
    gone |= rows["cell"].isin(["lora-r64-Tall-1", "full-Tall-1"])
    study = Study.of(rows[~gone], cells)
    return study, summary(study)


@pytest.fixture(scope="module")
def rates() -> pd.DataFrame:
    """Best at a rate that falls with the rank; of rank 16 two rates failed, full had two alone."""
    losses: dict[tuple[int | None, float], float | None] = {}
    for rank in [*PAPER_RANKS, None]:
        best = -3 if (rank or 4096) < 16 else -4 if (rank or 4096) < 512 else -5
        for rate in (1e-5, 1e-4, 1e-3):
            losses[rank, rate] = 2.0 + abs(np.log10(rate) - best)
    del losses[None, 1e-4]
    losses |= {(16, 1e-4): None, (16, 1e-5): None}
    return trials(losses, {4: 2.5}, "T100")


def draw(name: str, drawn, rates, width: float) -> Figure:
    study, numbers = drawn
    match name:
        case "scaling":
            return figures.scaling(study, numbers, width)
        case "categories":
            return figures.categories(study, "unseen", "Tall", width)
        case "fixed_size":
            return figures.fixed_size(study, numbers, ["T*100", "T250", "T*500"], width)
        case "costs":
            return figures.costs(study, numbers, width=width)
        case _:
            return figures.learning_rates(rates, "T100", width=width)


def texts(figure: Figure) -> list[Text]:
    found = figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_visible())
    return [text for text in found if isinstance(text, Text) and text.get_text().strip()]


@pytest.mark.parametrize("width", [plotting.TEXT, plotting.COLUMN], ids=["text", "column"])
@pytest.mark.parametrize("name", ["scaling", "categories", "fixed_size", "costs", "rates"])
def test_nothing_is_cut_and_no_words_overlap(drawn, rates, name, width):
    before = dict(matplotlib.rcParams)
    figure = draw(name, drawn, rates, width)
    assert dict(matplotlib.rcParams) == before
    assert figure.get_figwidth() == width and figure.get_figheight() < 1.4 * width + 2
    figure.draw_without_rendering()
    seen = [axis for axis in figure.axes if axis.get_visible()]
    undrawn = {  # labels of ticks that the axis does not reach
        label
        for axis in seen
        for along, line in enumerate((axis.xaxis, axis.yaxis))
        for label in line.get_ticklabels(which="both")
        if not np.ptp([*line.get_view_interval(), label.get_position()[along]])
        <= np.ptp(line.get_view_interval())
    }
    boxes = {text: text.get_window_extent() for text in texts(figure) if text not in undrawn}
    frame = figure.bbox
    for text, box in boxes.items():
        assert box.x0 >= -1 and box.y0 >= -1, text
        assert box.x1 <= frame.x1 + 1 and box.y1 <= frame.y1 + 1, text
        assert text.get_fontsize() >= 5
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= frame.x1
        tops = [axis.get_tightbbox().y1 for axis in seen]
        assert box.y0 >= max(tops) - 1
    pairs = list(boxes.items())
    for i, (one, a) in enumerate(pairs):
        for other, b in pairs[i + 1 :]:
            wide = min(a.x1, b.x1) - max(a.x0, b.x0)
            tall = min(a.y1, b.y1) - max(a.y0, b.y0)
            assert min(wide, tall) <= 0.5, (one, other)


def named(axis, label: str):
    return [line for line in axis.lines if line.get_label() == label]


def test_scaling_shows_the_means_the_gaps_and_the_holes(drawn):
    figure = figures.scaling(*drawn)
    assert [axis.get_title() for axis in figure.axes[:2]] == ["Seen tasks", "Unseen tasks"]
    assert [axis.get_ylabel() for axis in figure.axes[::2]] == ["Exact match (%)", "Rouge-L (%)"]
    for place, axis in enumerate(figure.axes):
        assert axis.get_xscale() == "log" and axis.xaxis.get_transform().base == 2
        lines = [named(axis, name) for name in SETS[:4]]
        assert [len(line) for line in lines] == [1, 1, 1, 1]
        assert len({line[0].get_color() for line in lines}) == 4
        assert len({line[0].get_marker() for line in lines}) == 4
        expected = 20 + 2 * np.log2(PAPER_RANKS) + 1 + (10 if place > 1 else 0)
        np.testing.assert_array_equal(lines[0][0].get_xdata(), PAPER_RANKS)
        np.testing.assert_allclose(lines[0][0].get_ydata(), expected)
        gap = np.asarray(lines[2][0].get_ydata(), float)
        assert np.isnan(gap[2]) and np.isfinite(np.delete(gap, 2)).all()
        lora, full = named(axis, plotting.FEW)
        assert list(lora.get_xdata()) == [64] and list(full.get_xdata()) == [0.98]
        assert lora.get_markerfacecolor() == full.get_markerfacecolor() == "white"
        dashed = named(axis, "_full")
        assert len(dashed) == 3 and {line.get_linestyle() for line in dashed} == {"--"}
        assert {line.get_ydata()[0] for line in dashed} == {43.0 if place > 1 else 33.0}
        assert len(axis.collections) == 4  # bands over rounds
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[-2:] == ["full fine-tuning", "rounds missing"] and len(labels) == 6


def test_categories_show_both_rates_and_the_majority_label(drawn):
    figure = figures.categories(drawn[0], "unseen", "Tall")
    shown = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title() for axis in shown] == [
        r"A \$5 Category (1)",
        "Answerability Classification\n(1)",
        "Cause Effect Classification\n(1)",
        "Dialogue Act Recognition (1)",
    ]
    for axis in shown:
        (right,), (out,) = named(axis, "exact match"), named(axis, "out of options")
        np.testing.assert_allclose(out.get_ydata(), 100 - 8 * np.log2(PAPER_RANKS))
        assert right.get_ydata()[0] == 25.0
        assert [line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == ":"] == [35.0]
        assert {line.get_ydata()[0] for line in named(axis, "_full")} == {33.0, 52.0}


def test_fixed_size_has_a_line_a_model(drawn):
    figure = figures.fixed_size(*drawn, ["T*100", "T250", "T*500"])
    for axis in figure.axes:
        lines = [line for line in axis.lines if line.get_label()[0] != "_"]
        assert [line.get_label() for line in lines] == [*(f"rank {r}" for r in PAPER_RANKS), "full"]
        assert all(list(np.round(line.get_xdata())) == [0, 1, 2] for line in lines)
    labels = [label.get_text() for label in figure.axes[2].get_xticklabels()]
    assert labels[:2] == [r"$T^*_{\mathrm{100}}$", r"$T_{\mathrm{250}}$"]


def test_costs_are_shares_and_operations(drawn):
    figure = figures.costs(*drawn)
    share, operations = figure.axes[:2]
    assert share.get_xscale() == operations.get_xscale() == "log"
    (line,) = named(share, "T100")
    assert line.get_xdata()[0] == pytest.approx(0.0622, abs=1e-4)
    assert line.get_xdata()[-1] == pytest.approx(38.927, abs=1e-3)
    (star,) = named(share, "Tall, full")
    assert list(star.get_xdata()) == [100.0] and list(star.get_ydata()) == [33.0]
    assert [list(line.get_xdata()) for line in named(share, plotting.FEW)][1] == [100.0]
    (line,) = named(operations, "Tall")
    assert line.get_xdata()[0] == pytest.approx(75_600 * (4 * 6738415616 + 6 * 4 * 32 * 4 * 8192))


def test_the_chosen_rate_of_each_rank_is_joined(rates):
    (axis,) = figures.learning_rates(rates, "T100").axes
    (chosen,) = named(axis, "chosen rate")
    assert list(chosen.get_xdata()) == [*range(11)]
    at = [2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0]
    np.testing.assert_array_equal(np.asarray(chosen.get_ydata(), float), at)
    framed = [patch.get_xy() for patch in axis.patches]
    assert framed == [(j - 0.5, i - 0.5) for j, i in enumerate([*at, 0])]
    words = {text.get_position(): text.get_text() for text in axis.texts}
    assert words[2, 1] == "×" and words[0, 0] == "4.000" and words[11, 0] == "2.000"
    assert (11, 1) not in words  # not planned
    assert [t.get_text() for t in axis.get_yticklabels()] == ["1e-05", "0.0001", "0.001"]
    assert axis.get_title() == r"$T_{\mathrm{100}}$: validation loss"


def test_a_rank_whose_rates_all_failed_is_empty(recwarn):
    found = trials({(4, 1e-4): None, (4, 1e-3): None, (8, 1e-4): 2.0, (8, 1e-3): 1.0}, {})
    (axis,) = figures.learning_rates(found, "T2").axes
    assert [patch.get_xy() for patch in axis.patches] == [(0.5, 0.5)] and not recwarn.list
    assert np.isnan(np.asarray(named(axis, "chosen rate")[0].get_ydata(), float)[0])


def test_a_flat_line_looks_flat():
    cells = grid(rounds=1)
    own = [{"task": "t0"}, {"task": "t1"}]
    study = Study.of(results(cells, {"seen": own, "unseen": own}, lambda *_: {}), cells)
    numbers = summary(study)
    for figure in (figures.scaling(study, numbers), figures.costs(study, numbers)):
        assert {axis.get_ylim() for axis in figure.axes} == {(-0.05, 0.95)}


def test_sets_without_results_leave_empty_panels():
    cells = grid(sets=("T2", "T*1"), rounds=1)
    own = [{"task": "t0"}, {"task": "t1"}]
    rows = results(cells, {"seen": own, "unseen": own}, linear)
    study = Study.of(rows[rows["set"] == "T*1"], cells)
    for draw in (figures.scaling, figures.costs):
        figure = draw(study, summary(study))
        figure.draw_without_rendering()
        assert not any(np.isfinite(line.get_ydata()).any() for line in figure.axes[0].lines)


PARTS = {
    "one set": lambda row: row["set"] == "T4",
    "two ranks": lambda row: row["set"] == "T2" and row["cell"].startswith(("lora-r4", "lora-r16")),
    "full alone": lambda row: row["method"] == "full" and row["set"] == "T*4",
    "a variant": lambda row: row["variant"] != "",
}


@pytest.mark.parametrize("part", PARTS)
def test_of_a_part_the_legend_has_what_is_drawn_and_ticks_differ(part):
    """Of some cells of a study of sets, variants and full fine-tuning."""
    varied = grid([4, 16], ["T2"], variant="all-linear")
    cells = pd.concat([grid(sets=["T2", "T4", "T*4"]), varied], ignore_index=True)
    own = [{"task": "t0", "closed_label": True, "majority_baseline": 40.0}]
    rows = results(cells, {"seen": own, "unseen": own}, linear)
    rows = rows.assign(out_of_options=5.0, exact_match_given_valid=20.0)
    study = Study.of(rows[rows.apply(PARTS[part], axis=1)], cells)
    numbers = summary(study)
    (there,) = study.rows["set"].unique()
    made = [
        figures.scaling(study, numbers),
        figures.costs(study, numbers),
        figures.fixed_size(study, numbers, ["T*4", "T4"]),
    ]
    if part != "a variant":  # categories are the plain recipe's
        made.append(figures.categories(study, "unseen", there))
    for figure in made:
        figure.draw_without_rendering()
        drawn = [
            line
            for axis in figure.axes
            for line in axis.lines
            if np.isfinite(np.asarray(line.get_ydata(), float)).any()
        ]
        entries = [line for shown in figure.legends for line in shown.get_lines()]
        for entry in entries:
            colour = to_hex(entry.get_color())
            same = [line for line in drawn if to_hex(line.get_color()) == colour]
            black = [line for line in drawn if line.get_linestyle() == entry.get_linestyle()]
            assert same or (colour == "#000000" and black), entry.get_label()
        for axis in figure.axes:
            labels = [text.get_text() for text in axis.get_xticklabels() if text.get_text()]
            assert len(labels) == len(set(labels))


def test_variants_have_lines_of_their_own():
    cells = pd.concat([grid(), grid([4, 16], variant="all-linear")], ignore_index=True)
    own = [{"task": "t0"}, {"task": "t1"}]
    study = Study.of(results(cells, {"seen": own, "unseen": own}, linear), cells)
    numbers = summary(study)
    axis = figures.costs(study, numbers).axes[0]
    assert [len(named(axis, f"T2{end}")[0].get_xdata()) for end in ("", ", all-linear")] == [3, 2]
    assert len(named(figures.scaling(study, numbers).axes[0], "T2")[0].get_xdata()) == 3


def test_files_are_the_same_bytes_for_the_same_picture(rates, tmp_path):
    for folder in ("a", "b"):
        plotting.save(figures.learning_rates(rates, "T100"), tmp_path / folder / "rates.x")
    for name, start in (("rates.x.png", b"\x89PNG"), ("rates.x.pdf", b"%PDF")):
        content = (tmp_path / "a" / name).read_bytes()
        assert content.startswith(start) and len(content) > 5000
        assert content == (tmp_path / "b" / name).read_bytes()


def test_a_report_needs_no_jax_and_no_pyplot():
    program = (
        "import sys, jax_lora.study.report\n"
        "heavy = {'jax', 'jaxlib', 'flax', 'torch', 'matplotlib.pyplot'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_control_character_in_a_name_breaks_no_picture():
    figure = plotting.panels(3.0, 1, 1, 1.0, False)[0]
    figure.axes[0].set_title(plotting.without_math("a\x07b $"))
    assert "a\\x07b $" in svg.element(figure, "x")
