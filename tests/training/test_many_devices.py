"""Many devices do what one does: on 8 fake ones in every mesh, and in 2 processes of 4 each."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_lora.training import trainable_mask
from jax_lora.training.checkpoints import Checkpoints
from jax_lora.training.optimizers import OPTIMIZERS
from jax_lora.training.step import State
from tests import reference
from tests.processes import finish, start, start_two
from tests.training import many_devices

# Every axis alone, and with others; fsdp with tensor alone is the mesh of two processes, and all
# three together have a test that is not slow.
MESHES = ["8,1,1", "1,8,1", "1,1,8", "2,1,4"]
WHAT = "a step on 8 devices instead of 1, any mesh, ranks 1, 3, 8 and above D"
slow = pytest.mark.slow  # a minute or two for each of the fixtures
DRIVER = "tests.training.many_devices"


def equal(promise, what, found):
    """Loss and gradients are one device's but for rounding."""
    promise(f"{what}: loss", found["loss"], 1e-5)
    promise(f"{what}: ‖g - g'‖ / ‖g'‖ of all weights, A, B and m", found["gradient"], 1e-5)


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """The results of a process with 8 devices, the folder it wrote and what it said."""
    folder = tmp_path_factory.mktemp("eight")
    (said,) = finish(start(DRIVER, 8, folder, *MESHES, "--more"))
    return json.loads((folder / "0.json").read_text()), folder, said


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The results of two processes with 4 devices each, and the folder they wrote."""
    folder = tmp_path_factory.mktemp("two")
    # 1,2,4: parameters and rows are cut between the processes, heads within each.
    finish(*start_two(DRIVER, folder, "1,2,4"))
    return [json.loads((folder / f"{i}.json").read_text()) for i in (0, 1)], folder


def test_a_mesh_equals_one_device(tmp_path, promise):
    finish(start(DRIVER, 8, tmp_path, "2,2,2", "--optimizers"))
    results = json.loads((tmp_path / "0.json").read_text())
    equal(promise, WHAT, results["2,2,2"])
    assert {*results["optimizers"]} == {*OPTIMIZERS}
    assert max(results["optimizers"].values()) <= 1e-6


def test_a_mesh_equals_one_device_for_every_family(tmp_path):
    """Mistral's heads, Qwen2's biases of q, k and v, Qwen3's norms of the heads of q and k."""
    finish(start(DRIVER, 4, tmp_path, "1,2,2", "--families"))
    results = json.loads((tmp_path / "0.json").read_text())
    assert {*results} == {*reference.FAMILIES}
    for case, found in results.items():
        assert max(found["1,2,2"].values()) <= 1e-5, (case, found)  # as LLaMA's


@slow
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_equals_one_device(eight, mesh, promise):
    equal(promise, WHAT, eight[0][mesh])


@slow
def test_a_device_holds_its_part_to_the_byte(eight):
    found, planned = eight[0]["bytes"]
    assert found == planned


@slow
@pytest.mark.parametrize("how", ["1 × 128", "4 × 32", "128 × 1"])
def test_the_cut_does_not_matter(eight, how, promise):
    # On one device: tests/parity/test_invariance.py.
    what = f"128 packed rows as {how} on 8 devices instead of 1 × 128 on 1, dropout on"
    equal(promise, what, eight[0]["cuts"][how])


@slow
def test_only_weights_are_gathered_and_a_layer_at_a_time(eight):
    results, _, said = eight
    assert "Involuntary full rematerialization" not in said
    for kind, origin, shapes in results["communication"]:
        assert kind != "all-to-all", origin
        for shape in shapes:
            if kind != "all-reduce":  # neither activations (B, T, ·) nor a stack of layers
                assert len([n for n in shape if n > 1]) <= 2, (origin, shape)
            if many_devices.TOKENS in shape:  # sums over `tensor` of a device's own rows
                assert shape[0] == many_devices.ROWS // 4, (origin, shape)


@slow
def test_two_processes_equal_one_device(two, promise):
    what = "a step in 2 processes of 4 devices instead of on 1"
    for results in two[0]:
        equal(promise, what, results["1,2,4"])


@slow
def test_a_flag_in_one_process_is_known_to_both(two):
    assert [results["flags"] for results in two[0]] == [[True, True, False]] * 2


@slow
@pytest.mark.parametrize("which", ["eight", "two"])
def test_a_checkpoint_knows_no_mesh(which, request):
    # Saved by 8 devices or 2 processes, restored there on another mesh, and here on one device.
    results, folder, *_ = request.getfixturevalue(which)
    assert all(result["restored"] for result in (results if which == "two" else [results]))
    tree = many_devices.variables()
    trainable, _ = trainable_mask.partition(
        tree, trainable_mask.mask(tree, *many_devices.EVERYTHING)
    )
    zero = jax.tree.map(jnp.zeros_like, trainable)
    like = State(jnp.zeros((), jnp.int32), zero, many_devices.GRADIENT.init(zero))
    checkpoints = Checkpoints(folder / "checkpoints")
    restored = checkpoints.restore(like)
    checkpoints.close()
    with np.load(folder / "state.npz") as saved:
        for found, name in zip(jax.tree.leaves(restored), saved.files, strict=True):
            np.testing.assert_array_equal(found, saved[name])
