"""The real base, SmolLM2-135M-Instruct from GGUF, against transformers' own reading of the file."""

import numpy as np
import pytest

import jax_lora
from jax_lora.data.instructions import read_checkout
from jax_lora.data.prompts import Encoder
from jax_lora.generation import greedy, scheduler
from jax_lora.weights import gguf

NEW_TOKENS = 16


@pytest.fixture(scope="module")
def ours(smollm2):
    return jax_lora.load(smollm2, dtype="float32")


@pytest.fixture(scope="module")
def theirs(smollm2):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def prompts(shared, ours):
    """12 real prompts, two of every other task, none of them long."""
    encoder = Encoder(ours.tokenizer)
    checkout = read_checkout(shared / "data" / "niv2-slice")
    rows = [
        encoder.prompt_row(task.example(instance)).ids
        for task in (*checkout.train, *checkout.test)
        for instance in task.instances()[:4]
    ]
    return [row for row in rows if len(row) <= 256][::2][:12]


def test_the_tokenizer_splits_digits_one_by_one(ours):
    ids = ours.tokenizer("In 1987, 12 x 345").input_ids
    pieces = ours.tokenizer.convert_ids_to_tokens(ids)
    assert [p for p in pieces if any(c.isdigit() for c in p)] == list("198712345")
    assert ours.tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parity
def test_weights_equal_transformers(smollm2, theirs):
    found = {k: v.numpy() for k, v in theirs.state_dict().items()}
    _, base = gguf.load(smollm2, "float32", put=lambda path, array: array)
    assert "lm_head" not in base
    for i in range(30):
        for group in ("self_attn", "mlp"):
            for name, leaf in base["layers"][group].items():
                wanted = found[f"model.layers.{i}.{group}.{name}.weight"]
                assert np.array_equal(leaf["kernel"][i], wanted.T), (i, name)
    for name in ("input_layernorm", "post_attention_layernorm"):
        stack = np.stack([found[f"model.layers.{i}.{name}.weight"] for i in range(30)])
        assert np.array_equal(base["layers"][name]["scale"], stack)
    assert np.array_equal(base["embed_tokens"]["embedding"], found["model.embed_tokens.weight"])
    assert np.array_equal(base["norm"]["scale"], found["model.norm.weight"])


@pytest.mark.parity
def test_logits_equal_transformers(ours, theirs, prompts):
    import torch  # pyright: ignore[reportMissingImports]

    worst = 0.0
    for ids in prompts[:6]:
        with torch.no_grad():
            expected = theirs(torch.tensor(ids[None].astype(np.int64))).logits.numpy()
        padded = np.pad(ids, (0, 256 - len(ids)))  # compiled once; a token sees none behind it
        found = ours.logits(padded[None])[:, : len(ids)]
        worst = max(worst, float(np.abs(found - expected).max()))
    print(f"worst difference of a logit {worst:.1e}")
    assert worst < 1e-3


@pytest.mark.parity
def test_greedy_answers_equal_transformers(ours, theirs, prompts):
    import torch  # pyright: ignore[reportMissingImports]

    assert len(prompts) == 12
    end = ours.tokenizer.eos_token_id
    found = scheduler.answers(
        ours.module,
        greedy.unstack_layers(ours.variables),
        prompts,
        max_new_tokens=NEW_TOKENS,
        end_ids=(end,),
        buckets=(256,),
        batch_tokens=2048,
        max_batch=8,
    )
    answers = {i: ids.tolist() for ended in found for i, ids in ended}
    for i, ids in enumerate(prompts):
        with torch.no_grad():
            out = theirs.generate(
                torch.tensor(ids[None].astype(np.int64)),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                eos_token_id=end,
                pad_token_id=end,
            )
        expected = out[0, len(ids) :].tolist()
        answer = answers[i]
        if answer != expected:
            pairs = zip(answer, expected, strict=False)
            at = next(j for j, (one, other) in enumerate(pairs) if one != other)
            logits = ours.logits(np.asarray([[*ids.tolist(), *expected[:at]]]))[0, -1]
            gap = float(np.diff(np.sort(logits)[-2:])[0])
            print(f"prompt {i} differs at token {at}, where the best two are {gap:.1e} apart")
            assert gap < 1e-4
