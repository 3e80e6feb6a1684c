"""The kills of tests/reliability.py; a file of their own, because a worker takes whole files."""

import pytest

from tests.test_reliability import try_shortly


@pytest.mark.parity  # minutes
def test_what_was_killed_ends_as_what_was_not():
    try_shortly("kills")
