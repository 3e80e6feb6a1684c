"""The cache of a checkout: nothing is read twice, and nothing in it can make a draw wrong."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from jax_lora.data import cache, instructions
from jax_lora.data.instructions import read_checkout
from jax_lora.data.tasksets import draw
from jax_lora.data.toy import write_checkout

SIZES = {"sizes": (4, 8, 16), "train_per_task": 5, "test_per_task": 3}


@pytest.fixture
def checkout(tmp_path) -> Path:
    return write_checkout(tmp_path / "toy", instances_per_task=12)


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The names of the task files that were opened, in order."""
    names: list[str] = []
    parse = instructions.parse_object

    def noted(path):
        names.append(path.stem)
        return parse(path)

    monkeypatch.setattr(instructions, "parse_object", noted)
    return names


def everything(checkout, round=0, **options):
    """All examples of all sets of a round."""
    sets = draw(checkout, round, **(SIZES | options))
    return {name: one.examples for name, one in sets.items()}


def rewrite(path: Path, change, *, same_time: bool = False) -> None:
    """Changes a task's first instance and, unless the time is to stay, its time of change."""
    before = path.stat()
    record = json.loads(path.read_text())
    change(record["Instances"][0])
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    later = before.st_mtime_ns + (0 if same_time else 1_000_000_000)
    os.utime(path, ns=(before.st_atime_ns, later))


def test_a_second_reading_opens_no_file(checkout, tmp_path, opened):
    plain = read_checkout(checkout)
    first = read_checkout(checkout, cache=tmp_path / "cache")
    drawn = everything(first)
    assert drawn == everything(plain)
    opened.clear()
    second = read_checkout(checkout, cache=tmp_path / "cache")
    assert second == first == plain
    assert second.fingerprint == plain.fingerprint
    assert everything(second) == drawn
    assert opened == []


@pytest.mark.parametrize(
    ("change", "same_time"),
    [
        (lambda row: row.update(input="An unheard-of text"), False),
        (lambda row: row.update(input="An unheard-of text"), True),
        (lambda row: row.update(input=row["input"][::-1]), False),
    ],
    ids=["size and time", "size", "time"],
)
def test_only_a_changed_file_is_read_again(checkout, tmp_path, opened, change, same_time):
    first = read_checkout(checkout, cache=tmp_path / "cache")
    before = everything(first)
    name = before["T4"][0].task
    other = read_checkout(checkout).fingerprint
    rewrite(checkout / "tasks" / f"{name}.json", change, same_time=same_time)
    opened.clear()
    second = read_checkout(checkout, cache=tmp_path / "cache")
    after = everything(second)
    assert set(opened) == {name}
    assert second.fingerprint != other
    assert after != before
    assert after == everything(read_checkout(checkout))


def test_a_file_that_comes_or_goes(checkout, tmp_path, opened):
    folder, split = tmp_path / "cache", checkout / "splits" / "default" / "train_tasks.txt"
    names = split.read_text().splitlines()
    split.write_text("\n".join(names[1:]))
    read_checkout(checkout, cache=folder)
    split.write_text("\n".join(names))
    opened.clear()
    assert read_checkout(checkout, cache=folder) == read_checkout(checkout)
    assert opened[0] == names[0] and opened.count(names[1]) == 1
    split.write_text("\n".join(names[2:]))
    opened.clear()
    assert len(read_checkout(checkout, cache=folder).train) == len(names) - 2
    assert opened == []


def test_verify_finds_what_size_and_time_hide(checkout, tmp_path, caplog):
    folder = tmp_path / "cache"
    stale = read_checkout(checkout, cache=folder)
    name = draw(stale, 0, **SIZES)["T4"].tasks[0]
    path = checkout / "tasks" / f"{name}.json"
    size = path.stat().st_size
    rewrite(path, lambda row: row.update(input=row["input"][::-1]), same_time=True)
    assert path.stat().st_size == size
    assert read_checkout(checkout, cache=folder) == stale
    with pytest.raises(ValueError, match=f"{name}.json: changed since .* with verify where"):
        everything(read_checkout(checkout, cache=folder))  # what it would draw is not that data
    assert not caplog.records
    right = read_checkout(checkout, cache=folder, verify=True)
    assert f"tasks.json: 1 wrong, made anew, the first is {name}" in caplog.text
    caplog.clear()
    assert right == read_checkout(checkout) != stale
    assert read_checkout(checkout, cache=folder) == right
    assert everything(right) == everything(read_checkout(checkout))
    assert read_checkout(checkout, cache=folder, verify=True) == right
    assert not caplog.records


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw.replace(b"task0", b"task1", 1),
        lambda raw: raw.split(b"\n")[1],
        lambda raw: b"\xff" * 64 + raw[64:],
    ],
    ids=["empty", "cut", "changed", "headless", "binary"],
)
def test_a_damaged_file_is_made_anew(checkout, tmp_path, damage, caplog, opened):
    folder = tmp_path / "cache"
    drawn = everything(read_checkout(checkout, cache=folder))
    files = {path: path.read_bytes() for path in folder.rglob("*.json")}
    assert len(files) == 1 + len(drawn)
    for path, raw in files.items():
        path.write_bytes(damage(raw))
        assert path.read_bytes() != raw
    assert everything(read_checkout(checkout, cache=folder)) == drawn
    assert {record.getMessage() for record in caplog.records} == {
        f"{path}: damaged, made anew" for path in files
    }
    assert {path: path.read_bytes() for path in folder.rglob("*.json")} == files
    opened.clear()
    assert everything(read_checkout(checkout, cache=folder)) == drawn
    assert opened == []


def test_draws_of_other_rounds_and_sizes_do_not_mix(checkout, tmp_path):
    plain, kept = read_checkout(checkout), read_checkout(checkout, cache=tmp_path / "cache")
    asked = [
        {},
        {"round": 1},
        {"sizes": (4, 9, 16)},
        {"sizes": (6, 8, 16)},
        {"train_per_task": 7},
        {"test_per_task": 5},
        {"train_per_task": 8, "test_per_task": 8},  # more than the tasks have
        {},
    ]
    for options in asked:
        assert everything(kept, **options) == everything(plain, **options)


def test_any_text_comes_back(tmp_path):
    root = write_checkout(tmp_path / "toy", instances_per_task=12)
    odd = ["a\u2028b\x00", "雪 \U0001f600", '"\\\n']
    for path in (root / "tasks").iterdir():
        record = json.loads(path.read_text())
        for row, text in zip(record["Instances"], odd, strict=False):
            row["input"], row["output"] = text, [text, ""]
        path.write_text(json.dumps(record))
    plain = everything(read_checkout(root))
    for _ in range(2):
        assert everything(read_checkout(root, cache=tmp_path / "cache")) == plain


READ = """
import sys
from jax_lora.data.instructions import read_checkout
from jax_lora.data.tasksets import draw
checkout = read_checkout(sys.argv[1], cache=sys.argv[2])
sys.stdin.read()  # both have read it before either draws
sets = draw(checkout, 0, sizes=(4, 8, 16), train_per_task=5, test_per_task=3)
print(checkout.fingerprint, hash(tuple(one.examples for one in sets.values())))
"""


def test_two_programs_at_once(checkout, tmp_path, caplog):
    folder = tmp_path / "cache"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", READ, str(checkout), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONHASHSEED": "0"},
            text=True,
        )
        for _ in range(2)
    ]
    (one, said), (other, also_said) = (program.communicate("") for program in running)
    assert one == other != ""
    assert said == also_said == ""
    assert one.split()[0] == read_checkout(checkout, cache=folder).fingerprint
    assert everything(read_checkout(checkout, cache=folder)) == everything(read_checkout(checkout))
    assert not caplog.records
    assert not list(folder.rglob("*.new"))


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, caplog):
    path = tmp_path / "facts.json"
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")  # a file of another disk has no rename
    cache.remembered(path, {"a": "1"}, str.upper)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(cache.os, "replace", full)
        assert cache.remembered(path, {"a": "2"}, str.upper) == {"a": "A"}
    assert "facts.json: not written" in caplog.text and "No space left" in caplog.text
    assert [file.name for file in tmp_path.iterdir()] == ["facts.json"]
    assert cache.remembered(path, {"a": "1"}, pytest.fail) == {"a": "A"}


def test_a_folder_that_cannot_be_written_costs_no_run(checkout, tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    kept = read_checkout(checkout, cache=tmp_path / "file" / "cache")
    assert kept == read_checkout(checkout)
    assert everything(kept) == everything(read_checkout(checkout))
    assert "tasks.json: not written, so it takes as long next time" in caplog.text


def test_only_a_large_checkout_goes_to_the_users_cache(checkout, tmp_path, monkeypatch, caplog):
    folder = tmp_path / "cache"
    monkeypatch.setenv("JAX_LORA_CACHE", str(folder))
    files = sorted(checkout.rglob("*"))
    everything(read_checkout(checkout))
    assert not folder.exists()
    monkeypatch.setattr(instructions, "_LARGE", 1)
    everything(read_checkout(checkout))
    assert len(list(folder.rglob("*.json"))) == 9
    assert sorted(checkout.rglob("*")) == files  # it may be read-only


def test_checkouts_of_one_name_are_two_and_a_link_is_none(tmp_path, opened):
    one, other = (
        write_checkout(tmp_path / part / "toy", seed, instances_per_task=12)
        for seed, part in enumerate("ab")
    )
    (tmp_path / "link").symlink_to(one)
    folder = tmp_path / "cache"
    first, second = (read_checkout(root, cache=folder) for root in (one, other))
    assert first.fingerprint != second.fingerprint
    opened.clear()
    assert read_checkout(tmp_path / "link", cache=folder).fingerprint == first.fingerprint
    assert read_checkout(other, cache=folder) == second
    assert opened == []


def test_where_the_users_cache_lies(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_LORA_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    home = tmp_path / ".cache" / "jax_lora"
    assert cache.cache_folder() == home
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.cache_folder() == home
    monkeypatch.setenv("XDG_CACHE_HOME", "/there")
    assert cache.cache_folder() == Path("/there/jax_lora")
    monkeypatch.setenv("JAX_LORA_CACHE", "/here")
    assert cache.cache_folder() == Path("/here")
    for name in ("JAX_LORA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert cache.cache_folder() is None
