"""A checkout of the real size, written once a session."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data import full_scale


@pytest.fixture(scope="session")
def full_checkout(shared, tmp_path_factory) -> Iterator[Path]:
    """875 tasks with 0.8 million instances: 100 MB, which go when the session ends."""
    root = tmp_path_factory.mktemp("full") / "checkout"
    yield full_scale.write(root, shared / "data" / "niv2_index.json", most=full_scale.MOST)
    shutil.rmtree(root)
