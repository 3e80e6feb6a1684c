"""Readers of quantized kernels: the values of the file, its order of rows, and what is refused."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter

from jax_lora.model.quantization import GGUF, NF4, Int8
from jax_lora.weights import base, gguf, hf, quantize
from tests import quantized
from tests.weights.builders import flat, hf_weights, refusal, write_gguf, write_hf


def numpy_only(path, array):
    assert isinstance(array, np.ndarray)
    return array


def kernel_of(tree, group="mlp", name="up_proj"):
    return tree["layers"][group][name]["kernel"]


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1])
def test_the_blocks_of_a_file_are_its_weights(tmp_path, kind):
    write_gguf(tmp_path / "m.gguf", hf_weights(bias=True), kind)
    config, dense = gguf.load(tmp_path / "m.gguf", "float32")
    same, found = gguf.load(tmp_path / "m.gguf", "float32", quantization="gguf")
    assert config == same
    assert isinstance(kernel_of(found), GGUF) and kernel_of(found).kinds == (kind.name,)
    for path, array in flat(quantized.dequantized(found)):
        leaf = dense
        for key in path:
            leaf = leaf[key]
        np.testing.assert_array_equal(array, leaf, err_msg="/".join(path))


def write_k_quants(path, kinds):
    """A file of two layers of 256 in random blocks: kinds[name][layer], Q4_K by default."""
    writer = GGUFWriter(path, "llama")
    keys = dict(block_count=2, context_length=64, embedding_length=256, feed_forward_length=512)
    for key, value in keys.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_uint32("llama.attention.head_count", 4)
    writer.add_uint32("llama.attention.head_count_kv", 2)
    writer.add_uint32("llama.vocab_size", 32)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    sizes = dict(attn_q=(256, 256), attn_k=(128, 256), attn_v=(128, 256), attn_output=(256, 256))
    sizes |= dict(ffn_gate=(512, 256), ffn_up=(512, 256), ffn_down=(256, 512))
    for i in range(2):
        for name, (rows, size) in sizes.items():
            kind = kinds.get(name, ("Q4_K", "Q4_K"))[i]
            blocks = quantized.gguf_rows(kind, rows, size, 100 * i + len(name))
            writer.add_tensor(f"blk.{i}.{name}.weight", blocks, raw_dtype=Kind[kind])
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(256, np.float32))
    writer.add_tensor("token_embd.weight", np.ones((32, 256), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_layers_of_a_file_may_have_several_kinds(tmp_path):
    # As in Q4_K_M, and with blocks of two sizes.
    kinds = {"ffn_down": ("Q6_K", "Q4_K"), "attn_v": ("Q4_K", "Q6_K"), "attn_q": ("Q8_0", "Q5_K")}
    write_k_quants(tmp_path / "m.gguf", kinds)
    dense = gguf.load(tmp_path / "m.gguf", "float32")[1]
    found = gguf.load(tmp_path / "m.gguf", "float32", quantization="gguf")[1]
    assert kernel_of(found, "mlp", "down_proj").kinds == ("Q4_K", "Q6_K")
    for path, array in flat(quantized.dequantized(found)):
        leaf = dense
        for key in path:
            leaf = leaf[key]
        np.testing.assert_array_equal(array, leaf, err_msg="/".join(path))


def test_kernels_are_never_floats_on_their_way_to_the_device(tmp_path):
    write_gguf(tmp_path / "m.gguf", hf_weights(), Kind.Q4_0)
    wide = []

    def put(path, array):
        if "kernel" in path and path[0] == "layers" and array.dtype == np.float32:
            wide.append(path)
        return array

    tree = gguf.load(tmp_path / "m.gguf", "float32", put, "gguf")[1]
    assert not wide
    stored = sum(x.nbytes for x in jax.tree.leaves(kernel_of(tree)))
    assert stored == 2 * (96 * 64 * 18 // 32 + 4)  # 4.5 bits per weight, and a kind per layer


@pytest.mark.parametrize(("form", "make"), [("int8", Int8), ("nf4", NF4)])
@pytest.mark.parametrize("source", ["hf", "gguf"])
def test_any_source_is_quantized_layer_by_layer(tmp_path, form, make, source):
    weights = hf_weights() if form == "int8" else widened()
    if source == "gguf":
        write_gguf(tmp_path / "m.gguf", weights, metadata=FEED_FORWARD if form == "nf4" else {})
        path = tmp_path / "m.gguf"
    else:
        size = {"intermediate_size": 128} if form == "nf4" else {}
        path = write_hf(tmp_path / "m", weights, **size)
    tree = base.load(path, "bfloat16", numpy_only, form)[1]
    kernel = kernel_of(tree)
    assert isinstance(kernel, make)
    assert tree["norm"]["scale"].dtype.name == "bfloat16"
    fields = {"int8": quantize.int8, "nf4": quantize.nf4}[form]
    for i in range(2):
        expected = fields(weights[f"model.layers.{i}.mlp.up_proj.weight"])
        for name, array in expected.items():
            np.testing.assert_array_equal(getattr(kernel, name)[i], array)


FEED_FORWARD = {"llama.feed_forward_length": 128}


def widened():
    """The tiny model with an mlp of 128, which blocks of 64 divide."""
    rng = np.random.default_rng(1)
    shapes = {"gate_proj": (128, 64), "up_proj": (128, 64), "down_proj": (64, 128)}
    return {
        key: rng.normal(size=shapes[key.split(".")[-2]]).astype(np.float32) if ".mlp." in key else x
        for key, x in hf_weights().items()
    }


# ---------------------------------------------------------------- what is refused


def test_blocks_that_do_not_divide_are_named(tmp_path):
    folder = write_hf(tmp_path / "m", hf_weights())
    for call in (
        lambda: base.check_quantization(folder, "nf4"),
        lambda: base.load(folder, "float32", lambda *_: pytest.fail("read"), "nf4"),
    ):
        assert refusal(call) == (
            f"{folder}: model.layers.0.mlp.down_proj.weight has 96 inputs, expected a multiple of "
            "64 for model_quantization=nf4"
        )


def test_gguf_blocks_need_a_gguf_file_and_known_kinds(tmp_path):
    folder = write_hf(tmp_path / "m", hf_weights())
    assert "found gguf for" in refusal(base.check_quantization, folder, "gguf")
    assert "found 'gguf' for" in refusal(hf.load, folder, "float32", quantization="gguf")
    for kind in (Kind.F32, Kind.F16, Kind.BF16):
        write_gguf(tmp_path / "m.gguf", hf_weights(), kind)
        expected = f"blk.0.attn_q.weight is {kind.name}, expected one of Q4_0, Q4_1,"
        assert expected in refusal(base.check_quantization, tmp_path / "m.gguf", "gguf")
        assert expected in refusal(gguf.load, tmp_path / "m.gguf", quantization="gguf")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_1])
def test_a_damaged_block_is_one_line_that_names_its_tensor(tmp_path, kind, value):
    path = tmp_path / "m.gguf"
    write_gguf(path, hf_weights(), kind)
    tensor = gguf.open_gguf(path).tensors["blk.1.ffn_up.weight"]
    content = bytearray(path.read_bytes())
    at = content.index(tensor.data.tobytes())
    size = {Kind.Q8_0: 34, Kind.Q4_1: 20}[kind]
    scale = at + 5 * size + (2 if kind == Kind.Q4_1 else 0)  # Q4_1's second, the minimum
    content[scale : scale + 2] = np.float16(value).tobytes()
    path.write_bytes(content)
    found = refusal(gguf.load, path, quantization="gguf")
    assert found.startswith(f"{path}: tensor blk.1.ffn_up.weight, scales of its blocks: found")
    assert "at (5,), expected finite numbers" in found


@pytest.mark.parametrize("form", ["int8", "nf4", "gguf"])
def test_weights_that_are_not_finite_are_named_in_every_form(tmp_path, form):
    weights = widened()
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    path = tmp_path / "m.gguf"
    kind = Kind.Q8_0 if form == "gguf" else Kind.F32
    with np.errstate(invalid="ignore"):
        write_gguf(path, weights, kind, metadata=FEED_FORWARD)
    assert "tensor blk.1.ffn_up.weight" in refusal(gguf.load, path, quantization=form)
