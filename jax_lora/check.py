"""What must not depend on how work is cut: answers on their batch, updates on their micro-batches.

`eval.py --check` prints it for a real run. Peers differ by whole points between batch sizes
(open-instruct#75, lm-evaluation-harness#1090) and lose loss between micro-batches
(torchtune#1875).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jax_lora import sharding
from jax_lora.data.batches import Batches, bucket_for
from jax_lora.data.prompts import Row
from jax_lora.model.llama import Llama
from jax_lora.training import masks
from jax_lora.training.step import Micro, State, make_step, zeros

Generate = Callable[[np.ndarray, np.ndarray], tuple[Any, Any]]


def answers(
    rows: Sequence[Row], buckets: Sequence[int], generate: Generate, many: Generate | None = None
) -> Iterator[tuple[str, int]]:
    """How many answers change with their arrangement.

    Args:
      rows: prompts.
      buckets: prompt lengths that are padded to.
      generate: (tokens (B, P), lengths (B,)) → (new tokens (B, N), their number (B,)).
      many: the same on all devices, where there are several.

    Yields:
      An arrangement and the number of rows whose ids differ from those of batches of 8 in order
      of length, the first one of the list included: it is made twice.
    """
    by_length = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
    longest, widest = by_length[0], (max(buckets),)
    shuffled = np.random.default_rng(0).permutation(len(rows)).tolist()
    beside = [[longest, *by_length[i : i + 7]] for i in range(0, len(rows), 7)]
    arrangements: dict[str, tuple[list[list[int]], int, Sequence[int]]] = {
        "the same again": (_cut(by_length, 8), 8, buckets),
        "one at a time": (_cut(by_length, 1), 1, widest),
        "batches of 64": (_cut(by_length, 64), 64, widest),
        "shuffled": (_cut(shuffled, 8), 8, widest),
        "beside the longest prompt": (beside, 8, widest),
    }
    ways = [(name, generate, arrangement) for name, arrangement in arrangements.items()]
    if many:
        ways.append((f"on {jax.device_count()} devices", many, arrangements["batches of 64"]))
    expected = _answer(generate, rows, *arrangements["the same again"])
    for name, way, arrangement in ways:
        found = _answer(way, rows, *arrangement)
        yield name, sum(found[i] != expected[i] for i in expected)


def _cut(order: Sequence[int], size: int) -> list[list[int]]:
    return [list(order[i : i + size]) for i in range(0, len(order), size)]


def _answer(
    generate: Generate,
    rows: Sequence[Row],
    batches: Sequence[Sequence[int]],
    size: int,
    buckets: Sequence[int],
) -> dict[int, tuple[int, ...]]:
    out: dict[int, tuple[int, ...]] = {}
    for batch in batches:
        width = bucket_for(max(len(rows[i].ids) for i in batch), buckets)
        tokens, lengths = np.zeros((size, width), np.int32), np.zeros(size, np.int32)
        for r, i in enumerate(batch):
            tokens[r, : len(rows[i].ids)], lengths[r] = rows[i].ids, len(rows[i].ids)
        new, counts = map(np.asarray, generate(tokens, lengths))
        out |= {i: tuple(new[r, : counts[r]].tolist()) for r, i in enumerate(batch)}
    return out


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
        working = functions.begin(state, frozen)
        gradients, loss = zeros(working)
        count = np.float32(sum(int(micro.loss_mask[:, 1:].sum()) for micro in batch))
        for micro in batch:
            moved = sharding.place_rows(Micro(**vars(micro)), mesh)
            gradients, loss = functions.accumulate(
                gradients, loss, working, state.step, frozen, moved, count
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
