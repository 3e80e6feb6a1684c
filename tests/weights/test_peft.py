"""LoRA adapters in PEFT's format, against what PEFT itself wrote and computed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_lora.model import lora
from jax_lora.model.arch import LINEAR_NAMES
from jax_lora.model.config import LlamaConfig
from jax_lora.weights import peft
from jax_lora.weights.peft_config import parse_config
from tests.weights.builders import flat, refusal

RECORDED = Path(__file__).resolve().parents[1] / "recorded" / "peft_adapter"
KEY = "base_model.model.model.layers.{}.{}.lora_{}.weight"
MAGNITUDE = "base_model.model.model.layers.{}.{}.lora_magnitude_vector"
TINY = LlamaConfig(
    vocab_size=32,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    rope_scaling=None,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)


def pairs(layers=2, rank=3, targets=("q_proj", "down_proj"), scale=2.0, d=8, f=12, dora=False):
    rng = np.random.default_rng(0)
    sizes = {"q_proj": ("self_attn", d, d), "down_proj": ("mlp", f, d)}
    tree: dict = {"layers": {}}
    for name in targets:
        group, size_in, size_out = sizes[name]
        tree["layers"].setdefault(group, {})[name] = {
            "a": rng.normal(size=(layers, size_in, rank)).astype(np.float32),
            "b": rng.normal(size=(layers, rank, size_out)).astype(np.float32),
            "scale": np.full(layers, scale, np.float32),
        }
        if dora:
            m = rng.uniform(0.5, 2, size=(layers, size_out)).astype(np.float32)
            tree["layers"][group][name]["m"] = m
    return tree


def assert_same_bits(found, wanted):
    found, wanted = dict(flat(found)), dict(flat(wanted))
    assert found.keys() == wanted.keys()
    for path, array in wanted.items():
        assert found[path].dtype == np.float32 and found[path].tobytes() == array.tobytes(), path


@pytest.fixture
def recorded(tmp_path) -> Path:
    folder = tmp_path / "recorded"
    shutil.copytree(RECORDED, folder)
    return folder


def leaves(adapters):
    for group in adapters["layers"].values():
        yield from group.items()


# ---------------------------------------------------------------- reading


def test_pefts_adapter_gives_pefts_update_to_every_kernel():
    found = peft.load(RECORDED)
    assert found.targets == ("q_proj", "v_proj", "down_proj")
    assert (found.rank, found.alpha, found.dropout, found.use_rslora) == (4, 6.0, 0.05, True)
    assert found.ranks == {"q_proj": (4, 2), "v_proj": (4, 4), "down_proj": (3, 3)}
    assert found.alphas == {"q_proj": (6, 6), "v_proj": (5, 5), "down_proj": (6, 6)}
    deltas = np.load(RECORDED / "deltas.npz")
    assert len(deltas.files) == 6
    for name in deltas.files:
        _, _, layer, group, module = name.split(".")
        leaf, i = found.adapters["layers"][group][module], int(layer)
        ours = leaf["scale"][i] * leaf["a"][i] @ leaf["b"][i]
        np.testing.assert_allclose(ours, deltas[name].T, rtol=2e-6, atol=1e-7)
    q = found.adapters["layers"]["self_attn"]["q_proj"]
    assert q["a"].shape == (2, 16, 4) and not q["a"][1, :, 2:].any() and not q["b"][1, 2:].any()
    assert {leaf[k].dtype for _, leaf in leaves(found.adapters) for k in leaf} == {
        np.dtype(np.float32)
    }


def test_half_precision_adapters_are_read_exactly(recorded):
    path = recorded / "adapter_model.safetensors"
    kinds = {"A": ml_dtypes.bfloat16, "B": np.float16}
    tensors = {k: v.astype(kinds[k.split("lora_")[1][0]]) for k, v in load_file(path).items()}
    save_file(tensors, path)
    leaf = peft.load(recorded).adapters["layers"]["mlp"]["down_proj"]
    for part in "AB":
        wanted = tensors[KEY.format(1, "mlp.down_proj", part)].astype(np.float32)
        assert leaf[part.lower()].dtype == np.float32
        assert np.array_equal(leaf[part.lower()][1].T, wanted)


@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_magnitudes_are_read_under_both_names(tmp_path, suffix):
    tree = pairs(dora=True)
    peft.save(tmp_path, tree, rank=3, alpha=6)
    path = tmp_path / "adapter_model.safetensors"
    found = load_file(path)
    assert MAGNITUDE.format(1, "self_attn.q_proj") in found
    save_file({k + suffix if k.endswith("vector") else k: v for k, v in found.items()}, path)
    assert_same_bits(peft.load(tmp_path).adapters, tree)


def test_a_target_that_is_a_regular_expression_is_compared_too(recorded):
    path = recorded / "adapter_config.json"
    raw = json.loads(path.read_text())
    for targets in (r".*\.(q|v|down)_proj", ".*[vq]_proj|.*down_proj"):
        path.write_text(json.dumps(raw | {"target_modules": targets}))
        assert peft.load(recorded).targets == ("q_proj", "v_proj", "down_proj")
    path.write_text(json.dumps(raw | {"target_modules": r".*\.([qkv]|down)_proj"}))
    assert "(A, B) for 0.self_attn.k_proj, 1.self_attn.k_proj" in refusal(peft.load, recorded)


def test_names_that_the_model_does_not_have_are_ignored_as_peft_ignores_them(recorded):
    path = recorded / "adapter_config.json"
    raw = json.loads(path.read_text())
    names = ["query_key_value", *raw["target_modules"]]
    path.write_text(json.dumps(raw | {"target_modules": names}))
    assert_same_bits(peft.load(recorded).adapters, peft.load(RECORDED).adapters)


def test_a_run_folder_stands_for_the_adapter_in_it(tmp_path):
    peft.save(tmp_path / "adapter", pairs(), rank=3, alpha=6)
    assert_same_bits(peft.load(tmp_path).adapters, pairs())


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            pairs(layers=3),
            "/adapter_model.safetensors: found a tensor of layer 2, expected 2 layers",
        ),
        (
            pairs(d=6),
            ": adapter leaf layers/self_attn/q_proj/a: found (2, 6, 3), expected (2, 8, 3)",
        ),
    ],
)
def test_an_adapter_of_another_model_is_told_with_its_folder(tmp_path, tree, message):
    wrong = tree["layers"]["self_attn"]  # the right down_proj does not excuse it
    peft.save(tmp_path / "a", {"layers": {"self_attn": wrong}}, rank=3, alpha=6)
    found = refusal(peft.load_trained, tmp_path / "a", TINY)
    assert found == f"{tmp_path / 'a'}{message}"


def test_an_adapter_that_lacks_a_layer_of_the_model_is_told(tmp_path):
    peft.save(tmp_path, pairs(layers=1), rank=3, alpha=6)
    found = refusal(peft.load_trained, tmp_path, TINY)
    assert "found no complete (A, B) for 1.self_attn.q_proj, 1.mlp.down_proj; expected" in found


def test_an_adapter_that_changes_nothing_is_told_with_its_folder(tmp_path):
    tree = pairs(dora=True)
    peft.save(tmp_path, tree, rank=3, alpha=6)
    assert_same_bits(peft.load_trained(tmp_path, TINY).adapters, tree)
    for _, leaf in leaves(tree):
        leaf["b"][:] = 0
    peft.save(tmp_path, tree, rank=3, alpha=6)
    found = refusal(peft.load_trained, tmp_path, TINY)
    assert found == f"{tmp_path}: every B is zero, expected a trained adapter"


def test_a_zero_adapter_is_told():
    tree = pairs()
    assert not lora.does_nothing(tree)
    for _, leaf in leaves(tree):
        leaf["b"][:] = 0
    assert lora.does_nothing(tree)
    assert lora.does_nothing({"layers": {}})


# ---------------------------------------------------------------- writing


def test_pefts_adapter_goes_out_as_it_came_in(tmp_path):
    found = peft.load(RECORDED)
    more = {k: getattr(found, k) for k in ("rank", "alpha", "dropout", "base_name", "use_rslora")}
    peft.save(tmp_path, found.adapters, ranks=found.ranks, alphas=found.alphas, **more)
    theirs, ours = (load_file(f / "adapter_model.safetensors") for f in (RECORDED, tmp_path))
    assert set(theirs) == set(ours)
    for key in theirs:
        assert theirs[key].dtype == ours[key].dtype and theirs[key].tobytes() == ours[key].tobytes()
    theirs, ours = (
        json.loads((f / "adapter_config.json").read_text()) for f in (RECORDED, tmp_path)
    )
    for key in set(ours) - {"init_lora_weights"}:
        assert ours[key] == theirs[key], key
    again = peft.load(tmp_path)
    assert (again.ranks, again.alphas, again.targets) == (found.ranks, found.alphas, found.targets)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_round_trips_bit_for_bit_and_replaces_the_last_one(tmp_path, dora):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text("old")
    tree = pairs(dora=dora)
    peft.save(tmp_path / "a", tree, rank=3, alpha=6, base_name="llama-7b")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 3,
        "lora_alpha": 6,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "down_proj"],
        "base_model_name_or_path": "llama-7b",
        "bias": "none",
        "use_rslora": False,
        "use_dora": dora,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    assert expected.items() <= config.items()
    assert_same_bits(peft.load(tmp_path / "a").adapters, tree)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize(
    ("tree", "more", "message"),
    [
        ({}, {}, "adapters: found nothing, expected some of"),
        ({"layers": {"mlp": {"dwon_proj": {}}}}, {}, "adapters: found ['dwon_proj'], expected"),
        (pairs(scale=1.0), {}, "adapters of q_proj: scale 1, expected 2"),
        (pairs(), {"use_rslora": True}, "adapters of q_proj: scale 2, expected 3.4641"),
        (pairs(), {"rank": 4, "alpha": 8}, "found 2 layers of up to rank 3, expected 2 of ranks"),
        (pairs(), {"rank": 2, "alpha": 4}, "layer 0 is not zero beyond its rank 2"),
        (
            {"layers": pairs(dora=True)["layers"] | pairs(targets=("q_proj",))["layers"]},
            {},
            "found m in down_proj only, expected it in all or none",
        ),
    ],
)
def test_adapters_that_contradict_themselves_are_not_written(tmp_path, tree, more, message):
    folder = tmp_path / "a"
    assert message in refusal(peft.save, folder, tree, **({"rank": 3, "alpha": 6} | more))
    assert not folder.exists()


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: found 'IA3', expected 'LORA'"),
        ({"use_dora": True}, "(A, B, magnitude) for 0.self_attn.q_proj, 1.self_attn.q_proj, 0."),
        ({"lora_bias": True}, "lora_bias: found True, expected False"),
        ({"bias": "all"}, "bias: found 'all', expected 'none'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: found ['lm_head']"),
        ({"init_lora_weights": "pissa_niter_4"}, "found 'pissa_niter_4', which changes the base"),
        ({"r": 2.5}, "r: found 2.5, expected a positive integer"),
        ({"lora_alpha": "x"}, "lora_alpha: found 'x', expected a number"),
        ({"lora_alpha": float("inf")}, "lora_alpha: found inf, expected a number"),
        ({"rank_pattern": [1]}, "rank_pattern: found [1]"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern: q_proj: found 2.5, expected a positive"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern: q_proj: found 'x', expected a number"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern: found '(', expected a regular expression"),
        ({"target_modules": "*"}, "target_modules: found '*', expected a regular expression"),
        ({"target_modules": [1]}, "target_modules: found [1], expected names"),
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            "target_modules: found model.embed_tokens, expected some of q_proj, ",
        ),
        ({"target_modules": r".*(proj|tokens)"}, "target_modules: found model.embed_tokens, expe"),
        ({"exclude_modules": "("}, "exclude_modules: found '(', expected a regular expression"),
        ({"target_modules": ["q_proj", "lm_head"]}, "found tensors of 0.self_attn.v_proj, "),
        ({"exclude_modules": ["v_proj"]}, "found tensors of 0.self_attn.v_proj, 1.self_attn.v_pro"),
        ({"exclude_modules": 3}, "exclude_modules: found 3, expected names"),
        ({"layers_to_transform": [1]}, "found tensors of 0.self_attn.q_proj, 0.self_attn.v_proj, "),
        ({"layers_to_transform": "1"}, "layers_to_transform: found '1', expected layers from 0 up"),
        ({"layers_to_transform": [-1]}, "layers_to_transform: found [-1], expected layers from 0"),
        ({"layers_pattern": "h"}, "layers_pattern: found 'h', expected layers_to_transform with"),
        (
            {"layers_to_transform": [0], "layers_pattern": "("},
            "layers_pattern: found '(', expected",
        ),
        (
            {"target_modules": ".*[qv]_proj", "layers_to_transform": 0},
            "layers_to_transform: found 0, expected none where target_modules is a text, as in PE",
        ),
        (
            {"target_modules": ["q_proj", "down_proj"]},
            "found tensors of 0.self_attn.v_proj, 1.self_attn.v_proj, expected none by "
            "target_modules, exclude_modules, layers_to_transform and layers_pattern",
        ),
        (
            {"r": 5},
            "layers.0.self_attn.q_proj: found A (4, 16), B (16, 4), expected A (5, 16), B (16, 5)",
        ),
        (
            {"target_modules": ["q_proj", "v_proj", "down_proj", "o_proj"]},
            "found no complete (A, B) for 0.self_attn.o_proj, 1.self_attn.o_proj; expected them by "
            "target_modules, exclude_modules, layers_to_transform and layers_pattern",
        ),
    ],
)
def test_configurations_that_mean_something_else_are_refused(recorded, keys, message):
    path = recorded / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    found = refusal(peft.load, recorded)
    assert message in found and str(recorded) in found


def test_a_module_that_is_listed_by_its_whole_name_is_of_no_layer():
    # As PEFT's check_target_module_exists: an exact name is looked up before layers are.
    raw = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "layers_to_transform": [1]}
    whole = "model.layers.0.self_attn.v_proj"
    found = parse_config(raw | {"target_modules": ["q_proj", "lm_head", whole]}, "here")
    assert found.targets("lm_head") and found.targets(whole)
    assert found.targets("model.layers.1.self_attn.q_proj")
    assert not found.targets("model.layers.0.self_attn.q_proj")
    assert not found.targets("model.layers.1.self_attn.v_proj")


def spoil(folder: Path, drop=(), **more):
    path = folder / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if k not in drop} | more, path)


ONE = np.ones((4, 16), np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json: no such file"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "safetensors: no such file"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "not valid JSON"),
        (
            lambda f: (f / "adapter_model.safetensors").write_bytes(
                (f / "adapter_model.safetensors").read_bytes()[:-8]
            ),
            "damaged or cut short at",
        ),
        (lambda f: spoil(f, load_file(f / "adapter_model.safetensors")), "found no tensors"),
        (
            lambda f: spoil(f, [KEY.format(1, "self_attn.v_proj", "B")]),
            "found no complete (A, B) for 1.self_attn.v_proj; expected them by target_modules, ",
        ),
        (
            lambda f: spoil(f, **{KEY.format(0, "self_attn.qkv_proj", "A"): ONE}),
            "layers.0.self_attn.qkv_proj.lora_A.weight, expected base_model.model.model.layers.N",
        ),
        (lambda f: spoil(f, **{KEY.format(0, "mlp.q_proj", "A"): ONE}), "found base_model"),
        (
            lambda f: spoil(f, **{"base_model.model.lm_head.lora_A.weight": ONE}),
            "found tensors of lm_head, expected none by target_modules, ",
        ),
        (
            lambda f: spoil(f, **{"base_model.model.embed_tokens.lora_A.weight": ONE}),
            "found base_model.model.embed_tokens.lora_A.weight, expected base_model.model.model.",
        ),
        (
            lambda f: spoil(f, **{KEY.format(3, "self_attn.v_proj", "A"): ONE}),
            "for 2.self_attn.q_proj, 3.self_attn.q_proj, 2.self_attn.v_proj and 3 more; expected",
        ),
        (
            lambda f: spoil(f, **{MAGNITUDE.format(0, "self_attn.v_proj"): ONE[0]}),
            "found base_model.model.model.layers.0.self_attn.v_proj.lora_magnitude_vector, "
            "expected use_dora: true with it",
        ),
        (
            lambda f: spoil(f, **{KEY.format(0, "self_attn.v_proj", "A"): ONE.ravel()}),
            "self_attn.v_proj.lora_A.weight: found shape (64,), expected 2 dimensions",
        ),
    ],
)
def test_spoilt_adapters_are_refused(recorded, change, message):
    change(recorded)
    assert message in refusal(peft.load, recorded)


# ---------------------------------------------------------------- adapters of some layers only


def chosen(folder: Path, rows: dict[str, tuple[int, ...]], **keys) -> None:
    """Write an adapter of `pairs` that PEFT's options leave in some layers of each target only."""
    peft.save(folder, pairs(), rank=3, alpha=6)
    path, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    kept = {
        key: tensor
        for key, tensor in load_file(path).items()
        if int(key.split(".")[4]) in rows.get(key.split(".")[6], ())
    }
    save_file(kept, path)
    config.write_text(json.dumps(json.loads(config.read_text()) | keys))


BOTH = {"q_proj": (1,), "down_proj": (1,)}
SOME = [
    (BOTH, {"layers_to_transform": [1]}),
    (BOTH, {"layers_to_transform": 1, "layers_pattern": "layers"}),
    (BOTH, {"layers_to_transform": [1], "layers_pattern": ["h", "layers"]}),
    (BOTH, {"target_modules": r"model\.layers\.1\..*(q|down)_proj"}),
    (BOTH, {"exclude_modules": r".*\.0\..*"}),
    ({"q_proj": (0,), "down_proj": (0, 1)}, {"exclude_modules": ["layers.1.self_attn.q_proj"]}),
    ({"q_proj": (0, 1), "down_proj": (0,)}, {"target_modules": ["q_proj", "0.mlp.down_proj"]}),
    ({"q_proj": (0, 1)}, {"exclude_modules": ["mlp.down_proj"]}),
    ({"q_proj": (0,)}, {"target_modules": ["model.layers.0.self_attn.q_proj"]}),
]


@pytest.mark.parametrize(("rows", "keys"), SOME)
def test_layers_that_an_adapter_leaves_out_are_zero_and_stay_out(tmp_path, rows, keys):
    chosen(tmp_path / "theirs", rows, **keys)
    found = peft.load_trained(tmp_path / "theirs", TINY)
    assert found.targets == tuple(rows)
    for name, leaf in leaves(found.adapters):
        wanted = dict(leaves(pairs()))[name]
        assert found.ranks[name] == tuple(3 if i in rows[name] else 0 for i in range(2))
        for i in range(2):
            for part in ("a", "b"):
                assert np.array_equal(leaf[part][i], wanted[part][i] * (i in rows[name]))
            assert leaf["scale"][i] == 2 * (i in rows[name])
    more = {"rank": 3, "alpha": 6, "ranks": found.ranks, "alphas": found.alphas}
    peft.save(tmp_path / "ours", found.adapters, **more)
    there, here = (
        load_file(tmp_path / n / "adapter_model.safetensors") for n in ("theirs", "ours")
    )
    assert there.keys() == here.keys()
    assert all(there[key].tobytes() == here[key].tobytes() for key in there)
    again = peft.load_trained(tmp_path / "ours", TINY)
    assert_same_bits(again.adapters, found.adapters)
    assert again.ranks == found.ranks


def test_all_linear_layers_but_the_excluded_ones_must_be_there(tmp_path):
    names = [n for n in LINEAR_NAMES if n not in ("q_proj", "down_proj")]
    keys = {"target_modules": "ALL-linear", "exclude_modules": names}
    chosen(tmp_path, {"q_proj": (0, 1), "down_proj": (0, 1)}, **keys)
    assert peft.load(tmp_path).targets == ("q_proj", "down_proj")
    chosen(tmp_path, {"q_proj": (0, 1)}, **keys)
    assert "for 0.mlp.down_proj, 1.mlp.down_proj; expected them by" in refusal(peft.load, tmp_path)


def test_no_targets_are_pefts_own_for_a_llama(recorded):
    path = recorded / "adapter_config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"target_modules": None}))
    found = refusal(peft.load, recorded)
    assert "found tensors of 0.mlp.down_proj, 1.mlp.down_proj, expected none by" in found
    tensors = load_file(recorded / "adapter_model.safetensors")
    spoil(recorded, [key for key in tensors if "down_proj" in key])
    assert peft.load(recorded).targets == ("q_proj", "v_proj")


def test_dora_in_some_layers_is_refused_by_name(tmp_path):
    peft.save(tmp_path, pairs(dora=True), rank=3, alpha=6)
    path = tmp_path / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if ".layers.1." in k}, path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"layers_to_transform": [1]}))
    found = refusal(peft.load, tmp_path)
    assert "layers_to_transform, layers_pattern: found DoRA in some layers only" in found
