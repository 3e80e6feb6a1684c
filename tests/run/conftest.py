"""The run that the tests of this folder change in a key or two."""

from collections.abc import Callable

import pytest

import jax_lora
from jax_lora.data.toy import write_checkout


@pytest.fixture(scope="module")
def tiny_run(tiny_model, tmp_path_factory) -> Callable[..., jax_lora.RunConfig]:
    """(**changes) → the config of a run of seconds, on toy tasks that each module has afresh."""
    toy = write_checkout(tmp_path_factory.mktemp("toy"), instances_per_task=12)

    def config(**changes: object) -> jax_lora.RunConfig:
        keys = {
            "model": str(tiny_model),
            "dtype": "float32",
            "batch_size": 8,
            "micro_tokens": 1024,
            "lora.rank": 2,
            "optim.warmup_steps": 1,
            "optim.learning_rate": 1e-3,
            "data.path": str(toy),
            "data.test_per_task": 2,
            "data.train_per_task": 4,
            "data.buckets": (384,),
            "data.source_length": 320,
            "eval.buckets": (384,),
            "eval.max_new_tokens": 3,
        }
        return jax_lora.RunConfig().replace(**(keys | changes))

    return config
