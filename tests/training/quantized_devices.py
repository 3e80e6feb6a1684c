"""What test_quantized_devices.py runs in a process with 8 devices: a step on a quantized base.

    python -m tests.training.quantized_devices FORM MESH …

A MESH is such as 2,2,2. Prints JSON: for each, how far loss and gradients are from those of one
device, the bytes of the linear layers on a device, and the same by the table.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora import sharding
from jax_lora.config import MeshSizes
from jax_lora.model import lora
from jax_lora.model.arch import LINEAR_NAMES, LINEARS
from jax_lora.model.quantization import product, with_int8_products
from jax_lora.model.transformer import Llama
from jax_lora.training import loop, trainable_mask
from jax_lora.training.step import State, make_step
from tests import quantized
from tests.training.many_devices import GRADIENT, cut, deviation, packed_batch


def variables(form):
    params, _ = quantized.base(form)
    adapters = lora.init(jax.random.key(1), quantized.TOY, 3, alpha=6.0, targets=LINEAR_NAMES)
    for members in adapters["layers"].values():
        for leaf in members.values():
            leaf["b"] = 0.1 * jax.random.normal(jax.random.key(2), leaf["b"].shape)
    return {"params": params, "lora": adapters}


def kernels(params):
    return {
        linear.name: {"kernel": params["layers"][linear.group][linear.name]["kernel"]}
        for linear in LINEARS
    }


def step_on(mesh, tree):
    """Loss, gradients, and the bytes of the linear layers on the first device."""
    mask = trainable_mask.mask(tree, *trainable_mask.LORA)
    trainable, frozen = trainable_mask.partition(sharding.shard(tree, mesh), mask)
    held = sum(
        shard.data.nbytes
        for x in jax.tree.leaves(kernels(frozen["params"]))
        for shard in x.addressable_shards
        if shard.device == jax.devices()[0]
    )
    trainable = jax.tree.map(jnp.array, trainable)
    start = State(
        sharding.shard(jnp.zeros((), jnp.int32), mesh),
        trainable,
        sharding.init_sharded(GRADIENT.init, mesh, trainable),
    )
    options = dict(seed=3, dropout_rate=0.2, packed=True, loss_chunk=8)
    functions = make_step(
        Llama(quantized.TOY, dtype=jnp.float32, remat="full"), GRADIENT, mesh=mesh, **options
    )
    put = functools.partial(sharding.shard_batch, mesh=mesh)
    batch = list(cut(packed_batch(1), 8, sharding.row_groups(mesh)))
    ((state, report),) = loop.train(start, frozen, [batch], functions, put)
    return float(report.loss), sharding.gather(state.optimizer[0].trace["lora"]), held


def integer_product(mesh=None):
    """A product of integers, its inputs divided among `tensor`."""
    stack = quantized.quantized("int8", np.random.default_rng(0).normal(size=(1, 256, 12)))
    kernel = with_int8_products(jax.tree.map(lambda x: x[0], stack))
    shard = sharding.Activations(mesh) if mesh else lambda x, *_: x

    @jax.jit
    def run(x, kernel):
        return product("cpu", shard, ("mlp", "embed"), shard(x, None, None, "mlp"), kernel)

    return np.asarray(run(jax.random.normal(jax.random.key(1), (8, 3, 256)), kernel))


def main():
    form, *meshes = sys.argv[1:]
    tree = jax.tree.map(np.asarray, variables(form))
    expected, found = step_on(None, jax.tree.map(jnp.asarray, tree)), {}
    for name in meshes:
        mesh = sharding.make_mesh(MeshSizes(*map(int, name.split(","))))
        made = step_on(mesh, tree)
        found[name] = deviation(made, expected) | {
            "held": made[2],
            "planned": sharding.local_bytes(kernels(tree["params"]), mesh),
            "one": expected[2],
        }
        if form == "int8":
            found[name]["equal"] = bool(np.array_equal(integer_product(mesh), integer_product()))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
