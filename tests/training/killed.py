"""Train, be killed, go on, several times: the driver of test_killed_runs.py.

    python killed.py WORKDIR_UNBROKEN WORKDIR_KILLED KILLS -- flags of train.py

Python and all that a run imports are imported once; every attempt is a forked child with a fresh
jax of its own, and is killed by SIGKILL a random moment after a step that this attempt took.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import tensorboardX  # noqa: E402, F401
from absl import flags  # noqa: E402
from ml_collections import config_flags  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402, F401

from jax_lora.run import Run  # noqa: E402

CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)


def attempt(workdir: Path, arguments: list[str]) -> int:
    """Start a training process; its id."""
    child = os.fork()
    if child == 0:
        try:
            flags.FLAGS(["train.py", *arguments])
            Run.open(CONFIG.value, workdir).train()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return child


def steps(workdir: Path) -> int:
    """Lines of metrics.jsonl that are there."""
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def main() -> None:
    unbroken, killed, kills, _, *arguments = sys.argv[1:]
    if os.waitpid(attempt(Path(unbroken), arguments), 0)[1]:
        raise SystemExit("the unbroken run failed")
    chance, moments = random.Random(0), []
    while len(moments) < int(kills):
        child = attempt(Path(killed), arguments)
        # Farther than the run ever was, so that it gets on however few checkpoints were in time.
        target = steps(Path(killed)) + chance.randint(1, 4)
        while steps(Path(killed)) < target:
            if os.waitpid(child, os.WNOHANG)[0]:
                raise SystemExit(f"a run ended by itself after {len(moments)} kills")
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        moments.append(steps(Path(killed)))
    if os.waitpid(attempt(Path(killed), arguments), 0)[1]:
        raise SystemExit("the last run failed")
    print(*moments)


if __name__ == "__main__":
    main()
