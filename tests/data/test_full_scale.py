"""All 875 tasks on disk, up to 1,300 instances each: what is promised of them, read once and twice.

Only the first reading parses the files. What follows from names and counts alone is tested over
more rounds, and without files, in test_tasksets.py.
"""

import hashlib
import json
from collections import Counter

import pytest

from jax_lora.data import instructions
from jax_lora.data.instructions import Checkout, read_checkout
from jax_lora.data.tasksets import TaskSet, draw
from tests.data import full_scale

NESTED = ("T100", "T250", "T500", "Tall")
TRAINED = (*NESTED, "T*100")  # T*500 alone would double the time; test_tasksets.py draws it


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def checkout(full_checkout, folder) -> Checkout:
    return read_checkout(full_checkout, cache=folder)


@pytest.fixture(scope="module")
def rounds(checkout) -> list[dict[str, TaskSet]]:
    """The sets of three rounds, those of round 0 with all their examples."""
    drawn = [draw(checkout, round) for round in range(3)]
    assert len(drawn[0]["Tall"].examples) == 75_317  # first: it reads what the others share
    return drawn


def digest(sets: dict[str, TaskSet], examples: tuple[str, ...]) -> str:
    """sha256 of the names of every set's tasks and of the ids of some sets' examples."""
    drawn = [[name, *one.tasks] for name, one in sets.items()]
    drawn += [[f"{e.task}/{e.id}" for e in sets[name].examples] for name in examples]
    return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:16]


def test_every_task_is_there(checkout, shared):
    index = shared / "data" / "niv2_index.json"
    assert sum(row["instances"] for row in full_scale.read_index(index)) == 2_805_170
    rows = full_scale.read_index(index, full_scale.MOST)
    assert len(rows) == 875
    for split, tasks in (("train", checkout.train), ("test", checkout.test)):
        assert [(t.name, t.category, t.count, t.distinct) for t in tasks] == sorted(
            (r["task"], r["category"], r["instances"], full_scale.distinct(r["instances"]))
            for r in rows
            if r["split"] == split
        )


def test_the_sets_are_nested_and_proportional(checkout, rounds):
    shares = Counter(task.category for task in checkout.train)
    for sets in rounds:
        names = [sets[name].tasks for name in NESTED]
        assert [len(set(one)) for one in names] == [100, 250, 500, 756]
        for smaller, larger in zip(names, names[1:], strict=False):
            assert set(smaller) < set(larger)
        for one in names:
            found = Counter(checkout.task(name).category for name in one)
            for category, count in shares.items():
                assert abs(found[category] - count * len(one) / 756) <= 2
        assert sets["T*100"].tasks == sets["seen"].tasks == sets["T100"].tasks
        assert sets["T*500"].tasks == sets["T500"].tasks
    examples = [set(rounds[0][name].examples) for name in NESTED]
    for smaller, larger in zip(examples, examples[1:], strict=False):
        assert smaller < larger


def test_the_test_sets_have_their_sizes(checkout, rounds):
    for sets in rounds:
        assert len(sets["seen"].examples) == 10_000
        assert Counter(e.task for e in sets["seen"].examples) == dict.fromkeys(
            sets["T100"].tasks, 100
        )
    unseen = rounds[0]["unseen"].examples
    assert len(unseen) == 11_810
    assert Counter(e.task for e in unseen) == {t.name: min(100, t.count) for t in checkout.test}


def test_nothing_that_is_tested_is_trained_on(rounds):
    for sets, names in zip(rounds, (TRAINED, ("T100",), ("T100",)), strict=True):
        tested = {(e.task, e.input.strip()) for e in sets["seen"].examples}
        assert len(tested) == 10_000
        for name in names:
            assert tested.isdisjoint((e.task, e.input.strip()) for e in sets[name].examples)
        assert set(sets["unseen"].tasks).isdisjoint(sets["Tall"].tasks)


def test_the_draws_are_the_same_on_every_machine(rounds):
    assert [digest(sets, ("T100", "seen")) for sets in rounds] == [
        "4f48971baba55272",
        "c82360449a96efca",
        "5bc9205cd6ed29d4",
    ]
    assert digest(rounds[0], (*TRAINED, "seen", "unseen")) == "0e1e09dee1982c13"


def test_a_second_program_opens_no_task(full_checkout, folder, checkout, rounds, monkeypatch):
    def parse(path):
        raise AssertionError(f"{path} was opened")

    monkeypatch.setattr(instructions, "parse_object", parse)
    again = read_checkout(full_checkout, cache=folder)
    assert again == checkout
    assert again.fingerprint == checkout.fingerprint
    sets = draw(again, 0)
    for name in (*TRAINED, "seen", "unseen"):
        assert sets[name].examples == rounds[0][name].examples
