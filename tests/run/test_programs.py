"""A process that opens many runs does not die of the programs that it compiled."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jax_lora import Run, RunConfig
from jax_lora.run import programs

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="no /proc")


@jax.jit
def _kept(x):
    return jnp.sin(x)


@pytest.mark.parametrize("most_maps", [0, programs.MOST_MAPS])
def test_opening_a_run_forgets_programs_only_where_there_are_many(most_maps, monkeypatch, tmp_path):
    """Programs of functions of a module outlive every run that used them, which is asserted too."""
    monkeypatch.setattr(programs, "MOST_MAPS", most_maps)
    for length in range(1, 6):
        _kept(jnp.ones(length)).block_until_ready()
    assert _kept._cache_size() == 5
    Run.open(RunConfig(), tmp_path / "run")
    assert _kept._cache_size() == (0 if most_maps == 0 else 5)
