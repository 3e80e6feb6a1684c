"""What must not depend on how work is cut: answers on their batch, updates on their micro-batches.

`eval.py --check` prints it for a real run. Peers differ by whole points between batch sizes
(open-instruct#75, lm-evaluation-harness#1090) and lose loss between micro-batches
(torchtune#1875).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jax_lora import sharding
from jax_lora.data.batches import Batches
from jax_lora.data.prompts import Row
from jax_lora.model.transformer import Llama
from jax_lora.training import masks
from jax_lora.training.step import Micro, State, make_step, zeros

Generate = Callable[..., Iterable[Sequence[tuple[int, np.ndarray]]]]


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
      tasks: the task of each; prompts of a task share what they begin with.
      buckets: prompt lengths that the cache is made for.
      many: the same on all devices, where there are several.

    Yields:
      An arrangement and the number of rows whose ids differ from those of 8 rows at a time, the
      first one of the list included: it is made twice.
    """
    in_order = np.arange(len(rows))
    shuffled = np.random.default_rng(0).permutation(len(rows))
    arrangements: dict[str, tuple[np.ndarray, Sequence[str] | range, dict[str, Any]]] = {
        "the same again": (in_order, tasks, {}),
        "one at a time": (in_order, tasks, {"max_batch": 1}),
        # As far as `generate`'s own limit of tokens lets so many into a batch.
        "up to 64 at a time": (in_order, tasks, {"max_batch": 64}),
        "shuffled": (shuffled, tasks, {}),
        "cache of the longest bucket": (in_order, tasks, {"buckets": (max(buckets),)}),
        "every prompt read whole": (in_order, range(len(rows)), {}),
    }

    def answer(way: Generate, order: np.ndarray, labels: Any, changed: dict[str, Any]) -> dict:
        options = {"buckets": tuple(buckets), "max_batch": 8, **changed}
        prompts, groups = [rows[i].ids for i in order], [labels[i] for i in order]
        ended = itertools.chain.from_iterable(way(prompts, groups, **options))
        return {order[i]: ids.tolist() for i, ids in ended}

    expected = answer(generate, *arrangements["the same again"])
    ways = [(name, generate, arrangement) for name, arrangement in arrangements.items()]
    if many:
        ways.append((f"on {jax.device_count()} devices", many, arrangements["the same again"]))
    for name, way, arrangement in ways:
        found = answer(way, *arrangement)
        yield name, sum(found[i] != expected[i] for i in expected)


def updates(
    model: Llama,
    variables: Any,
    trains: Any,
    rows: Sequence[Row],
    *,
    dropout_rate: float,
    mesh: Mesh | None = None,
) -> Iterator[tuple[str, float, float]]:
    """How far a step's loss and gradient move when its batch is cut, padded or packed otherwise.

    Args:
      model: in float32, what rounds is then the order of additions alone.
      variables: {"params": …, "lora": …}.
      trains: the mask's boolean tree.
      rows: training rows of one global batch.
      dropout_rate: on the input of A; its masks must not change either.
      mesh: of several devices, to cut the batch by too.

    Yields:
      A way to cut, the relative difference of the loss, and the largest relative norm of a
      leaf's gradient difference, from the batch taken whole.
    """
    longest = max(len(row.ids) for row in rows)
    width = -(-longest // 128) * 128

    def run(
        micro_rows: int, width: int, packed: bool, mesh: Mesh | None = None
    ) -> tuple[float, Any]:
        step, placed = sharding.place((jnp.zeros((), jnp.int32), variables), mesh)
        trainable, frozen = masks.partition(placed, trains)
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
            row_parts=sharding.row_parts(mesh),
        ).at(0)
        options: Any = dict(seed=0, dropout_rate=dropout_rate, packed=packed, mesh=mesh)
        functions = make_step(model, optax.sgd(0.0), **options)
        diff_params = functions.prepare(state, frozen)
        gradients, loss = zeros(diff_params)
        count = np.float32(sum(int(micro.loss_mask[:, 1:].sum()) for micro in batch))
        for micro in batch:
            moved = sharding.place_rows(Micro(**vars(micro)), mesh)
            gradients, loss = functions.accumulate(
                gradients, loss, diff_params, state.step, frozen, moved, count
            )
        return float(loss), sharding.whole(gradients)

    whole, expected = run(len(rows), width, False)
    n = len(rows)
    arrangements: dict[str, Any] = {
        f"{n // 4} × {min(4, n)}": (4, width, False),
        f"{n} × 1": (1, width, False),
        "padded to twice the length": (4, 2 * width, False),
        "packed": (2, 2 * width, True),
    }
    if mesh is not None:
        arrangements[f"on {mesh.size} devices"] = (1, width, False, mesh)
    for name, arrangement in arrangements.items():
        loss, gradients = run(*arrangement)
        apart = jax.tree.map(
            lambda x, y: float(np.linalg.norm(x - y) / (np.linalg.norm(y) + 1e-30)),
            gradients,
            expected,
        )
        yield name, abs(loss - whole) / abs(whole), max(jax.tree.leaves(apart))
