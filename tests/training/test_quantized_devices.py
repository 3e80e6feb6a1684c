"""A quantized base on 8 devices: one device's step, its bytes shared out on block boundaries."""

import json

import pytest

from tests.processes import finish, start

# The four blocks of nf4 along 256 inputs 8 devices do not divide: they cut the outputs.
MESHES = {
    "nf4": ["1,8,1", "2,2,2", "1,1,8"],
    "Q8_0": ["1,8,1", "2,2,2", "1,1,8"],
    "int8": ["2,2,2"],
    "Q4_K+Q6_K": ["2,2,2"],
}


@pytest.mark.parametrize("form", MESHES)
def test_a_mesh_equals_one_device_and_shares_the_base(form, promise):
    (said,) = finish(start("tests.training.quantized_devices", 8, form, *MESHES[form]))
    for mesh, found in json.loads(said.splitlines()[-1]).items():
        what = "a step on 8 devices instead of 1, base in int8, nf4 or GGUF blocks"
        promise(f"{what}: loss", found["loss"], 1e-5)
        promise(f"{what}: ‖g - g'‖ / ‖g'‖ of A and B", found["gradient"], 1e-5)
        assert found["held"] == found["planned"]
        assert found.get("equal", True)  # products of integers
        _, fsdp, tensor = map(int, mesh.split(","))
        # But for the constants of groups, and the scales of int8 where inputs are cut.
        assert found["held"] < 1.15 * found["one"] / (fsdp * tensor)
