"""Operations, against limits that were worked out by hand."""

import pytest

from jax_lora.config import RunConfig
from jax_lora.planning.operations import ceiling, operations
from jax_lora.planning.steps import planned
from jax_lora.planning.targets import DEVICES

H200 = DEVICES["h200"]
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
