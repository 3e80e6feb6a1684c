"""The table covers every leaf, cuts what it can, and says where memory goes; all from shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from jax_lora import sharding
from jax_lora.config import MeshSizes, OptimConfig
from jax_lora.model import lora
from jax_lora.model.arch import BY_NAME, TARGETS
from jax_lora.model.config import LlamaConfig
from jax_lora.model.families import CONFIGS
from jax_lora.training.optimizers import OPTIMIZERS, make_optimizer
from jax_lora.training.trainable_mask import leaf_name
from jax_lora.weights.tree import leaves


def abstract(data, fsdp, tensor):
    return AbstractMesh((data, fsdp, tensor), sharding.AXES)


def variables(config, rank):
    """The shapes of a base, of DoRA adapters on every linear layer, and of their products."""
    tree = {"params": {}, "lora": {}, "deltas": {}}

    def put(node, path, shape):
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = jax.ShapeDtypeStruct(shape, jnp.float32)

    for leaf in leaves(config):
        put(tree["params"], leaf.path, leaf.leaf_shape)
    for name, sides in lora.shapes(config, rank, TARGETS).items():
        copies, _, size_out = sides["b"]
        sides = {**sides, "m": (copies, size_out), "scale": (copies,)}
        for side, shape in sides.items():
            put(tree["lora"], (*BY_NAME[name].tree_path, side), shape)
        put(tree["deltas"], BY_NAME[name].tree_path, config.stack_shapes()[name])
    return tree


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1), (1, 1, 8), (8, 1, 1)])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_matrix_of_every_preset_is_cut_whatever_the_rank(name, sizes):
    mesh = abstract(*sizes)
    for rank in (1, 7):
        tree = variables(CONFIGS[name], rank)
        expected = 0
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            end = path[-1].key
            parts = 1 if end in ("scale", "m") else sizes[1] * sizes[2]
            if end == "bias":  # of q, k and v, which `tensor` cuts with their outputs
                parts = sizes[2]
            expected += leaf.size * 4 // parts
        assert sharding.local_bytes(tree, mesh) == expected


def test_the_two_axes_of_an_adapter_begin_with_its_kernels():
    mesh = abstract(2, 2, 2)
    for name, kernel, a, b in [
        ("q_proj", P(None, "fsdp", "tensor"), ("fsdp", "tensor"), ("tensor", "fsdp")),
        ("o_proj", P(None, ("tensor", "fsdp")), ("tensor", "fsdp"), ("fsdp", "tensor")),
    ]:
        place = f"lora/layers/self_attn/{name}"
        assert sharding.spec(f"params/layers/self_attn/{name}/kernel", (2, 8, 8), mesh) == kernel
        assert sharding.spec(f"deltas/layers/self_attn/{name}", (2, 8, 8), mesh) == kernel
        assert sharding.spec(f"{place}/a", (2, 8, 1), mesh) == P(None, a)
        assert sharding.spec(f"{place}/b", (2, 1, 8), mesh) == P(None, None, b)
    assert sharding.spec("lora/lm_head/a", (1, 8, 1), mesh) == P(None, ("fsdp", "tensor"))
    assert sharding.spec("lora/lm_head/b", (1, 1, 8), mesh) == P(None, None, ("tensor", "fsdp"))
    assert sharding.spec("deltas/lm_head", (1, 8, 8), mesh) == P(None, "fsdp", "tensor")


@pytest.mark.parametrize(
    ("shape", "sizes", "expected"),
    [
        ((32, 61), (2, 2, 2), P("fsdp")),  # an odd vocabulary
        ((32, 62), (2, 2, 2), P("fsdp", "tensor")),
        ((31, 62), (2, 2, 2), P(None, "tensor")),
        ((31, 61), (2, 2, 2), P()),
        ((32, 62), (8, 1, 1), P()),
        ((32, 62), (1, 1, 8), P()),
    ],
)
def test_an_axis_that_does_not_divide_is_left_out(shape, sizes, expected):
    assert sharding.spec("params/lm_head/kernel", shape, abstract(*sizes)) == expected


def test_one_of_two_axes_may_divide():
    spec = sharding.spec("lora/layers/mlp/up_proj/a", (2, 6, 4), abstract(1, 4, 2))
    assert spec == P(None, "tensor")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_is_sharded_as_its_parameter_or_replicated(name):
    mesh = abstract(2, 2, 2)
    trainable = variables(LlamaConfig(512, 256, 384, 2, 4, 2, 64), 160)
    optimizer = make_optimizer(
        OptimConfig(name=name, loraplus_lr_ratio=16.0), optax.constant_schedule(1.0)
    )
    state = jax.eval_shape(optimizer.init, trainable)
    parameters = {
        leaf_name(path): (leaf.shape, where.spec)
        for (path, leaf), where in zip(
            jax.tree_util.tree_leaves_with_path(trainable),
            jax.tree.leaves(sharding.shardings(trainable, mesh)),
            strict=True,
        )
    }
    copies = 0
    for (path, leaf), where in zip(
        jax.tree_util.tree_leaves_with_path(state),
        jax.tree.leaves(sharding.shardings(state, mesh)),
        strict=True,
    ):
        found = [parameters[end] for end in parameters if leaf_name(path).endswith(end)]
        shape, spec = found[0] if found else ((), P())
        copies += leaf.shape == shape != ()
        assert where.spec == (spec if leaf.shape == shape else P()), leaf_name(path)
    per_parameter = copies / len(parameters)
    assert per_parameter == {"sgd": 0, "lion": 1, "adam": 2, "adamw": 2}.get(name, per_parameter)
    assert name != "adafactor" or 0 < per_parameter < 1  # vectors only


def test_a_leaf_that_is_not_in_the_table_is_named():
    tree = {"params": {"layers": {"mlp": {"router": {"kernel": jnp.zeros((2, 4, 4))}}}}}
    with pytest.raises(ValueError, match="params/layers/mlp/router/kernel"):
        sharding.shardings(tree, abstract(1, 1, 1))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 1, 1), "found 3 × 1 × 1 on 8 devices, expected data × fsdp × tensor"),
        ((-1, 3, 1), "found -1 × 3 × 1 on 8 devices"),
        ((16, -1, 1), "found 16 × -1 × 1 on 8 devices"),
        ((-1, -1, 1), "found -1 × -1 × 1 on 8 devices"),
        ((0, 8, 1), "found 0 × 8 × 1 on 8 devices"),
        ((-1, 0, 1), "found -1 × 0 × 1 on 8 devices"),
        ((-2, -4, 1), "found -2 × -4 × 1 on 8 devices"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(MeshSizes(*sizes), devices=jax.devices()[:1] * 8)


def test_minus_one_is_what_is_left():
    mesh = sharding.make_mesh(MeshSizes(fsdp=-1), jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert sharding.row_groups(mesh) == 1


def test_a_reader_gets_one_function_per_mesh_that_shards_leaves():
    one = sharding.make_mesh(MeshSizes(), jax.devices()[:1])
    same = sharding.make_mesh(MeshSizes(), jax.devices()[:1])
    assert sharding.leaf_sharder(one) is sharding.leaf_sharder(same)
    kernel = np.arange(12.0, dtype=np.float32).reshape(4, 3)
    np.testing.assert_array_equal(sharding.leaf_sharder(one)(("lm_head", "kernel"), kernel), kernel)


def test_rows_that_do_not_divide_are_refused():
    four = np.array(jax.devices()[:1] * 4).reshape(2, 2, 1)
    with pytest.raises(ValueError, match="found 6 rows, expected a multiple of data × fsdp = 4"):
        sharding.shard_batch({"tokens": np.zeros((6, 3))}, Mesh(four, sharding.AXES))
