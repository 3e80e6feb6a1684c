"""Costs of cells, against planning's count and against products counted by hand."""

import pytest

from jax_lora.config import RunConfig
from jax_lora.planning.operations import operations
from jax_lora.planning.steps import planned
from jax_lora.study import costs


def run(**changes):
    return RunConfig().replace(model="llama-7b", **changes)


def test_the_operations_of_a_high_rank_are_plannings():
    """The delta is materialized once per step: 40.5 · 10⁹ operations, not 52.2."""
    training, forward = costs.operations_per_token(run(**{"lora.rank": 4096}))
    parts = operations(planned(run(**{"lora.rank": 4096}), "llama-7b", "cuda", length=1152))
    assert training == sum(work.forward + work.backward for work in parts.values())
    assert forward == sum(parts[name].forward for name in ("layers", "attention", "vocabulary"))
    assert 40.4e9 < training < 40.7e9


def test_operations_are_the_products_of_a_step():
    d, f, v, length = 4096, 11008, 32000, 1152
    attention = 32 * 2 * d * length  # the causal half of two products, length × length × d
    forward = 2 * (32 * (4 * d * d + 3 * d * f) + d * v) + attention
    adapters = 2 * 32 * 4 * 16 * (d + d)
    lora = costs.operations_per_token(run(**{"lora.rank": 16}))
    assert lora == pytest.approx((2 * forward + attention + 3 * adapters, forward))
    full = {"method": "full", "trainable": (r"params/.*",), "frozen": ()}
    assert costs.operations_per_token(run(**full)) == pytest.approx((3 * forward, forward))


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("remat", "none"), ("attention", "xla"), ("dtype", "float32"), ("mesh.fsdp", 8)],
        ("model_quantization", "gguf"),  # whose blocks are those of a file that is not read
    ],
)
def test_operations_depend_on_no_option_of_speed(variant, key, value):
    plain = {"lora.variant": variant, "lora.rank": 2048, "batch_size": 8}
    one, other = (costs.operations_per_token(run(**plain, **c)) for c in ({}, {key: value}))
    assert one == other
