"""Answers that need no model: the input, a demonstration's output, the majority label, nothing.

Source: Wang et al. (2022), "Super-NaturalInstructions", section 6.1, whose heuristics are the first
two; on the unseen tasks of its default track they score 14.2 and 28.5 Rouge-L there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from jax_lora.data.instructions import Checkout, positive_outputs
from jax_lora.data.tasksets import TaskSet
from jax_lora.evaluation import behaviour, metrics

INPUT, DEMONSTRATION, MAJORITY, EMPTY = BASELINES = (
    "copied input",
    "copied demonstration",
    "majority label",
    "empty answer",
)


def baselines(
    checkout: Checkout,
    taskset: TaskSet,
    names: Sequence[str] = metrics.OFFICIAL,
    progress: Callable[[int], object] | None = None,
) -> dict[str, dict[str, float]]:
    """The scores of BASELINES on a test set.

    A demonstration is the task's first positive example or, where it has none, its first instance
    that is not in the set. The majority label is the most frequent answer of all of a task's
    instances, whether it is closed-label or not.

    Args:
      checkout: of the set's tasks.
      taskset: the test set.
      names: of the metrics, see `metrics.METRICS`.
      progress: called with the number of newly scored answers, time and again.

    Returns:
      By baseline what `metrics.aggregate` returns, percentages.
    """
    inputs: dict[str, set[str]] = {}
    for example in taskset.examples:
        inputs.setdefault(example.task, set()).add(example.input.strip())
    fixed = {task: _of_a_task(checkout, task, tested) for task, tested in inputs.items()}
    found = {}
    for baseline in BASELINES:
        rows = [
            {
                "task": example.task,
                "category": example.category,
                "references": example.references,
                "prediction": (fixed[example.task] | {INPUT: example.input})[baseline],
            }
            for example in taskset.examples
        ]
        scores = metrics.score_all(rows, names, progress)
        found[baseline] = metrics.aggregate(rows, scores, names)
    return found


def _of_a_task(checkout: Checkout, name: str, tested: Collection[str]) -> dict[str, str]:
    """The answers that are the same for all examples of a task."""
    task = checkout.task(name)
    instances = task.instances()
    others = (one.outputs[0] for one in instances if one.key not in tested)
    demonstration = next(iter(positive_outputs(task)), None)
    label = behaviour.majority_label(behaviour.label_counts(one.outputs for one in instances))
    # As the data has it: a label is normalized, and Rouge-L would see other words.
    texts = (text for one in instances for text in one.outputs)
    majority = next(text for text in texts if metrics.normalize(text) == label)
    return {
        DEMONSTRATION: next(others, "") if demonstration is None else demonstration,
        MAJORITY: majority,
        EMPTY: "",
    }
