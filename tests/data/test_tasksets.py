"""Drawing task sets: the protocol's promises at full scale and on checkouts of any shape."""

import dataclasses
import hashlib
import json
import logging
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_lora.data.instructions import Checkout, Instance, Task, read_checkout
from jax_lora.data.tasksets import TaskSet, _only_eligible, _systematic, draw, validation_set
from jax_lora.data.toy import write_checkout


def fake(name: str, category: str, inputs: list[str] | int) -> Task:
    """A task in memory: the given inputs, or that many different ones, made when asked for."""
    texts = [f"{name} {i}" for i in range(inputs)] if isinstance(inputs, int) else inputs

    def read() -> tuple[Instance, ...]:
        rows = enumerate(texts)
        return tuple(Instance(f"{name}-{i}", text, (f"answer {i}",)) for i, text in rows)

    distinct = len({text.strip() for text in texts})
    return Task(name, category, f"Do {name}.", len(texts), distinct, "", "memory", read)


def synthetic(
    sizes: dict[str, list[int]], test: tuple[int, ...] = (30, 4), order: int = 1
) -> Checkout:
    """A checkout with, for each category, tasks of the given numbers of inputs."""
    train = [
        fake(f"{category}-{i}", category, count)
        for category, counts in sizes.items()
        for i, count in enumerate(counts)
    ]
    tests = [fake(f"test-{i}", "test", count) for i, count in enumerate(test)]
    return Checkout(train=tuple(train[::order]), test=tuple(tests))


def digest(sets: dict[str, TaskSet], examples: bool) -> str:
    """sha256 of what was drawn: the names, and the examples' ids if asked for."""
    drawn = {name: [list(one.tasks)] for name, one in sets.items()}
    if examples:
        for name, one in sets.items():
            drawn[name].append([f"{example.task}/{example.id}" for example in one.examples])
    return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()


def inputs_by_task(one: TaskSet) -> dict[str, set[str]]:
    """The distinct inputs that a set takes from each of its tasks."""
    result: dict[str, set[str]] = {name: set() for name in one.tasks}
    for example in one.examples:
        result[example.task].add(example.input.strip())
    return result


def off_proportion(checkout: Checkout, names: tuple[str, ...]) -> float:
    """How many tasks the worst category is away from its share."""
    every = Counter(task.category for task in checkout.train)
    found = Counter(checkout.task(name).category for name in names)
    share = len(names) / len(checkout.train)
    return max(abs(found[category] - share * count) for category, count in every.items())


# ---------------------------------------------------------------- the real names and counts


@pytest.fixture(scope="module")
def full(shared) -> Checkout:
    """All 875 tasks with their real names and categories, and made-up instances.

    As many as they really have, but at most 600: no rule looks at more, and it is six times faster.
    """
    rows = json.loads((shared / "data" / "niv2_index.json").read_text())["tasks"]
    by_split = {
        split: tuple(
            fake(row["task"], row["category"], min(600, row["instances"]))
            for row in rows
            if row["split"] == split
        )
        for split in ("train", "test")
    }
    return Checkout(**by_split)


@pytest.fixture(scope="module")
def round_0(full) -> dict[str, TaskSet]:
    return draw(full, 0)


@pytest.mark.parametrize("round", range(12))
def test_nested_proportional_and_eligible(full, round):
    sets = draw(full, round)
    nested = [sets[name].tasks for name in ("T100", "T250", "T500", "Tall")]
    assert [len(names) for names in nested] == [100, 250, 500, 756]
    for smaller, larger in zip(nested, nested[1:], strict=False):
        assert set(smaller) < set(larger)
    for names in nested:
        assert len(set(names)) == len(names)
        assert off_proportion(full, names) <= 2
    assert all(full.task(name).count >= 200 for name in sets["T100"].tasks)
    assert sets["T*100"].tasks == sets["seen"].tasks == sets["T100"].tasks
    assert sets["T*500"].tasks == sets["T500"].tasks


def test_the_drawn_names_are_the_same_on_every_machine(full):
    assert [digest(draw(full, round), examples=False)[:16] for round in range(3)] == [
        "a18a90f082876c26",
        "b547a952553ab3f2",
        "5374d636f2b455c1",
    ]


def test_the_papers_numbers_of_examples(full, round_0):
    counts = {name: len(one.examples) for name, one in round_0.items()}
    names = round_0["T500"].tasks
    assert counts == {
        "T100": 10_000,
        "T250": sum(min(100, full.task(name).count) for name in round_0["T250"].tasks),
        "T500": sum(min(100, full.task(name).count) for name in names),
        "Tall": 75_317,
        "T*100": 25_000,
        "T*500": 25_000,
        "seen": 10_000,
        "unseen": 11_810,
    }
    assert set(Counter(e.task for e in round_0["T*100"].examples).values()) == {250}
    assert set(Counter(e.task for e in round_0["T*500"].examples).values()) == {50}
    assert set(Counter(e.task for e in round_0["seen"].examples).values()) == {100}


def test_nothing_that_is_tested_is_trained_on(round_0):
    seen = inputs_by_task(round_0["seen"])
    for name in ("T100", "T250", "T500", "Tall", "T*100", "T*500"):
        trained = inputs_by_task(round_0[name])
        assert all(trained[task].isdisjoint(tested) for task, tested in seen.items())
    tests = {example.task for example in round_0["unseen"].examples}
    assert tests.isdisjoint(round_0["Tall"].tasks)


def test_nested_sets_share_their_examples(round_0):
    sets = [set(round_0[name].examples) for name in ("T100", "T250", "T500", "Tall")]
    assert sets[0] < sets[1] < sets[2] < sets[3]


def test_rounds_differ_in_tasks_and_in_test_examples(full, round_0):
    other = draw(full, 1)
    common = set(round_0["seen"].tasks) & set(other["seen"].tasks)
    assert 0 < len(common) < 50
    here, there = inputs_by_task(round_0["seen"]), inputs_by_task(other["seen"])
    assert all(here[name] != there[name] for name in common if full.task(name).count > 250)
    assert round_0["unseen"].examples == other["unseen"].examples


# ---------------------------------------------------------------- validation


@pytest.mark.parametrize("name", ["T4", "T7", "T10", "Tall", "T*4", "T*10"])
@pytest.mark.parametrize("round", range(3))
def test_validation_neither_trains_nor_tests(name, round):
    checkout = synthetic(MIXED)
    sets = draw(checkout, round, **SMALL)
    found = validation_set(checkout, round, sets[name], sets["seen"], 5)
    assert found.tasks == sets[name].tasks
    trained, tested = inputs_by_task(sets[name]), inputs_by_task(sets["seen"])
    for task, inputs in inputs_by_task(found).items():
        used = trained[task] | tested.get(task, set())
        assert inputs.isdisjoint(used)
        assert len(inputs) == min(5, checkout.task(task).distinct - len(used))
    tasks = [example.task for example in found.examples]
    assert len(set(found.examples)) == len(tasks)
    assert [task for task in found.tasks if task in tasks] == list(dict.fromkeys(tasks))


def test_validation_follows_the_test_examples_in_their_order():
    """What a larger count of test examples would take next."""
    checkout = synthetic({"A": [60, 50, 40]})
    sets = draw(checkout, 0, sizes=(1, 2, 3), train_per_task=10, test_per_task=6)
    longer = draw(checkout, 0, sizes=(1, 2, 3), train_per_task=10, test_per_task=11)
    found = validation_set(checkout, 0, sets["T1"], sets["seen"], 5)
    assert found.examples == longer["seen"].examples[6:]
    fewer = validation_set(checkout, 0, sets["T1"], sets["seen"], 2)
    assert fewer.examples == found.examples[:2]
    other = validation_set(checkout, 1, sets["T1"], sets["seen"], 5)
    assert set(other.examples) != set(found.examples)


def test_validation_is_remembered_as_long_as_nothing_changes(tmp_path):
    checkout = read_checkout(write_checkout(tmp_path / "toy", instances_per_task=30))
    checkout = dataclasses.replace(checkout, cache=tmp_path / "cache")
    small = {"sizes": (3, 4, 5), "train_per_task": 10, "test_per_task": 6}

    def found(count, **changes):
        sets = draw(checkout, 0, **(small | changes))
        return validation_set(checkout, 0, sets["T3"], sets["seen"], count).examples

    first = found(5)
    (path,) = (tmp_path / "cache").glob("validation-*")
    before = path.read_bytes()
    assert found(5) == first and path.read_bytes() == before
    assert found(4) != first and found(5, test_per_task=7) != first  # nothing stale
    assert found(5) == first


# ---------------------------------------------------------------- checkouts of other shapes

MIXED = {"A": [60, 50, 40, 5], "B": [30, 30], "C": [8, 9, 50], "D": [44], "E": [70, 3]}
SMALL = {"sizes": (4, 7, 10), "train_per_task": 10, "test_per_task": 6}


def test_the_same_in_any_order_of_the_tasks():
    here = draw(synthetic(MIXED), 0, **SMALL)
    there = draw(synthetic(MIXED, order=-1), 0, **SMALL)
    assert digest(here, examples=True) == digest(there, examples=True)
    assert digest(here, examples=True)[:16] == "e7d2a34bf7f6a1b0"


def test_small_counts():
    sets = draw(synthetic(MIXED), 0, **SMALL)
    assert list(sets) == ["T4", "T7", "T10", "Tall", "T*4", "T*10", "seen", "unseen"]
    assert len(sets["seen"].examples) == 4 * 6
    assert len(sets["T4"].examples) == 4 * 10
    assert Counter(e.task for e in sets["T*4"].examples) == {  # 10 x 7 / 4 = 17.5, rounded up
        name: 18 for name in sets["T4"].tasks
    }
    assert len(sets["T*10"].examples) == 10 * 7
    assert len(sets["Tall"].examples) == 8 * 10 + 5 + 8 + 9 + 3


def test_the_control_sets_draw_with_replacement():
    sets = draw(synthetic(MIXED), 0, **SMALL)
    repeated = [n for n in Counter(e.id for e in sets["T*4"].examples).values() if n > 1]
    assert repeated
    outside = {e.id for e in sets["T*4"].examples} - {e.id for e in sets["T4"].examples}
    assert outside  # from the whole task, not only from what the nested sets train on


def test_unseen_is_the_head_of_the_file():
    repeated = fake("test", "test", ["b", "a", "b", "c", "d"])
    checkout = Checkout(train=synthetic(MIXED).train, test=(repeated,))
    for round in range(3):
        examples = draw(checkout, round, sizes=(1, 2, 3), test_per_task=4)["unseen"].examples
        assert [example.input for example in examples] == ["b", "a", "b", "c"]


def test_repeated_inputs_never_fall_on_both_sides():
    texts = [f"{i % 16}{' ' * (i // 16)}" for i in range(64)]  # 16 inputs, four spellings each
    checkout = Checkout(train=(fake("one", "A", texts),), test=synthetic({}).test)
    sizes, control = (1, 2, 3), "T*1"
    for round in range(5):
        sets = draw(checkout, round, sizes=sizes, train_per_task=10, test_per_task=6)
        seen = inputs_by_task(sets["seen"])["one"]
        assert len(seen) == 6
        assert len(inputs_by_task(sets["T1"])["one"]) == len(sets["T1"].examples) == 10
        assert seen.isdisjoint(inputs_by_task(sets["T1"])["one"])
        assert seen.isdisjoint(inputs_by_task(sets[control])["one"])


def test_sizes_above_the_checkout_are_cut_and_said(caplog):
    with caplog.at_level(logging.INFO, logger="jax_lora.data.tasksets"):
        sets = draw(synthetic(MIXED), 0, sizes=(4, 250, 500), train_per_task=10, test_per_task=6)
    assert [len(sets[name].tasks) for name in ("T4", "T250", "T500", "Tall")] == [4, 12, 12, 12]
    assert [record.getMessage() for record in caplog.records] == [
        "sizes (4, 250, 500) are cut to the 12 train tasks of the checkout"
    ]


def test_shorter_tasks_enter_the_first_set_only_when_they_must(caplog):
    checkout = synthetic({"A": [40, 7, 40], "B": [9, 1], "C": [40]})
    sets = draw(checkout, 0, sizes=(5, 6, 7), train_per_task=10, test_per_task=6)
    assert "only 3 tasks have enough distinct inputs for the smallest set of 5: 2 shorter" in (
        caplog.text
    )
    assert {"A-0", "A-2", "C-0"} < set(sets["T5"].tasks)
    for name, tested in inputs_by_task(sets["seen"]).items():
        distinct = checkout.task(name).distinct
        half = 10 if distinct >= 16 else max(1, distinct // 2)
        assert len(inputs_by_task(sets["T5"])[name]) == half
        assert len(tested) == min(6, distinct - half)


def test_a_place_without_an_eligible_task_goes_to_the_most_underserved_category():
    moved = _only_eligible(
        quotas={"A": 4, "B": 2, "C": 1, "D": 0},
        limits={"A": 8, "B": 5, "C": 2, "D": 1},
        eligible={"A": 2, "B": 9, "C": 9, "D": 9},
        fair={"A": Fraction(4), "B": Fraction(19, 10), "C": Fraction(17, 10), "D": Fraction(6, 10)},
    )
    # C lacks 0.7 of a task and D 0.6, B has 0.1 too many: one place to C, then one to D.
    assert moved == {"A": 2, "B": 2, "C": 2, "D": 1}


def test_the_first_set_avoids_short_tasks_where_it_can():
    checkout = synthetic({"A": [40, 5, 5, 5, 5, 5], "B": [40] * 4, "C": [40] * 2})
    for round in range(20):
        sets = draw(checkout, round, sizes=(4, 8, 11), train_per_task=10, test_per_task=6)
        assert all(checkout.task(name).distinct == 40 for name in sets["T4"].tasks)


def test_a_set_reads_no_file_before_its_examples_are_wanted():
    def read() -> tuple[Instance, ...]:
        raise AssertionError("read too early")

    task = Task("t", "A", "Do.", 400, 400, "", "memory", read)
    sets = draw(Checkout(train=(task,), test=()), 0)
    assert sets["T100"].tasks == ("t",)
    with pytest.raises(AssertionError, match="read too early"):
        _ = sets["T100"].examples


def test_the_toy_checkout_from_disk(tmp_path):
    checkout = read_checkout(write_checkout(tmp_path))
    sets = draw(checkout, 0, sizes=(8, 16, 24))
    assert len(sets["seen"].examples) == len(sets["T8"].examples) == 800
    assert (len(sets["T*8"].examples), len(sets["T*24"].examples)) == (8 * 200, 24 * 67)
    assert len(sets["unseen"].examples) == 100 * len(checkout.test)
    assert sets["T8"].examples is sets["T8"].examples


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": (5, 5, 6)}, r"sizes are \(5, 5, 6\), expected three rising counts"),
        ({"sizes": (0, 5, 6)}, "expected three rising counts"),
        ({"train_per_task": 0}, "train_per_task is 0 and test_per_task 6, expected at least 1"),
    ],
)
def test_wrong_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        draw(synthetic(MIXED), 0, **{**SMALL, **changes})
    with pytest.raises(ValueError, match="the checkout has no train tasks"):
        draw(Checkout(train=(), test=()), 0)


@given(
    weights=st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any),
    u=st.fractions(0, 1).filter(lambda u: u < 1),
    share=st.fractions(0, 1),
)
def test_systematic_sampling(weights, u, share):
    named = {str(i): weight for i, weight in enumerate(weights)}
    size = int(share * sum(weights))
    quotas = _systematic(size, named, u)
    assert sum(quotas.values()) == size
    for name, weight in named.items():
        assert abs(quotas[name] - Fraction(size * weight, sum(weights))) < 1
        assert 0 <= quotas[name] <= weight


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=8), min_size=1, max_size=6),
    sizes=st.sets(st.integers(1, 60), min_size=3, max_size=3),
    round=st.integers(0, 5),
)
def test_any_checkout(counts, sizes, round):
    checkout = synthetic({f"c{i}": row for i, row in enumerate(counts)})
    first, middle, last = sorted(sizes)
    total = len(checkout.train)
    sets = draw(checkout, round, sizes=(first, middle, last), train_per_task=8, test_per_task=5)
    nested = [sets[f"T{size}"] for size in (first, middle, last)] + [sets["Tall"]]
    assert [len(one.tasks) for one in nested] == [min(size, total) for size in sorted(sizes)] + [
        total
    ]
    for smaller, larger in zip(nested, nested[1:], strict=False):
        assert set(smaller.tasks) <= set(larger.tasks)
        assert set(smaller.examples) <= set(larger.examples)
    places = set(nested[1].tasks)
    eligible = [task for task in checkout.train if task.distinct >= 13 and task.name in places]
    entered = [task for task in eligible if task.name in nested[0].tasks]
    assert len(entered) == min(len(eligible), len(nested[0].tasks))  # they come before others
    seen = inputs_by_task(sets["seen"])
    for one in (*nested, sets[f"T*{first}"], sets[f"T*{last}"]):
        trained = inputs_by_task(one)
        assert all(trained.values())  # no task without an example
        assert all(trained[name].isdisjoint(tested) for name, tested in seen.items())
