"""Processor time and memory of the bad inputs of tests/bad_inputs: of reliability.py.

    python tests/bad_inputs_measured.py 1      # all of them; 10: every tenth

What Python imports is imported once, by a script that is run here; each input is given to a forked
child. Prints a JSON list: kind, name, exit code, seconds, MiB beyond what the imports take.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets  # noqa: E402, F401
from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: E402, F401

import jax_lora.study.command  # noqa: E402, F401
from tests import bad_inputs  # noqa: E402
from tests.scripts import run  # noqa: E402


def memory() -> tuple[int, int]:
    """Resident now and at most so far, in KiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]), int(lines["VmHWM"].split()[0])


def measured(case: bad_inputs.Case, ground: bad_inputs.Ground, folder: Path) -> dict:
    """What one input took."""
    folder.mkdir()
    arguments = case.make(ground, folder)
    source, out = os.pipe()
    child = os.fork()
    if not child:
        Path("/proc/self/clear_refs").write_text("5")  # the most so far is from now on
        before, began = memory()[0], sum(os.times()[:2])
        done = run(case.script, *arguments)
        seconds = sum(os.times()[:2]) - began
        text = done.stderr.strip()[-200:]
        row = {"code": done.returncode, "seconds": seconds, "said": text}
        os.write(out, json.dumps(row | {"mib": (memory()[1] - before) / 1024}).encode())
        os._exit(0)
    os.close(out)
    with os.fdopen(source) as file:
        text = file.read()
    os.waitpid(child, 0)
    row = json.loads(text) if text else {"code": -1, "seconds": 0.0, "mib": 0.0, "said": "died"}
    return {"kind": case.kind, "name": f"{case.kind} {case.variant}".strip()} | row


def main() -> None:
    share = int(sys.argv[1])
    with tempfile.TemporaryDirectory(prefix="jax_lora-bounds-") as folder:
        root = Path(folder)
        ground = bad_inputs.Ground(root / "ground")
        train = bad_inputs.Case("", "", "train.py", lambda g, f: g.train(f"--workdir={g.run}"), ())
        trained = measured(train, ground, root / "trained")  # JAX's devices start in a child
        if trained["code"]:
            raise SystemExit(trained["said"])
        cases = list(bad_inputs.cases())[::share]
        print(json.dumps([measured(c, ground, root / str(i)) for i, c in enumerate(cases)]))


if __name__ == "__main__":
    main()
