"""Tasks and rows: checkouts, JSONL, JSON, CSV, Parquet, templates."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.bad_inputs import Case, Ground, copy

GOOD = {"instruction": "Say it.", "input": "a", "output": "b"}
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
DEEP = "[" * 100_000 + "]" * 100_000
SPLITS = {
    "a path above": "../../etc/passwd",
    "a path above within": "a/../../b",
    "an absolute path": "/etc/passwd",
    "another spelling": "./task001_toy",
    "a task that is not there": "task999_none",
    "a zero byte": "a\0b",
    "nothing": "",
    "a control character": "\x1b[2Jtask",
}
TASKS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no instances": lambda t: t.pop("Instances"),
    "instances that are none": lambda t: t.update(Instances={"a": 1}),
    "no instance": lambda t: t.update(Instances=[]),
    "an instance that is a text": lambda t: t.update(Instances=["a"]),
    "an input that is a number": lambda t: t["Instances"][1].update(input=5),
    "an output that is a number": lambda t: t["Instances"][1].update(output=[5]),
    "no output": lambda t: t["Instances"][1].update(output=[]),
    "an input of half a surrogate pair": lambda t: t["Instances"][1].update(input="\ud800"),
    "an id of half a surrogate pair": lambda t: t["Instances"][1].update(id="\udfff"),
    "a definition that is a number": lambda t: t.update(Definition=[5]),
    "an empty definition": lambda t: t.update(Definition=[" "]),
    "no category": lambda t: t.pop("Categories"),
    "a category of half a surrogate pair": lambda t: t.update(Categories=["\ud800"]),
}
ROWS = {
    "cut": '{"instruction": "a"',
    "a list": "[1]",
    "a number": "5",
    "deep": '{"instruction": ' + DEEP + "}",
    "no columns": "{}",
    "no answer": json.dumps({"instruction": "a"}),
    "a number for a text": json.dumps(GOOD | {"instruction": 5}),
    "numbers for answers": json.dumps(GOOD | {"output": [5]}),
    "an object for an id": json.dumps(GOOD | {"id": {}}),
    "half a surrogate pair": json.dumps(GOOD | {"input": "\ud800"}),
    "no turns": json.dumps({"messages": []}),
    "a turn that is a text": json.dumps({"messages": ["a"]}),
    "a turn without a role": json.dumps({"messages": [{"content": "a"}]}),
    "an unknown role": json.dumps({"messages": [{"role": "cat", "content": "a"}]}),
    "no last answer": json.dumps({"messages": CHAT[:1]}),
    "two questions": json.dumps({"messages": [CHAT[0], *CHAT]}),
    "a call of a tool": json.dumps({"messages": [CHAT[0], CHAT[1] | {"tool_calls": [1]}]}),
    "a text that is too long": json.dumps(GOOD | {"input": "a" * 1_000_001}),
    "an empty answer": json.dumps(GOOD | {"output": ""}),
}
FILES = {
    "an empty file": ("bad.jsonl", b""),
    "no UTF-8": ("bad.jsonl", b'{"instruction": "\xff", "output": "b"}\n'),
    "JSON of an object": ("bad.json", b'{"a": 1}\n{}'),
    "JSON that is cut": ("bad.json", b'[{"instruction": "a"'),
    "JSON of numbers": ("bad.json", b"[1]"),
    "JSON 100,000 deep": ("bad.json", DEEP.encode()),
    "JSON without rows": ("bad.json", b"[]"),
    "CSV with a field too many": ("bad.csv", b"instruction,output\na,b,c\n"),
    "CSV with an open quote": ("bad.csv", b'instruction,output\n"a,b\n'),
    "CSV of a header": ("bad.csv", b"instruction,output\n"),
    "Parquet that is cut": ("bad.parquet", b"PAR1" + bytes(40)),
    "Parquet of nonsense": ("bad.parquet", b"PAR1" + b"x" * 200 + b"\xff\xff\xff\x7fPAR1"),
}
TEMPLATES = {
    "no template": "{{ instruction",
    "an unknown name": "{{ nothing }}",
    "a division by zero": "{{ 1 // 0 }}",
    "an unknown filter": "{{ instruction | shout }}",
    "no UTF-8": None,
}


def _toy(change: Callable[[Path], str]) -> Callable[[Ground, Path], list[str]]:
    def make(ground: Ground, folder: Path) -> list[str]:
        toy = copy(ground.toy, folder)
        change(toy)
        return ground.train(f"--workdir={folder}/r", "--show=1", **{"data.path": toy})

    return make


def _first(toy: Path) -> Path:
    return sorted((toy / "tasks").iterdir())[0]


def _split(line: str) -> Callable[[Path], object]:
    path = "splits/default/train_tasks.txt"
    return lambda toy: (toy / path).write_text(f"{line}\n")


def _task(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(toy: Path) -> None:
        task = json.loads(_first(toy).read_text())
        change(task)
        _first(toy).write_text(json.dumps(task))

    return apply


def _rows(name: str, content: bytes) -> Callable[[Ground, Path], list[str]]:
    def make(ground: Ground, folder: Path) -> list[str]:
        (folder / name).write_bytes(content)
        keys = {"data.path": folder / name, "data.strict": True}
        return ground.train(f"--workdir={folder}/r", "--show=1", **keys)

    return make


def _template(text: str | None) -> Callable[[Ground, Path], list[str]]:
    def make(ground: Ground, folder: Path) -> list[str]:
        path = folder / "bad.jinja"
        path.write_bytes(b"\xff\xfe{{" if text is None else text.encode())
        keys = {"data.path": ground.rows, "data.template": path}
        return ground.train(f"--workdir={folder}/r", "--show=1", **keys)

    return make


def cases() -> Iterator[Case]:
    """The cases of this module."""
    for variant, line in SPLITS.items():
        make = _toy(_split(line))
        yield Case("a split of tasks", variant, "train.py", make, ("{folder}",))
    for kind, change in TASKS.items():
        yield Case(
            f"a task with {kind}", "", "train.py", _toy(_task(change)), ("{folder}/toy/tasks",)
        )
    for variant, text in {"cut": "{", "deep": DEEP, "a list": "[]", "a byte": "\x00"}.items():
        make = _toy(lambda toy, text=text: _first(toy).write_text(text))
        yield Case("a task as a text", variant, "train.py", make, ("{folder}/toy/tasks",))
    good = json.dumps(GOOD)
    for variant, line in ROWS.items():
        make = _rows("bad.jsonl", f"{good}\n{line}\n".encode())
        if "turn" in variant or "role" in variant or "messages" in line:
            make = _rows("bad.jsonl", f"{json.dumps({'messages': CHAT})}\n{line}\n".encode())
        yield Case("a row of JSONL", variant, "train.py", make, ("bad.jsonl: row 2",))
    again = json.dumps(GOOD | {"id": "1"})
    make = _rows("bad.jsonl", f"{again}\n{again}\n".encode())
    yield Case("a row of JSONL", "an id twice", "train.py", make, ("bad.jsonl: row 2: id",))
    for kind, (name, content) in FILES.items():
        yield Case(f"a file with {kind}", "", "train.py", _rows(name, content), (name,))
    for kind, text in TEMPLATES.items():
        yield Case(f"a Jinja file with {kind}", "", "train.py", _template(text), ("bad.jinja",))
    yield Case(
        "a file of a format that it is not", "", "train.py",
        lambda g, f: g.train(f"--workdir={f}/r", "--show=1", **{
            "data.path": g.rows, "data.format": "parquet",
        }),
        ("rows.jsonl",),
    )  # fmt: skip
