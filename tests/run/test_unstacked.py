"""A run whose frozen kernels are one array per layer, as on a GPU without remat."""

import numpy as np

import jax_lora
from jax_lora.training import unstacked
from jax_lora.training.resolve import Resolved
from jax_lora.training.unstacked import put


def test_a_run_trains_and_validates_as_with_stacks(tiny_run, tmp_path, monkeypatch):
    config = tiny_run(max_steps=2, remat="none", dtype="float32", validate_every=2)
    config = config.replace(**{"data.validation_per_task": 2})
    metrics, loaded = [], []

    def spied(path, array):
        loaded.append(path[-1])
        return put(path, array)

    monkeypatch.setattr(unstacked, "put", spied)
    for unstacks in (False, True):
        monkeypatch.setattr(Resolved, "unstacks", unstacks)
        run = jax_lora.Run.open(config, tmp_path / str(unstacks))
        metrics.append(run.train())
        assert ("kernel" in loaded) == unstacks
    columns = ["loss", "gradient_norm"]
    np.testing.assert_allclose(metrics[0][columns], metrics[1][columns], rtol=1e-5)
