"""Adapters that a run is given: from another base, or in some layers only."""

from __future__ import annotations

import pytest

from jax_lora.errors import ConfigError, DataError
from jax_lora.files import read_json
from jax_lora.model import lora
from jax_lora.run import Run, initial_weights
from jax_lora.weights import base, peft
from tests.run.test_hub import trained  # noqa: F401  (a fixture)
from tests.weights.test_convert import adapter
from tests.weights.test_peft import BOTH, TINY, chosen


@pytest.mark.parametrize("call", ["score", "check"])
def test_an_adapter_of_another_base_is_not_scored_unless_asked_for(trained, tmp_path, call):  # noqa: F811
    saved, other = Run.open(None, trained).config, "0" * 64
    config = saved.replace(**{"data.path": str(tmp_path / "missing")})
    run = Run.open(config, trained)
    tree = adapter(tmp_path / "a")
    peft.save(tmp_path / "a", tree, rank=3, alpha=6, base_digest=other)
    score = {
        "score": lambda **more: run.score(None, str(tmp_path / "a"), **more),
        "check": lambda **more: run.check(str(tmp_path / "a"), **more),
    }[call]
    with pytest.raises(DataError) as caught:
        score()
    text = str(caught.value)
    assert other[:12] in text and base.digest(config.model)[:12] in text and "--any_base" in text
    with pytest.raises((DataError, OSError)) as caught:
        score(any_base=True)  # gets as far as the data, which is not there
    assert "any_base" not in str(caught.value) and "missing" in str(caught.value)


def test_a_run_names_its_base_in_its_adapter(trained):  # noqa: F811
    saved = read_json(trained / "config.json")
    assert peft.base_digest(trained) == peft.base_digest(trained / "adapter")
    assert peft.base_digest(trained) == saved["base_digest"]


def test_training_does_not_start_from_an_adapter_of_some_layers(tmp_path):
    chosen(tmp_path, BOTH, layers_to_transform=[1])
    with pytest.raises(ConfigError, match="found layers without an adapter of q_proj, down_proj"):
        initial_weights.new_adapters(
            TINY,
            rank=3,
            alpha=6,
            targets=("q_proj", "down_proj"),
            scaling=lora.SCALINGS[0],
            seed=0,
            init=str(tmp_path),
            variant="lora",
        )
