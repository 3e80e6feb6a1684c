"""Values that are not finite are named where weights, adapters and GGUF tensors are read."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_lora.errors import DataError
from jax_lora.weights import base, finite
from tests.test_damaged_files import adapter, model
from tests.weights.builders import hf_weights, tiny_bpe, write_gguf


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_first_value_that_is_not_finite_is_named(dtype, value, monkeypatch):
    monkeypatch.setattr(finite, "_BLOCK", 7)
    array = np.zeros((4, 5), dtype)
    array[0, 0], array[0, 1] = ml_dtypes.finfo(dtype).max, ml_dtypes.finfo(dtype).min
    assert finite.check_finite(array, "x", "f") is array
    array[2, 3] = array[3, 4] = value
    with pytest.raises(DataError, match=rf"f: tensor x: found {value} at \(2, 3\), expected"):
        finite.check_finite(array, "x", "f")


def test_a_folder_of_weights(tmp_path):
    source = model(tmp_path)
    path = source / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = np.nan
    save_file(tensors, path)
    with pytest.raises(DataError, match=f"{source}: tensor {name}: found nan at"):
        base.load(source, "float32")


def test_an_adapter(tmp_path):
    folder, read = adapter(tmp_path)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name][0, 1] = np.inf
    save_file(tensors, path)
    with pytest.raises(DataError) as caught:
        read()
    assert str(path) in str(caught.value) and name in str(caught.value)


def test_a_gguf_file(tmp_path):
    keys = tiny_bpe("smollm")
    weights = hf_weights(len(keys["tokens"]))
    name = "model.norm.weight"
    weights[name] = weights[name].copy()
    weights[name][5] = -np.inf
    path = tmp_path / "tiny.gguf"
    write_gguf(path, weights, tokenizer=keys)
    with pytest.raises(DataError, match=rf"{path}: tensor output_norm.weight: found -inf at \(5,"):
        base.load(path, "float32")
