"""Hugging Face folders: weights, the hub's cache, and damaged input."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_lora.errors import ConfigError
from jax_lora.model.config import RopeScaling
from jax_lora.weights import base as base_weights
from jax_lora.weights import hf, tokenizers
from tests.weights.builders import CONFIG, HEADS, LLAMA3, D, H, hf_weights, refusal, write_hf

# ---------------------------------------------------------------- reading


def test_every_tensor_arrives_in_its_place(tmp_path):
    weights = hf_weights(bias=True)
    folder = write_hf(tmp_path / "m", weights, attention_bias=True)
    config, base = hf.load(folder, "float32")
    assert config.biases == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert not config.tie_word_embeddings
    assert np.array_equal(base["embed_tokens"]["embedding"], weights["model.embed_tokens.weight"])
    assert np.array_equal(base["norm"]["scale"], weights["model.norm.weight"])
    assert np.array_equal(base["lm_head"]["kernel"], weights["lm_head.weight"].T)
    layers = base["layers"]
    assert set(layers) == {"input_layernorm", "post_attention_layernorm", "self_attn", "mlp"}
    for i in range(2):
        at = f"model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            assert np.array_equal(layers[norm]["scale"][i], weights[f"{at}{norm}.weight"])
        for group in ("self_attn", "mlp"):
            for name, leaf in layers[group].items():
                assert np.array_equal(leaf["kernel"][i], weights[f"{at}{group}.{name}.weight"].T)
                if group == "self_attn":
                    assert np.array_equal(leaf["bias"][i], weights[f"{at}{group}.{name}.bias"])
                assert set(leaf) == ({"kernel", "bias"} if group == "self_attn" else {"kernel"})


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wanted", ["float32", "float16", "bfloat16"])
def test_dtypes_are_cast_once_from_what_is_stored(tmp_path, stored, wanted):
    weights = {k: v.astype(stored) for k, v in hf_weights().items()}
    _, base = hf.load(write_hf(tmp_path / "m", weights), wanted)
    leaf = base["layers"]["mlp"]["up_proj"]["kernel"]
    assert leaf.dtype == wanted
    expected = jnp.asarray(weights["model.layers.1.mlp.up_proj.weight"]).astype(wanted).T
    assert np.array_equal(leaf[1], expected)


def test_tied_models_have_no_head_and_old_leftovers_are_ignored(tmp_path):
    weights = hf_weights(tied=True)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    _, base = hf.load(write_hf(tmp_path / "m", weights, tie_word_embeddings=True), "float32")
    assert set(base) == {"embed_tokens", "layers", "norm"}


@pytest.mark.parametrize("rows", [40, 41])
def test_a_head_that_is_called_tied_and_differs_is_refused(tmp_path, rows):
    weights = hf_weights(tied=True)
    weights["lm_head.weight"] = np.resize(weights["model.embed_tokens.weight"], (rows, D)).copy()
    weights["lm_head.weight"][39, 3] += 1e-3
    folder = write_hf(tmp_path / "m", weights, tie_word_embeddings=True)
    found = refusal(hf.load, folder, "float32")
    assert found.startswith(f"{folder}: lm_head.weight differs from model.embed_tokens.weight")
    if rows == 40:
        write_hf(folder, weights, tie_word_embeddings=False)
        _, base = hf.load(folder, "float32")
        assert np.array_equal(base["lm_head"]["kernel"].T, weights["lm_head.weight"])


def test_no_more_than_one_leaf_is_alive_beside_what_is_placed(tmp_path):
    shape = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=8, vocab_size=256)
    raw = CONFIG | shape | {"num_key_value_heads": 4}
    config = hf.parse_config(raw)
    numbers = np.zeros((256, 256), np.float32)
    names = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o")
    names += ("mlp.gate", "mlp.up", "mlp.down")
    weights = {f"model.layers.{i}.{n}_proj.weight": numbers for i in range(8) for n in names}
    norms = ("input_layernorm", "post_attention_layernorm")
    weights |= {f"model.layers.{i}.{n}.weight": numbers[0] for i in range(8) for n in norms}
    weights |= {"model.embed_tokens.weight": numbers, "lm_head.weight": numbers}
    weights["model.norm.weight"] = numbers[0]
    folder = write_hf(tmp_path / "m", weights, **shape, num_key_value_heads=4)
    placed: list[tuple[str, ...]] = []
    tracemalloc.start()
    try:
        hf.load(folder, "float32", put=lambda path, array: placed.append(path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(placed) == len(set(placed)) == 12
    leaf, tensor = 8 * numbers.nbytes, numbers.nbytes
    assert config.num_hidden_layers == 8 and peak < leaf + 4 * tensor  # all of it: 58 tensors


# ---------------------------------------------------------------- damaged folders


def spoil_config(folder: Path, **keys):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def spoil_weights(folder: Path, drop=(), **more):
    path = folder / "model.safetensors"
    weights = {k: v for k, v in load_file(path).items() if k not in drop}
    save_file(weights | more, path)


def cut(path: Path, keep: float):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


DOWN = "model.layers.{}.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "found a list, expected a JSON object"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights, expected model.safetensors"),
        (lambda f: cut(f / "model.safetensors", 0.9), "damaged or cut short at"),
        (lambda f: cut(f / "model.safetensors", 0.001), "damaged or cut short at"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "damaged or cut short at 0 bytes"),
        (
            lambda f: spoil_weights(f, [DOWN.format(1)]),
            f"missing tensor {DOWN.format(1)}; expected 21 tensors",
        ),
        (
            lambda f: spoil_config(f, num_hidden_layers=4),
            "missing tensors model.layers.2.input_layernorm.weight, "
            "model.layers.3.input_layernorm.weight, "
            "model.layers.2.post_attention_layernorm.weight and 15 more",
        ),
        (
            lambda f: spoil_config(f, intermediate_size=97),
            "model.layers.0.mlp.gate_proj.weight has shape (96, 64), expected (97, 64)",
        ),
        (
            lambda f: spoil_weights(f, ["lm_head.weight"]),
            "lm_head.weight is missing, though tie_word_embeddings is false",
        ),
        (
            lambda f: spoil_weights(f, **{"model.extra.weight": np.ones(2, np.float32)}),
            "unexpected tensor model.extra.weight",
        ),
        (
            lambda f: spoil_weights(f, **{DOWN.format(0): np.ones((64, 96), np.int8)}),
            f"{DOWN.format(0)} is I8, expected unquantised floats",
        ),
    ],
)
def test_a_spoilt_folder_is_refused_before_any_weight_is_read(tmp_path, spoil, message):
    folder = write_hf(tmp_path / "m", hf_weights())
    spoil(folder)
    placed = []
    found = refusal(hf.load, folder, "float32", put=lambda path, array: placed.append(path))
    assert message in found and str(folder) in found and not placed


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f, shard: shard.unlink(), "this shard is missing, though model.safetensors.index"),
        (lambda f, shard: cut(shard, 0.5), "damaged or cut short"),
        (lambda f, shard: save_file({}, shard), "no tensor"),
        (lambda f, shard: (f / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
    ],
)
def test_a_spoilt_shard_is_named(tmp_path, spoil, message):
    config, base = hf.load(write_hf(tmp_path / "one", hf_weights()), "float32")
    hf.save(tmp_path / "m", config, base, dtype="float32", shard_bytes=50_000)
    spoil(tmp_path / "m", sorted((tmp_path / "m").glob("*.safetensors"))[2])
    assert message in refusal(hf.load, tmp_path / "m")


def test_other_dtypes_and_overflow_are_refused(tmp_path):
    weights = hf_weights()
    weights["model.norm.weight"][3] = 1e5
    folder = write_hf(tmp_path / "m", weights)
    assert "dtype: found 'int8', expected one of" in refusal(hf.load, folder, "int8")
    found = refusal(hf.load, folder, "float16")
    assert "model.norm.weight: holds 100000, above float16's largest 65504" in found


# ---------------------------------------------------------------- where a source lies


def test_folders_and_gguf_files_are_themselves(tmp_path):
    assert hf.resolve(tmp_path) == tmp_path
    (tmp_path / "a.gguf").touch()
    assert hf.resolve(str(tmp_path / "a.gguf")) == tmp_path / "a.gguf"
    (tmp_path / "a.bin").touch()
    assert "expected a folder or a .gguf file" in refusal(hf.resolve, tmp_path / "a.bin")


def test_a_hub_id_is_found_in_the_hubs_cache_offline(tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    write_hf(repository / "snapshots" / commit, hf_weights())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = hf.resolve("org/tiny")
    assert hf.load(found, "float32")[0].hidden_size == 64
    lost = refusal(hf.resolve, "org/other")
    assert lost.startswith("org/other: no such folder or file here, and as a hub id it could not")
    for name in ("nowhere", "/no/where/at/all", "./a/b", "../b"):
        assert f"{name}: no such folder or file, nor a hub id" in refusal(hf.resolve, name)


def test_planning_and_encoding_fetch_no_weights_of_a_hub_id(tmp_path, monkeypatch):
    write_hf(tmp_path, hf_weights())
    asked = []

    def fetch(name, allow_patterns, **_):
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert base_weights.known_or_read_config("org/tiny").hidden_size == 64
    assert base_weights.known_or_read_kinds("org/tiny", "int8") == ()
    with pytest.raises(ConfigError, match="expected a GGUF file"):
        base_weights.check_quantization("org/tiny", "gguf")
    assert not tokenizers.has_tokenizer("org/tiny")
    assert asked and not any(fnmatch("model.safetensors", pattern) for pattern in asked)
    base_weights.load("org/tiny", "float32")
    assert any(fnmatch("model.safetensors", pattern) for pattern in asked)


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_saved_is_what_was_loaded_bit_for_bit(tmp_path, tied):
    weights = hf_weights(tied=tied, bias=True)
    folder = write_hf(tmp_path / "m", weights, tie_word_embeddings=tied, attention_bias=True)
    config, base = hf.load(folder, "float32")
    hf.save(tmp_path / "one", config, base, dtype="float32")
    hf.save(tmp_path / "many", config, base, dtype="float32", shard_bytes=50_000)
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()
    saved = load_file(tmp_path / "one" / "model.safetensors")
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 3 and shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    assert max(path.stat().st_size for path in shards) < 52_000
    split = {k: v for path in shards for k, v in load_file(path).items()}
    for found in (saved, split):
        assert set(found) == set(weights)
        assert all(np.array_equal(found[k], weights[k]) for k in weights)
    again, _ = hf.load(tmp_path / "many", "float32")
    assert again == config
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "many", "one"]  # nothing partial


def test_saving_leaves_nothing_behind_when_it_fails(tmp_path):
    config, base = hf.load(write_hf(tmp_path / "m", hf_weights()), "float32")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "keep").touch()
    assert "not empty" in refusal(hf.save, tmp_path / "full", config, base)
    wrong = replace(config, vocab_size=41)
    found = refusal(hf.save, tmp_path / "new", wrong, base)
    assert found == ("base parameter embed_tokens/embedding: found (40, 64), expected (41, 64)")
    base["norm"]["scale"] = base["norm"]["scale"] * 1e30
    assert "model.norm.weight" in refusal(hf.save, tmp_path / "new", config, base, dtype="float16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "m"]
    (tmp_path / "empty").mkdir()
    hf.save(tmp_path / "empty", config, base)
    assert (tmp_path / "empty" / "model.safetensors").is_file()


# ---------------------------------------------------------------- against transformers


@pytest.mark.parity
@pytest.mark.parametrize("rope", [None, LLAMA3, {"rope_type": "linear", "factor": 2.0}])
def test_against_hf_transformers_loads_what_we_save(tmp_path, rope):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    keys = {"rope_scaling": rope, "attention_bias": True}
    weights = hf_weights(bias=True)
    config, base = hf.load(write_hf(tmp_path / "m", weights, **keys), "float32")
    hf.save(tmp_path / "out", config, base, dtype="float32", shard_bytes=50_000)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32
    state = model.state_dict()
    assert set(state) == set(weights)
    assert all(np.array_equal(state[k].numpy(), weights[k]) for k in weights)
    theirs = model.config
    assert theirs.rope_parameters["rope_type"] == (rope or {"rope_type": "default"})["rope_type"]
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert (theirs.head_dim, theirs.num_attention_heads) == (H, HEADS)


@pytest.mark.parity
@pytest.mark.parametrize("tied", [False, True])
def test_against_hf_we_load_what_transformers_saves(tmp_path, tied):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    keys = {k: v for k, v in CONFIG.items() if k not in ("model_type", "rope_theta")}
    rope = {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 2e4,
        "original_max_position_embeddings": 128,
    }
    theirs = transformers.LlamaConfig(
        **keys, rope_parameters=rope, tie_word_embeddings=tied, mlp_bias=True
    )
    model = transformers.LlamaForCausalLM(theirs)
    model.save_pretrained(tmp_path / "m")
    config, base = hf.load(tmp_path / "m", "float32")
    assert config.rope_scaling == RopeScaling("yarn", 4.0, 128) and config.rope_theta == 2e4
    state = model.state_dict()
    for i in range(2):
        down = state[f"model.layers.{i}.mlp.down_proj.weight"].numpy().T
        assert np.array_equal(base["layers"]["mlp"]["down_proj"]["kernel"][i], down)
        bias = state[f"model.layers.{i}.mlp.down_proj.bias"].numpy()
        assert np.array_equal(base["layers"]["mlp"]["down_proj"]["bias"][i], bias)
    assert ("lm_head" in base) is not tied
