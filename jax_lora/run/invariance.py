"""What must not depend on batching: answers on their batch, updates on their micro-batches.

`eval.py --check` prints it for a real run. Peers differ by whole points between batch sizes
(open-instruct#75, lm-evaluation-harness#1090) and lose loss between micro-batches
(torchtune#1875).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from jax_lora import sharding
from jax_lora.data.loader import Batches
from jax_lora.data.prompts import Row
from jax_lora.model.transformer import Llama
from jax_lora.training import loop, trainable_mask
from jax_lora.training.step import State, make_step, zeros

Generate = Callable[..., Iterable[Sequence[tuple[int, np.ndarray]]]]
Labels = Sequence[str] | range  # of prompts: equal ones may share a prefix


def answers(
    generate: Generate,
    rows: Sequence[Row],
    tasks: Sequence[str],
    buckets: Sequence[int],
    many: Generate | None = None,
) -> Iterator[tuple[str, int]]:
    """How many answers change with their arrangement.

    Args:
      generate: `generation.scheduler.answers`, bound but for the prompts, their groups and what is
        arranged here.
      rows: prompts.
      tasks: the task of each; prompts of a task share a prefix.
      buckets: prompt lengths that the cache is made for.
      many: the same on all devices, or in several batches on one, where there are several.

    Yields:
      An arrangement and the number of rows whose ids differ from those of 8 rows at a time, which
      are the first arrangement: they are generated twice.
    """
    in_order = np.arange(len(rows))
    shuffled = np.random.default_rng(0).permutation(len(rows))
    arrangements: dict[str, tuple[np.ndarray, Labels, dict[str, object]]] = {
        "the same again": (in_order, tasks, {}),
        "one at a time": (in_order, tasks, {"max_batch": 1}),
        # As far as `generate`'s limit of tokens allows.
        "up to 64 at a time": (in_order, tasks, {"max_batch": 64}),
        "shuffled": (shuffled, tasks, {}),
        "cache of the longest bucket": (in_order, tasks, {"buckets": (max(buckets),)}),
        "no shared prefix": (in_order, range(len(rows)), {}),
    }

    def answer(
        way: Generate, order: np.ndarray, labels: Labels, changed: Mapping[str, object]
    ) -> dict[int, list[int]]:
        options: dict[str, object] = {"buckets": tuple(buckets), "max_batch": 8, **changed}
        prompts, groups = [rows[i].ids for i in order], [labels[i] for i in order]
        ended = itertools.chain.from_iterable(way(prompts, groups, **options))
        return {int(order[i]): ids.tolist() for i, ids in ended}

    expected = answer(generate, *arrangements["the same again"])
    ways = [(name, generate, arrangement) for name, arrangement in arrangements.items()]
    if many:
        several = f"on {n} devices" if (n := jax.device_count()) > 1 else "batches side by side"
        ways.append((several, many, arrangements["the same again"]))
    for name, way, arrangement in ways:
        found = answer(way, *arrangement)
        yield name, sum(found[i] != expected[i] for i in expected)


def last_logits(model: Llama, variables: PyTree, rows: Sequence[Row]) -> np.ndarray:
    """The logits behind some prompts.

    Args:
      model: the module.
      variables: {"params": …, "lora": …}.
      rows: prompts.

    Returns:
      (prompts, 1, V), float32.
    """
    width = -(-max(len(row.ids) for row in rows) // 128) * 128
    tokens = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row.ids)] = row.ids
    last = jnp.array([len(row.ids) - 1 for row in rows])

    @jax.jit
    def logits(variables: PyTree) -> jax.Array:
        hidden = model.apply(variables, jnp.asarray(tokens), method="hidden")
        return model.apply(variables, hidden[jnp.arange(len(rows)), last][:, None], method="head")

    return np.asarray(logits(variables))


def updates(
    model: Llama,
    variables: PyTree,
    trains: PyTree,
    rows: Sequence[Row],
    *,
    dropout_rate: float,
    materialized: Sequence[str] = (),
    mesh: Mesh | None = None,
) -> Iterator[tuple[str, float, float]]:
    """How far a step's loss and gradient move when its batch is divided or packed otherwise.

    Args:
      model: in float32, so that only the order of additions rounds otherwise.
      variables: {"params": …, "lora": …}.
      trains: the mask's boolean tree.
      rows: training rows of one global batch.
      dropout_rate: on the input of A; its masks must not change either.
      materialized: targets whose delta is formed once per step, as the run's training does.
      mesh: of several devices, to divide the batch among too.

    Yields:
      An arrangement, the relative difference of the loss, and the largest relative norm of a
      leaf's gradient difference, from the batch in a single micro-batch.
    """
    n, longest = len(rows), max(len(row.ids) for row in rows)
    width = -(-longest // 128) * 128
    gradient = functools.partial(
        _gradient, model, variables, trains, rows, dropout_rate, materialized
    )
    expected_loss, expected = gradient(n, width)
    arrangements = {
        f"{-(-n // 4)} × {min(4, n)}": lambda: gradient(4, width),
        f"{n} × 1": lambda: gradient(1, width),
        "padded to twice the length": lambda: gradient(4, 2 * width),
        "packed": lambda: gradient(2, 2 * width, packed=True),
    }
    if mesh is not None:
        arrangements[f"on {mesh.size} devices"] = lambda: gradient(1, width, mesh=mesh)
    for name, arrangement in arrangements.items():
        loss, gradients = arrangement()
        differences = jax.tree.map(
            lambda x, y: float(np.linalg.norm(x - y) / (np.linalg.norm(y) + 1e-30)),
            gradients,
            expected,
        )
        relative = abs(loss - expected_loss) / abs(expected_loss)
        yield name, relative, max(jax.tree.leaves(differences))


def _gradient(
    model: Llama,
    variables: PyTree,
    trains: PyTree,
    rows: Sequence[Row],
    dropout_rate: float,
    materialized: Sequence[str],
    micro_rows: int,
    width: int,
    packed: bool = False,
    mesh: Mesh | None = None,
) -> tuple[float, PyTree]:
    """Loss and gradient of all rows, in micro-batches of so many rows of so many tokens."""
    step, variables = sharding.shard((jnp.zeros((), jnp.int32), variables), mesh)
    trainable, frozen = trainable_mask.partition(variables, trains)
    state = State(step, trainable, None)
    batch = Batches(
        rows,
        batch_size=len(rows),
        seed=0,
        buckets=(width,),
        micro_tokens=micro_rows * width,
        answer_only=True,
        pad_id=0,
        packed=packed,
        row_groups=sharding.row_groups(mesh),
    ).at(0)
    functions = make_step(
        model,
        optax.sgd(0.0),
        seed=0,
        dropout_rate=dropout_rate,
        packed=packed,
        materialized=materialized,
        mesh=mesh,
    )
    diff_params = functions.prepare(state, frozen)
    gradients, loss = zeros(diff_params)
    for micro in batch:
        gradients, loss = functions.accumulate(
            gradients,
            loss,
            diff_params,
            state.step,
            frozen,
            sharding.shard_batch(micro, mesh),
            loop.total_loss_weight(batch),
        )
    return float(loss), sharding.gather(gradients)
