"""Reading checkouts and the hub's format: irregular files load, wrong ones say what is wrong."""

import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_lora.data.hub import read_hub
from jax_lora.data.instructions import Checkout, Instance, read_checkout
from jax_lora.errors import DataError


def record(**changes) -> dict:
    """A regular task file with three instances."""
    rows = [{"id": f"t-{i}", "input": f"in {i}", "output": [f"out {i}"]} for i in range(3)]
    plain = {"Categories": ["Some Kind"], "Definition": ["Do it."], "Domains": ["Web"]}
    return {**plain, "Instances": rows, **changes}


def write(root: Path, train: dict[str, dict], test: dict[str, dict] | None = None) -> Path:
    (root / "tasks").mkdir(parents=True)
    (root / "splits" / "default").mkdir(parents=True)
    for split, tasks in (("train", train), ("test", test or {"t9": record()})):
        (root / "splits" / "default" / f"{split}_tasks.txt").write_text("\n".join(tasks))
        for name, content in tasks.items():
            (root / "tasks" / f"{name}.json").write_text(json.dumps(content))
    return root


def test_a_regular_checkout(tmp_path):
    root = write(tmp_path / "c", {"t2": record(), "t1": record(Definition=["Other."])})
    checkout = read_checkout(root)
    assert [task.name for task in checkout.train] == ["t1", "t2"]  # sorted, whatever the file
    assert [task.name for task in checkout.test] == ["t9"]
    task = checkout.task("t1")
    assert (task.category, task.definition, task.count, task.distinct) == (
        "Some Kind",
        "Other.",
        3,
        3,
    )
    assert task.instances()[1] == Instance("t-1", "in 1", ("out 1",))
    example = task.example(task.instances()[2])
    assert (example.task, example.instruction, example.references) == ("t1", "Other.", ("out 2",))
    with pytest.raises(ValueError, match="no task 'nope' among 2 train and 1 test tasks"):
        checkout.task("nope")


def test_irregular_files_load(tmp_path):
    rows = [
        {"input": "a", "output": "plain"},
        {"id": "x", "input": " a\n", "output": [""], "extra": 1},
        {"id": "x", "input": "b", "output": ["one", "two"]},
        {"id": 7, "input": "", "output": ["c"]},
    ]
    odd = {
        "Instruction Source": "extra",
        "Categories": "Text Generation -> Dialogue Generation",
        "Definition": "A plain string.",
        "Domains": "News",
        "Instances": rows,
        "Instance License": ["after the instances"],
    }
    task = read_checkout(write(tmp_path / "c", {"task672_odd": odd})).task("task672_odd")
    assert task.category == "Text Generation -> Dialogue Generation"
    assert task.definition == "A plain string."
    assert (task.count, task.distinct) == (4, 3)  # "a" and " a\n" are one input
    assert [i.id for i in task.instances()] == ["task672_odd-0", "x", "x-2", "7"]
    assert [i.outputs for i in task.instances()] == [("plain",), ("",), ("one", "two"), ("c",)]


def test_blank_lines_and_repeats_in_a_split_file(tmp_path):
    root = write(tmp_path / "c", {"t1": record()})
    (root / "splits" / "default" / "train_tasks.txt").write_text("\n t1 \r\n\nt1\n")
    assert [task.name for task in read_checkout(root).train] == ["t1"]


def one_row(**changes) -> dict:
    row = {"id": "t", "input": "in", "output": ["out"], **changes}
    return record(Instances=[{"input": "fine", "output": ["fine"]}, row])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (one_row(output=[]), r"instance 1 has output \[\], expected a string or a non-empty list"),
        (one_row(output=None), "instance 1 has output None, expected a string or a non-empty"),
        (one_row(output=["a", 3]), r"instance 1 has output \['a', 3\], expected a string"),
        (one_row(input=3), "instance 1 has input 3, expected a string"),
        (record(Instances=["text"]), "instance 0 is 'text', expected an object"),
        (record(Instances=[]), "Instances is 'list of length 0', expected a list of at least one"),
        (record(Instances=None), "Instances is None, expected a list"),
        (record(Definition=[]), r"Definition is \[\], expected a non-empty string"),
        (record(Definition=[" "]), "Definition is .* expected a non-empty string"),
        (record(Categories=None), "Categories is None, expected a non-empty string"),
        ([1], "found a JSON list, expected an object"),
    ],
)
def test_wrong_files_are_refused_in_one_line(tmp_path, content, message):
    root = write(tmp_path / "c", {"t1": record(), "t2": content})
    with pytest.raises(ValueError, match=message) as caught:
        read_checkout(root)
    assert "t2.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@given(share=st.floats(0.0, 1.0, exclude_max=True))
def test_a_file_cut_anywhere_is_refused(tmp_path_factory, share):
    root = write(tmp_path_factory.mktemp("cut") / "c", {"t1": record()})
    path = root / "tasks" / "t1.json"
    raw = path.read_bytes()
    path.write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(ValueError, match=r"t1\.json: not valid JSON .* expected one whole object"):
        read_checkout(root)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("content", "where"),
    [
        (one_row(input="a \ud83d"), "instance 1"),
        (one_row(output=["a", "\udc00"]), "instance 1"),
        (one_row(id="\ud83d"), "instance 1"),
        (record(Definition=["\ud83d"]), "Definition"),
        (record(Categories="\ud83d"), "Categories"),
    ],
)
def test_half_of_a_surrogate_pair_is_refused(tmp_path, split, content, where):
    tasks = {"t1": record(), "t2": content}
    root = write(tmp_path / "c", tasks if split == "train" else {"t1": record()})
    if split == "test":
        (root / "tasks" / "t2.json").write_text(json.dumps(content))
        (root / "splits" / "default" / "test_tasks.txt").write_text("t2\n")
    with pytest.raises(DataError, match=rf"t2\.json: {where}: found .*half of a surrogate pair"):
        read_checkout(root)


def test_encodings_of_a_split_file(tmp_path):
    root = write(tmp_path / "c", {"t1": record()})
    path = root / "splits" / "default" / "train_tasks.txt"
    path.write_bytes("t1\n".encode("utf-8-sig"))
    assert [task.name for task in read_checkout(root).train] == ["t1"]
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        path.write_bytes("t1\n".encode(encoding))
        with pytest.raises(DataError, match="train_tasks.txt: .*(not UTF-8|in UTF-8)"):
            read_checkout(root)
    path.write_bytes("täsk\n".encode("latin-1"))
    with pytest.raises(DataError, match="train_tasks.txt: not UTF-8"):
        read_checkout(root)


def test_tasks_in_folders_of_one_name_are_two_tasks(tmp_path):
    root = write(tmp_path / "c", {"t1": record()})
    splits = root / "splits" / "default"
    for folder, text in (("en", "English"), ("de", "German")):
        (root / "tasks" / folder).mkdir()
        content = json.dumps(record(Definition=[text]))
        (root / "tasks" / folder / "polar.json").write_text(content)
    (splits / "train_tasks.txt").write_text("en/polar\nt1\n")
    (splits / "test_tasks.txt").write_text("de/polar\n")
    checkout = read_checkout(root)
    assert [task.name for task in checkout.train] == ["en/polar", "t1"]
    assert checkout.task("de/polar").definition == "German"
    assert checkout.task("en/polar").definition == "English"
    for other in ("./t1", "en//polar", "en/../t1", str(root / "tasks" / "t1")):
        (splits / "test_tasks.txt").write_text(f"{other}\n")  # would be trained on and tested
        with pytest.raises(DataError, match="test_tasks.txt: found .*, expected a task's name"):
            read_checkout(root)


def test_missing_and_contradicting_files(tmp_path):
    def broken(name: str) -> Path:
        return write(tmp_path / name, {"t1": record(), "t2": record()})

    with pytest.raises(FileNotFoundError, match="nowhere: no such folder; expected a checkout"):
        read_checkout(tmp_path / "nowhere")
    root = broken("a")
    (root / "tasks").rename(root / "task")
    with pytest.raises(FileNotFoundError, match="tasks: no such folder; expected a checkout"):
        read_checkout(root)
    root = broken("b")
    (root / "splits").rename(root / "split")
    with pytest.raises(FileNotFoundError, match="default: no such folder; expected a checkout"):
        read_checkout(root)
    root = broken("c")
    (root / "splits" / "default" / "test_tasks.txt").unlink()
    with pytest.raises(FileNotFoundError, match="test_tasks.txt: no such file, expected one task"):
        read_checkout(root)
    root = broken("d")
    (root / "splits" / "default" / "train_tasks.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="train_tasks.txt: no task names found"):
        read_checkout(root)
    root = broken("e")
    (root / "tasks" / "t2.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"t2.json: no such file, but train_tasks.txt"):
        read_checkout(root)
    root = broken("f")
    (root / "splits" / "default" / "test_tasks.txt").write_text("t2\nt9\n")
    with pytest.raises(ValueError, match="1 task.s. in both train_tasks.txt and test.* 't2'"):
        read_checkout(root)


def test_instances_are_read_anew_and_a_changed_file_is_noticed(tmp_path):
    root = write(tmp_path / "c", {"t1": record()})
    task = read_checkout(root).task("t1")
    assert task.instances() == task.instances()
    assert task.instances() is not task.instances()
    (root / "tasks" / "t1.json").write_text(json.dumps(one_row()))
    with pytest.raises(ValueError, match="t1.json: changed since the checkout was read"):
        task.instances()


def test_the_fingerprint_follows_names_splits_and_content(tmp_path):
    def fingerprint(name: str, train: dict, test: dict) -> str:
        return read_checkout(write(tmp_path / name, train, test)).fingerprint

    one, other = record(), one_row()
    base = fingerprint("a", {"t1": one, "t2": other}, {"t3": one})
    assert base == fingerprint("b", {"t2": other, "t1": one}, {"t3": one})
    assert len({base, fingerprint("c", {"t1": other, "t2": one}, {"t3": one})}) == 2
    assert len({base, fingerprint("d", {"t1": one}, {"t2": other, "t3": one})}) == 2
    assert len(base) == 64


def test_the_real_slice(shared):
    checkout = read_checkout(shared / "data" / "niv2-slice")
    assert (len(checkout.train), len(checkout.test)) == (11, 5)
    for task in (*checkout.train, *checkout.test):
        instances = task.instances()
        assert len(instances) == task.count >= 142
        assert len({instance.id for instance in instances}) == task.count
    plain = checkout.task("task363_sst2_polarity_classification")  # str for list in three fields
    assert plain.category == "Basic Sentiment Analysis"
    assert {output for i in plain.instances() for output in i.outputs} == {"POS", "NEG"}


# ---------------------------------------------------------------- the hub's format


def hub_row(task: str, id: str | None, text: str, target: str | None) -> dict:
    return {
        "task_name": task,
        "id": id,
        "definition": f"Do {task}.",
        "inputs": text,
        "targets": target,
    }


ROWS = {
    "train/b_train.jsonl": [hub_row("b", None, "x", "1"), hub_row("b", None, "y", "2")],
    "train/a_train.jsonl": [
        hub_row("a", "a-1", "x", "1"),
        hub_row("a", "a-1", "x", "2"),
        hub_row("a", "a-1", "x", "1"),
        hub_row("a", "a-2", "x", "3"),
    ],
    "test/c_test.jsonl": [hub_row("c", "c-2", "first", "1"), hub_row("c", "c-1", "then", "2")],
}


def write_hub(root: Path, files: dict[str, list[dict]], kind: str = "jsonl") -> Path:
    for name, rows in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "parquet":
            import pyarrow
            import pyarrow.parquet

            table = pyarrow.Table.from_pylist(rows)
            table = table.set_column(1, "id", table["id"].cast(pyarrow.string()))
            pyarrow.parquet.write_table(table, path.with_suffix(".parquet"))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_hubs_format(tmp_path, kind, caplog):
    pytest.importorskip("datasets")
    root = write_hub(tmp_path / "hub", ROWS, kind)
    with caplog.at_level(logging.WARNING, logger="jax_lora.data.hub"):
        checkout = read_hub(root, categories={"a": "Kind"}, cache=tmp_path / "cache")
    assert "no category for 2 of 3 tasks (first b)" in caplog.text
    assert isinstance(checkout, Checkout)
    assert [task.name for task in checkout.train] == ["a", "b"]
    assert [task.category for task in checkout.train] == ["Kind", "unknown"]
    a, b, c = (checkout.task(name) for name in "abc")
    assert a.instances() == (Instance("a-1", "x", ("1", "2")), Instance("a-2", "x", ("3",)))
    assert (a.count, a.distinct, a.definition) == (2, 1, "Do a.")
    assert [instance.id for instance in b.instances()] == ["b-0", "b-1"]
    assert [instance.input for instance in c.instances()] == ["first", "then"]  # order kept


def test_the_hubs_categories_from_a_file(tmp_path):
    pytest.importorskip("datasets")
    root = write_hub(tmp_path / "hub", ROWS)
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"tasks": [{"task": t, "category": t.upper()} for t in "abc"]}))
    checkout = read_hub(root, categories=index, cache=tmp_path / "cache")
    assert [task.category for task in (*checkout.train, *checkout.test)] == ["A", "B", "C"]
    index.write_text(json.dumps({"a": "X", "b": "Y", "c": "Z"}))
    other = read_hub(root, categories=index, cache=tmp_path / "cache")
    assert [task.category for task in (*other.train, *other.test)] == ["X", "Y", "Z"]
    assert other.fingerprint != checkout.fingerprint
    index.write_text(json.dumps({"a": 3}))
    with pytest.raises(ValueError, match="index.json: expected an object task -> category"):
        read_hub(root, categories=index, cache=tmp_path / "cache")


def test_wrong_hub_folders(tmp_path):
    pytest.importorskip("datasets")
    cache = tmp_path / "cache"
    with pytest.raises(FileNotFoundError, match="nowhere: datasets cannot load it"):
        read_hub(tmp_path / "nowhere", cache=cache)
    only_train = {name: rows for name, rows in ROWS.items() if name.startswith("train")}
    with pytest.raises(ValueError, match=r"found splits \['train'\], expected train and test"):
        read_hub(write_hub(tmp_path / "a", only_train), cache=cache)
    other = {"train/a.jsonl": [{"text": "x"}], "test/b.jsonl": [{"text": "x"}]}
    with pytest.raises(ValueError, match=r"train has columns \['text'\], expected"):
        read_hub(write_hub(tmp_path / "b", other), cache=cache)
    both = {**ROWS, "test/a_test.jsonl": ROWS["train/a_train.jsonl"]}
    with pytest.raises(ValueError, match="'a' is in both train and test"):
        read_hub(write_hub(tmp_path / "c", both), cache=cache)
    empty = {
        **ROWS,
        "test/c_test.jsonl": [hub_row("c", "c", "x", None), ROWS["test/c_test.jsonl"][0]],
    }
    with pytest.raises(ValueError, match="test:c: found inputs 'x' and targets None, expected"):
        read_hub(write_hub(tmp_path / "d", empty), cache=cache)
