"""The toy checkout: the real layout, deterministic, as large and as short as it promises."""

import string
from collections import Counter

import pytest

from jax_lora.data.instructions import Checkout, read_checkout
from jax_lora.data.toy import TASKS, write_checkout


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Checkout:
    return read_checkout(write_checkout(tmp_path_factory.mktemp("toy")))


def test_sizes(toy):
    assert len(toy.train) >= 24
    assert len(toy.test) >= 8
    assert len({task.category for task in toy.train}) >= 6
    assert len({task.category for task in toy.test}) >= 6
    assert {task.category for task in toy.train}.isdisjoint(task.category for task in toy.test)
    for task in (*toy.train, *toy.test):
        assert task.count == task.distinct == 300, task.name
        assert 12 <= len(task.definition.split()) <= 60, task.name
        for instance in task.instances():
            assert 2 <= len(instance.input.split()) <= 40
            assert 1 <= len(instance.outputs[0].split()) <= 12
            assert len(instance.outputs) == 1


def test_about_half_are_closed_and_those_are_balanced_and_named_in_the_definition(toy):
    closed = [task for task in TASKS if task.labels]
    assert 0.4 <= len(closed) / len(TASKS) <= 0.6
    assert {task.split for task in closed} == {"train", "test"}
    for task in closed:
        assert 2 <= len(task.labels) <= 6
        words = [word.strip(string.punctuation) for word in task.definition.split()]
        assert set(task.labels) <= set(words), task.name
        answers = [instance.outputs[0] for instance in toy.task(task.name).instances()]
        for part in (answers, answers[:100]):  # the test takes the first hundred
            counts = Counter(part)
            assert set(counts) == set(task.labels)
            assert max(counts.values()) - min(counts.values()) <= 1


def test_answers_are_right_where_code_can_tell(toy):
    rules = {
        "first_word": lambda text: text.split()[0],
        "last_word": lambda text: text.split()[-1],
        "upper_case": str.upper,
        "swap_words": lambda text: " ".join(reversed(text.split())),
        "larger_number": lambda text: str(max(int(n) for n in text.split(" and "))),
        "count_words": lambda text: str(len(text.split(", "))),
        "ask_where": lambda text: f"Where does {text.split()[0]} work?",
    }
    checked = 0
    for task in toy.train:
        rule = rules.get(task.name.split("_toy_")[1])
        if rule is None:
            continue
        for instance in task.instances():
            assert rule(instance.input) == instance.outputs[0]
            checked += 1
    assert checked == 300 * len(rules)


def test_extracted_answers_stand_in_the_input(toy):
    names = [f"extract_{what}" for what in ("person", "city", "date", "colour")]
    names += ["who_did_it", "where_is_it", "pronoun", "shared_word"]
    tasks = [t for t in (*toy.train, *toy.test) if t.name.split("_toy_")[1] in names]
    assert len(tasks) == len(names)
    for task in tasks:
        assert all(instance.outputs[0] in instance.input for instance in task.instances())


def test_equal_seeds_write_equal_files_and_others_do_not(tmp_path, toy):
    again = read_checkout(write_checkout(tmp_path / "again", seed=0))
    other = read_checkout(write_checkout(tmp_path / "other", seed=1))
    assert again.fingerprint == toy.fingerprint
    for task in toy.train:
        assert task.instances() != other.task(task.name).instances()
        assert task.definition == other.task(task.name).definition


def test_the_files_are_the_same_on_every_machine(toy):
    assert toy.fingerprint == "0ec39fadcb46aa11fe3a5733b269af6aa6ab6ff46e04840c3cfeebf5c2cfccd1"


def test_fewer_instances_are_a_prefix_and_too_many_are_refused(tmp_path, toy):
    small = read_checkout(write_checkout(tmp_path / "small", instances_per_task=7))
    for task in small.test:
        assert task.instances() == toy.task(task.name).instances()[:7]
    with pytest.raises(ValueError, match="instances_per_task is 5000, but task001.* has about"):
        write_checkout(tmp_path / "large", instances_per_task=5000)
    with pytest.raises(ValueError, match="instances_per_task is 0, expected at least 1"):
        write_checkout(tmp_path / "none", instances_per_task=0)
    assert not (tmp_path / "large").exists()
