"""Adapters as plain LoRA: the same update, with one rank and α/r."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_lora.run.convert import convert_adapter
from jax_lora.weights import peft
from jax_lora.weights.fold import fold_scale
from tests.scripts import run
from tests.weights.builders import refusal
from tests.weights.test_peft import BOTH, RECORDED, chosen, leaves, pairs


def updates(adapters):
    """s A B of every target, float64: (L, in, out)."""
    for name, leaf in leaves(adapters):
        a, b, s = (leaf[key].astype(np.float64) for key in ("a", "b", "scale"))
        yield name, s[:, None, None] * (a @ b)


def test_an_rslora_adapter_with_patterns_becomes_a_plain_one(tmp_path):
    done = run("convert.py", str(RECORDED), str(tmp_path / "plain"), "--fold-scale")
    assert done == (0, f"wrote {tmp_path / 'plain'}\n", "")
    raw = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    plain = {"r": 4, "lora_alpha": 4, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    assert plain.items() <= raw.items()
    tensors = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    assert {min(tensor.shape) for tensor in tensors.values()} == {4}
    before = dict(updates(peft.load(RECORDED).adapters))
    after = dict(updates(peft.load(tmp_path / "plain").adapters))
    assert before.keys() == after.keys()
    for name, update in before.items():
        error = np.abs(after[name] - update).max() / np.abs(update).max()
        assert error < 1e-6, name


def test_layers_without_an_adapter_stay_so(tmp_path):
    chosen(tmp_path, BOTH, layers_to_transform=[1], use_rslora=True)
    found = peft.load(tmp_path)
    folded = fold_scale(found, "here")
    # The last layer is one that the base may have: without it, layer 1 would be the last of all.
    assert folded.ranks == {"q_proj": (0, 3, 0), "down_proj": (0, 3, 0)}
    peft.save(tmp_path / "out", folded.adapters, rank=3, alpha=3, ranks=folded.ranks)
    again = peft.load(tmp_path / "out")
    assert again.ranks == folded.ranks
    before, after = (dict(updates(one.adapters)) for one in (found, again))
    for name, update in before.items():
        np.testing.assert_allclose(after[name], update, rtol=0, atol=1e-6 * np.abs(update).max())


def test_dora_is_refused(tmp_path):
    peft.save(tmp_path, pairs(dora=True), rank=3, alpha=6)
    found = refusal(fold_scale, peft.load(tmp_path), "here")
    assert found == "here: found DoRA, expected LoRA, whose scale can be folded into B"


@pytest.mark.parity
# peft 0.21 asks transformers 5.23 for an attribute by its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("layers", [None, [1]])
def test_against_peft_the_plain_adapter_gives_the_same_logits(tmp_path, layers):
    pytest.importorskip("torch")
    theirs = pytest.importorskip("peft")
    from tests.weights.test_peft_exchange import TOKENS, base, logits, our_logits

    config = theirs.LoraConfig(
        r=4,
        lora_alpha=60,
        use_rslora=True,
        init_lora_weights=False,
        target_modules=["q_proj", "v_proj", "down_proj"],
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
        rank_pattern={"layers.1.self_attn.q_proj": 2, "down_proj": 3},
        alpha_pattern={r"model\.layers\.1\..*q_proj": 50, "v_proj": 25},
    )
    model = theirs.get_peft_model(base(), config)
    model.save_pretrained(tmp_path / "theirs")
    convert_adapter(str(tmp_path / "theirs"), str(tmp_path / "plain"), fold=True)
    wanted = logits(model, TOKENS)
    plain = theirs.PeftModel.from_pretrained(base(), tmp_path / "plain")
    largest = np.abs(wanted).max()
    assert np.abs(logits(plain, TOKENS) - wanted).max() / largest < 1e-6
    before, after = (
        our_logits(tmp_path, peft.load(tmp_path / n, 2).adapters, TOKENS)
        for n in ("theirs", "plain")
    )
    assert np.abs(after - before).max() / largest < 1e-6
    assert np.abs(after - wanted).max() / largest < 1e-5
