"""A small checkout of our own making, for the quick start and the tests: no download, no licence.

The tasks are generated from templates and are easy enough for a small pretrained model to learn
in a few hundred LoRA steps; the test tasks are relatives of the train tasks, not copies.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from jax_lora.data import toy_closed, toy_free
from jax_lora.data.toy_words import Dice, ToyTask
from jax_lora.errors import ConfigError

TASKS: tuple[ToyTask, ...] = (*toy_closed.TASKS, *toy_free.TASKS)
TRIES = 30  # picks that one more new input may need, on average


def write_checkout(
    path: str | Path,
    seed: int = 0,
    instances_per_task: int = 300,
    tasks: Sequence[ToyTask] = TASKS,
) -> Path:
    """Writes tasks/*.json and splits/default/*.txt, ready for `instructions.read_checkout`.

    The labels of a closed task take turns, so every prefix of its instances is balanced.

    Arguments:
        path: the folder to fill; made where it is missing, files of the same name are replaced.
        seed: another seed gives other instances of the same tasks.
        instances_per_task: instances, all with distinct inputs, of each task.
        tasks: to write.
    Returns:
        The folder.
    Raises:
        ConfigError: a count below one, or one for which some task has too few sentences.
    """
    if instances_per_task < 1:
        raise ConfigError(f"instances_per_task is {instances_per_task}, expected at least 1")
    root = Path(path)
    records = {task.name: _record(task, seed, instances_per_task) for task in tasks}
    (root / "tasks").mkdir(parents=True, exist_ok=True)
    (root / "splits" / "default").mkdir(parents=True, exist_ok=True)
    for name, record in records.items():
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        (root / "tasks" / f"{name}.json").write_text(text, encoding="utf-8")
    for split in ("train", "test", "excluded"):
        names = "".join(f"{task.name}\n" for task in tasks if task.split == split)
        (root / "splits" / "default" / f"{split}_tasks.txt").write_text(names, encoding="utf-8")
    return root


def _record(task: ToyTask, seed: int, count: int) -> dict[str, object]:
    """The task in the layout's own fields."""
    rows = _rows(task, seed, count)
    number = task.name.split("_")[0]
    return {
        "Contributors": ["jax_lora"],
        "Source": ["generated from templates"],
        "URL": [],
        "Categories": [task.category],
        "Reasoning": [],
        "Definition": [task.definition],
        "Input_language": ["English"],
        "Output_language": ["English"],
        "Instruction_language": ["English"],
        "Domains": ["Toy"],
        "Positive Examples": [],
        "Negative Examples": [],
        "Instances": [
            {"id": f"{number}-{index:032x}", "input": text, "output": [answer]}
            for index, (text, answer) in enumerate(rows)
        ],
        "Instance License": ["Apache 2.0"],
    }


def _rows(task: ToyTask, seed: int, count: int) -> list[tuple[str, str]]:
    """`count` (input, answer) pairs, no input twice."""
    dice = Dice("toy", seed, task.name)
    rows: dict[str, str] = {}
    for _ in range(TRIES * count):
        text, answer = task.make(
            dice, task.labels[len(rows) % len(task.labels)] if task.labels else ""
        )
        rows.setdefault(text, answer)
        if len(rows) == count:
            return list(rows.items())
    raise ConfigError(
        f"instances_per_task is {count}, but {task.name} has about {len(rows)} distinct inputs"
    )
