"""`eval.stop` looks at the last tokens alone, and finds what a search of the whole text finds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from jax_lora.data.prompts import Encoder
from jax_lora.generation.stop_texts import stop_rule

WORDS = ["a", "b", " ", "\n", "\n\n", "ab", "aba", " the", "## End", "é", "€", "🙂", "日本", " 🙂"]
BYTES = sorted({byte for word in (*WORDS, "ñ") for byte in word.encode()})


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's kind: a character may be several tokens, each of them bytes of it."""
    shown = byte_names()
    names = [*(shown[byte] for byte in range(256))]
    names += [name for word in WORDS if len(name := "".join(shown[b] for b in word.encode())) > 1]
    inner = Tokenizer(BPE(dict(zip(names, range(len(names)), strict=True)), []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="</s>")


def byte_names() -> list[str]:
    """GPT-2's characters for the bytes: visible Latin-1 as it is, the others from U+0100 on."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def sentencepiece() -> PreTrainedTokenizerFast:
    """LLaMA's kind: words, and bytes that decode together or not at all."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    names += [word.replace(" ", "▁") for word in WORDS if word not in (" ", "\n")]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    inner = Tokenizer(BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")


ENCODERS = {kind.__name__: Encoder(kind(), "plain") for kind in (byte_level, sentencepiece)}


def searched(prompt, answer, texts, decode):
    """The first token up to which the whole text has one of the texts, behind the prompt's end."""
    for end in range(1, len(answer) + 1):
        start, text = len(decode(prompt)), decode([*prompt, *answer[:end]])
        if any(one in text[max(0, start - len(one) + 1) :] for one in texts):
            return end
    return None


@st.composite
def cases(draw):
    """A tokenizer, a prompt and an answer, texts, and how many tokens come at a time."""
    encoder = ENCODERS[draw(st.sampled_from(sorted(ENCODERS)))]
    first = 1 if encoder.byte_ids else 0  # the id of byte 0
    bytes_ = [first + byte for byte in BYTES]
    words = range(first + 256, len(encoder.tokenizer))
    spelled = st.sampled_from(WORDS).map(lambda word: [first + byte for byte in word.encode()])
    token = st.sampled_from(words) | st.sampled_from(bytes_)
    pieces = st.lists(token.map(lambda i: [i]) | spelled, max_size=40)
    prompt, answer = (sum(draw(pieces), []) for _ in range(2))
    # Texts out of the answer, so that many end it, and texts that may not be there.
    shown = encoder.decode_all([*prompt[-3:], *answer])
    texts = draw(st.lists(st.sampled_from(["\n\n", "ab", "€", "🙂 the", "End"]), max_size=2))
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, max(0, len(shown) - 1)))
        texts.append(shown[start : start + draw(st.integers(1, 9))])
    texts = [text for text in texts if text] or ["ab"]
    return encoder, prompt or [words[0]], answer, tuple(texts), draw(st.sampled_from([1, 3, 8, 50]))


def check(encoder, prompt, answer, texts, every):
    """The whole answer at once, and so many tokens of it at a time."""
    expected = searched(prompt, answer, texts, encoder.decode_all)
    rule = stop_rule(texts, encoder.decode_all, encoder.byte_ids)
    assert rule is not None
    assert rule(prompt, np.asarray(answer, np.int32), 0) == expected
    found, checked = None, 0
    while found is None and checked < len(answer):
        shown = answer[: checked + every]
        found, checked = rule(prompt, shown, checked), len(shown)
    assert found == expected
    return expected


@settings(max_examples=400, deadline=None)
@given(cases())
def test_the_last_tokens_say_what_the_whole_text_says(case):
    check(*case)


@pytest.mark.parametrize(
    ("kind", "prompt", "answer", "text", "expected"),
    [
        ("byte_level", "a", b"a" * 20 + b"b", "aaaaab", 21),  # over more tokens than most texts
        ("byte_level", "a", b"a" * 40 + "€".encode() + b"b", "€b", 44),
        ("byte_level", "ab", b"b" * 30, "ab", None),  # it ended before the answer
        ("byte_level", "a", b"b" * 30, "ab", 1),
        # An unfinished character makes all bytes beside it unreadable, and what ended has ended.
        ("sentencepiece", "a", b"\xf0" + b"a" * 20 + b"b", "ab", None),
        ("sentencepiece", "a", "€".encode() + b"\xf0", "€", 3),
        ("sentencepiece", "🙂", "é".encode(), "\ufffd" * 4, 1),
        # The last bytes of a character alone would be unreadable, and what follows with them.
        ("sentencepiece", "ab🙂", b"\n\n ab", "\n", 1),
        ("sentencepiece", "ab🙂", b"\n\n ab", "\n\n", 2),
    ],
)
@pytest.mark.parametrize("every", [1, 8, 50])
def test_texts_over_many_tokens_and_unfinished_characters(
    kind, prompt, answer, text, expected, every
):
    first = kind == "sentencepiece"
    ids = [[first + byte for byte in part] for part in (prompt.encode(), answer)]
    assert check(ENCODERS[kind], *ids, (text,), every) == expected


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("word", [" the", "日本", "a"])
def test_the_work_is_in_proportion_to_the_answer(kind, word):
    """Tokens that are decoded, per token of an answer that nothing ends."""
    encoder, decoded = ENCODERS[kind], 0
    vocab = encoder.tokenizer.get_vocab()
    named = "".join(byte_names()[b] for b in word.encode()) if kind == "byte_level" else None
    token = vocab[named or word.replace(" ", "▁")]

    def decode(ids):
        nonlocal decoded
        decoded += len(ids)
        return encoder.decode_all(ids)

    rule = stop_rule(("\n\n", "### Instruction:"), decode, encoder.byte_ids)
    assert rule is not None
    work = []
    for length in (512, 2048):
        decoded = 0
        answer = np.full(length, token)
        for end in range(8, length + 1, 8):
            assert rule([token] * 30, answer[:end], end - 8) is None
        work.append(decoded / length)
    assert work[1] < 1.1 * work[0] < 20
