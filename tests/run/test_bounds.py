"""Nothing of a size that a file or a config names is made before the size is known to be right."""

import json

import pytest

from jax_lora.errors import ConfigError, DataError
from jax_lora.model import lora
from jax_lora.run import Run, initial_weights
from jax_lora.weights import gguf, hf
from jax_lora.weights.tokenizers import load_tokenizer


@pytest.fixture
def nothing_drawn(monkeypatch):
    def draw(*_, **__):
        raise AssertionError("adapters were made")

    monkeypatch.setattr(lora, "init", draw)


def test_adapters_beyond_the_memory_are_never_made(tiny_run, tmp_path, monkeypatch, nothing_drawn):
    monkeypatch.setattr(initial_weights.os, "sysconf", lambda name: 128)  # 16 KiB in all
    with pytest.raises(ConfigError, match="config.lora.rank: found 64, whose adapters take 0.0"):
        Run.open(tiny_run(**{"lora.rank": 64}), tmp_path / "r").train()
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "change",
    [{"num_hidden_layers": 4096}, {"hidden_size": 1 << 20, "num_attention_heads": 1 << 16}],
)
def test_a_base_is_compared_with_its_files_first(
    tiny_model, tiny_run, tmp_path, change, nothing_drawn
):
    folder = tmp_path / "hf"
    hf.save(folder, *gguf.load(tiny_model, "float32"), load_tokenizer(tiny_model), "float32")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=str(folder)):
        Run.open(tiny_run(model=str(folder)), tmp_path / "r").train()
