"""What a cell is measured by: its weight update, forgetting, memory, and the tables of them."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from jax_lora.config import RunConfig
from jax_lora.data.instructions import read_checkout
from jax_lora.data.toy_pairs import LETTERS, VALUE_BITS, codebook
from jax_lora.errors import DataError
from jax_lora.model import lora
from jax_lora.run import Run, inputs
from jax_lora.study import Study, measure_figures, measures, plotting, small, update
from jax_lora.study.measure_figures import mean_spectra
from jax_lora.study.measure_findings import measure_findings
from jax_lora.study.measure_tables import capacity_table, measures_table
from jax_lora.study.report import report
from jax_lora.study.statistics import measured
from jax_lora.weights import base as base_weights
from jax_lora.weights import peft
from tests.study.test_spectra import counted
from tests.study.test_tables import cells_of, grid, linear, results, tasks

TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj", "lm_head")


@pytest.fixture(scope="module")
def kernels(tiny_model):
    base = base_weights.load(tiny_model, "float32")[1]
    return {name: np.asarray(lora.kernel(base, name)) for name in TARGETS}


def trained(tiny_model, folder, **changes) -> Run:
    """A run of which `update.measure` reads the config and the folder."""
    changes = {"model": str(tiny_model), "lora.targets": TARGETS} | changes
    return Run.open(RunConfig().replace(**changes), folder)


def save(folder, adapters, rank: int) -> None:
    peft.save(folder / "adapter", lora.tree(adapters), rank=rank, alpha=2 * rank)


def with_adapter(
    tiny_model, folder, kernels, size: float, rank: int = 3
) -> tuple[Run, dict[str, dict[str, np.ndarray]]]:
    """A run with random adapters, and these."""
    rng = np.random.default_rng(0)
    adapters = {
        name: {
            "a": rng.normal(size=(*kernel.shape[:2], rank)).astype(np.float32),
            "b": size * rng.normal(size=(len(kernel), rank, kernel.shape[2])).astype(np.float32),
            "scale": np.full(len(kernel), 2, np.float32),
        }
        for name, kernel in kernels.items()
    }
    save(folder, adapters, rank)
    return trained(tiny_model, folder), adapters


def entropy_rank(values: np.ndarray) -> float:
    """Roy and Vetterli's effective rank, term by term."""
    shares = [v / sum(values) for v in values if v > 1e-12 * values[0]]
    return math.exp(-sum(p * math.log(p) for p in shares))


@pytest.mark.parametrize("size", [1e-4, 1.0])
def test_a_lora_update_is_that_of_plain_numpy(tiny_model, tmp_path, kernels, size):
    run, adapters = with_adapter(tiny_model, tmp_path, kernels, size)
    found = update.measure(run).set_index(["module", "layer"])
    assert len(found) == sum(map(len, kernels.values()))
    for (name, layer), row in found.iterrows():
        leaf, w = adapters[name], kernels[name][layer].astype(float)
        delta = 2 * leaf["a"][layer].astype(float) @ leaf["b"][layer].astype(float)
        values = np.linalg.svd(delta, compute_uv=False)[:3]
        np.testing.assert_allclose(row["values"], values, rtol=1e-6)
        assert row["effective_rank"] == pytest.approx(entropy_rank(values), rel=1e-6)
        assert row["norm"] == pytest.approx(np.linalg.norm(delta), rel=1e-6)
        relative = np.linalg.norm(delta) / np.linalg.norm(w)
        assert row["relative_norm"] == pytest.approx(relative, rel=1e-6)
        assert row["intruder_dimensions"] == counted(w, w + delta)
    assert (found["intruder_dimensions"] > 0).any() == (size == 1.0)


def test_a_full_update_is_that_of_plain_numpy(tiny_model, tmp_path, kernels, monkeypatch):
    rng = np.random.default_rng(1)
    after, tree = {}, base_weights.load(tiny_model, "float32")[1]
    for name, kernel in kernels.items():
        after[name] = kernel + 0.1 * rng.normal(size=kernel.shape).astype(np.float32)
        tree = lora.with_kernel(tree, name, after[name])
    run = trained(tiny_model, tmp_path, method="full", trainable=("params/.*",), frozen=())
    monkeypatch.setattr(run, "weights", lambda: (None, tree))
    for _, row in update.measure(run).iterrows():
        w, tuned = (x[row["module"]][row["layer"]].astype(float) for x in (kernels, after))
        values = np.linalg.svd(tuned - w, compute_uv=False)
        np.testing.assert_allclose(row["values"], values, rtol=1e-6, atol=1e-9)
        assert row["effective_rank"] == pytest.approx(entropy_rank(values), rel=1e-6)
        assert row["intruder_dimensions"] == counted(w, tuned)


def test_an_adapter_of_zeros_changes_nothing(tiny_model, tmp_path, kernels):
    run, _ = with_adapter(tiny_model, tmp_path, kernels, 0.0)
    found = update.measure(run)
    numbers = found.drop(columns=["module", "layer", "values"])
    assert (numbers == 0).all(axis=None) and not np.concatenate(found["values"]).any()


def test_a_planted_direction_is_found(tiny_model, tmp_path, kernels):
    """It reads the direction that the base hardly reads, and writes one that it never writes."""
    _, adapters = with_adapter(tiny_model, tmp_path, kernels, 0.0, rank=1)
    inputs_of, _, outputs = np.linalg.svd(kernels["up_proj"][1].astype(float))
    assert len(inputs_of) < len(outputs)
    adapter = adapters["up_proj"]
    adapter["a"][1, :, 0], adapter["b"][1, 0] = inputs_of[:, -1], 100 * outputs[-1]
    save(tmp_path / "again", adapters, rank=1)
    found = update.measure(trained(tiny_model, tmp_path / "again"))
    planted = (found["module"] == "up_proj") & (found["layer"] == 1)
    assert found[planted]["intruder_dimensions"].to_list() == [1]
    assert found[planted]["effective_rank"].to_list() == pytest.approx([1.0])
    assert not found[~planted]["intruder_dimensions"].any()


# ---------------------------------------------------------------- the text, and memory


def test_the_text_of_forgetting(tmp_path):
    passage = measures.text_of("")
    assert passage.startswith("When on board H.M.S. 'Beagle,'") and 3000 < len(passage) < 8000
    path = tmp_path / "text.txt"
    path.write_text("Another one.")
    assert measures.text_of(str(path)) == "Another one."
    for content, words in ((b"\xff\xfe\xff", "not UTF-8"), (b" \n", "found no text")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"text.txt: {words}"):
            measures.text_of(str(path))
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        measures.text_of(str(tmp_path / "nowhere.txt"))


def test_memorized_bits_by_hand(monkeypatch):
    """Two pairs known by heart, one as by chance, one held for certain to be another."""
    bits = np.array([0.0, 0.0, VALUE_BITS, 3 * VALUE_BITS])
    tokens = np.array([2, 3, 4, 5])
    losses = pd.DataFrame({"loss": bits * math.log(2) / tokens, "tokens": tokens})
    monkeypatch.setattr(inputs, "training_set", lambda _: None)
    model: Any = SimpleNamespace(config=None, references=lambda _: losses)
    assert measures.memorized_bits(model) == pytest.approx((2 + 0 - 2) * VALUE_BITS)


def test_codebooks_are_random_and_their_keys_distinct(tmp_path):
    small.write_tasks(tmp_path / "tasks", 40, ("Word Semantics",), (), codebooks=3)
    checkout = read_checkout(tmp_path / "tasks" / "grid")
    assert [task.name for task in checkout.train] == [codebook(i).name for i in range(3)]
    outside = {task.name for task in read_checkout(tmp_path / "tasks" / "outside").train}
    books = {name for name in outside if "toy_pairs" in name}
    assert books == {codebook(i).name for i in (3, 4, 5)} and len(outside) == 5
    pairs = [(one.input, one.outputs[0]) for task in checkout.train for one in task.instances()]
    keys, values = zip(*pairs, strict=True)
    assert len({*keys}) == len(pairs) == 120 and len({*values}) > 100
    assert {len(value.split()) for value in values} == {VALUE_BITS // 4}
    letters = "".join(values).replace(" ", "")
    counts = [letters.count(letter) for letter in LETTERS]
    assert sum(counts) == 480 and min(counts) > 12  # 30 each, give or take 5.3


# ---------------------------------------------------------------- tables and figures


def measured_rows(cell, test, task) -> dict:
    rank, of_round = cell["rank"] or 64, cell["round"]
    return linear(cell, test, task) | {
        "reference_loss": 1.0 + (test == "unseen") + of_round,
        "adapter_rank": cell["rank"], "alpha": cell["rank"] and 2.0 * cell["rank"],
        "text_loss": 3.0, "forgetting": 0.1 * of_round - 0.1, "effective_rank": rank / 2,
        "intruder_dimensions": 8 / rank,
    }  # fmt: skip


def test_measures_are_means_over_rounds():
    cells = grid((4, 16, None), ["T2"])
    study = Study.of(results(cells, tasks(2), measured_rows), cells)
    data = measured(study).set_index("config")
    assert data.loc["rank 4", "reference_loss_unseen"] == pytest.approx(3.0)
    assert data.loc["rank 4", "reference_loss_unseen_std"] == pytest.approx(1.0)
    table = measures_table(study, data.reset_index(), "T2")
    assert table
    rows = {row[0]: row[1:] for row in cells_of(table.markdown())}
    assert rows["rank 4"] == [
        "4", "8", "4,194,304", "2.000 ± 1.000", "3.000 ± 1.000", "3.000 ± 0.000", "+0.00 ± 0.10",
        "2.0 ± 0.0", "2.00 ± 0.00",
    ]  # fmt: skip
    assert rows["full"][:2] == ["", ""]
    assert capacity_table(study, data.reset_index()) is None


def test_what_the_measures_say_of_the_rank():
    cells = grid((4, 16, None), ["T2", "T4"], rounds=2)
    rows = results(cells, tasks(2), measured_rows)
    # Rank 16 forgets more on T2 and less on T4; full fine-tuning as much as rank 16.
    sign = np.where(rows["set"] == "T2", 1, -1)
    rows["forgetting"] = 0.25 + 0.125 * sign * (rows["rank"].fillna(64) != 4)
    rows.loc[(rows["set"] == "T4") & (rows["rank"] == 16), "intruder_dimensions"] = np.nan
    said = {one.question: one.answers for one in measure_findings(Study.of(rows, cells))}
    forget, intruders, effective = said.values()
    assert forget == [
        "rank 4 to rank 16: undecided. +0.000 nats per token of other text on average, −0.125 to "
        "+0.125 in 4 pairs of a set and round (2 rounds; a range, no interval).",
        "rank 16 to full: no. +0.000 nats per token of other text on average, +0.000 to +0.000 in "
        "4 pairs of a set and round (2 rounds; a range, no interval).",
        "Means over sets and rounds: rank 4 0.250, rank 16 0.250, full 0.250 nats per token of "
        "other text.",
    ]
    assert intruders[0].startswith("rank 4 to rank 16: no. −1.50 of ten per matrix on average, ")
    assert "in 2 pairs" in intruders[0]
    assert effective[0].startswith("rank 4 to rank 16: yes. +6.0 on average, +6.0 to +6.0 in 4")
    one = rows[(rows["set"] == "T2") & (rows["round"] == 0)]
    line = measure_findings(Study.of(one, cells))[2].answers[0]
    assert line.startswith("rank 4 to rank 16: undecided, one pair of models alone. +6.0")
    apart = rows[(rows["rank"] == 4) == (rows["set"] == "T2")]
    assert measure_findings(Study.of(apart, cells))[0].answers[0] == (
        "rank 4 to rank 16: cannot be said, no set and round has both."
    )
    assert measure_findings(Study.of(results(cells, tasks(2), linear), cells)) == []


def test_references_weigh_as_their_examples():
    cells = grid((4,), ["T2"], rounds=1)
    both = {"seen": [{"task": "a", "examples": 1}, {"task": "b", "examples": 3}]}
    values = {"a": 1.0, "b": 2.0}
    rows = results(cells, both, lambda _, __, task: {"reference_loss": values[task["task"]]})
    (row,) = measured(Study.of(rows, cells)).to_dict("records")
    assert row["reference_loss_seen"] == pytest.approx(1.75)
    assert np.isnan(row["reference_loss_unseen"]) and np.isnan(row["forgetting"])


def test_a_report_of_a_study_without_measures_has_none(tmp_path):
    cells = grid((4, None), ["T2"], rounds=1)
    text = report(results(cells, tasks(2), linear), cells, tmp_path).read_text("utf-8")
    assert "intruders" not in text and not (tmp_path / "tables" / "measures.csv").exists()


def test_a_report_with_measures(tmp_path):
    cells = grid((4, 16, None), ["T2", "T4"])
    rows = results(cells, tasks(2), measured_rows)
    rows["memorized_bits"] = 1000.0 * rows["rank"].fillna(64).astype(float)
    shapes = {"full": (1.0, 0.5, 0.25), "lora": (4.0, 1.0)}
    updates = pd.DataFrame(
        {"cell": row["cell"], "module": name, "values": np.array(values)}
        for row in cells.to_dict("records")
        for scale in (1.0, 3.0)
        for name, values in (
            ("q_proj", np.array(shapes[row["method"]]) * scale),
            ("k_proj", [1.0]),  # a narrow matrix, whose one value is left out
        )
    )
    text = report(rows, cells, tmp_path, updates=updates).read_text("utf-8")
    for name in ("measures", "capacity"):
        assert (tmp_path / "tables" / f"{name}.md").read_text("utf-8") in text
    for name in ("measures", "spectra", "capacity"):
        assert f"![{name}](figures/{name}.png)" in text
    # Of what is half finished the legend has what is drawn.
    half = Study.of(rows[(rows["set"] == "T4") & (rows["method"] == "lora")], cells)
    for draw in (measure_figures.measures, measure_figures.capacity):
        (shown,) = draw(half, measured(half)).legends
        assert [text.get_text() for text in shown.get_texts()] == [r"$T_{\mathrm{4}}$"]
        assert shown.get_lines()[0].get_color() == plotting.COLOURS[1]
    lines = mean_spectra(Study.of(rows, cells), updates, "T4")
    assert list(lines) == ["rank 4", "rank 16", "full"]
    assert lines["full"].tolist() == [1, 0.5, 0.25] and lines["rank 4"].tolist() == [1, 0.25]
    bits = {row[0]: row[1:] for row in cells_of((tmp_path / "tables" / "capacity.md").read_text())}
    assert bits["rank 16"][1] == "16,000 ± 0" and bits["rank 16"][-1] == "0.00"


def test_measures_out_of_range_are_refused():
    cells = grid((4,), ["T2"], rounds=1)
    rows = results(cells, tasks(2), measured_rows)
    Study.of(rows.assign(forgetting=-0.5), cells)
    for name, value in (("forgetting", np.inf), ("intruder_dimensions", -1.0)):
        with pytest.raises(DataError, match=f"{name} is .*, expected "):
            Study.of(rows.assign(**{name: value}), cells)
    rows.loc[0, "text_loss"] = 9.0
    with pytest.raises(DataError, match="text_loss is .* expected one value"):
        Study.of(rows, cells)
