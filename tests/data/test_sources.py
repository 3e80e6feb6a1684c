"""Data of one's own: formats, shapes of rows, and what is wrong with them."""

import csv
import json
import logging

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from jax_lora.config import DataConfig, RunConfig
from jax_lora.data.example import Example, Message
from jax_lora.data.sources import tables, user_data
from jax_lora.errors import ConfigError, DataError, MissingFileError
from jax_lora.run import inputs

ROWS = [
    {"instruction": f"Add 1 to {i}.", "input": "" if i % 3 else f"in {i}", "output": str(i + 1)}
    for i in range(60)
]


def write(path, rows):
    """The rows in the format that the name ends with."""
    kind = path.suffix[1:]
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


def read(path, seed=0, **options):
    return user_data.read(DataConfig(path=str(path), **options), seed)


def train(path, **options):
    return read(path, **options).examples["train"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "folder"])
def test_a_format_is_seen_from_the_content(tmp_path, name):
    path = write(tmp_path / name, ROWS)
    found = train(path)
    assert len(found) == 60
    assert found[3] == Example("Add 1 to 3.", "in 3", ("4",), "all", "unknown", found[3].id)
    assert found[1].input == "" and len({e.id for e in found}) == 60
    assert not tables.is_natural_instructions(str(path))
    if path.is_file():  # whatever it is called
        other = path.rename(tmp_path / "data.txt")
        assert train(other) == found
        assert train(other, format=name[2:]) == found


def test_a_folder_of_files_and_its_splits(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "mine"
    folder.mkdir()
    write(folder / "train.jsonl", ROWS[:50])
    write(folder / "test.jsonl", ROWS[45:])
    found = read(folder)
    assert set(found.examples) == {"train", "test"}
    assert [e.references[0] for e in found.examples["test"]] == [r["output"] for r in ROWS[45:]]
    assert len(found.examples["train"]) == 45  # without the five that are tested
    with pytest.raises(ConfigError, match="data.test: found 0.1 and a split test"):
        read(folder, test=0.1)


def test_shapes_of_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "And?")]
    messages = [{"role": r, "content": c} for r, c in [*turns, ("assistant", "Bye")]]
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    sharegpt = [{"from": names[m["role"]], "value": m["content"]} for m in messages]
    wanted = Example(
        "And?", "", ("Bye",), "all", "unknown", "row 1", tuple(Message(*t) for t in turns[:3])
    )
    for row, expected in (
        ({"messages": messages}, wanted),
        ({"conversations": sharegpt}, wanted),
        (
            {
                "prompt": "Q: 1?\nA:",
                "completion": [" 1", " one"],
                "task": "t",
                "category": "c",
                "id": 7,
            },
            Example("Q: 1?\nA:", "", (" 1", " one"), "t", "c", "7"),
        ),
        (
            {"instruction": "Do.", "input": None, "output": ["a", " "], "extra": {"x": [1]}},
            Example("Do.", "", ("a",), "all", "unknown", "row 1"),
        ),
    ):
        assert train(write(path, [row])) == (expected,)


def test_other_names_of_columns(tmp_path):
    rows = [{"question": "1?", "answer": "1", "kind": "sum"}]
    path = write(tmp_path / "a.jsonl", rows)
    found = train(path, columns="instruction=question, output=answer,task=kind")
    assert found == (Example("1?", "", ("1",), "sum", "unknown", "row 1"),)
    for wrong in ("question", "instruction=", "what=question", "instruction=a,output=a"):
        with pytest.raises(
            ConfigError, match="config.data.columns: found .*, expected name=column"
        ):
            train(path, columns=wrong)
    # A renamed column stands in for one that has its new name already, wherever it stands.
    both = [{"question": "1?", "instruction": "no", "answer": "1", "output": "no"}]
    for rows in (both, [dict(reversed(both[0].items()))]):
        found = train(write(path, rows), columns="instruction=question,output=answer")
        assert (found[0].instruction, found[0].references) == ("1?", ("1",))
    swapped = train(write(path, [GOOD]), columns="instruction=output,output=instruction")
    assert (swapped[0].instruction, swapped[0].references) == ("done", ("Do.",))
    # Row by row: one that has our name already needs no other.
    mixed = write(path, [*rows, GOOD, {"instruction": "2?", "output": "2"}])
    found = train(mixed, columns="instruction=question,output=answer")
    assert [one.instruction for one in found] == ["1?", "Do.", "2?"]
    with pytest.raises(DataError, match="a.jsonl: found no column kontext, expected all that conf"):
        train(path, columns="input=kontext")


# ---------------------------------------------------------------- rows that are wrong


def turns(*roles):
    return {"messages": [{"role": role, "content": role} for role in roles]}


GOOD = {"instruction": "Do.", "output": "done"}
CHAT = turns("user", "assistant")
BAD = {  # name: (rows, the row, what is said)
    "no known columns": ([{"a": 1}], 1, "found columns a, expected messages or conversations or"),
    "a missing column": ([GOOD, {"instruction": "Do."}], 2, "found columns instruction, expected"),
    "a null": ([GOOD, {"instruction": "Do.", "output": None}], 2, "expected instruction and outp"),
    "no columns": ([GOOD, {}], 2, "found columns none, expected instruction and output, as in"),
    "mixed shapes": ([GOOD, CHAT], 2, "found columns messages, expected instruction and output"),
    "mixed the other way": ([CHAT, GOOD], 2, "expected messages, as in the rows before"),
    "a number for an instruction": ([GOOD | {"instruction": 1}], 1, "instruction: found 1, expec"),
    "an object for an instruction": ([GOOD | {"instruction": {}}], 1, "instruction: found {}, exp"),
    "a list for an input": ([GOOD | {"input": ["a"]}], 1, "input: found .'a'., expected a text"),
    "a number for an output": ([GOOD | {"output": 4.5}], 1, "output: found 4.5, expected a text"),
    "a truth for an output": ([GOOD | {"output": True}], 1, "output: found True, expected a text"),
    "an object for an output": ([GOOD | {"output": {"a": 1}}], 1, "output: found {'a': 1}, expec"),
    "nested lists": ([GOOD | {"output": [["a"]]}], 1, "output: found ..'a'.., expected a text or"),
    "a list of numbers": ([GOOD | {"output": ["a", 1]}], 1, "output: found .'a', 1., expected a"),
    "an empty list": ([GOOD | {"output": []}], 1, "an empty answer"),
    "an empty output": ([GOOD, GOOD | {"output": ""}], 2, "an empty answer"),
    "a blank output": ([GOOD, GOOD | {"output": [" \n"]}], 2, "an empty answer"),
    "an empty instruction": ([GOOD | {"instruction": " "}], 1, "an empty instruction"),
    "an empty task": ([GOOD | {"task": ""}], 1, "an empty task or category"),
    "a task that is no text": ([GOOD | {"task": 3}], 1, "task: found 3, expected a text"),
    "a huge text": ([GOOD | {"output": "a" * 1_000_001}], 1, "a text of more than 1,000,000 ch"),
    "half of a surrogate pair": ([GOOD | {"output": "\ud83d"}], 1, "output: found .*surrogate"),
    "the same id twice": ([GOOD | {"id": "x"}] * 2, 2, "id: found 'x' again, expected distinct"),
    "an id of two lines": ([GOOD | {"id": "a\nb"}], 1, "id: found 'a..b', expected one line"),
    "a task of two lines": ([GOOD | {"task": "a\rb"}], 1, "task: found 'a..b', expected one line"),
    "a thousand columns": (
        [{f"c{i}": i for i in range(1000)}],
        1,
        "found columns c0, c1, c10, c10",
    ),
    "a turn of a thousand keys": (
        [{"messages": [{f"c{i}": i for i in range(1000)}]}],
        1,
        "messages.0.: found c0, c1, c2, .*, expected role and content",
    ),
    "an id that is none": ([GOOD | {"id": [1]}], 1, "id: found .1., expected a text or a whole"),
    "no turns": ([{"messages": []}], 1, "messages: found .., expected a list of turns"),
    "turns that are texts": ([{"messages": ["hi"]}], 1, "messages.0.: found 'hi', expected an ob"),
    "a turn as an object": ([{"messages": {"role": "user"}}], 1, "messages: found .*a list of t"),
    "a turn without a role": ([{"messages": [{"content": "a"}]}], 1, "messages.0.: found content"),
    "an unknown role": ([turns("user", "tool", "assistant")], 1, "messages.1.: role: found 'tool'"),
    "two users": ([CHAT, turns("user", "user", "assistant")], 2, "messages.1.: found a turn of t"),
    "an assistant first": ([turns("assistant", "user")], 1, "messages.0.: found a turn of the as"),
    "a late system message": ([turns("user", "assistant", "system")], 1, "messages.2.: found a tu"),
    "a user last": ([turns("user", "assistant", "user")], 1, "found a last turn of the user, exp"),
    "a system message alone": ([turns("system")], 1, "found a last turn of the system, expected"),
    "content that is a list": (
        [{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}],
        1,
        "messages.0.: content: found .*, expected a text",
    ),
    "an empty turn": (
        [CHAT, {"messages": [*CHAT["messages"][:1], {"role": "assistant", "content": ""}]}],
        2,
        "an empty turn",
    ),
    "a tool call": (
        [{"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}],
        1,
        "messages.0.: found tool_calls, expected turns of text",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_one_line_with_file_and_row(tmp_path, kind):
    rows, number, message = BAD[kind]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=rf"a\.jsonl: row {number}: .*{message}") as error:
        train(path, strict=True)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 400 + len(str(path))


FILES = {  # name: (bytes, what is said)
    "no JSON": (b'{"instruction": "a", "output": "b"}\n{"instr\n', "row 2: not valid JSON"),
    "a line that is a list": (b'{"prompt": "a", "completion": "b"}\n[1]\n', "row 2: found .1., ex"),
    "a key twice": (
        b'{"prompt": "a", "completion": "b", "prompt": "c"}',
        "row 1: .*'prompt' is th",
    ),
    "a column twice": (b"prompt,completion,prompt\na,b,c\n", "the column 'prompt' twice, exp"),
    "half a list": (b'[{"instruction": "a"', "not valid JSON"),
    "a list of numbers": (b"[1, 2]", "row 1: found 1, expected an object"),
    "deep nesting": (b"[" * 100_000, "not valid JSON"),
    "no UTF-8": (b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xe9"}', "row 2: .*not UTF-8"),
    "UTF-16": ('{"prompt": "a", "completion": "b"}'.encode("utf-16"), "row 1: .*not UTF-8"),
    "nothing": (b"", "found an empty file"),
    "white space": (b" \n\n", "found an empty file"),
    "an empty list": (b"[]", "found no rows"),
    "a header alone": (b"instruction,output\n", "found no rows"),
    "too few fields": (b"instruction,output\na,b\nc\n", "row 2: found 1 fields, expected the 2"),
    "too many fields": (b"instruction,output\na,b,c\n", "row 1: found 3 fields, expected the 2"),
    "an open quote": (b'instruction,output\na,b\n"c,d\n', "row 2: not valid CSV"),
    "half a Parquet file": (b"PAR1abc", "not valid Parquet"),
    "prose": (b"Hello, world\nthis, is\n", "row 1: found columns  world, Hello, expected"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_bad_file_is_one_line_with_its_name(tmp_path, kind):
    content, message = FILES[kind]
    path = tmp_path / "data"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"data: .*{message}") as error:
        train(path)
    assert "\n" not in str(error.value)


def test_a_field_of_a_table_may_be_long(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"instruction,output\n{'word ' * 40_000},done\n")
    assert len(train(path)[0].instruction) == 200_000


def test_rows_that_cannot_be_used_are_counted_and_named(tmp_path, caplog):
    rows = [*ROWS[:10], GOOD | {"output": ""}, GOOD | {"output": " "}, GOOD | {"instruction": ""}]
    path = write(tmp_path / "a.jsonl", rows)
    with caplog.at_level(logging.WARNING, logger="jax_lora"):
        assert len(train(path)) == 10
    (line,) = [r.getMessage() for r in caplog.records]
    assert line == (
        "3 rows left out (2 with an empty answer, 1 with an empty instruction); the first is "
        f"{path}: row 11: an empty answer"
    )
    with pytest.raises(DataError, match="row 11: an empty answer; config.data.strict=False leaves"):
        train(path, strict=True)
    with pytest.raises(DataError, match="found no usable row for train"):
        train(write(tmp_path / "b.jsonl", [GOOD | {"output": ""}]))


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfinstruction;output\r\nDo; this;done\r\n")
    with pytest.raises(DataError, match="row 1: found 3 fields, expected the 2"):
        train(path)
    path.write_bytes(b'\xef\xbb\xbfinstruction;output\r\n"Do;\nthis";done\r\n')
    assert train(path) == (Example("Do;\nthis", "", ("done",), "all", "unknown", "row 1"),)


def test_what_is_not_there(tmp_path):
    for name in ("nothing.jsonl", str(tmp_path / "nothing"), "a/b.csv"):
        assert not tables.is_natural_instructions(name)
        with pytest.raises(MissingFileError, match="no such file or folder, and no hub id"):
            train(name)
    with pytest.raises(DataError, match="found a folder, expected a json file"):
        train(tmp_path, format="json")


def test_natural_instructions_keeps_its_own_sets(tmp_path):
    from jax_lora.data.toy import write_checkout

    toy = write_checkout(tmp_path / "toy", instances_per_task=5)
    config = RunConfig().replace(**{"data.path": str(toy), "data.sizes": (2, 3, 4)})
    config = config.replace(**{"data.set": "T2"})
    assert list(inputs.examples(config)) == ["train", "seen", "unseen"]
    with pytest.raises(ConfigError, match="data.test: found 0.1 with Natural Instructions"):
        inputs.data(config.replace(**{"data.test": 0.1}))


def test_a_hub_id(monkeypatch):

    splits = {"train": ROWS[:50], "test": ROWS[50:]}
    hub = {
        "me/alpaca": splits,
        "me/instructions": {
            split: [
                {"task_name": split, "id": str(i), "definition": "Do.", "inputs": i, "targets": i}
                for i in map(str, range(3))
            ]
            for split in splits
        },
    }

    def load_dataset(name, cache_dir=None):
        if name not in hub:
            raise FileNotFoundError(f"no {name} on the hub")
        tables = {split: datasets.Dataset.from_list(rows) for split, rows in hub[name].items()}
        return datasets.DatasetDict(tables)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = RunConfig().replace(**{"data.path": "me/alpaca"})
    found = inputs.examples(config)
    assert {name: len(one.examples) for name, one in found.items()} == {"train": 50, "test": 10}
    found = inputs.data(config.replace(**{"data.path": "me/instructions"}))
    assert [task.name for task in (*found.train, *found.test)] == ["train", "test"]
    with pytest.raises(MissingFileError, match="me/nothing: datasets cannot load it"):
        inputs.data(config.replace(**{"data.path": "me/nothing"}))
