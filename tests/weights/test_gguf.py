"""GGUF files written by the `gguf` package: weights, configuration, and damaged files."""

from __future__ import annotations

import os
import struct

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import quants

from jax_lora.errors import DataError
from jax_lora.model.config import RopeScaling
from jax_lora.model.families import CONFIGS
from jax_lora.weights import gguf, hf
from jax_lora.weights.gguf_file import open_gguf
from tests.weights.builders import (
    H,
    flat,
    hf_weights,
    refusal,
    tiny_bpe,
    write_gguf,
    write_hf,
)

# ---------------------------------------------------------------- weights


@pytest.mark.parametrize(
    "kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_1]
)
@pytest.mark.parametrize(("tied", "bias"), [(False, False), (True, True)])
def test_a_gguf_holds_the_model_of_the_folder_it_was_made_from(tmp_path, kind, tied, bias):
    # What quantisation leaves of the weights is the writing package's word.
    weights = hf_weights(tied=tied, bias=bias)
    kept = {
        k: quants.dequantize(quants.quantize(v, kind), kind) if v.ndim == 2 else v
        for k, v in weights.items()
    }
    write_gguf(tmp_path / "m.gguf", weights, kind)
    folder = write_hf(tmp_path / "m", kept, tie_word_embeddings=tied, attention_bias=bias)
    config, base = gguf.load(tmp_path / "m.gguf", "float32")
    expected_config, expected = hf.load(folder, "float32")
    assert config == expected_config
    found, wanted = dict(flat(base)), dict(flat(expected))
    assert set(found) == set(wanted)
    assert all(np.array_equal(found[path], wanted[path]) for path in wanted)


def test_bfloat16_is_asked_for_and_given(tmp_path):
    write_gguf(tmp_path / "m.gguf", hf_weights(), Kind.Q8_0)
    _, base = gguf.load(tmp_path / "m.gguf")
    assert {array.dtype.name for _, array in flat(base)} == {"bfloat16"}


# ---------------------------------------------------------------- the header is remembered


def test_a_file_that_changed_is_read_again(tmp_path):
    path = tmp_path / "m.gguf"
    for theta in (1e4, 2e4, 3e4):  # each in as many bytes as the one before
        write_gguf(path, hf_weights(), metadata={"llama.rope.freq_base": theta})
        os.utime(path, ns=(0, int(theta)))
        assert gguf.read_config(open_gguf(path)).rope_theta == theta
    first, second = open_gguf(path), open_gguf(path)
    first.metadata.clear()
    assert second.metadata and open_gguf(path).metadata == second.metadata
    path.write_bytes(path.read_bytes()[:-1])
    os.utime(path, ns=(0, 30000))
    with pytest.raises(DataError, match="cut short"):
        open_gguf(path)


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("keys", "field", "expected"),
    [
        ({}, "rope_theta", 10000.0),
        ({"rope.freq_base": 5e5}, "rope_theta", 5e5),
        ({"vocab_size": None}, "vocab_size", 40),
        ({"rope.dimension_count": None}, "head_dim", 16),
        ({"attention.key_length": 16, "attention.value_length": 16}, "head_dim", 16),
        ({}, "rope_scaling", None),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 2.0}, "rope_scaling", None),
        ({"rope.scaling.factor": 2.0}, "rope_scaling", RopeScaling("linear", 2.0)),
        ({"rope.scale_linear": 4.0}, "rope_scaling", RopeScaling("linear", 4.0)),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
            "rope_scaling",
            RopeScaling("linear", 2.0),
        ),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 128,
                "rope.scaling.yarn_beta_fast": 16.0,
            },
            "rope_scaling",
            RopeScaling("yarn", 4.0, 128, beta_fast=16.0),
        ),
    ],
)
def test_metadata_becomes_configuration(tmp_path, keys, field, expected):
    path = tmp_path / "m.gguf"
    metadata = {f"llama.{k}": v for k, v in keys.items()}
    tokens = {"tokens": [str(i) for i in range(40)]}
    write_gguf(path, hf_weights(), metadata=metadata, tokenizer=tokens)
    assert getattr(gguf.read_config(open_gguf(path)), field) == expected


def llama3_table(factor: float, theta: float, original=8192, low=1.0, high=4.0) -> np.ndarray:
    """The divisors as llama.cpp's converter defines them, case by case."""
    table = []
    for frequency in 1 / theta ** (np.arange(0, H, 2) / H):
        wavelength = 2 * np.pi / frequency
        if wavelength < original / high:
            table.append(1.0)
        elif wavelength > original / low:
            table.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            table.append(1 / ((1 - smooth) / factor + smooth))
    return np.asarray(table, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_1_is_recognised_by_its_divisors(tmp_path, factor):
    table = {"rope_freqs.weight": llama3_table(factor, 5e5)}
    assert 1.0 < table["rope_freqs.weight"][4] < factor  # the smooth part is there
    path = tmp_path / "m.gguf"
    write_gguf(path, hf_weights(), metadata={"llama.rope.freq_base": 5e5}, extra=table)
    config, _ = gguf.load(path, "float32")
    assert config.rope_scaling == RopeScaling("llama3", factor, 8192, 1.0, 4.0)


@pytest.mark.parametrize(
    "table",
    [llama3_table(16.0, 5e5), llama3_table(8.0, 5e5, original=4096), np.ones(4, np.float32)],
)
def test_other_divisors_are_refused(tmp_path, table):
    path = tmp_path / "m.gguf"
    keys = {"llama.rope.freq_base": 5e5}
    write_gguf(path, hf_weights(), metadata=keys, extra={"rope_freqs.weight": table})
    assert "rope_freqs.weight: found a table of" in refusal(gguf.load, path)


# ---------------------------------------------------------------- what is refused


def change(weights, drop=(), **more):
    return {k: v for k, v in weights.items() if k not in drop} | more


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"expert_count": 8}, "llama.expert_count: found 8, expected a dense model"),
        ({"rope.dimension_count": 8}, "llama.rope.dimension_count: found 8, expected the head"),
        ({"attention.value_length": 8}, "llama.attention.value_length: found 8"),
        ({"rope.scaling.type": "longrope"}, "found 'longrope', expected none, linear or yarn"),
        ({"rope.scaling.attn_factor": 0.5}, "llama.rope.scaling.attn_factor: found 0.5"),
        ({"block_count": None}, "llama.block_count: found nothing, expected one positive"),
        ({"attention.head_count": [4, 4]}, "llama.attention.head_count: found [4, 4]"),
        ({"attention.head_count": 0}, "llama.attention.head_count: found 0"),
        ({"attention.head_count_kv": 3}, "num_key_value_heads, 3"),
        ({"block_count": 3}, "missing tensors blk.2.attn_norm.weight, blk.2.ffn_norm.weight, "),
        ({"feed_forward_length": 64}, "blk.0.ffn_gate.weight has shape (96, 64), expected (64,"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(tmp_path, keys, message):
    path = tmp_path / "m.gguf"
    write_gguf(path, hf_weights(), metadata={f"llama.{k}": v for k, v in keys.items()})
    found = refusal(gguf.load, path, put=lambda *_: pytest.fail("read a weight"))
    assert message in found and found.startswith(str(path))


def test_other_architectures_split_files_and_strange_tensors_are_refused(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, hf_weights(), architecture="gemma2")
    assert "general.architecture: found 'gemma2', expected one of llama" in refusal(gguf.load, path)
    write_gguf(path, hf_weights(), metadata={"split.count": 3})
    assert "one of 3 parts" in refusal(gguf.load, path)
    write_gguf(path, hf_weights(), extra={"blk.0.attn_q_norm.weight": np.ones(16, np.float32)})
    assert "unexpected tensor blk.0.attn_q_norm.weight" in refusal(gguf.load, path)
    write_gguf(path, hf_weights() | {"model.norm.weight": np.ones(64, np.float64)})
    data = path.read_bytes()
    name = b"output_norm.weight"
    # The same bytes, said to be F64: a kind that the package does not de-quantise.
    at = data.index(name) + len(name) + 4 + 8
    path.write_bytes(data[:at] + struct.pack("<I", Kind.F64) + data[at + 4 :])
    found = refusal(gguf.load, path, put=lambda *_: pytest.fail("read a weight"))
    assert "output_norm.weight is F64, which cannot be read" in found


def test_a_missing_tensor_is_named_as_the_file_names_it(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, change(hf_weights(), ["model.layers.1.self_attn.q_proj.weight"]))
    assert (
        refusal(gguf.load, path)
        == f"{path}: missing tensor blk.1.attn_q.weight; expected 21 tensors"
    )


def test_what_is_no_gguf_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    for content in (b"", b"GG", b"PK\x03\x04 some zip archive"):
        path.write_bytes(content)
        assert "not a GGUF file: starts with" in refusal(gguf.load, path)
    assert "m2.gguf" in refusal(gguf.load, tmp_path / "m2.gguf")


def test_a_file_cut_anywhere_is_refused_before_a_weight_is_read(tmp_path):
    path, whole = tmp_path / "m.gguf", tmp_path / "whole.gguf"
    write_gguf(whole, hf_weights(), tokenizer=tiny_bpe("smollm"), metadata={"llama.vocab_size": 40})
    data = whole.read_bytes()
    gguf.load(whole)
    last = 64 * 40 * 4  # the head is the last tensor
    for size in [*range(4, 30_000, 97), len(data) // 2, len(data) - last, len(data) - 40]:
        path.write_bytes(data[:size])
        found = refusal(gguf.load, path, put=lambda *_: pytest.fail("read a weight"))
        assert found.startswith(f"{path}: damaged or cut short at {size} bytes: ")
    assert "tensor output.weight would end at byte" in found


@pytest.mark.parametrize("at", range(4, 400, 3))
def test_garbage_in_the_header_is_one_line_or_another_model(tmp_path, at):
    path = tmp_path / "m.gguf"
    write_gguf(path, hf_weights())
    data = bytearray(path.read_bytes())
    data[at : at + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    try:
        gguf.load(path)  # the change may lie in a name that does not matter
    except ValueError as error:
        assert "\n" not in str(error) and str(path) in str(error)


# ---------------------------------------------------------------- the real file


def test_smollm2_is_the_published_shape(smollm2):
    config = gguf.read_config(open_gguf(smollm2))
    assert config == CONFIGS["smollm2-135m"]
