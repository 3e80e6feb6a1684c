"""Whole files and folders, and JSON that names its file when it is damaged."""

import errno
import os
from pathlib import Path

import pytest

from jax_lora import files
from jax_lora.errors import DataError


def full_disk(monkeypatch):
    """Half of what is written arrives, then there is no room."""

    def write(self, content):
        with self.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write)


def test_a_file_is_written_with_its_folder_and_nothing_else(tmp_path):
    path = tmp_path / "a" / "b" / "c.json"
    files.write_json(path, {"é": [1, 2.5, None]})
    assert path.read_bytes() == '{\n  "é": [\n    1,\n    2.5,\n    null\n  ]\n}\n'.encode()
    assert files.read_json(path) == files.read_json(path, dict) == {"é": [1, 2.5, None]}
    files.write_text(path, "[1]")
    assert files.read_json(path, list) == [1]
    assert os.listdir(path.parent) == ["c.json"]


def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, "old")
    full_disk(monkeypatch)
    with pytest.raises(OSError, match="No space left") as caught:
        files.write_json(path, "new" * 1000)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert files.read_json(path) == "old" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("fault", [KeyboardInterrupt, ValueError("a bug"), OSError("no word")])
def test_a_crash_before_the_rename_leaves_the_old_file(tmp_path, fault):
    path = tmp_path / "a.json"
    files.write_json(path, "old")
    kind = fault if isinstance(fault, type) else type(fault)
    with pytest.raises(kind) as caught:
        with files.fresh_file(path) as partial:
            partial.write_text("half")
            assert partial.parent == path.parent and files.read_json(path) == "old"
            raise fault
    if kind is OSError:
        assert str(caught.value) == f"[Errno 5] no word: {str(path)!r}"
    assert files.read_json(path) == "old" and os.listdir(tmp_path) == ["a.json"]


def test_a_rename_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, "old")

    def refuse(source, target):
        raise OSError(errno.EACCES, "Permission denied", str(source), None, str(target))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError) as caught:
        files.write_json(path, "new")
    assert str(caught.value) == f"[Errno 13] Permission denied: {str(path)!r}"
    assert files.read_json(path) == "old" and os.listdir(tmp_path) == ["a.json"]


def test_two_writers_of_one_file_have_names_of_their_own(tmp_path):
    path = tmp_path / "a.json"
    with files.fresh_file(path) as one, files.fresh_file(path) as other:
        assert one != other
        one.write_text("1")
        other.write_text("2")
    assert files.read_json(path) == 1 and os.listdir(tmp_path) == ["a.json"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "out" / "model"
    with pytest.raises(OSError, match="full") as caught, files.fresh_folder(folder) as partial:
        (partial / "sub").mkdir()
        raise OSError(errno.ENOSPC, "full", str(partial / "sub" / "x"))
    assert caught.value.filename == str(folder / "sub" / "x")
    assert os.listdir(folder.parent) == []
    with files.fresh_folder(folder) as partial:
        files.write_text(partial / "x", "1")
        assert not folder.exists()
    assert os.listdir(folder.parent) == ["model"] and os.listdir(folder) == ["x"]
    with pytest.raises(FileExistsError, match="folder that is not empty") as caught:
        files.check_vacant(folder)
    assert caught.value.filename == str(folder)
    with pytest.raises(FileExistsError, match="found a file, expected a new or empty folder"):
        with files.fresh_folder(folder / "x"):
            pass


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b'{"a": ', object, "not valid JSON"),
        (b"", object, "not valid JSON"),
        (b'{"a": "\xff"}', object, "not valid JSON: 'utf-8'"),
        (b"[" * 100_000, object, "not valid JSON"),
        (b"1" * 5000, object, "not valid JSON"),
        (b"[1]", dict, "found a list, expected a JSON object"),
        (b"null", list, "found a NoneType, expected a JSON array"),
    ],
)
def test_damaged_json_names_its_file(tmp_path, content, kind, message):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        files.read_json(path, kind)
    assert str(caught.value).startswith(f"{path}: ")
    with pytest.raises(FileNotFoundError) as missing:
        files.read_json(tmp_path / "b.json")
    assert missing.value.filename == str(tmp_path / "b.json")


def test_lines_are_read_back_but_for_one_that_was_cut(tmp_path, caplog):
    path, rows = tmp_path / "a.jsonl", [{"a": "é\u2028\n"}, {"b": None}]
    path.write_bytes("".join(map(files.jsonl_line, rows)).encode() + b'{"c": "\xc3')
    assert files.read_jsonl(path) == rows
    assert files.read_jsonl(tmp_path / "missing.jsonl") == []
    for line, message in ((b'{"a"', "line 2 is not valid"), (b"[1]", "line 2 .*found a list")):
        path.write_bytes(b"{}\n" + line + b'\n{"d": 1}\n')
        with pytest.raises(DataError, match=message):
            files.read_jsonl(path)
        caplog.clear()
        assert files.read_jsonl(path, pass_over_damage=True) == [{}, {"d": 1}]
        assert f"{path}: line 2" in caplog.text


def test_what_is_written_is_on_the_disk_before_and_after_its_rename(tmp_path, monkeypatch):
    """The calls in their order: a loss of power after any of them leaves the old or the new."""
    calls = []

    def record(module, name, describe):
        call = getattr(module, name)

        def recorded(*arguments):
            calls.append((name, describe(*arguments)))
            return call(*arguments)

        monkeypatch.setattr(module, name, recorded)

    def opened(handle):
        return Path(os.readlink(f"/proc/self/fd/{handle}")).name.split(".")[-1]

    record(os, "fsync", opened)
    for name in ("replace", "rename"):
        record(os, name, lambda source, target: Path(target).name)
    files.write_text(tmp_path / "folder" / "a", "1")
    assert calls == [("fsync", "new"), ("replace", "a"), ("fsync", "folder")]
    calls.clear()
    with files.fresh_folder(tmp_path / "made") as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "x").write_text("1")
    flushed, (last, renamed) = calls[:-2], calls[-2]
    assert {("fsync", "x"), ("fsync", "sub"), ("fsync", "new")} <= {*flushed}
    assert (last, renamed) == ("rename", "made") and calls[-1] == ("fsync", tmp_path.name)


@pytest.mark.parametrize("address", ["gs://b/run", "s3://b/run", "hf://o/n", "file:///tmp/run"])
def test_an_address_is_no_folder_to_write(tmp_path, monkeypatch, address):
    import jax_lora
    from jax_lora.errors import ConfigError
    from jax_lora.run.convert import convert

    monkeypatch.chdir(tmp_path)
    for write in (
        lambda: files.check_vacant(address),
        lambda: jax_lora.Run.open(jax_lora.RunConfig(), address),
        lambda: convert("org/name", address),
    ):
        with pytest.raises(ConfigError, match=f"^{address}: found an address, expected a folder"):
            write()
    assert not list(tmp_path.iterdir())


def test_a_tilde_is_the_users_home(tmp_path, monkeypatch):
    import jax_lora

    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.check_vacant("~/out") == tmp_path / "out"
    assert jax_lora.Run.open(jax_lora.RunConfig(), "~/run").workdir == tmp_path / "run"
