"""Values outside of a key's domain are refused before any compute."""

from __future__ import annotations

import math

import pytest

from jax_lora.config import CHOICES, RunConfig
from jax_lora.data.sources import tables
from jax_lora.errors import ConfigError
from jax_lora.model import attention, lora, transformer
from jax_lora.run import initial_weights

NAN, INF = math.nan, math.inf
WRONG = [
    *(("optim.learning_rate", value) for value in (-0.1, NAN, INF)),
    *(("optim.b1", value) for value in (1.0, -0.1, NAN)),
    *(("optim.b2", value) for value in (1.0, 2.0, NAN)),
    *(("optim.eps", value) for value in (0.0, -1e-8, NAN)),
    *(("optim.clip_norm", value) for value in (-1.0, NAN, INF)),
    *(("optim.weight_decay", value) for value in (-1.0, NAN)),
    *(("optim.loraplus_lr_ratio", value) for value in (0.0, NAN)),
    *(("lora.alpha_per_rank", value) for value in (0.0, -2.0, NAN, INF)),
    *(("lora.dropout", value) for value in (1.0, -0.1, NAN)),
    *(("lora.rank", value) for value in (0, -1, 1.5, True)),
    *(("data.buckets", value) for value in ((), (384.5, 768), (0, 768), (-1,), 768)),
    *(("eval.buckets", value) for value in ((), (384.5,), (0,))),
    *(("eval.metrics", value) for value in ((), "exact_match")),
    *(("batch_size", value) for value in (0, -1, 0.5)),
    *(("epochs", value) for value in (0, NAN)),
    *(("tracker", value) for value in ("", "mlflow", None)),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_a_value_outside_of_its_domain_is_refused_by_name(key, value):
    with pytest.raises(ConfigError) as caught:
        RunConfig().replace(**{key: value})
    text = str(caught.value)
    assert text.startswith(f"config.{key}: found ") and ", expected " in text and "\n" not in text


def test_a_group_is_replaced_key_by_key():
    config = RunConfig().replace(**{"lora.dropout": 0.0, "lora.targets": ("q_proj",)})
    found = config.replace(lora={"rank": 8}, seed=3, **{"optim.b1": 0.5})
    expected = {"lora.rank": 8, "seed": 3, "optim.b1": 0.5}
    assert found == config.replace(**expected) and found.lora.dropout == 0.0
    for wrong in ({"lora": {"r": 8}}, {"loar": {"rank": 8}}, {"lora": {"rank": {"x": 1}}}):
        with pytest.raises(ConfigError, match="no such key"):
            config.replace(**wrong)


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("remat", transformer.REMAT),
        ("attention", ("auto", *attention.KERNELS)),
        ("lora.scaling", lora.SCALINGS),
        ("lora.variant", initial_weights.VARIANTS),
        ("data.format", ("auto", "ni", *tables.FILES, "datasets", "hub")),
    ],
)
def test_a_choice_is_what_the_module_that_reads_it_knows(key, known):
    # The config imports no sibling, so that these lists are written twice.
    assert CHOICES[key] == known
