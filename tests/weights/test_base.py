"""The identity of a base: its content, wherever it lies."""

import shutil

import numpy as np

from jax_lora.weights import base
from tests.weights.builders import hf_weights, tiny_bpe, write_gguf, write_hf


def test_a_folder_is_known_by_its_content(tmp_path):
    weights = hf_weights()
    folder = write_hf(tmp_path / "one", weights)
    known = base.digest(folder)
    assert len(known) == 64
    shutil.copytree(folder, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "README.md").write_text("not a weight")
    assert base.digest(tmp_path / "elsewhere") == known
    assert base.digest(write_hf(tmp_path / "theta", weights, rope_theta=5e5)) != known
    weights["model.norm.weight"][3] += 1
    assert base.digest(write_hf(tmp_path / "other", weights)) != known


def test_a_gguf_is_known_by_its_content(tmp_path):
    keys = tiny_bpe("gpt-2")
    weights = hf_weights(len(keys["tokens"]))
    write_gguf(tmp_path / "a.gguf", weights, tokenizer=keys)
    shutil.copy(tmp_path / "a.gguf", tmp_path / "b.gguf")
    assert base.digest(tmp_path / "a.gguf") == base.digest(tmp_path / "b.gguf")
    weights["model.norm.weight"][3] += 1
    write_gguf(tmp_path / "c.gguf", weights, tokenizer=keys)
    assert base.digest(tmp_path / "a.gguf") != base.digest(tmp_path / "c.gguf")


def test_of_a_large_file_blocks_from_end_to_end_are_read(tmp_path):
    path = tmp_path / "a.gguf"
    content = np.zeros(6 << 20, np.uint8)
    content.tofile(path)
    known = base.digest(path)
    for at in (0, -1):
        changed = content.copy()
        changed[at] = 1
        changed.tofile(path)
        assert base.digest(path) != known
    np.append(content, np.uint8(0)).tofile(path)
    assert base.digest(path) != known
