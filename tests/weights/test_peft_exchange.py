"""Adapter files exchanged with PEFT, both ways, and merged as PEFT merges."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_lora.weights import merge, peft
from tests.weights.builders import refusal

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.parity,
    # peft 0.21 asks transformers 5.23 for an attribute by its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def base(dtype="float32"):
    """A model of 8 and 12 columns, the same at every call."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))


def modules(model):
    """(layer, group, target, PEFT's module) of everything adapted."""
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            _, _, _, _, layer, group, target = name.split(".")
            yield int(layer), group, target, module


def kernels(model):
    """Our stacked kernels, float32, of a transformers model."""
    layers: dict = {"self_attn": {}, "mlp": {}}
    for name, weight in model.named_parameters():
        if name.endswith("_proj.weight"):
            _, _, _, group, target, _ = name.split(".")
            layers[group].setdefault(target, []).append(weight.detach().float().numpy().T)
    stacked = {g: {n: {"kernel": np.stack(w)} for n, w in m.items()} for g, m in layers.items()}
    return {"layers": stacked}


PATTERNS = {
    "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 3},
    "alpha_pattern": {r"model\.layers\.0\..*q_proj": 5, "v_proj": 2.5},
}


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        (PATTERNS, "float32"),
        (PATTERNS | {"use_rslora": True, "use_dora": True}, "float32"),
        ({"use_dora": True, "target_modules": r".*\.(up|o)_proj"}, "bfloat16"),
    ],
)
def test_against_peft_its_adapter_through_ours_is_the_same_adapter(tmp_path, options, dtype):
    targets = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    settings = dict(r=4, lora_alpha=6, lora_dropout=0.05, init_lora_weights=False)
    config = theirs.LoraConfig(**settings, **(targets | options), task_type="CAUSAL_LM")
    model = theirs.get_peft_model(base(dtype), config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_magnitude" in name:
                weight *= 1 + torch.rand_like(weight)
    model.save_pretrained(tmp_path / "theirs")

    found = peft.load(tmp_path / "theirs")
    more = {k: getattr(found, k) for k in ("rank", "alpha", "dropout", "base_name", "use_rslora")}
    folder = tmp_path / "ours"
    peft.save(folder, found.adapters, ranks=found.ranks, alphas=found.alphas, **more)
    wanted, ours = (
        load_file(f / "adapter_model.safetensors") for f in (tmp_path / "theirs", folder)
    )
    assert {str(tensor.dtype) for tensor in wanted.values()} == {dtype}
    assert wanted.keys() == ours.keys()
    for key, tensor in wanted.items():
        assert ours[key].tobytes() == tensor.astype(np.float32).tobytes(), key

    again = theirs.PeftModel.from_pretrained(base(), folder)
    loaded = {(i, target): module for i, _, target, module in modules(again)}
    merged = merge.merge(kernels(base(dtype)), found.adapters)["layers"]
    count = 0
    for i, group, target, module in modules(model):
        other = loaded[i, target]
        for key in ("r", "lora_alpha", "scaling", "use_rslora", "use_dora"):
            assert getattr(module, key) == getattr(other, key), key
        assert module.lora_dropout["default"].p == other.lora_dropout["default"].p == 0.05
        module.float()
        for key, tensor in other.state_dict().items():
            assert torch.equal(tensor, module.state_dict()[key]) or "base_layer" in key
        module.merge()
        kernel = module.get_base_layer().weight.detach().numpy().T
        np.testing.assert_allclose(merged[group][target]["kernel"][i], kernel, rtol=0, atol=1e-6)
        count += 1
    assert count == len(loaded) == 2 * len(found.targets)
    raw, same = (
        json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path / "theirs", folder)
    )
    free = {"init_lora_weights", "target_modules", "rank_pattern", "alpha_pattern"}  # seen above
    assert all(same[key] == raw[key] for key in set(same) - free)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")  # PEFT, while it converts
@pytest.mark.parametrize("options", [{"use_rslora": True}, {"rank_pattern": {"down_proj": 2}}])
def test_against_peft_a_pissa_adapter_loads_once_it_is_plain_lora(tmp_path, options):
    config = theirs.LoraConfig(
        r=3,
        lora_alpha=6,
        init_lora_weights="pissa",
        target_modules=["q_proj", "down_proj"],
        task_type="CAUSAL_LM",
        **options,
    )
    model = theirs.get_peft_model(base(), config)
    model.peft_config["default"].init_lora_weights = True  # as PEFT asks for the start
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight += 0.1 * torch.randn_like(weight)
    model.save_pretrained(tmp_path / "pissa")
    message = "'pissa', which changes the base weights; expected an adapter converted to plain LoRA"
    assert message in refusal(peft.load, tmp_path / "pissa")
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    found = peft.load(tmp_path / "plain")
    assert found.ranks == {
        "q_proj": (6, 6),
        "down_proj": (6, 6) if "use_rslora" in options else (4, 4),
    }
    merged = merge.merge(kernels(base()), found.adapters)["layers"]
    for i, group, target, module in modules(model):
        module.merge()
        kernel = module.get_base_layer().weight.detach().numpy().T
        np.testing.assert_allclose(merged[group][target]["kernel"][i], kernel, rtol=0, atol=1e-6)


def logits(model, tokens):
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens)).logits.numpy()


def our_logits(tmp_path, adapters, tokens):
    from jax_lora.model.transformer import Llama
    from jax_lora.weights import hf

    base().save_pretrained(tmp_path / "base")
    config, params = hf.load(tmp_path / "base", "float32")
    return np.asarray(Llama(config, np.float32).apply({"params": params, "lora": adapters}, tokens))


TOKENS = np.random.default_rng(0).integers(0, 32, (2, 16))
LAYER_OPTIONS = [
    {"layers_to_transform": [1]},
    {"layers_to_transform": 0, "layers_pattern": "layers"},
    {"layers_to_transform": [0], "layers_pattern": ["h", "layers"], "use_rslora": True},
    {"target_modules": r"model\.layers\.1\..*(q|down)_proj"},
    {"target_modules": r".*layers\.0\.self_attn\.q_proj|.*layers\.1\.mlp\.\w+_proj"},
    {"exclude_modules": r".*\.0\..*"},
    {"exclude_modules": ["layers.1.self_attn.q_proj", "0.mlp.down_proj"]},
    {"target_modules": ["q_proj", "0.mlp.down_proj", "model.layers.1.self_attn.o_proj"]},
    {"target_modules": ["q_proj", "query_key_value"], "rank_pattern": {"0.self_attn.q_proj": 2}},
    {"target_modules": "all-linear", "exclude_modules": ["q_proj", "o_proj"]},
    {"target_modules": None},
]


@pytest.mark.parametrize("options", LAYER_OPTIONS)
def test_against_peft_an_adapter_of_some_layers_gives_its_logits(tmp_path, options):
    from jax_lora.weights import hf

    settings = dict(r=4, lora_alpha=60, init_lora_weights=False, task_type="CAUSAL_LM")
    targets = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    model = theirs.get_peft_model(base(), theirs.LoraConfig(**settings, **(targets | options)))
    model.save_pretrained(tmp_path / "theirs")
    wanted = logits(model, TOKENS)

    base().save_pretrained(tmp_path / "base")
    found = peft.load_trained(tmp_path / "theirs", hf.read_config(tmp_path / "base"))
    ours = our_logits(tmp_path, found.adapters, TOKENS)
    assert np.abs(ours - wanted).max() / np.abs(wanted).max() < 1e-5
    assert np.abs(logits(base(), TOKENS) - wanted).max() / np.abs(wanted).max() > 1e-2

    more = {k: getattr(found, k) for k in ("rank", "alpha", "use_rslora", "ranks", "alphas")}
    peft.save(tmp_path / "ours", found.adapters, **more)
    again = theirs.PeftModel.from_pretrained(base(), tmp_path / "ours")
    assert np.array_equal(logits(again, TOKENS), wanted)
