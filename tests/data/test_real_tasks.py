"""The 700 real tasks beside the repository: what draws from them, and what print says of them."""

from collections import Counter

import pytest

from configs import smollm2 as config_smollm2
from configs import study_real_cpu, study_smollm2
from jax_lora.config import RunConfig
from jax_lora.data.instructions import Checkout, Instance, read_checkout
from jax_lora.data.tasksets import TaskSet, draw
from jax_lora.evaluation.baselines import DEMONSTRATION, INPUT, baselines
from jax_lora.run import inputs
from jax_lora.study.config import StudyConfig

NESTED = ("T100", "T250", "T500", "Tall")


@pytest.fixture(scope="module")
def checkout(shared, tmp_path_factory) -> Checkout:
    folder = shared / "data" / "niv2"
    if not folder.is_dir():
        pytest.skip("the real tasks in ../shared/data/niv2 are not here")
    return read_checkout(folder, cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def rounds(checkout) -> list[dict[str, TaskSet]]:
    return [draw(checkout, round) for round in range(3)]


def test_the_test_sets_have_the_papers_sizes(checkout, rounds):
    assert (len(checkout.train), len(checkout.test)) == (581, 119)
    for sets in rounds:
        assert len(sets["seen"].examples) == 10_000
        assert set(Counter(e.task for e in sets["seen"].examples).values()) == {100}
        assert len(sets["unseen"].examples) == 11_810
    assert len({sets["T100"].tasks for sets in rounds}) == 3  # a round is a draw of its own


def test_the_task_sets_are_nested(rounds):
    for sets in rounds:
        names = [set(sets[name].tasks) for name in NESTED]
        assert [len(one) for one in names] == [100, 250, 500, 581]
        assert names[0] < names[1] < names[2] < names[3]
        assert set(sets["T100"].examples) < set(sets["T250"].examples)
        assert sets["T*100"].tasks == sets["T100"].tasks == sets["seen"].tasks
    assert len(rounds[0]["Tall"].examples) == 57_982


def test_nothing_that_is_tested_is_trained_on(rounds):
    for sets in rounds:
        tested = {(e.task, e.input.strip()) for e in sets["seen"].examples}
        assert len(tested) == 10_000
        for name in ("T250", "T*100"):
            assert tested.isdisjoint((e.task, e.input.strip()) for e in sets[name].examples)
        assert set(sets["unseen"].tasks).isdisjoint(sets["Tall"].tasks)


@pytest.mark.slow
def test_the_heuristics_score_what_the_paper_prints(checkout, rounds):
    """Wang et al. (2022) have 14.2 and 28.5; some references are missing here."""
    scores = baselines(checkout, rounds[0]["unseen"], ("rougeL",))
    assert round(scores[INPUT]["rougeL"], 1) == 14.0
    assert 28.05 <= scores[DEMONSTRATION]["rougeL"] < 28.35


def test_the_study_of_real_tasks_tells_diversity_from_amount(checkout):
    """T100 and T500 have as many examples per task, T*100 and T500 as many in all."""
    config = StudyConfig.from_config_dict(study_real_cpu.get_config())
    d = config.run.data
    for round in config.rounds:
        counts = (d.sizes, d.train_per_task, d.test_per_task)
        names = ("sizes", "train_per_task", "test_per_task")
        sets = draw(checkout, round, **dict(zip(names, counts, strict=True)))
        small, large, many = (sets[name] for name in config.sets)
        assert (len(small.tasks), len(large.tasks)) == (100, 500) and small.tasks == many.tasks
        assert len(large.examples) == len(many.examples) == 5 * len(small.examples)
        assert {*Counter(e.task for e in large.examples).values()} == {d.train_per_task}
        assert len(set(many.examples)) > 0.95 * len(many.examples)  # drawn with replacement
        unseen = Counter(e.task for e in sets["unseen"].examples)
        assert len(unseen) == 119 and set(unseen.values()) == {d.test_per_task}
        # A standard deviation of 40 points of Rouge-L is a standard error of 1.5.
        assert len(sets["unseen"].examples) > (40 / 1.5) ** 2


@pytest.mark.parametrize("made", [study_real_cpu, study_smollm2, config_smollm2])
def test_the_configs_of_real_tasks_have_room_for_every_definition(made, checkout, smollm2):
    """Nothing is cut of an instruction: a prompt that is too long without its input is refused."""
    found = made.get_config(f"model={smollm2}")
    if made is config_smollm2:
        run = RunConfig.from_config_dict(found)
    else:
        run = StudyConfig.from_config_dict(found).run
    encoder = inputs.encoder(run)
    assert run.data.source_length <= max(run.eval.buckets)
    for task in (*checkout.train, *checkout.test):
        row = encoder.training_row(task.example(Instance("1", "", ("yes",))))
        assert len(row.ids) <= max(run.data.buckets), task.name
