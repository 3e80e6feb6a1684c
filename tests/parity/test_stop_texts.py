"""`eval.stop` against transformers' `stop_strings`: the same ids and texts."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jax_lora.data.prompts import Encoder
from jax_lora.generation import greedy, scheduler, stop_texts
from jax_lora.model.transformer import Llama
from jax_lora.weights import hf
from jax_lora.weights.tokenizers import load_tokenizer
from tests.weights import builders

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity
NEW = 16


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A random LLaMA over a byte-level vocabulary, ours and transformers'."""
    folder = tmp_path_factory.mktemp("toy")
    vocabulary = builders.tiny_bpe("gpt-2")
    count = len(vocabulary["tokens"])
    builders.write_gguf(folder / "t.gguf", builders.hf_weights(count), tokenizer=vocabulary)
    tokenizer = load_tokenizer(folder / "t.gguf")
    source = builders.write_hf(folder / "m", builders.hf_weights(count), vocab_size=count)
    tokenizer.save_pretrained(source)
    config, base = hf.load(source, "float32")
    model = transformers.LlamaForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager"
    )
    return Llama(config, dtype=jnp.float32), {"params": base}, model, tokenizer


def test_answers_equal_those_of_stop_strings(toy):
    module, variables, model, tokenizer = toy
    encoder = Encoder(tokenizer, "plain")
    rng = np.random.default_rng(0)
    weights = greedy.unstack_layers(variables)
    words = ["Hello", " world", " the", "ing", "123", " a", " b", "\n", ":\n", "--"]
    prompts = [tokenizer("".join(rng.choice(words, 6))).input_ids for _ in range(6)]

    def answer(texts):
        ended = scheduler.answers(
            module,
            weights,
            prompts,
            max_new_tokens=NEW,
            end_ids=(tokenizer.eos_token_id,),
            buckets=(48,),
            batch_tokens=1000,
            max_batch=4,  # so that rows that are stopped make room
            stop=stop_texts.stop_rule(texts, encoder.decode_all, encoder.byte_ids),
        )
        found = dict(itertools.chain.from_iterable(ended))
        return [found[i].tolist() for i in range(len(prompts))]

    def theirs(texts):
        found = []
        for ids in prompts:
            out = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                max_new_tokens=NEW,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
                **({"stop_strings": list(texts), "tokenizer": tokenizer} if texts else {}),
            )
            found.append(out[0, len(ids) :].tolist())
        return found

    free = answer(())
    assert free == theirs(())
    shown = [encoder.decode_all(ids) for ids in free]
    # Texts of one to four characters out of the answers, some of them over several tokens; and
    # some that begin in the prompt.
    parts = [text[k : k + n] for text in shown for k in range(12) for n in (1, 2, 3, 4)]
    inside = [part for part in parts if part.isascii() and len(part) > 1]
    last = [encoder.decode_all(ids)[-1] for ids in prompts]
    across = [end + text[0] for end, text in zip(last, shown, strict=True) if text[0].isascii()]
    stops = [(text,) for text in (*inside[:: len(inside) // 4], *across[:2])]
    stops.append((inside[1], inside[-1]))
    shorter = 0
    for texts in stops:
        found = answer(texts)
        assert found == theirs(texts), texts
        assert [encoder.decode(ids) for ids in found] == [
            tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in theirs(texts)
        ]
        shorter += sum(len(a) < len(b) for a, b in zip(found, free, strict=True))
    assert shorter > len(stops) and across
