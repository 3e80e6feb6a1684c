"""Run scripts, kill them at random moments, run them again, and compare: of reliability.py.

    python tests/killed_scripts.py SPEC.json

SPEC.json: "commands", one per process, each a script and its arguments, in which {workdir} and
{address} are filled in; "fresh", a folder that the workdir starts as a copy of, or null; "kind",
what is compared; "kills", how many. Rounds of kills go on until there are so many; a round ends
when an attempt comes to its end before it is killed. What Python imports is imported once: each
attempt is a forked child with a fresh jax of its own.

Prints one JSON object: kills, rounds, and those that ended otherwise than the unbroken one.
"""

import hashlib
import json
import os
import random
import runpy
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from rouge_score import rouge_scorer  # noqa: E402, F401
from transformers import PreTrainedTokenizerFast  # noqa: E402, F401

from jax_lora.run import Run  # noqa: E402, F401


def free_address() -> str:
    """host:port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start(commands: list[list[str]], workdir: Path, log: Path) -> list[int]:
    """A child per command; their ids."""
    address, children = free_address(), []
    for command in commands:
        script, *rest = (x.format(workdir=workdir, address=address) for x in command)
        child = os.fork()
        if not child:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            os.dup2(2, 1)
            sys.argv = [str(REPOSITORY / script), *rest]
            code = 1
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return children


def wait(children: list[int], seconds: float = 600.0) -> bool:
    """Whether all ended by themselves, well, within so many seconds; those that did not are
    killed."""
    end, left = time.monotonic() + seconds, list(children)
    while left and time.monotonic() < end:
        for child in list(left):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                left.remove(child)
                if status:
                    raise SystemExit(f"a process ended with status {status}")
        time.sleep(0.002)
    for child in left:
        os.kill(child, signal.SIGKILL)
    for child in left:
        os.waitpid(child, 0)
    return not left


def outcome(kind: str, workdir: Path) -> object:
    """What two runs of one kind are compared by."""
    if kind == "study":
        return hashlib.sha256((workdir / "results.parquet").read_bytes()).hexdigest()
    if kind == "eval":
        folder = workdir / "eval" / "unseen"
        answers = sorted((folder / "predictions.jsonl").read_text().splitlines())
        return [answers, (folder / "scores.json").read_text()]
    lines = map(json.loads, (workdir / "metrics.jsonl").open())
    curve = [(row["step"], row["loss"], row.get("validation_loss")) for row in lines]
    adapter = (workdir / "adapter" / "adapter_model.safetensors").read_bytes()
    return [curve, hashlib.sha256(adapter).hexdigest()]


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    root, chance = Path(sys.argv[1]).parent, random.Random(spec["kind"])
    log = root / "log.txt"

    def fresh(name: str) -> Path:
        shutil.rmtree(root / name, ignore_errors=True)
        if spec["fresh"]:
            shutil.copytree(spec["fresh"], root / name)
        return root / name

    for _ in range(2):  # the second one finds its programs compiled
        whole = fresh("whole")
        began = time.monotonic()
        if not wait(start(spec["commands"], whole, log)):
            raise SystemExit("the unbroken one does not end")
        length = time.monotonic() - began
    wanted = outcome(spec["kind"], whole)
    kills, rounds, broken = 0, 0, []
    while kills < spec["kills"]:
        workdir = fresh("killed")
        last = False
        while True:
            # At the end an attempt that nothing kills.
            last = last or kills >= spec["kills"]
            seconds = 600.0 if last else chance.uniform(0.1 * length, length)
            if wait(start(spec["commands"], workdir, log), seconds):
                break
            kills += 1
        rounds += 1
        if outcome(spec["kind"], workdir) != wanted:
            broken.append(f"round {rounds}")
    print(json.dumps({"kills": kills, "rounds": rounds, "broken": broken, "seconds": length}))


if __name__ == "__main__":
    main()
