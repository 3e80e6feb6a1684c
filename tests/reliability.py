"""Try what docs/reliability.md promises, and write that file.

    python tests/reliability.py                # as often as the file says; about two hours
    python tests/reliability.py --short        # a few tries of each, nothing is written
    python tests/reliability.py damage locks   # some of them; the rows of the others stay
    python tests/reliability.py fuzz           # an hour, in as many processes as kinds of files

A try that breaks a promise is printed and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

DOCUMENT = REPOSITORY / "docs" / "reliability.md"
START, END = "<!-- measured -->\n", "<!-- end -->\n"  # what is between them is written here


class Result(NamedTuple):
    """A row of the table, and what broke the promise."""

    promise: str
    how: str
    tries: int
    outcome: str
    broken: list[str]


# ---------------------------------------------------------------- what is tried


class Ground:
    """A folder with the tiny model, the toy tasks, and a finished run; `is_short`: a few tries."""

    def __init__(self, folder: Path, is_short: bool):
        from jax_lora.data.toy import write_checkout
        from tests.weights import builders

        self.folder, self.model, self.is_short = folder, folder / "tiny.gguf", is_short
        vocabulary = builders.tiny_bpe("gpt-2")
        weights = builders.hf_weights(len(vocabulary["tokens"]))
        small = {k: v if v.ndim == 1 else 0.1 * v for k, v in weights.items()}
        builders.write_gguf(self.model, small, tokenizer=vocabulary)
        self.toy = write_checkout(folder / "toy", instances_per_task=12)
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self.run = folder / "finished"
        self.finish(self.train(self.run))

    def train(self, workdir: Path, steps: int = 6, rank: int = 64) -> list[str]:
        """The command that trains there."""
        keys = {
            "model": self.model, "data.path": self.toy, "max_steps": steps, "batch_size": 2,
            "checkpoint_every": 2, "optim.warmup_steps": 1, "optim.learning_rate": 1e-3,
            "data.test_per_task": 2, "data.train_per_task": 4, "data.buckets": "(384,)",
            "data.source_length": 384, "eval.buckets": "(384,)", "eval.max_new_tokens": 4,
        }  # fmt: skip
        flags = [f"--config.{key}={value}" for key, value in keys.items()]
        config = f"--config={REPOSITORY}/configs/lora.py:rank={rank}"
        return self.script("train.py", config, f"--workdir={workdir}", *flags)

    def eval(self, workdir: Path) -> list[str]:
        """The command that scores there, from the start."""
        return self.script("eval.py", f"--workdir={workdir}", "--sets=unseen", "--overwrite")

    def script(self, name: str, *arguments: str) -> list[str]:
        """The command of a script."""
        return [sys.executable, str(REPOSITORY / name), *arguments]

    def start(self, command: list[str]) -> subprocess.Popen[str]:
        """A process that runs a command."""
        return subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            cwd=REPOSITORY, env=self.environment,
        )  # fmt: skip

    def finish(self, command: list[str]) -> None:
        """Run a command to its end, which must be a good one."""
        process = self.start(command)
        _, text = process.communicate()
        if process.returncode:
            raise SystemExit(f"{command}: exit code {process.returncode}\n{text}")

    def fresh(self, name: str) -> Path:
        """A folder that is not there."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        return path


# ---------------------------------------------------------------- damage


def damage(ground: Ground, tries: int) -> list[Result]:
    """Flip a bit of, or cut, a file of the newest of two checkpoints, and restore."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    from jax_lora.errors import DataError
    from jax_lora.run import prepare
    from jax_lora.run.folder import read_saved
    from jax_lora.training.checkpoints import Checkpoints, steps_in

    logging.getLogger("jax_lora").setLevel(logging.ERROR)
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    config, _ = read_saved(ground.run)
    given = prepare.read_inputs(config, ground.run)
    source = ground.run / "checkpoints"
    newest, before = steps_in(source)
    like = prepare.build(given, ground.fresh("empty")).state
    made = {}
    for step in (newest, before):
        alone = ground.fresh("alone")
        shutil.copytree(source / str(step), alone / str(step))
        made[step] = Checkpoints(alone, single_process=True).restore(like)

    def is_equal(state, expected):
        return all(map(np.array_equal, *map(jax.tree.leaves, (state, expected))))

    plain = ocp.StandardCheckpointer()
    named = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(like.trainable)
    }

    def with_orbax(folder: Path) -> str:
        """What Orbax alone makes of the trainable half."""
        try:
            found = plain.restore(folder / str(newest) / "trainable", named)
        except Exception:
            return "refused"
        expected = jax.tree.leaves(made[newest].trainable)
        good = all(map(np.array_equal, found.values(), expected))
        return "equal" if good else "silent"

    results = []
    for kind in ("flip", "cut"):
        rng, counts, alone, orbax, broken = random.Random(0), Counter(), Counter(), Counter(), []
        for number in range(tries):
            folder = ground.fresh("damaged")
            shutil.copytree(source, folder)
            _damage(folder / str(newest), kind, rng)
            orbax[with_orbax(folder)] += 1
            only = ground.fresh("only")
            shutil.copytree(folder / str(newest), only / str(newest))
            try:
                state = Checkpoints(only, single_process=True).restore(like)
                alone["equal" if is_equal(state, made[newest]) else "silent"] += 1
            except DataError:
                alone["refused"] += 1
            state = Checkpoints(folder).restore(like)
            step = int(state.step)
            good = step in made and is_equal(state, made[step])
            counts[{newest: "equal", before: "before"}.get(step, "lost") if good else "silent"] += 1
            if not good or alone["silent"]:
                broken.append(f"{kind} {number}: step {step}")
        what = {"flip": "one bit flipped", "cut": "one file cut"}[kind]
        results.append(
            Result(
                "no damaged checkpoint is loaded; the one before is resumed from",
                f"{what} at random in a rank-64 checkpoint, an older one beside it",
                tries,
                f"{counts['before']} passed over for the one before, {counts['equal']} in bytes "
                f"that hold no value, {counts['silent']} loaded silently",
                broken,
            )
        )
        results.append(
            Result(
                "the same with no older one: refused",
                f"{what}, as above",
                tries,
                f"{alone['refused']} refused, {alone['equal']} equal, {alone['silent']} silently; "
                f"by Orbax alone: {orbax['refused']} refused, {orbax['equal']} equal (of the "
                f"trainable half), {orbax['silent']} silently",
                [],
            )
        )
    return results


def _damage(folder: Path, kind: str, rng: random.Random) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
    (path,) = rng.choices(files, [p.stat().st_size for p in files])
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content))
    if kind == "cut":
        content = content[:at]
    else:
        content[at] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


# ---------------------------------------------------------------- kills, locks, signals


class Killed(NamedTuple):
    """What is killed."""

    kind: str  # what is compared
    commands: list[list[str]]  # one per process
    start: Path | None  # the folder that it starts from
    share: int  # of the kills, in eighths
    short: bool = False  # the others are killed by test_killed_runs.py and test_study.py


def killed_commands(ground: Ground) -> dict[str, Killed]:
    """What is killed, by name."""
    train = ground.train(Path("{workdir}"), 8 if ground.is_short else 20, rank=2)[1:]
    packed = ["--config.data.packed=True", "--config.validate_every=3"]
    packed += ["--config.data.validation_per_task=2", "--config.keep=best"]
    packed = [flag for flag in train if "batch_size" not in flag] + packed
    packed += ["--config.batch_size=8"]
    two = [[*packed, "--coordinator={address}", "--processes=2", f"--process={i}"] for i in (0, 1)]
    score = ground.eval(Path("{workdir}"))[1:-1]  # without --overwrite
    study = [f"--config={REPOSITORY}/configs/study_smoke.py", "--config.ranks=(2,)"]
    study += ["--config.sets=('T2',)", "--config.toy.run.epochs=1", "--workdir={workdir}"]
    return {
        "train.py": Killed("train", [train], None, 3),
        "train.py, packed and validating": Killed("train", [packed], None, 1),
        "train.py, packed and validating, in two processes": Killed("train", two, None, 1, True),
        "eval.py": Killed("eval", [score], ground.run, 2, True),
        "study.py": Killed("study", [[str(REPOSITORY / "study.py"), *study]], None, 1),
    }


def kills(ground: Ground, tries: int) -> list[Result]:
    """SIGKILL scripts again and again, see tests/killed_scripts.py."""
    results = []
    for name, (kind, commands, start, share, short) in killed_commands(ground).items():
        if ground.is_short and not short:
            continue
        folder = ground.fresh("kills")
        folder.mkdir()
        spec = {"kind": kind, "commands": commands, "fresh": start and str(start)}
        count = max(1, tries * share // 8)
        (folder / "spec.json").write_text(json.dumps(spec | {"kills": count}))
        driver = [sys.executable, str(REPOSITORY / "tests/killed_scripts.py")]
        done = subprocess.run(
            [*driver, str(folder / "spec.json")], capture_output=True, text=True, cwd=REPOSITORY,
            env=ground.environment,
        )  # fmt: skip
        log = folder / "log.txt"
        if done.returncode:
            tail = log.read_text(errors="replace")[-2000:] if log.is_file() else ""
            found, said = {"kills": 0, "broken": [done.stderr, tail]}, "it did not come to its end"
        else:
            found = json.loads(done.stdout.splitlines()[-1])
            equal = found["rounds"] - len(found["broken"])
            said = f"{equal} of {found['rounds']} times equal to the unbroken one"
        promise = "what was killed and run again ends as an unbroken one, byte for byte"
        how = f"SIGKILL at random moments of {name}, run again until it ends"
        results.append(Result(promise, how, found["kills"], said, found["broken"]))
    return results


def locks(ground: Ground, tries: int) -> list[Result]:
    """Two scripts on one folder at the same time."""
    results = []
    for first, second in (("train", "train"), ("eval", "eval"), ("train", "eval")):
        outcomes, broken = Counter(), []
        for number in range(tries):
            workdir = ground.fresh("shared")
            shutil.copytree(ground.run, workdir)
            if "train" in (first, second):  # two steps are left to be trained
                shutil.rmtree(workdir / "checkpoints" / "6")
            commands = [getattr(ground, name)(workdir) for name in (first, second)]
            processes = [ground.start(command) for command in commands]
            texts = [process.communicate(timeout=300)[1] for process in processes]
            codes = sorted(process.returncode for process in processes)
            refused = [text for p, text in zip(processes, texts, strict=True) if p.returncode == 2]
            told = all("runs here, process" in text for text in refused)
            # A second one that comes when the first has ended finds nobody there.
            outcomes[str(codes)] += 1
            if codes not in ([0, 2], [0, 0]) or not told:
                broken.append(f"{first} beside {second} {number}: {codes} {texts}")
        said = ", ".join(f"{count} × exit codes {codes}" for codes, count in outcomes.items())
        how = f"{first}.py and {second}.py started together on one folder"
        promise = "a run's folder has one owner, the second script says who it is"
        results.append(Result(promise, how, tries, said, broken))
    return results


def stopped_commands(ground: Ground) -> dict[str, tuple[list[str], Path, Path | None]]:
    """What is stopped: script → its command, the folder that it writes, what that starts as."""
    at = {name: ground.folder / f"stopped-{name}" for name in ("train", "eval", "study", "convert")}
    study = [f"--config={REPOSITORY}/configs/study_smoke.py", "--config.ranks=(2,)"]
    study += ["--config.sets=('T2',)", "--config.toy.run.epochs=1", f"--workdir={at['study']}"]
    plan = [f"--config={REPOSITORY}/configs/lora_7b_a100.py:rank=2048", "--target=a100-80gb"]
    return {
        "train": (ground.train(at["train"], 40), at["train"], None),
        "eval": (ground.eval(at["eval"]), at["eval"], ground.run),
        "study": (ground.script("study.py", *study), at["study"], None),
        "convert": (
            ground.script("convert.py", str(ground.model), str(at["convert"])), at["convert"], None,
        ),
        "plan": (ground.script("plan.py", *plan), ground.folder / "nothing", None),
    }  # fmt: skip


def signals(ground: Ground, tries: int) -> list[Result]:
    """Each stop signal at random moments of each script, of its first half minute.

    Args:
      tries: per script; a signal that came after the end of a process is not counted.
    """
    results = []
    for number in STOPS:  # what nohup or a shell's background ignores, children would ignore too
        signal.signal(number, signal.SIG_DFL)
    for name, (command, workdir, start) in stopped_commands(ground).items():

        def begin(command=command, workdir=workdir, start=start) -> subprocess.Popen[str]:
            shutil.rmtree(workdir, ignore_errors=True)
            if start:
                shutil.copytree(start, workdir)
            return ground.start(command)

        # How long it takes to its end, or to half a minute; what it compiles is there afterwards.
        length = 8.0  # which few tries are not worth: compiling is stopped as well
        if not ground.is_short:
            began, process = time.monotonic(), begin()
            try:
                process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                process.terminate()
                process.communicate()
            length = time.monotonic() - began
        rng, outcomes, broken, slowest, count = random.Random(0), Counter(), [], 0.0, 0
        while count < tries:
            process, number = begin(), STOPS[count % len(STOPS)]
            time.sleep(rng.uniform(0.02, 1.0) * length)
            if process.poll() is not None:
                process.communicate()
                continue
            count += 1
            process.send_signal(number)
            began = time.monotonic()
            _, text = process.communicate(timeout=60)
            slowest = max(slowest, time.monotonic() - began)
            if process.returncode == -number and not text:  # before Python had read the script
                outcomes["before the script"] += 1
                continue
            outcomes[f"exit code {process.returncode}"] += 1
            lines = [line for line in text.splitlines() if line.lstrip("\r").startswith("stopped")]
            good = process.returncode == 0 or (process.returncode == 75 and len(lines) == 1)
            if not good or "Traceback" in text:
                broken.append(f"{name}, {number.name}: {process.returncode} {text[-500:]}")
        left = [path.name for path in ground.folder.glob(".*.new")]
        said = ", ".join(f"{times} × {what}" for what, times in sorted(outcomes.items()))
        results.append(
            Result(
                "a stop: one line, exit code 75 (0 at the end), nothing temporary left",
                f"SIGTERM, SIGINT, SIGHUP in turn, at random moments of {name}.py",
                tries,
                f"{said}; the slowest ended after {slowest:.1f} s",
                [*broken, *left],
            )
        )
    return results


# ---------------------------------------------------------------- bad inputs


def bounds(ground: Ground, share: int) -> list[Result]:
    """Time and memory of the bad inputs of tests/bad_inputs, each in a forked child.

    Args:
      share: every so manieth of them.
    """
    command = [sys.executable, str(REPOSITORY / "tests/bad_inputs_measured.py"), str(share)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=REPOSITORY, env=ground.environment
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    rows = json.loads(done.stdout.splitlines()[-1])
    slow = max(rows, key=lambda row: row["seconds"])
    large = max(rows, key=lambda row: row["mib"])
    wrong = [row for row in rows if row["code"] != 2]
    over = [row for row in rows if row["seconds"] > 2 or row["mib"] > 500]
    said = (
        f"{len(rows) - len(wrong)} ended with exit code 2; the slowest took "
        f"{slow['seconds']:.1f} s of processor time ({slow['name']}), the largest "
        f"{large['mib']:.0f} MiB more memory ({large['name']}); {len(over)} took more than 2 s or "
        "500 MiB"
    )
    promise = "a bad input is refused in one line, in 2 s and 500 MiB, and nothing is written"
    kinds = len({row["kind"] for row in rows})
    how = f"the table of tests/bad_inputs, {kinds} kinds"
    return [Result(promise, how, len(rows), said, [str(row) for row in (*wrong, *over)])]


# ---------------------------------------------------------------- damaged files

FUZZED = {
    "gguf": "GGUF models and tokenizers",
    "hf": "Hugging Face: config.json, safetensors, their index, tokenizers",
    "tasks": "tasks, splits, rows, chats, predictions",
    "peft": "PEFT adapters and parameters.json",
}


def fuzz(ground: Ground, seconds: int) -> list[Result]:
    """Readers fed with damaged files, see tests/fuzz.py; all kinds of files at the same time."""
    script = str(REPOSITORY / "tests/fuzz.py")
    processes = {
        kind: subprocess.Popen(
            [sys.executable, script, kind, f"--seconds={seconds}"], stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY, env=ground.environment,
        )
        for kind in FUZZED
    }  # fmt: skip
    results = []
    for kind, process in processes.items():
        text, _ = process.communicate()
        *lines, last = text.splitlines()
        end = re.fullmatch(rf"{kind}: (\d+) inputs, (\d+) findings", last)
        if end is None or process.returncode not in (0, 1):
            raise SystemExit(text)
        promise = (
            "a damaged file is read or refused: no other error, no end of the process, 5 s, 1 GB"
        )
        how = f"{seconds / 60:g} minutes of random damage to files of {FUZZED[kind]}"
        said = f"{end[2]} findings"
        findings = lines if int(end[2]) else []  # else they are warnings of libraries
        results.append(Result(promise, how, int(end[1]), said, findings))
    return results


# ---------------------------------------------------------------- all of them

TRIES = {
    damage: (100, 5), kills: (200, 8), locks: (10, 1), signals: (30, 1), bounds: (1, 10),
    fuzz: (3600, 2),
}  # fmt: skip


def write(found: dict[str, list[Result]]) -> None:
    """Put the rows of some trials into docs/reliability.md, in place of their old ones."""
    text = DOCUMENT.read_text("utf-8")
    head, tail = text[: text.index(START)], text[text.index(END) :]
    lines = text[len(head) + len(START) : -len(tail)].splitlines()
    header = ["| trial | promise | how it is tried | tries | outcome |", "|---|---|---|---:|---|"]
    for trial in (one.__name__ for one in TRIES):
        if trial in found:
            rows = (map(str, (trial, *result[:4])) for result in found[trial])
            cells = ([cell.replace("|", r"\|") for cell in row] for row in rows)
            header += [f"| {' | '.join(row)} |" for row in cells]
        else:
            header += [line for line in lines if line.startswith(f"| {trial} |")]
    table = "".join(f"{line}\n" for line in header)
    DOCUMENT.write_text(f"{head}{START}{table}{tail}", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="damage, kills, locks, signals, bounds, fuzz")
    parser.add_argument("--short", action="store_true", help="a few tries of each")
    given = parser.parse_args()
    found: dict[str, list[Result]] = {}
    with tempfile.TemporaryDirectory(prefix="jax_lora-reliability-") as folder:
        ground = Ground(Path(folder), given.short)
        for trial, counts in TRIES.items():
            if given.names and trial.__name__ not in given.names:
                continue
            for result in trial(ground, counts[given.short]):
                print(*result[:4], sep=" | ", flush=True)
                print(*result.broken, sep="\n", flush=True)
                found.setdefault(trial.__name__, []).append(result)
    if not given.short:
        write(found)
    if any(result.broken for results in found.values() for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
