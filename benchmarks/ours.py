"""Our side of the benchmarks: training as train.py drives it, and greedy decoding."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.work import LEARNING_RATE, Case
from jax_lora.model import lora
from jax_lora.model.transformer import Llama
from jax_lora.model.xla_cpu import bitcast_bf16, einsum
from jax_lora.training import loop, trainable_mask
from jax_lora.training.step import State
from jax_lora.training.unstacked import unstack


def variables(case: Case) -> dict[str, Any]:
    """Random weights and new adapters, a function of the case alone, made on the device."""
    shapes = jax.eval_shape(
        Llama(case.shape).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
    )["params"]
    dtype = jnp.dtype("float32" if case.rank is None else case.config.dtype)
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    base = tree.unflatten(
        [
            # Those of a norm have ones.
            jnp.ones(x.shape, dtype)
            if x.ndim == 1 or x.shape[-2] == case.shape.num_hidden_layers
            else _drawn(key, x.shape, dtype)
            for x, key in zip(leaves, keys, strict=True)
        ]
    )
    if case.rank is None:
        return {"params": base}
    settings = case.config.lora
    adapters = lora.init(
        jax.random.key(1), case.shape, case.rank, alpha=settings.alpha, targets=settings.targets
    )
    return {"params": base, "lora": adapters}


@partial(jax.jit, static_argnums=(1, 2))
def _drawn(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return 0.02 * jax.random.normal(key, shape, dtype)


class Trainer:
    """Training in progress. It donates the buffers of the adapters that it is given."""

    def __init__(self, case: Case, weights: Any, packed: bool = False):
        case = replace(case, config=case.config.replace(**{"data.packed": packed}))
        resolved = case.planned(jax.default_backend()).resolved
        config = resolved.config
        trains = trainable_mask.mask(weights, config.trainable, config.frozen)
        trainable, frozen = trainable_mask.partition(weights, trains)
        frozen = bitcast_bf16(frozen, jax.default_backend())
        self.frozen = unstack(frozen) if resolved.unstacks else frozen
        optimizer = resolved.optimizer(optax.constant_schedule(LEARNING_RATE))
        self.functions = resolved.step(optimizer, mesh=None)
        self.state = State(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))

    def steps(self, batches: Any) -> Iterator[float]:
        """Take a step for every global batch; yields its loss once the step has finished."""
        for state, report in loop.train(self.state, self.frozen, batches, self.functions):
            self.state = jax.block_until_ready(state)
            yield float(report.loss)

    def step(self, micro: Any) -> float:
        """One step on one micro-batch: its loss."""
        (loss,) = self.steps([[micro]])
        return loss


def generator(case: Case, weights: Any) -> Callable[[np.ndarray, int], np.ndarray]:
    """(prompts (B, P), new tokens N) → greedy continuations (B, N) that never end early."""
    from jax_lora.generation import greedy, scheduler

    module = case.planned(jax.default_backend()).resolved.model()
    weights = greedy.unstack_layers(weights)

    def generate(prompts: np.ndarray, new: int) -> np.ndarray:
        rows, length = prompts.shape
        one = partial(
            scheduler.answers,
            module,
            weights,
            max_new_tokens=new,
            end_ids=(case.shape.vocab_size,),
            buckets=(length,),
            batch_tokens=rows * length,
            max_batch=rows,
        )
        ended = scheduler.round_robin(scheduler.batches(one))(prompts, range(rows))
        ids = dict(itertools.chain.from_iterable(ended))
        return np.stack([ids[i] for i in range(rows)])

    return generate


def product(dtype: str, side: int) -> Callable[[], Any]:
    """A function that multiplies two (side, side) matrices as the model does and waits."""
    a, b = jax.random.normal(jax.random.key(0), (2, 1, side, side), jnp.dtype(dtype))
    platform = jax.default_backend()
    multiply = jax.jit(lambda x, w: einsum("btd,df->btf", x.dtype, x, w[0], platform))
    return lambda: multiply(a, b).block_until_ready()


def kernels(call: Callable[[], Any]) -> list[tuple[str, float, int]]:
    """What the device does in a call: names of its kernels, their seconds in all and how often
    they run, the dearest first."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        for file in Path(folder).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
                for line in plane.lines if plane.name.startswith("/device:") else ():
                    for event in line.events:
                        found.setdefault(event.name, []).append(event.duration_ns / 1e9)
    return sorted(((k, sum(v), len(v)) for k, v in found.items()), key=lambda one: -one[1])


def peak_bytes() -> int | None:
    """Most device memory held so far; None on a CPU, whose process tells."""
    found = jax.devices()[0].memory_stats()
    return None if found is None else int(found["peak_bytes_in_use"])
