"""What `eval.py --check` compares: rows that are scored and trained on too."""

import json

import pytest

from jax_lora.errors import DataError
from jax_lora.run import check

LONG = {"instruction": "word " * 400, "output": "x"}


def rows(count):
    return [{"instruction": f"question {i}", "output": f"answer {i}"} for i in range(count)]


def write(path, found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)


@pytest.fixture
def config(tiny_run, tmp_path):
    train = write(tmp_path / "train.jsonl", [*rows(12), LONG])
    test = write(tmp_path / "test.jsonl", [*({**r, "input": "!"} for r in rows(9)), LONG])
    keys = {"data.path": train, "data.test_path": test, "data.train_per_task": 100}
    return tiny_run(**{**keys, "data.test_per_task": 100})


@pytest.mark.parametrize("count", [1, 3, 8, 100])
def test_rows_that_are_left_out_of_a_run_are_left_out_here(config, count):
    found = check._rows(config, count)
    assert 1 <= len(found.prompts) <= min(count, 9) and len(found.tasks) == len(found.prompts)
    assert 1 <= len(found.trained) <= max(1, count // 4)
    assert all(len(row.ids) <= 384 for row in (*found.prompts, *found.trained))


def test_where_nothing_is_left_the_set_is_named(config, tmp_path):
    nothing = config.replace(**{"data.test_path": write(tmp_path / "long.jsonl", [LONG])})
    with pytest.raises(DataError, match="found no example of test, expected some"):
        check._rows(nothing, 8)
