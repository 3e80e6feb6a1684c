"""Data of one's own: which rows are trained on, validated and tested, and that none is twice."""

import itertools
import logging

import datasets
import pytest

from jax_lora.config import RunConfig
from jax_lora.errors import ConfigError, DataError
from jax_lora.run import inputs
from tests.data.test_sources import ROWS, read, write


def test_shares_are_drawn_by_hash_and_share_no_question(tmp_path):
    doubled = [*ROWS, *({**row, "output": "again"} for row in ROWS)]
    path = write(tmp_path / "a.jsonl", doubled)
    found = read(path, validation=0.1, test=0.2)
    sizes = {name: len(rows) for name, rows in found.examples.items()}
    assert sizes == {"train": 84, "test": 24, "validation": 12}
    keys = {name: {e.key for e in rows} for name, rows in found.examples.items()}
    assert sum(map(len, keys.values())) == len(set().union(*keys.values())) == 60
    assert read(path, validation=0.1, test=0.2).examples == found.examples
    assert read(path, seed=1, validation=0.1, test=0.2).examples != found.examples
    # The draw is of the questions: in another order of the rows the same ones are held out.
    other = read(write(tmp_path / "b.jsonl", doubled[::-1]), validation=0.1, test=0.2)
    assert {e.key for e in other.examples["test"]} == keys["test"]
    assert len(read(path, test=0.001).examples["test"]) == 2  # one question, asked twice
    assert read(path).fingerprint != found.fingerprint


def test_a_question_that_is_tested_is_not_trained_on(tmp_path, caplog):
    path, test = write(tmp_path / "a.jsonl", ROWS), tmp_path / "b.json"
    write(test, [{**row, "instruction": f" {row['instruction']} "} for row in ROWS[:6]])
    with caplog.at_level(logging.WARNING, logger="jax_lora"):
        found = read(path, test_path=str(test), validation=0.1)
    assert len(found.examples["test"]) == 6
    sets = [{e.key for e in rows} for rows in found.examples.values()]
    assert sum(map(len, sets)) == len(set().union(*sets)) == 60
    (line,) = [r.getMessage() for r in caplog.records]
    assert line.startswith("6 rows left out (6 with a question that is in test too)")
    with pytest.raises(DataError, match="a question that is in test too"):
        read(path, test_path=str(test), strict=True)
    with pytest.raises(ConfigError, match="data.test: found 0.1 and config.data.test_path"):
        read(path, test_path=str(test), test=0.1)


def conversation(*texts):
    """Questions and answers in turn, the last one an answer."""
    roles = itertools.cycle(("user", "assistant"))
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]}


def test_no_turn_of_a_conversation_trains_on_a_tested_question(tmp_path, caplog):
    tested, train = conversation("Q1 ", "A1"), tmp_path / "train.jsonl"
    rows = [conversation("Q1", "A1", "Q2", "A2"), conversation("Q2", "A2"), conversation("Q3", "x")]
    write(train, rows)
    test = write(tmp_path / "test.jsonl", [tested])
    with caplog.at_level(logging.WARNING, logger="jax_lora"):
        found = read(train, test_path=str(test))
    assert [e.instruction for e in found.examples["train"]] == ["Q2", "Q3"]
    assert "(1 with a question that is in test too)" in caplog.text
    # Shares take whole conversations, however far each row of them goes.
    rows = [conversation(*(f"{k}{i}" for i in range(n))) for k in range(20) for n in (2, 4, 6)]
    write(train, rows)
    found = read(train, test=0.5)
    first = {
        name: {(e.messages[0].content if e.messages else e.instruction) for e in some}
        for name, some in found.examples.items()
    }
    assert len(first["test"]) == len(first["train"]) == 10 and not first["test"] & first["train"]
    assert sum(map(len, found.examples.values())) == 60
    # Where all begin alike, by their last questions.
    write(train, [conversation("Hello", "Hi", f"Q{i}", f"A{i}") for i in range(20)])
    found = read(train, test=0.1)
    assert {name: len(some) for name, some in found.examples.items()} == {"train": 18, "test": 2}


def test_which_split_is_tested_is_not_guessed(tmp_path):
    folder = datasets.DatasetDict(
        {name: datasets.Dataset.from_list(ROWS[:3]) for name in ("train", "validation")}
    )
    folder.save_to_disk(tmp_path / "d")
    path = write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(DataError, match="found the splits train, validation, expected test, or"):
        read(path, test_path=str(tmp_path / "d"))
    found = read(path, validation_path=str(tmp_path / "d"))
    assert len(found.examples["validation"]) == 3


def test_the_sets_of_a_run(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    config = RunConfig().replace(**{"data.path": str(path), "data.validation": 0.1})
    assert set(inputs.examples(config)) == {"train", "validation"}
    with pytest.raises(ConfigError, match="found no test set, expected test_path, or a share"):
        inputs.test_sets(config)
    config = config.replace(**{"data.test": 0.5})
    sets = inputs.examples(config)
    assert list(sets) == ["train", "validation", "test"] and len(sets["test"].examples) == 30
    assert list(inputs.test_sets(config)) == ["test"]
    with pytest.raises(ConfigError, match="--sets: found 'seen', expected some of test"):
        inputs.test_sets(config, ["seen"])
    with pytest.raises(ConfigError, match="validation and test: found 0.6 and 0.5"):
        config.replace(**{"data.validation": 0.6})
