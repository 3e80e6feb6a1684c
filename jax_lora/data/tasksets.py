"""The task sets of one round: nested train sets, their controls and the two test sets.

Method, for a round and the sizes 100, 250 and 500. The paper says that tasks are sampled "in
proportion to the distribution of task categories" and that the sets are inclusive; the rest is
our choice:

1. Categories are shuffled, and so are the tasks inside each, eligible tasks first. A task is
   eligible when it has `train_per_task + test_per_task` distinct inputs.
2. Every set takes the first q tasks of each category. The quotas q come top-down by systematic
   sampling: Tall gives those of T500, these give those of T250, these give those of T100. A
   quota never exceeds the one that it came from, so the sets are nested by construction.
3. T100 holds eligible tasks only, so that each has examples to train on and to be tested on.
   Where a category's quota finds too few, the place goes to the most under-served category.
4. A task's instances, one for each distinct input, are shuffled. The first `train_per_task` are
   trained on, by every set alike; for the tasks of T100 the next `test_per_task` are held out:
   together they are the intra-task test set, "seen", of the round whatever is trained on.
5. T*100 and T*500 have the tasks of T100 and T500 and the number of examples of T250, drawn with
   replacement from all of a task's instances whose inputs are not held out.
   Validation, where it is asked for, takes what follows in the same order.
6. "unseen" is `Instances[:test_per_task]` of each test task: the official, balanced ones.

All randomness is sha256 of (round, purpose, names): the same on every machine, in every version
of Python, and for a task whatever the other tasks are. The examples of a large checkout are
remembered in its cache, each task's for as long as its file stays the same.
"""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, cached_property
from math import floor

from jax_lora.data.cache import remembered
from jax_lora.data.instructions import Checkout, Example, Instance, Task
from jax_lora.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskSet:
    """A set of tasks and the examples drawn from them.

    Arguments:
        name: its key in `draw`'s answer.
        tasks: the tasks' names.
        draw: returns the examples; called once, when `examples` is first looked at.
    """

    name: str
    tasks: tuple[str, ...]
    draw: Callable[[], tuple[Example, ...]] = field(repr=False, compare=False)

    @cached_property
    def examples(self) -> tuple[Example, ...]:
        """The examples, task after task; they are read when this is first looked at."""
        return self.draw()


def set_names(sizes: Sequence[int]) -> tuple[str, ...]:
    """The sets of `draw` that can be trained on, of its three sizes."""
    nested = (f"T{size}" for size in sizes)
    return (*nested, "Tall", f"T*{sizes[0]}", f"T*{sizes[2]}")


def draw(
    checkout: Checkout,
    round: int,
    *,
    sizes: tuple[int, int, int] = (100, 250, 500),
    train_per_task: int = 100,
    test_per_task: int = 100,
) -> dict[str, TaskSet]:
    """Draws the sets of one round.

    Arguments:
        checkout: the train and test tasks.
        round: the round's number, its only seed; the paper has three.
        sizes: tasks in the three nested sets, rising; one above the number of train tasks is cut
            to it, the set's name stays.
        train_per_task: examples of a task in the nested sets (fewer where it has fewer).
        test_per_task: examples of a task in the two test sets.
    Returns:
        The sets by name: "T100", "T250", "T500" (named after the sizes), "Tall", "T*100",
        "T*500" (first and last size), "seen" and "unseen".
    Raises:
        ConfigError: sizes that do not rise, a count below one.
        DataError: no train tasks.
    """
    _check_counts(checkout, sizes, train_per_task, test_per_task)
    small, middle, large, tall, *controls = set_names(sizes)
    chosen = _draw_tasks(checkout.train, round, sizes, train_per_task + test_per_task)
    held_out = {name: test_per_task for name in chosen[0]}

    @cache  # a task is read and split once, whatever the number of sets that hold it
    def parts(name: str) -> tuple[list[Instance], list[Instance]]:
        return _split(checkout.task(name), round, train_per_task, held_out.get(name, 0))

    def taskset(
        key: str, names: tuple[str, ...], count: int, pick: Callable[[str], Sequence[Instance]]
    ) -> TaskSet:
        def examples() -> tuple[Example, ...]:
            decides = {n: f"{train_per_task} {held_out.get(n, 0)} {count}" for n in names}
            return _examples(checkout, f"{key}-round{round}", decides, pick)

        return TaskSet(key, names, examples)

    def control(key: str, names: tuple[str, ...]) -> TaskSet:
        # As many examples as the middle set: 250 of each task of T100, 50 of each of T500.
        share = Fraction(train_per_task * len(chosen[1]), len(names))
        count = max(1, floor(share + Fraction(1, 2)))

        def pick(name: str) -> list[Instance]:
            tested = parts(name)[1] if name in held_out else ()
            return _resample(checkout.task(name), tested, count, round, key)

        return taskset(key, names, count, pick)

    sets = [
        taskset(name, names, train_per_task, lambda name: parts(name)[0])
        for name, names in zip((small, middle, large, tall), chosen, strict=True)
    ]
    sets += [
        control(controls[0], chosen[0]),
        control(controls[1], chosen[2]),
        taskset("seen", chosen[0], test_per_task, lambda name: parts(name)[1]),
        taskset(
            "unseen",
            tuple(task.name for task in checkout.test),
            test_per_task,
            lambda name: checkout.task(name).instances()[:test_per_task],
        ),
    ]
    return {one.name: one for one in sets}


def _check_counts(
    checkout: Checkout, sizes: tuple[int, int, int], train_per_task: int, test_per_task: int
) -> None:
    if not 0 < sizes[0] < sizes[1] < sizes[2]:
        raise ConfigError(f"sizes are {sizes}, expected three rising counts of tasks")
    if train_per_task < 1 or test_per_task < 1:
        raise ConfigError(
            f"train_per_task is {train_per_task} and test_per_task {test_per_task}, "
            "expected at least 1 of each"
        )
    if not checkout.train:
        raise DataError("the checkout has no train tasks, expected at least one")


def validation_set(
    checkout: Checkout, round: int, trained: TaskSet, tested: TaskSet, per_task: int
) -> TaskSet:
    """Examples of the tasks of a training set whose inputs neither train nor test.

    They are what follows the examples of `draw` in a task's order, for the control sets without
    the inputs that those drew. A task that has no input left has no examples.

    Arguments:
        checkout: as for `draw`.
        round: as for `draw`.
        trained: the set that is trained on.
        tested: "seen" of the same round.
        per_task: examples of a task (fewer where it has fewer).
    Returns:
        The set "validation".
    """

    def examples() -> tuple[Example, ...]:
        used: defaultdict[str, set[str]] = defaultdict(set)
        for example in (*trained.examples, *tested.examples):
            used[example.task].add(example.input.strip())

        def pick(name: str) -> list[Instance]:
            shuffled = _shuffled(checkout.task(name), round)
            return [one for one in shuffled if one.key not in used[name]][:per_task]

        decides = {n: f"{per_task} {_hash(*sorted(used[n])):x}" for n in trained.tasks}
        return _examples(checkout, f"validation-{trained.name}-round{round}", decides, pick)

    return TaskSet("validation", trained.tasks, examples)


def _examples(
    checkout: Checkout,
    name: str,
    decides: Mapping[str, str],
    pick: Callable[[str], Sequence[Instance]],
) -> tuple[Example, ...]:
    """The instances that `pick` gives for each task, remembered in the checkout's cache.

    Arguments:
        checkout: of the tasks.
        name: of the file in the cache.
        decides: task -> all that decides what `pick` gives besides the name and the task's content.
        pick: task -> its instances.
    """
    tasks = [checkout.task(task) for task in decides]
    guards = {task.name: f"{task.content} {decides[task.name]}" for task in tasks}
    file = f"{name.replace('*', 'x')}.json"
    rows = remembered(checkout.cache and checkout.cache / file, guards, pick)
    return tuple(
        task.example(Instance(id, text, tuple(outputs)))
        for task in tasks
        for id, text, outputs in rows[task.name]
    )


# ---------------------------------------------------------------- which tasks (steps 1 to 3)


def _draw_tasks(
    train: Iterable[Task], round: int, sizes: tuple[int, int, int], needed: int
) -> list[tuple[str, ...]]:
    """The task names of the three nested sets and of Tall, each category after category."""
    members: defaultdict[str, list[Task]] = defaultdict(list)
    for task in sorted(train, key=lambda task: task.name):
        members[task.category].append(task)
    categories = sorted(members, key=lambda category: _hash(round, "category", category))
    for category in categories:
        members[category].sort(
            key=lambda task: (task.distinct < needed, _hash(round, "task", task.name))
        )
    everything = {category: len(members[category]) for category in categories}
    total = sum(everything.values())
    if sizes[-1] > total:
        logger.warning("sizes %s are cut to the %d train tasks of the checkout", sizes, total)
    clipped = [min(size, total) for size in sizes]

    quotas = [everything]
    for size in reversed(clipped):
        u = Fraction(_hash(round, "quota", size), 2**256)
        quotas.insert(0, _systematic(size, quotas[0], u))
    eligible = {
        category: sum(task.distinct >= needed for task in members[category])
        for category in categories
    }
    fair = {category: Fraction(clipped[0] * n, total) for category, n in everything.items()}
    quotas[0] = _only_eligible(quotas[0], quotas[1], eligible, fair)
    return [
        tuple(task.name for category in categories for task in members[category][: quota[category]])
        for quota in quotas
    ]


def _systematic(size: int, weights: Mapping[str, int], u: Fraction) -> dict[str, int]:
    """Shares `size` places among categories in proportion to their weights.

    A category's quota is the step of floor(cumulative share + u), u uniform in [0, 1): within one
    of its exact share, equal to it on average, and `size` in total. With `size` at most the sum
    of the weights no quota exceeds its weight.
    """
    total, so_far, taken = sum(weights.values()), 0, 0
    quotas = {}
    for category, weight in weights.items():
        so_far += weight
        upto = floor(Fraction(size * so_far, total) + u)
        quotas[category], taken = upto - taken, upto
    return quotas


def _only_eligible(
    quotas: Mapping[str, int],
    limits: Mapping[str, int],
    eligible: Mapping[str, int],
    fair: Mapping[str, Fraction],
) -> dict[str, int]:
    """Moves places for which a category has no eligible task to where there is one.

    Arguments:
        quotas: places by category, as systematic sampling gave them.
        limits: the next larger set's quotas, which nesting forbids to exceed.
        eligible: eligible tasks by category.
        fair: exact proportional shares; the category farthest below its own is served first,
            the earlier one in the shuffled order among equals.
    """
    room = {category: min(limits[category], eligible[category]) for category in quotas}
    result = {category: min(quota, room[category]) for category, quota in quotas.items()}
    left = sum(quotas.values()) - sum(result.values())
    shorter = max(0, left - sum(room.values()) + sum(result.values()))
    if shorter:
        logger.warning(
            "only %d tasks have enough distinct inputs for the smallest set of %d: "
            "%d shorter task(s) enter it with fewer examples",
            sum(room.values()),
            sum(quotas.values()),
            shorter,
        )
    for number in range(left):
        open_to = room if number < left - shorter else limits
        lagging = [category for category in result if result[category] < open_to[category]]
        result[max(lagging, key=lambda category: fair[category] - result[category])] += 1
    return result


# ---------------------------------------------------------------- which examples (steps 4 and 5)


def _split(
    task: Task, round: int, train_count: int, test_count: int
) -> tuple[list[Instance], list[Instance]]:
    """Train and test instances of a task, no input in both nor twice in either.

    A task that is to be tested but is too short for both counts trains on half of its inputs.
    """
    shuffled = _shuffled(task, round)
    if test_count and len(shuffled) < train_count + test_count:
        train_count = min(train_count, max(1, len(shuffled) // 2))
    return shuffled[:train_count], shuffled[train_count : train_count + test_count]


def _shuffled(task: Task, round: int) -> list[Instance]:
    """The first instance of every distinct input, in the order of a round."""
    first: dict[str, Instance] = {}
    for instance in task.instances():
        first.setdefault(instance.key, instance)
    keys = sorted(first, key=lambda key: _hash(round, "instance", task.name, key))
    return [first[key] for key in keys]


def _resample(
    task: Task, tested: Iterable[Instance], count: int, round: int, key: str
) -> list[Instance]:
    """`count` instances with replacement from those whose inputs are not tested."""
    forbidden = {instance.key for instance in tested}
    pool = [instance for instance in task.instances() if instance.key not in forbidden]
    return [pool[_hash(round, key, task.name, number) % len(pool)] for number in range(count)]


def _hash(*parts: object) -> int:
    """A uniform integer below 2**256, a function of the parts' text alone."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest())
