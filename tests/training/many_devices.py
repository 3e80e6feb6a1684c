"""What test_many_devices.py runs in processes of its own: a step on many devices and on one.

    python -m tests.training.many_devices FOLDER MESH … [--more] [--optimizers] [--families]
        [--coordinator HOST:PORT --processes N --process I]

A MESH is such as 2,2,2. FOLDER/I.json gets, for each, how far loss and gradients are from those of
one device; with --more, what else is asked of 8 devices; with --optimizers, how far updates are on
2,2,2; with --families, each mesh for the small model of every family. With --more or in many
processes, FOLDER/checkpoints and state.npz get the state after the last one's step.
"""

import argparse
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_lora import distributed, sharding
from jax_lora.config import MeshSizes, OptimConfig
from jax_lora.data.loader import MicroBatch
from jax_lora.model import lora
from jax_lora.model.arch import ATTENTION
from jax_lora.model.config import LlamaConfig
from jax_lora.model.transformer import Llama
from jax_lora.training import loop, trainable_mask
from jax_lora.training.checkpoints import Checkpoints
from jax_lora.training.optimizers import OPTIMIZERS, make_optimizer
from jax_lora.training.step import State, make_step
from jax_lora.weights.hf_config import parse_config
from jax_lora.weights.tree import leaves
from tests import reference

CONFIG = LlamaConfig(62, 32, 80, 3, 4, 2, 12, biases=ATTENTION)  # a vocabulary that 4 does not cut
RANKS = dict(
    q_proj=40, k_proj=8, v_proj=3, down_proj=1, lm_head=3
)  # 40 is above D, v_proj's a DoRA
CONTRACTED = ("q_proj",)
# Everything trains at once: one compilation shows the gradient of every kind of leaf.
EVERYTHING = ((r"params/.*", r"lora/.*/[abm]"), (r"lora/.*/scale",))
GRADIENT = optax.chain(optax.trace(0.0), optax.scale(-1e-3))  # its state is the last gradient
ROWS, TOKENS = 8, 20


@functools.cache
def variables(config=CONFIG):
    """Base and adapters, numpy, no leaf zero."""
    rng = np.random.default_rng(0)

    def drawn(*shape):
        return rng.normal(0, 0.2, shape).astype(np.float32)

    params, adapters = {}, {}
    for leaf in leaves(config):
        node = params
        for key in leaf.path[:-1]:
            node = node.setdefault(key, {})
        node[leaf.path[-1]] = drawn(*leaf.leaf_shape)
    for name, rank in RANKS.items():
        copies, size_in, size_out = config.stack_shapes()[name]
        adapters[name] = {"a": drawn(copies, size_in, rank), "b": drawn(copies, rank, size_out)}
        adapters[name]["scale"] = np.full(copies, 1.5, np.float32)
    copies, _, size_out = config.stack_shapes()["v_proj"]
    adapters["v_proj"]["m"] = 1 + drawn(copies, size_out)
    return {"params": params, "lora": lora.tree(adapters)}


def packed_batch(seed, rows=ROWS):
    """Rows of two examples and some padding."""
    rng = np.random.default_rng(seed)
    ends = rng.integers(5, 9, (rows, 2)).cumsum(axis=1)
    column = np.arange(TOKENS)
    second = column >= ends[:, :1]
    segment_ids = np.where(column < ends[:, 1:], second + 2 * np.arange(rows)[:, None], -1)
    in_example = column - np.where(second, ends[:, :1], 0)
    tokens = np.where(segment_ids >= 0, rng.integers(1, 61, (rows, TOKENS)), 0)
    weights = (segment_ids >= 0) & (in_example >= 2)
    return MicroBatch(
        tokens.astype(np.int32), weights.astype(np.float32), segment_ids.astype(np.int32)
    )


def cut(batch, rows, parts):
    """Micro-batches of so many rows, each filled with empty ones up to a multiple of `parts`."""
    empty = MicroBatch(batch.tokens * 0, batch.loss_weights * 0, batch.segment_ids * 0 - 1)
    for start in range(0, len(batch.tokens), rows):
        yield jax.tree.map(
            lambda x, e, start=start: np.concatenate([x[start : start + rows], e[: -rows % parts]]),
            batch,
            empty,
        )


def functions_on(mesh, remat, config=CONFIG):
    """The functions of a step; dropout is on, rows are packed."""
    return make_step(
        Llama(config, dtype=jnp.float32, remat=remat),
        GRADIENT,
        seed=3,
        dropout_rate=0.2,
        packed=True,
        materialized=CONTRACTED,
        loss_chunk=8,
        mesh=mesh,
    )


def step_on(mesh, batch=None, config=CONFIG):
    """Loss, gradients and state after one step of two micro-batches, or of the given ones."""
    tree = variables(config)
    trainable, frozen = trainable_mask.partition(tree, trainable_mask.mask(tree, *EVERYTHING))

    def begin(trainable):
        return State(jnp.zeros((), jnp.int32), trainable, GRADIENT.init(trainable))

    if mesh is None:
        state, frozen = begin(jax.tree.map(jnp.array, trainable)), jax.tree.map(jnp.array, frozen)
        place = None
    else:
        state = sharding.init_sharded(begin, mesh, sharding.shard(trainable, mesh))
        frozen = sharding.shard(frozen, mesh)
        place = functools.partial(sharding.shard_batch, mesh=mesh)
    functions = functions_on(mesh, "none", config)
    batch = batch or [packed_batch(1), packed_batch(2)]
    ((state, report),) = loop.train(state, frozen, [batch], functions, place)
    assert functions.accumulate._cache_size() == 1, "the second micro-batch was compiled again"
    if mesh is not None:
        places = jax.tree.map(
            lambda x, where: x.sharding.is_equivalent_to(where, x.ndim),
            state,
            sharding.shardings(state, mesh),
        )
        assert all(jax.tree.leaves(places)), "the new state is not where the table has it"
    return float(report.loss), sharding.gather(state.optimizer[0].trace), state


def deviation(found, expected):
    """Of the loss, and of the gradients the worst leaf's relative norm."""
    each = jax.tree.map(
        lambda x, y: float(np.linalg.norm(x - y) / np.linalg.norm(y)), found[1], expected[1]
    )
    return {"loss": abs(found[0] - expected[0]), "gradient": max(jax.tree.leaves(each))}


def optimizers_on(mesh):
    """How far three updates of each optimizer go apart on a mesh and on one device."""
    rng = np.random.default_rng(0)
    shapes = {"a": (2, 160, 130), "b": (2, 130, 160)}  # large enough for adafactor to factor

    def drawn():
        leaf = {k: rng.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}
        return {"lora": {"layers": {"self_attn": {"q_proj": leaf}}}}

    start, taken, found = drawn(), [drawn() for _ in range(3)], {}
    for name in OPTIMIZERS:
        config = OptimConfig(name=name, loraplus_lr_ratio=4.0)
        optimizer = make_optimizer(config, optax.constant_schedule(1e-2))
        ends = []
        for where in (None, mesh):
            trainable = sharding.shard(jax.tree.map(jnp.asarray, start), where)
            state = sharding.init_sharded(optimizer.init, where, trainable)
            for gradients in taken:
                gradients = sharding.shard(gradients, where)
                updates, state = jax.jit(optimizer.update)(gradients, state, trainable)
                trainable = optax.apply_updates(trainable, updates)
                state = state if where is None else sharding.shard(state, where)
            ends.append(sharding.gather(trainable))
        apart = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), *ends)
        found[name] = max(jax.tree.leaves(apart))
    return found


def families(meshes):
    """How far the step of each family's small model on some meshes is from that on one device."""
    found = {}
    for case in reference.FAMILIES:
        config = parse_config(reference.config(case))
        expected = step_on(None, config=config)
        found[case] = {
            name: deviation(step_on(mesh, config=config), expected) for name, mesh in meshes.items()
        }
    return found


def cuts():
    """How far 128 rows on 8 devices as 1 × 128, 4 × 32 and 128 × 1 are from 1 × 128 on one."""
    batch, found = packed_batch(4, 128), {}
    expected, mesh = step_on(None, [batch]), sharding.make_mesh(MeshSizes(fsdp=8))
    for rows in (128, 32, 1):
        micros = list(cut(batch, rows, sharding.row_groups(mesh)))
        found[f"{128 // rows} × {rows}"] = deviation(step_on(mesh, micros), expected)
    return found


def compiled(mesh):
    """`accumulate`, and the bytes that its arguments should take on a device."""
    tree = variables()
    trainable, frozen = trainable_mask.partition(tree, trainable_mask.mask(tree, *EVERYTHING))
    functions = functions_on(mesh, "full")
    state = State(np.zeros((), np.int32), trainable, None)
    diff_params = sharding.abstract(jax.eval_shape(functions.prepare, state, frozen), mesh)
    micro = sharding.shard_batch(packed_batch(1), mesh)
    number = np.zeros((), np.float32)
    program = functions.accumulate.lower(
        diff_params, number, diff_params, state.step, sharding.abstract(frozen, mesh), micro, number
    ).compile()
    held = 2 * sharding.local_bytes(diff_params, mesh) + sharding.local_bytes(frozen, mesh)
    unused = sum(3 * 4 for _ in CONTRACTED)  # their scales
    rows = ROWS // sharding.row_groups(mesh) * TOKENS * (4 + 4 + 4)
    return program, held - unused + rows + 3 * 4


def communication(program):
    """(operation, where it comes from, the shapes that it returns) of every collective."""
    found = []
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    for line in program.as_text().splitlines():
        if match := re.match(rf"\s*(?:ROOT )?\S+ = (.*?) ({kinds})(?:-start)?\(", line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            (origin,) = re.findall(r'op_name="([^"]*)"', line) or [""]
            sizes = [[int(n) for n in shape.split(",") if n] for shape in shapes]
            found.append((match[2], origin, sizes))
    return found


def saved_and_restored(state, folder):
    """Whether the state of one mesh comes back on another, bit for bit."""
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(state)
    checkpoints.close()
    values = sharding.gather(state)
    if jax.process_index() == 0:
        np.savez(folder / "state.npz", *jax.tree.leaves(values))
    checkpoints = Checkpoints(folder / "checkpoints")
    like = sharding.abstract(state, sharding.make_mesh(MeshSizes(fsdp=8)))
    restored = checkpoints.restore(like)
    checkpoints.close()
    placed = jax.tree.map(lambda x, y: x.sharding == y.sharding, restored, like)
    equal = jax.tree.map(np.array_equal, sharding.gather(restored), values)
    return all(jax.tree.leaves((placed, equal)))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("mesh", nargs="+")
    parser.add_argument("--more", action="store_true")
    parser.add_argument("--optimizers", action="store_true")
    parser.add_argument("--families", action="store_true")
    parser.add_argument("--coordinator", default="")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0)
    given = parser.parse_args()
    distributed.initialize(given.coordinator, given.processes, given.process)

    meshes = {
        name: sharding.make_mesh(MeshSizes(*map(int, name.split(",")))) for name in given.mesh
    }
    if given.families:
        (given.folder / "0.json").write_text(json.dumps(families(meshes)))
        return
    expected = step_on(None)
    results, state = {}, None
    for name, mesh in meshes.items():
        *found, state = step_on(mesh)
        results[name] = deviation(found, expected)
    if given.more or given.processes > 1:
        results["restored"] = saved_and_restored(state, given.folder)
        flags = (jax.process_index() == i for i in range(3))
        results["flags"] = [distributed.any_process(flag, state) for flag in flags]
    if given.optimizers:
        results["optimizers"] = optimizers_on(sharding.make_mesh(MeshSizes(2, 2, 2)))
    if given.more:
        program, planned = compiled(sharding.make_mesh(MeshSizes(2, 2, 2)))
        results["bytes"] = [program.memory_analysis().argument_size_in_bytes, planned]
        results["communication"] = communication(program)
        results["cuts"] = cuts()
    (given.folder / f"{given.process}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
