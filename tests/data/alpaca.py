"""A JSONL file in Alpaca's form, from the toy tasks.

    python -m tests.data.alpaca alpaca.jsonl 2000

An instruction is the definition of a task, so that few instructions have many inputs.
"""

import json
import random
import sys
import tempfile
from pathlib import Path

from jax_lora.data.toy import TASKS, write_checkout


def write(path: Path, count: int = 2000, seed: int = 0) -> Path:
    """Write `count` rows of instruction, input and output, in a random order."""
    with tempfile.TemporaryDirectory() as folder:
        toy = write_checkout(folder, seed, instances_per_task=-(-count // len(TASKS)))
        records = [json.loads(file.read_text()) for file in sorted(toy.glob("tasks/*.json"))]
    rows = [
        {"instruction": one["Definition"][0], "input": row["input"], "output": row["output"][0]}
        for one in records
        for row in one["Instances"]
    ]
    random.Random(seed).shuffle(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
    return path


if __name__ == "__main__":
    write(Path(sys.argv[1]), *map(int, sys.argv[2:]))
