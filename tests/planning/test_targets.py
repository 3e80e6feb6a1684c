"""Names of targets."""

import pytest

from jax_lora.planning.targets import DEVICES, full_name, target


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("h200", "h200", None),
        ("a100-80gb", "a100-80gb", None),
        ("a100-80gb-8", "a100-80gb", 8),
        ("v5e-8", "v5e", 8),
        ("v5p-8", "v5p", 4),  # TensorCores, two per chip
        ("cpu", "cpu", None),
    ],
)
def test_names(name, kind, count):
    found = target(name)
    assert (found.kind, found.count, found.device) == (kind, count, DEVICES[kind])
    assert count is None or full_name(kind, count) == name


@pytest.mark.parametrize("name", ["a100", "h200-0", "v5p-3", "tpu-8", ""])
def test_wrong_names_are_refused(name):
    with pytest.raises(ValueError, match=f"--target: found '{name}', expected"):
        target(name)


def test_every_device_says_where_its_numbers_come_from():
    assert all(device.source and device.bytes > 0 for device in DEVICES.values())
