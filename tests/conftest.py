"""Fixtures shared by the suite."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the repository; what needs it skips where it is missing."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the folder ../shared with real data is not here")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A real GGUF file: JAX_LORA_SMOLLM2 names it, or it lies in the repository's .cache."""
    default = REPOSITORY / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path = Path(os.environ.get("JAX_LORA_SMOLLM2", default))
    if not path.is_file():
        pytest.skip(f"no SmolLM2 GGUF: set JAX_LORA_SMOLLM2 or put it at {default}")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A GGUF file of a random two-layer LLaMA with a byte-level vocabulary."""
    from tests.weights import builders

    vocabulary = builders.tiny_bpe("gpt-2")
    weights = builders.hf_weights(len(vocabulary["tokens"]))
    small = {k: v if v.ndim == 1 else 0.1 * v for k, v in weights.items()}
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    builders.write_gguf(path, small, tokenizer=vocabulary)
    return path
