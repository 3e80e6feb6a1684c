"""Writes a checkout of the real size: the real names, categories and counts, texts of our own."""

import json
from pathlib import Path

MOST = 1_300  # instances per task in tests; benchmarks/data_scale.py writes and reads all of them
LABELS = ("yes", "no", "maybe", "Ja, natürlich")


def read_index(index: Path, most: int | None = None) -> list[dict]:
    """The task, split, category and instances of every task, of which each has `most` at most."""
    rows = json.loads(index.read_text())["tasks"]
    return [row | {"instances": min(row["instances"], most or row["instances"])} for row in rows]


def write(root: Path, index: Path, *, filler: int = 0, most: int | None = None) -> Path:
    """Writes 875 task files with 2.8 million instances, as fast as the disk takes them.

    The instances of a task are its first ones of a common list, with its own name in the ids. In
    that list every hundredth one after the thousandth has the input of the one before it.

    Arguments:
        root: the folder to fill.
        index: JSON with `tasks`, a list of task, split, category and instances.
        filler: characters of meaningless text to put before every input.
        most: instances per task, fewer than there are.
    Returns:
        The folder.
    """
    rows = read_index(index, most)
    before = ("All of this is to be read with care. " * (filler // 36 + 1))[:filler]
    common = []
    for i in range(max(row["instances"] for row in rows)):
        # The same input is written with other white space around it.
        text, space = (i - 1, "  ") if i > 1000 and i % 100 == 0 else (i, "")
        text = f"{space}{before}Is item {text} one of the {text * 7919 % 10007}?"
        common.append(f'{i:032x}", "input": "{text}", "output": ["{LABELS[i % len(LABELS)]}"]}}')
    (root / "tasks").mkdir(parents=True)
    (root / "splits" / "default").mkdir(parents=True)
    for row in rows:
        head = json.dumps(
            {"Categories": [row["category"]], "Definition": [f"Answer as {row['task']} says."]}
        )
        start = f'{{"id": "{row["task"].split("_")[0]}-'
        instances = start + f", {start}".join(common[: row["instances"]])
        (root / "tasks" / f"{row['task']}.json").write_text(
            f'{head[:-1]}, "Instances": [{instances}]}}', encoding="utf-8"
        )
    for split in ("train", "test"):
        names = "".join(f"{row['task']}\n" for row in rows if row["split"] == split)
        (root / "splits" / "default" / f"{split}_tasks.txt").write_text(names)
    return root


def distinct(count: int) -> int:
    """Distinct inputs among a task's first `count` instances."""
    return count - max(0, (count - 1) // 100 - 10)
