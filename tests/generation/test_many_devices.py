"""Devices that share one copy of the weights answer as one device does."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY, many_cpus


@pytest.fixture(scope="module")
def found():
    """What tests/generation/many_devices.py prints, by the number of devices."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.generation.many_devices"],
        cwd=REPOSITORY,
        env=os.environ | many_cpus(4),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("count", ["2", "4"])
def test_answers_are_those_of_one_device(found, count):
    assert found[count]["answers"] == found["1"]["answers"]


@pytest.mark.parametrize("count", ["1", "2", "4"])
def test_the_host_stops_answers_on_any_number_of_devices(found, count):
    assert found[count]["stopped"] == [answer[:3] for answer in found[count]["answers"]]
    assert found[count]["new_programs"] == 0


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_device_holds_its_part_of_the_weights(found, count):
    planned = found[str(count)]["planned"]
    assert found[str(count)]["weights"] == [planned] * count + [0] * (4 - count)
    assert planned < 1.4 * found["1"]["planned"] / count  # an odd vocabulary is not split


@pytest.mark.parametrize("count", ["2", "4"])
def test_devices_exchange_two_sums_a_layer_and_nothing_of_the_past(found, count):
    shapes = [shape for _, _, shapes in found[count]["communication"] for shape in shapes]
    states = [shape for shape in shapes if sorted(shape) == [1, 4, 32]]  # of a token a row
    looked_up = int(count == "2")  # a sum over the parts of the embeddings, which 4 does not cut
    assert len(states) == 2 * 3 + looked_up
    assert not any(38 in shape for shape in shapes)  # slots
    assert found["1"]["communication"] == []


def test_caches_are_cut_where_the_heads_divide(found):
    for (full, *_), two, four in zip(*(found[n]["caches"] for n in "124"), strict=True):
        assert two == [full // 2, full // 2, 0, 0]  # 2 kv heads
        assert four == [full] * 4
