"""The table covers every leaf, cuts what it can, and says where memory goes; all from shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from jax_lora import sharding
from jax_lora.model import lora
from jax_lora.model.arch import GROUP, LINEAR
from jax_lora.model.config import LlamaConfig
from jax_lora.model.families import CONFIGS
from jax_lora.training.step import adamw
from jax_lora.weights.tree import leaves


def abstract(data, fsdp, tensor):
    return AbstractMesh((data, fsdp, tensor), sharding.AXES)


def variables(config, rank):
    """The shapes of a base, of DoRA adapters on every linear layer, and of their products."""
    tree = {"params": {}, "lora": {"layers": {}}, "deltas": {}}

    def put(node, path, shape):
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = jax.ShapeDtypeStruct(shape, jnp.float32)

    for leaf in leaves(config):
        put(tree["params"], leaf.path, leaf.leaf_shape)
    depth = config.num_hidden_layers
    for name, sides in lora.shapes(config, rank, LINEAR).items():
        size_out = sides["b"][2]
        sides = {**sides, "m": (depth, size_out), "scale": (depth,)}
        for side, shape in sides.items():
            put(tree["lora"], ("layers", GROUP[name], name, side), shape)
        put(tree["deltas"], (GROUP[name], name), (depth, *config.linear_shapes()[name]))
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
        assert sharding.spec(f"deltas/self_attn/{name}", (2, 8, 8), mesh) == kernel
        assert sharding.spec(f"{place}/a", (2, 8, 1), mesh) == P(None, a)
        assert sharding.spec(f"{place}/b", (2, 1, 8), mesh) == P(None, None, b)


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


def test_optimizer_state_lies_where_its_parameter_does():
    mesh = abstract(2, 2, 2)
    trainable = variables(LlamaConfig(64, 32, 48, 2, 4, 2, 8), 4)
    state = jax.eval_shape(adamw(optax.constant_schedule(1.0), b_ratio=16.0).init, trainable)
    wanted = jax.tree.leaves(sharding.shardings(trainable, mesh))
    found = [x for x in jax.tree.leaves(sharding.shardings(state, mesh)) if x.spec != P()]
    cut = [x for x in wanted if x.spec != P()]
    assert found == cut * 2  # both moments


def test_a_leaf_that_is_not_in_the_table_is_named():
    tree = {"params": {"layers": {"mlp": {"router": {"kernel": jnp.zeros((2, 4, 4))}}}}}
    with pytest.raises(ValueError, match="params/layers/mlp/router/kernel"):
        sharding.shardings(tree, abstract(1, 1, 1))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            (3, 1, 1),
            r"found data × fsdp × tensor = 3 × 1 × 1 on 8 devices, expected a product of 8",
        ),
        ((-1, 3, 1), "= -1 × 3 × 1 on 8 devices"),
        ((16, -1, 1), "= 16 × -1 × 1 on 8 devices"),
        ((-1, -1, 1), "found -1 × -1 × 1, expected the sizes"),
        ((0, 8, 1), "found 0 × 8 × 1, expected the sizes"),
        ((8, 1), "found 8 × 1, expected the sizes"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(sizes, devices=range(8))


def test_minus_one_is_what_is_left():
    mesh = sharding.make_mesh((1, -1, 1), jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert sharding.row_parts(mesh) == 1


def test_a_reader_places_leaves_and_keeps_one_function_a_mesh():
    one = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    same = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    assert sharding.placer(one) is sharding.placer(same)
    kernel = np.arange(12.0, dtype=np.float32).reshape(4, 3)
    np.testing.assert_array_equal(sharding.placer(one)(("lm_head", "kernel"), kernel), kernel)


def test_rows_that_do_not_divide_are_refused():
    class Four:
        shape = {"data": 2, "fsdp": 2, "tensor": 1}

    with pytest.raises(ValueError, match="found 6 rows, expected a multiple of data × fsdp = 4"):
        sharding.place_rows({"tokens": np.zeros((6, 3))}, Four())


@pytest.fixture
def no_cluster(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    started = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: started.append(given))
    return started


def test_a_process_stays_alone_unless_told(no_cluster):
    sharding.join()
    assert no_cluster == []


def test_the_cluster_the_flags_or_the_environment_say_who_takes_part(no_cluster, monkeypatch):
    sharding.join("auto")
    sharding.join("[::1]:1234", 4, 0)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "first:99")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    sharding.join()
    told = [
        tuple(x[k] for k in ("coordinator_address", "num_processes", "process_id"))
        for x in no_cluster[1:]
    ]
    assert no_cluster[0] == {}
    assert told == [("[::1]:1234", 4, 0), ("first:99", 2, 1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host", 2, 0), "coordinator: found 'host', expected host:port or auto"),
        (("host:1", -1, 0), "coordinator: found process 0 of -1, expected 0 to one less"),
        (("host:1", 2, 2), "coordinator: found process 2 of 2, expected"),
        (("host:1", 2, -1), "coordinator: found process -1 of 2, expected"),
    ],
)
def test_bad_flags_of_many_processes_are_refused(no_cluster, arguments, message):
    with pytest.raises(ValueError, match=message):
        sharding.join(*arguments)


def test_a_number_in_the_environment_must_be_one(no_cluster, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES: found 'two', expected a number"):
        sharding.join("host:1")


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (RuntimeError("DEADLINE_EXCEEDED\nmore"), OSError, "the processes did not meet: DEADLINE"),
        (ValueError("coordinator_address should be defined."), ValueError, "found no cluster"),
    ],
)
def test_processes_that_do_not_meet_are_a_line(no_cluster, monkeypatch, fault, kind, message):
    def fail(**_):
        raise fault

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(kind, match=message):
        sharding.join("auto")
