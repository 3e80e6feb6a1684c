"""Feed the readers of files damaged ones, for as long as is asked for.

    python tests/fuzz.py gguf hf tasks peft --seconds=3600
    python tests/fuzz.py peft --only=1234        # one input again, with its traceback

A reader may read an input or refuse it by a DataError or an OSError that names a file. Anything
else is a finding: another exception, the end of the process, more than 5 s, or 1 GB more memory.
Findings are printed with their numbers, and make the exit code 1; each becomes a test.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jax_lora.data.sources.rows import Unused, read_examples  # noqa: E402
from jax_lora.data.sources.tables import read_tables  # noqa: E402
from jax_lora.errors import DataError  # noqa: E402
from tests import test_damaged_files as files  # noqa: E402

SECONDS, GROWTH = 5, 1 << 30
Reader = Callable[[Path], tuple[Path, Callable[[], object]]]


def rows(folder: Path) -> tuple[Path, Callable[[], object]]:
    """A JSONL file of rows of each shape."""
    path = folder / "rows.jsonl"
    row = {"instruction": "a", "input": "b", "output": ["c"], "task": "t", "id": "1"}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"id": 2, "messages": turns}) + "\n")

    def read() -> object:
        return [list(read_examples(t, {}, Unused())) for t in read_tables(str(path)).values()]

    return path, read


def chats(folder: Path) -> tuple[Path, Callable[[], object]]:
    """A JSON file of conversations."""
    path, turn = folder / "chats.json", {"from": "human", "value": "a"}
    path.write_text(json.dumps([{"conversations": [turn, {"from": "gpt", "value": "b"}]}] * 2))

    def read() -> object:
        return [list(read_examples(t, {}, Unused())) for t in read_tables(str(path)).values()]

    return path, read


READERS: dict[str, Sequence[Reader]] = {
    "gguf": (files.gguf_model, files.gguf_tokenizer),
    "hf": (
        files.config_json, files.weights, files.index, files.tokenizer_config,
        files.sentencepiece, files.sentencepiece_config,
    ),
    "tasks": (
        files.task, files.split, files.categories, files.examples, files.predictions,
        files.labels, rows, chats,
    ),
    "peft": (files.adapter_config, files.adapter_weights, files.parameters),
}  # fmt: skip

# ---------------------------------------------------------------- damage

NASTY = [
    None, True, False, 0, -1, 1, 2, 3.5, -0.0, 1e308, -1e308, float("nan"), float("inf"), 2**31,
    2**32, 2**53, 2**63, 2**64, 10**30, 10**400, "", "x", "0", "\ud800", "\0", "\x1b[2J", "../..",
    "/etc/passwd", "a" * 5000, "(", "(a+)+$", r"(\w+|.)+!", ".*" * 30, "é", "\u202e", [], {}, [[]],
    [None], [1], ["x"], [{}], {"": 1}, {"a": {}}, {"0": "x"}, [0] * 3000, "q_proj", "all-linear",
]  # fmt: skip


def mutate_tree(tree: object, rng: random.Random) -> object:
    """Replace, drop, double or wrap one part of a JSON value."""
    if isinstance(tree, dict) and tree and rng.random() < 0.85:
        key = rng.choice(list(tree))
        kind = rng.random()
        if kind < 0.1:
            return {k: v for k, v in tree.items() if k != key}
        if kind < 0.15:
            return tree | {str(rng.choice(NASTY)): tree[key]}
        return tree | {key: mutate_tree(tree[key], rng)}
    if isinstance(tree, list) and tree and rng.random() < 0.85:
        at = rng.randrange(len(tree))
        kind = rng.random()
        if kind < 0.1:
            return tree[:at] + tree[at + 1 :]
        if kind < 0.15:
            return tree[:at] + tree[at : at + 1] * rng.choice([2, 50]) + tree[at:]
        return tree[:at] + [mutate_tree(tree[at], rng)] + tree[at + 1 :]
    return rng.choice([*NASTY, [tree], {"a": tree}, str(tree)])


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Some flips, numbers, cuts, copies and insertions, more of them near the start."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        if not data:
            break
        at = rng.randrange(min(len(data), rng.choice([64, 1024, 8192, len(data)])))
        kind = rng.randrange(7)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        elif kind == 2:
            number = rng.choice([0, 1, 8, 9, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(data)])
            width = rng.choice("IQ")
            packed = struct.pack(f"<{width}", number & (2**32 - 1 if width == "I" else 2**64 - 1))
            data[at : at + len(packed)] = packed
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            del data[at : at + rng.choice([1, 4, 8, 100])]
        elif kind == 5:
            data[at:at] = data[at : at + rng.choice([1, 8, 64, 4096])]
        else:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice([1, 8, 40])))
    return bytes(data)


def mutate(path: Path, content: bytes, rng: random.Random) -> bytes:
    """Another content for a file, damaged by what it holds."""
    if path.suffix == ".safetensors" and rng.random() < 0.6:
        (size,) = struct.unpack("<Q", content[:8])
        header = json.dumps(mutate_tree(json.loads(content[8 : 8 + size]), rng)).encode()
        return struct.pack("<Q", len(header)) + header + content[8 + size :]
    if path.suffix == ".json" and rng.random() < 0.8:
        tree: object = json.loads(content)
        for _ in range(rng.choice([1, 1, 2, 3])):
            tree = mutate_tree(tree, rng)
        return json.dumps(tree).encode()
    if path.suffix == ".jsonl" and rng.random() < 0.8:
        lines = [json.loads(line) for line in content.splitlines()]
        at = rng.randrange(len(lines))
        lines[at] = mutate_tree(lines[at], rng)
        return "".join(f"{json.dumps(line)}\n" for line in lines).encode()
    return mutate_bytes(content, rng)


# ---------------------------------------------------------------- running


class TooLong(BaseException):
    """An input that took more than SECONDS; no reader catches it by accident."""


def _alarm(*_: object) -> None:
    raise TooLong


def try_one(path: Path, read: Callable[[], object], content: bytes) -> str:
    """Read an input; what is wrong with how that ended, or ""."""
    path.write_bytes(content)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        read()
    except DataError:
        pass
    except OSError as error:
        if error.filename is None:
            return traceback.format_exc()
    except TooLong:
        return f"more than {SECONDS} s\n{traceback.format_exc()}"
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return ""


def child(readers: Sequence[Reader], start: int, end: float, out: int, only: bool) -> None:
    """Read inputs from number `start` on until `end`; tell each number, and what was found."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _alarm)
    with tempfile.TemporaryDirectory(prefix="jax_lora-fuzz-") as folder:
        made = []
        for i, reader in enumerate(readers):
            (Path(folder) / str(i)).mkdir()
            path, read = reader(Path(folder) / str(i))
            read()
            made.append((path, read, path.read_bytes()))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        resource.setrlimit(resource.RLIMIT_AS, (_mapped() + 4 * GROWTH,) * 2)
        number = start
        while time.time() < end:
            rng = random.Random(number)
            path, read, content = made[number % len(made)]
            os.write(out, f"{number}\n".encode())
            found = try_one(path, read, mutate(path, content, rng))
            path.write_bytes(content)
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
            if not found and grown > GROWTH:
                found = f"the memory grew by {grown >> 20} MiB"
            if found:
                text = json.dumps({"number": number, "reader": path.name, "what": found})
                os.write(out, f"{text}\n".encode())
                if grown > GROWTH:
                    return
            number += 1
            if only:
                return


def _mapped() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def fuzz(name: str, seconds: float, start: int, only: bool = False) -> tuple[int, list[dict]]:
    """Inputs that a group of readers was given, and the findings, one of each kind."""
    end, number, found = time.time() + seconds, start, {}
    while time.time() < end:
        source, out = os.pipe()
        process = os.fork()
        if not process:
            code = 1
            try:
                os.close(source)
                child(READERS[name], number, end, out, only)
                code = 0
            finally:
                os._exit(code)
        os.close(out)
        with os.fdopen(source) as lines:
            for line in lines:
                said = json.loads(line)
                if isinstance(said, int):
                    number = said
                else:
                    kind = said["what"].strip().splitlines()
                    found.setdefault((said["reader"], *kind[-3:]), said)
        _, status = os.waitpid(process, 0)
        if os.WIFSIGNALED(status) or os.WEXITSTATUS(status):
            found.setdefault(("died", number), {"number": number, "what": f"status {status}"})
        number += 1
        if only:
            break
    return number - start, list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", default=[*READERS], help=", ".join(READERS))
    parser.add_argument("--seconds", type=float, default=60, help="for each of them")
    parser.add_argument("--start", type=int, default=0, help="number of the first input")
    parser.add_argument("--only", type=int, help="one input")
    given = parser.parse_args()
    total = 0
    for name in given.names:
        only = given.only is not None
        count, found = fuzz(name, given.seconds, given.only if only else given.start, only)
        for one in found:
            print(f"{name} {one['number']} {one.get('reader', '')}\n{one['what']}", flush=True)
        print(f"{name}: {count} inputs, {len(found)} findings", flush=True)
        total += len(found)
    raise SystemExit(bool(total))


if __name__ == "__main__":
    main()
