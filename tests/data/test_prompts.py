"""Templates as their sources write them, and rows whose training ids equal what decoding sees."""

import numpy as np
import pytest

from jax_lora.data.example import Example
from jax_lora.data.instructions import read_checkout
from jax_lora.data.prompts import Encoder, alpaca, tk
from jax_lora.data.toy import write_checkout
from jax_lora.errors import ConfigError, DataError
from jax_lora.weights.tokenizers import load_tokenizer


def example(definition="Say it back.", text="hello world", answer="hello world"):
    return Example(definition, text, (answer,), "task1_echo", "Echo", "task1-0")


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


def test_the_alpaca_template_is_that_of_its_source():
    assert alpaca(example("Do it.", "this")) == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nDo it.\n\n### Input:\nthis\n\n### Response:\n"
    )
    assert alpaca(example("Do it.", "")) == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nDo it.\n\n### Response:\n"
    )
    # Braces in the data are text, not fields of the template.
    assert "\n{x}\n\n### Input:\n{\n" in alpaca(example("{x}", "{"))


@pytest.mark.parametrize(
    ("definition", "text", "expected"),
    [
        (
            " Do it ",
            " this ",
            "Definition: Do it.\n\nNow complete the following example -\nInput: this.\nOutput: ",
        ),
        (
            "Do it!",
            "this?",
            "Definition: Do it!\n\nNow complete the following example -\nInput: this?\nOutput: ",
        ),
    ],
)
def test_the_tk_template_is_that_of_its_source(definition, text, expected):
    assert tk(example(definition, text)) == expected


@pytest.mark.parametrize("template", ["alpaca", "tk"])
def test_training_rows_begin_with_what_decoding_sees(tokenizer, template, tmp_path):
    encoder = Encoder(tokenizer, template)
    for task in read_checkout(write_checkout(tmp_path, instances_per_task=5)).train:
        for instance in task.instances():
            shown = task.example(instance)
            prompt, row = encoder.prompt_row(shown), encoder.training_row(shown)
            np.testing.assert_array_equal(row.ids[: row.prompt_length], prompt.ids)
            answer = row.ids[row.prompt_length :]
            assert answer[-1] == tokenizer.eos_token_id and len(answer) > 1
            assert encoder.decode(answer.tolist()) == shown.references[0].strip()


def test_only_the_input_is_cut(tokenizer):
    long = example(text="word " * 400)
    encoder = Encoder(tokenizer, source_length=256, target_length=32)
    row = encoder.prompt_row(long)
    assert row.truncated and len(row.ids) <= 256 and len(row.ids) > 250
    assert row.prompt.endswith("\n\n### Response:\n") and "Say it back." in row.prompt
    assert not encoder.prompt_row(example()).truncated


def test_a_long_answer_stays_whole(tokenizer):
    encoder = Encoder(tokenizer, source_length=256, target_length=16)
    shown = example(text="word " * 60, answer="a long answer, longer than the room kept for it")
    row = encoder.training_row(shown)
    assert len(row.ids) <= encoder.row_length and row.truncated
    assert encoder.decode(row.ids[row.prompt_length :].tolist()) == shown.references[0]


def test_what_cannot_fit_is_refused(tokenizer):
    with pytest.raises(ValueError, match="task1_echo task1-0: the prompt has .* raise source_len"):
        Encoder(tokenizer, source_length=100).prompt_row(example(definition="Do it. " * 200))
    with pytest.raises(ConfigError, match="template: found 'other', expected one of alpaca"):
        Encoder(tokenizer, "other")
    with pytest.raises(ConfigError, match="template: found chat, but .* no chat template"):
        Encoder(tokenizer, "chat")


def test_a_token_that_the_model_does_not_have_is_refused(tokenizer):
    plain = Encoder(tokenizer).training_row(example())
    size = 1 + int(plain.ids.max())
    encoder = Encoder(tokenizer, vocab_size=size)
    np.testing.assert_array_equal(encoder.training_row(example()).ids, plain.ids)
    i = tokenizer.convert_tokens_to_ids("<user>")
    assert i >= size
    said = f"task1_echo task1-0: token '<user>' has id {i}, expected below the model's vocab_size"
    with pytest.raises(DataError, match=f"{said} {size}"):
        encoder.prompt_row(example(text="a <user> b"))
    with pytest.raises(DataError, match=said):
        encoder.training_row(example(answer="<user>"))


def test_llama_answers_carry_no_extra_space(shared):
    # sentencepiece puts a space before any text; behind the response header there is none.
    encoder = Encoder(load_tokenizer(shared / "tokenizers" / "llama"))
    row = encoder.training_row(example(answer="positive"))
    pieces = encoder.tokenizer.convert_ids_to_tokens(row.ids.tolist())
    assert pieces[0] == "<s>" and pieces[-1] == "</s>" and pieces.count("<s>") == 1
    assert pieces[row.prompt_length - 1] == "<0x0A>"
    assert not pieces[row.prompt_length].startswith("▁")
    # Encoded as one text, the row would be the same.
    whole = encoder.tokenizer(row.prompt + "positive").input_ids
    assert row.ids.tolist() == [*whole, encoder.tokenizer.eos_token_id]


@pytest.mark.parametrize("template", ["alpaca", "tk"])
@pytest.mark.parametrize("family", ["llama", "smollm2"])
def test_boundaries_over_the_real_tasks(shared, request, family, template):
    source = shared / "tokenizers/llama" if family == "llama" else request.getfixturevalue(family)
    encoder = Encoder(load_tokenizer(source), template, source_length=2048)
    checkout = read_checkout(shared / "data" / "niv2-slice")
    for task in (*checkout.train, *checkout.test):
        for instance in task.instances()[:5]:
            shown = task.example(instance)
            prompt, row = encoder.prompt_row(shown), encoder.training_row(shown)
            np.testing.assert_array_equal(row.ids[: row.prompt_length], prompt.ids)
            answer = row.ids[row.prompt_length :].tolist()
            assert encoder.decode(answer) == encoder.decode(
                encoder.tokenizer(shown.references[0], add_special_tokens=False).input_ids
            )
