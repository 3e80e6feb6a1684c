"""LoRA on lm_head against PEFT: files, logits, gradients, greedy answers, the merged model."""

from __future__ import annotations

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_lora.generation import greedy, scheduler
from jax_lora.model.transformer import Llama
from jax_lora.training import trainable_mask
from jax_lora.weights import hf, merge
from jax_lora.weights import peft as our_peft
from tests import reference
from tests.parity import training

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.parity,
    training.PEFT_WARNING,
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]
NEW = 8


@pytest.fixture(scope="module", params=["gqa", "tied"])
def made(request, tmp_path_factory):
    """An adapter that PEFT made and wrote, and ours of its files."""
    folder = tmp_path_factory.mktemp("model")
    base = training.load_base(folder, request.param)
    settings = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=["q_proj", "lm_head"], init_lora_weights=False
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(base.load(), settings)
    model.save_pretrained(folder / "theirs")
    found = our_peft.load_trained(folder / "theirs", base.config)
    variables = {"params": base.params, "lora": found.adapters}
    return SimpleNamespace(
        case=request.param, base=base, model=model, found=found, variables=variables, folder=folder
    )


def logits_of(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(reference.tokens(), dtype=torch.int64)).logits.numpy()


def test_logits_and_gradients(made, promise):
    assert made.found.targets == ("q_proj", "lm_head") and made.found.ranks["lm_head"] == (4,)
    ours = Llama(made.base.config, dtype=jnp.float32)
    expected = logits_of(made.model)
    assert np.abs(expected - logits_of(made.base.load())).max() > 0.1
    error = np.abs(ours.apply(made.variables, reference.tokens()) - expected).max()
    promise(f"LoRA on lm_head, {made.case}: logits", error, 1e-4)
    (batch,) = training.batches(1, (4, 24), (4, 24))
    made.model.train().zero_grad()
    expected = training.backward(made.model, batch)
    found, loss = training.Ours(ours).gradients(made.variables, trainable_mask.LORA, batch)
    error = training.worst_error(
        training.adapter_tensors(found["lora"]),
        training.torch_tensors(made.model, gradients=True),
    )
    promise(f"LoRA on lm_head, {made.case}: loss", abs(loss - expected), 1e-5)
    promise(f"LoRA on lm_head, {made.case}: ‖g − g_ref‖ / ‖g_ref‖ of A and B", error, 1e-5)


def test_files_go_back_to_peft(made, tmp_path):
    our_peft.save(tmp_path, made.found.adapters, rank=4, alpha=12)
    ours, theirs = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (tmp_path, made.folder / "theirs")
    )
    frozen = "base_model.model.lm_head.base_layer.weight"  # which PEFT writes, too
    assert {*theirs} - {*ours} == {frozen}
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[name])
    again = peft.PeftModel.from_pretrained(made.base.load(), tmp_path)
    np.testing.assert_array_equal(logits_of(again), logits_of(made.model))


def test_greedy_answers(made):
    prompts = [list(prompt) for prompt in reference.PROMPTS]
    found = scheduler.answers(
        Llama(made.base.config, dtype=jnp.float32),
        greedy.unstack_layers(made.variables),
        prompts,
        max_new_tokens=NEW,
        end_ids=(reference.END,),
        buckets=(16,),
        batch_tokens=100,
        max_batch=2,
    )
    answers = {i: ids.tolist() for part in found for i, ids in part}
    for i, prompt in enumerate(prompts):
        ids = made.model.eval().generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=reference.END,
            pad_token_id=0,
        )
        assert answers[i] == ids[0, len(prompt) :].tolist()


def test_the_merged_model_is_untied(made, tmp_path, promise):
    merged = merge.merge(made.base.params, made.found.adapters)
    config = merge.merged_config(made.base.config, merged)
    hf.save(tmp_path / "merged", config, merged, dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, attn_implementation="eager"
    )
    assert model.config.tie_word_embeddings is False
    table = model.get_input_embeddings().weight.numpy(force=True)
    np.testing.assert_array_equal(table, made.base.params["embed_tokens"]["embedding"])
    error = np.abs(logits_of(model) - logits_of(made.model)).max()
    promise(f"LoRA on lm_head, {made.case}, merged, in transformers: logits", error, 1e-4)
    change, largest = merge.rounding_change(config, merged, "bfloat16")
    assert 0 < change < 0.1 * largest
