"""Operations, against limits worked out by hand and against the products that JAX traces."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from jax_lora.config import RunConfig
from jax_lora.model.transformer import Llama
from jax_lora.planning.operations import (
    ceiling,
    dequantization_seconds,
    dequantized_bytes,
    operations,
)
from jax_lora.planning.steps import planned, variables
from jax_lora.planning.targets import DEVICES
from jax_lora.weights.hf_config import parse_config
from tests import reference

H200 = DEVICES["h200"]
TOKENS = 8
FULL = {"method": "full", "trainable": (r"params/.*",), "frozen": ()}


def seven(rank, devices=1, **keys):
    changes = FULL if rank is None else {"lora.rank": rank}
    config = RunConfig().replace(**{"lora.materialize_delta": "never"} | changes | keys)
    return planned(config, "llama-7b", "cuda", devices, length=2048)


# Arithmetic limits of one H200 at 790 TFLOP/s, rows of 2048 tokens, A and B as two products,
# worked out by hand: 6.607e9 matmul parameters, nothing recomputed or all of it.
@pytest.mark.parametrize(
    ("rank", "kept", "repeated"),
    [(8, 28.1, 18.9), (512, 25.3, 17.1), (4096, 14.7, 10.4), (None, 19.2, 14.4)],
)
def test_the_limits_of_an_h200(rank, kept, repeated):
    parts = operations(seven(rank)).values()
    forward, backward = sum(p.forward for p in parts), sum(p.backward for p in parts)
    rate = H200.rate
    assert round(rate / (forward + backward) / 1e3, 1) == kept
    assert round(rate / (2 * forward + backward) / 1e3, 1) == repeated


def test_what_is_recomputed_is_less_than_a_forward_pass():
    full, products, none = (
        sum(p.recomputed for p in operations(seven(16, remat=remat)).values())
        for remat in ("full", "products", "none")
    )
    forward = sum(p.forward for p in operations(seven(16)).values())
    assert none < products < full < forward
    # The last product of a layer is read by nothing that goes back, and the vocabulary's has its
    # gradient taken where it is made.
    down, vocabulary = 2 * 32 * 11008 * 4096, 2 * 32000 * 4096
    assert forward - full == pytest.approx(down + vocabulary)


def test_materializing_the_delta_pays_above_half_the_width():
    base = ceiling(seven(8, remat="none"), H200)
    shares = [
        base / ceiling(seven(4096, remat="none", **{"lora.materialize_delta": choice}), H200)
        for choice in ("never", "auto")
    ]
    assert shares[0] == pytest.approx(1.90, abs=0.02)
    assert shares[1] == pytest.approx(1.46, abs=0.02)


def test_devices_multiply_and_masks_decide():
    eight = seven(16, 8, **{"mesh.data": 2, "mesh.fsdp": 4})
    assert ceiling(eight, H200) == pytest.approx(8 * ceiling(seven(16), H200))
    rules = (r"lora/.*/[ab]", r"params/lm_head/.*")
    more = operations(seven(16, trainable=rules))["vocabulary"]
    assert more.backward == 2 * operations(seven(16))["vocabulary"].backward


def traced(jaxpr):
    """Operations of all matrix products, those of a scan's body once per iteration."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (inputs, _), _ = equation.params["dimension_numbers"]
            summed = math.prod(equation.invars[0].aval.shape[i] for i in inputs)
            total += 2 * summed * math.prod(equation.outvars[0].aval.shape)
        inner = sum(traced(found) for found in jaxprs_in_params(equation.params))
        total += inner * (equation.params["length"] if equation.primitive.name == "scan" else 1)
    return total


@pytest.mark.parametrize("case", ["gqa", *reference.FAMILIES])
def test_the_forward_pass_of_every_family_has_the_operations_that_are_traced(case):
    shape, rank, targets = parse_config(reference.config(case)), 3, reference.TARGETS
    config = RunConfig().replace(
        attention="xla", **{"lora.rank": rank, "lora.targets": targets, "lora.dropout": 0.0}
    )
    step = planned(config, shape, "cpu", rows=1, length=TOKENS)
    model, tokens = Llama(shape, dtype=jnp.float32), jnp.zeros((1, TOKENS), jnp.int32)
    jaxpr = jax.make_jaxpr(model.apply)(variables(step)[0], tokens).jaxpr
    assert traced(jaxpr) == TOKENS * sum(part.forward for part in operations(step).values())


@pytest.mark.parametrize("remat", ["none", "full"])
def test_an_adapter_on_the_head_sees_the_loss_tokens_alone(remat):
    keys = {"lora.targets": ("lm_head",), "lora.rank": 16, "remat": remat}
    step = planned(RunConfig().replace(**keys), "llama-7b", "cuda", loss_share=0.25)
    found = operations(step)["adapters"]
    forward = 2 * 16 * (4096 + 32000) / 4
    assert found == (forward, 2 * forward, 0.0)
    both = operations(replace(step, loss_share=1.0))["adapters"]
    assert both.total == 4 * found.total


def test_dequantizing_takes_the_time_of_its_bytes():
    # Worked out by hand for LLaMA-7B: weights of a layer's seven kernels, and of the last one.
    each, down = 4 * 4096**2 + 3 * 4096 * 11008, 4096 * 11008
    stored = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes of a weight in nf4, but for one offset per layer
    keys = {"model_quantization": "nf4", "batch_size": 12, "remat": "full"}
    step = seven(16, **keys)  # micro-batches of 4 rows
    expected = 3 * 32 * (stored + 2) * (2 * each + each - down)
    assert dequantized_bytes(step) == pytest.approx(expected, rel=1e-6)
    kept = seven(16, **keys | {"remat": "none"})
    assert dequantized_bytes(kept) == pytest.approx(3 * 32 * (stored + 2) * 2 * each, rel=1e-6)
    # Devices that share the rows dequantize all kernels, those that share the columns a part.
    rows = seven(16, 2, **keys | {"batch_size": 24, "mesh.fsdp": 2})
    columns = seven(16, 2, **keys | {"mesh.fsdp": 1, "mesh.tensor": 2})
    assert dequantized_bytes(rows) == dequantized_bytes(step) == 2 * dequantized_bytes(columns)
    assert dequantized_bytes(seven(16, batch_size=12)) == 0

    assert dequantization_seconds(step, H200) == pytest.approx(expected / 4.8e12, rel=1e-6)
    seconds = [12 * 2048 / ceiling(s, H200) for s in (step, seven(16, batch_size=12))]
    assert seconds[0] - seconds[1] == pytest.approx(expected / 4.8e12, rel=1e-6)
    assert dequantization_seconds(step, DEVICES["cpu"]) == 0  # nobody measured its bandwidth
