"""Operations, against limits that were worked out by hand."""

from dataclasses import replace

import pytest

from jax_lora.model.config import ATTENTION, CONFIGS
from jax_lora.planning.operations import ceiling, operations
from jax_lora.planning.setup import Setup
from jax_lora.planning.targets import DEVICES
from jax_lora.training import masks

H200 = DEVICES["h200"]
FULL = dict(trainable=masks.FULL[0], frozen=masks.FULL[1], dropout=0.0)


def seven(rank, **fields):
    return Setup(CONFIGS["llama-7b"], rank, length=2048, **fields)


# Arithmetic limits of one H200 at 790 TFLOP/s, rows of 2048 tokens, A and B as two products,
# worked out by hand: 6.607e9 matmul parameters, nothing computed again or all of it.
@pytest.mark.parametrize(
    ("rank", "kept", "repeated"),
    [(8, 28.1, 18.9), (512, 25.3, 17.1), (4096, 14.7, 10.4), (None, 19.2, 14.4)],
)
def test_the_limits_of_an_h200(rank, kept, repeated):
    setup = seven(rank, **(FULL if rank is None else {}))
    parts = operations(setup).values()
    forward, backward = sum(p.forward for p in parts), sum(p.backward for p in parts)
    rate = H200.rate
    assert round(rate / (forward + backward) / 1e3, 1) == kept
    assert round(rate / (2 * forward + backward) / 1e3, 1) == repeated


def test_what_is_computed_again_is_less_than_a_forward_pass():
    full, products, none = (
        sum(p.again for p in operations(seven(16, remat=remat)).values())
        for remat in ("full", "products", "none")
    )
    forward = sum(p.forward for p in operations(seven(16)).values())
    assert none < products < full < forward
    # The last product of a layer is read by nothing that goes back, and the vocabulary's has its
    # gradient taken where it is made.
    down, vocabulary = 2 * 32 * 11008 * 4096, 2 * 32000 * 4096
    assert forward - full == pytest.approx(down + vocabulary)


def test_forming_the_product_pays_above_half_the_width():
    skinny, formed = seven(4096), seven(4096, materialized=ATTENTION)
    base = seven(8, remat="none")
    shares = [
        ceiling(base, H200) / ceiling(replace(one, remat="none"), H200) for one in (skinny, formed)
    ]
    assert shares[0] == pytest.approx(1.90, abs=0.02)
    assert shares[1] == pytest.approx(1.46, abs=0.02)


def test_devices_multiply_and_masks_decide():
    assert ceiling(seven(16, mesh=(2, 4, 1)), H200) == pytest.approx(8 * ceiling(seven(16), H200))
    rules = (r"lora/.*/[ab]", r"params/lm_head/.*")
    more = operations(seven(16, trainable=rules))["vocabulary"]
    assert more.backward == 2 * operations(seven(16))["vocabulary"].backward
