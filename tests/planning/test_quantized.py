"""The plan of a quantized base: its bytes by format, and a compiled step that widens one layer."""

import json

import jax
import pytest

from jax_lora.config import RunConfig
from jax_lora.errors import ConfigError
from jax_lora.model import lora, variants
from jax_lora.model.config import LlamaConfig
from jax_lora.model.families import CONFIGS
from jax_lora.model.quantization import is_quantized
from jax_lora.planning.compile import compile_step
from jax_lora.planning.memory import memory
from jax_lora.planning.steps import PlannedStep, planned, variables
from jax_lora.planning.targets import target
from jax_lora.training.resolve import resolve
from tests import quantized
from tests.processes import finish, start

BITS = {"int8": 8, "nf4": 4 + 8 / 64 + 32 / 64 / 256}


def shape(layers):
    return LlamaConfig(64, 256, 512, layers, 4, 4, 64)


def step(form, layers, remat="full", **keys):
    keys = {"lora.dropout": 0.0, "loss_chunk": 32} | keys
    config = RunConfig().replace(model_quantization=form, dtype="float32", remat=remat, **keys)
    return planned(config, shape(layers), "cpu", rows=1, length=32)


@pytest.mark.parametrize("form", BITS)
def test_bytes_of_the_base_by_format(form):
    dense, found = (memory(step(one, 2)).base for one in ("none", form))
    linear = shape(2).linear_shapes().values()
    weights = 2 * sum(a * b for a, b in linear)
    # And of int8 a float32 scale per output, of nf4 a float32 mean per kernel and layer.
    small = 4 * 2 * (sum(b for _, b in linear) if form == "int8" else len(linear))
    assert found == pytest.approx(dense - 4 * weights + weights * BITS[form] / 8 + small, rel=1e-3)


def test_gguf_is_planned_by_the_kinds_of_its_layers():
    kinds = tuple((name, ("Q4_K", "Q6_K")) for name in shape(2).linear_shapes())
    config = RunConfig().replace(model_quantization="gguf")
    resolved = resolve(config.replace(**{"data.buckets": (32,)}), shape(2), "cpu", 1, kinds)
    one = step("none", 2)
    made = type(one)(resolved, 1, 32)
    kernels = [
        x for x in jax.tree.leaves(variables(made)[0], is_leaf=is_quantized) if is_quantized(x)
    ]
    assert len(kernels) == 7
    for kernel in kernels:
        _, size, out = kernel.shape
        blocks = quantized.gguf_kernel(["Q4_K", "Q6_K"], (size, out), 0)[0].blocks
        assert kernel.blocks.shape == blocks.shape and kernel.blocks.dtype == blocks.dtype
    with pytest.raises(ConfigError, match="found gguf, expected a GGUF file as model"):
        memory(step("gguf", 2))


def test_a_kernel_that_trains_is_refused_by_the_plan_too():
    with pytest.raises(ConfigError, match="found nf4 and params/layers/mlp/gate_proj/kernel"):
        memory(step("nf4", 2, trainable=(r"lora/.*/[abm]", r"params/.*/gate_proj/kernel")))


@pytest.mark.parametrize("remat", ["full", "none"])
def test_the_compiled_step_holds_one_dequantized_layer_at_most(remat):
    one_layer = 4 * sum(a * b for a, b in shape(1).linear_shapes().values())
    added = {}
    for layers in (2, 12):
        dense, found = (
            compile_step(step(form, layers, remat, unroll=1), target("cpu")).programs["accumulate"]
            for form in ("none", "nf4")
        )
        added[layers] = found.temporary - dense.temporary
        assert dense.arguments - found.arguments > 0.8 * layers * one_layer
    assert max(added.values()) < one_layer
    assert abs(added[12] - added[2]) < 0.1 * one_layer  # ten layers more add nothing


@pytest.mark.slow
def test_the_compiled_step_of_smollm2_holds_no_more_than_the_unquantized_one():
    model = CONFIGS["smollm2-135m"]
    weights = sum(a * b for a, b in model.linear_shapes().values())
    kinds = tuple((name, ("Q4_1",)) for name in model.linear_shapes())
    keys = {"dtype": "float32", "data.buckets": (256,), "lora.dropout": 0.0, "loss_chunk": 128}
    temporary = {}
    for form in ("none", "int8", "nf4", "gguf"):
        config = RunConfig().replace(model_quantization=form, unroll=1, **keys)
        resolved = resolve(config, model, "cpu", 1, kinds if form == "gguf" else ())
        made = PlannedStep(resolved, 2, 256)
        found = compile_step(made, target("cpu")).programs["accumulate"]
        assert memory(made).peak == pytest.approx(found.peak, rel=0.1)
        temporary[form] = found.temporary
    for form, held in temporary.items():
        assert held - temporary["none"] < 0.1 * 4 * weights, form


def test_a_step_on_many_devices_gathers_a_layer_at_a_time():
    (said,) = finish(start("tests.planning.quantized_devices", 4))
    temporary, stored = json.loads(said.splitlines()[-1])
    for case, added in temporary.items():
        for form, size in added.items():
            # A copy of what is stored would be all of it per layer, what is gathered four times it.
            assert size - added["none"] < 0.25 * stored[form], (case, form)


def test_the_start_that_pissa_keeps_is_counted():
    plain, pissa = (step("nf4", 2, **{"lora.init": init}) for init in ("kaiming", "pissa"))
    adapters = lora.init(jax.random.key(0), shape(2), plain.config.lora.rank, alpha=1.0)
    kept = variants.without(quantized.base("nf4", shape(2))[0], adapters)
    made = variables(pissa)[0]["params"]
    assert jax.tree.structure(made) == jax.tree.structure(kept)
    for found, expected in zip(*map(jax.tree.leaves, (made, kept)), strict=True):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    size = sum(x.nbytes for x in jax.tree.leaves(adapters))
    assert memory(pissa).base - memory(plain).base == size
    takes = [
        compile_step(one, target("cpu")).programs["accumulate"].arguments for one in (plain, pissa)
    ]
    assert takes[1] - takes[0] == size


def test_layers_stay_rolled_where_kernels_are_quantized():
    assert step("none", 3, "none").resolved.model().unroll == 3
    assert step("nf4", 3, "none").resolved.model().unroll == 1
