"""Conversations: ids and masks against transformers' own, and what is text in them."""

import dataclasses

import numpy as np
import pytest

from jax_lora.data.chat import Chat
from jax_lora.data.example import Example, Message
from jax_lora.data.prompts import Encoder, RowTooLong
from jax_lora.errors import ConfigError, DataError
from tests.data import chats

SYSTEM = Message("system", "Answer briefly.")
FIRST = [Message("user", "What is the capital of France?"), Message("assistant", "Paris.")]
CONVERSATIONS = {
    "one turn": [],
    "a system message": [SYSTEM],
    "two turns": FIRST,
    "three turns and a system message": [
        SYSTEM,
        *FIRST,
        Message("user", "Paris?  Sure?"),
        Message("assistant", "Yes, Paris.\n\nIt is."),
    ],
}


def example(messages=(), instruction="And of Italy?", answer="That of Italy is Rome.", text=""):
    return Example(instruction, text, (answer,), "t", "c", "t-0", tuple(messages))


def theirs(tokenizer, shown, **options):
    """transformers' ids and assistant mask of the whole conversation."""
    turns = [m._asdict() for m in shown.conversation(shown.references[0])]
    found = tokenizer.apply_chat_template(
        turns, return_dict=True, return_assistant_tokens_mask=True, **options
    )
    return found["input_ids"], found["assistant_masks"]


@pytest.mark.parametrize("turns", CONVERSATIONS)
@pytest.mark.parametrize("name", chats.NAMES)
def test_ids_and_masks_equal_transformers(name, turns):
    marked, unmarked = chats.tokenizer(name), chats.tokenizer(name, marked=False)
    shown = example(CONVERSATIONS[turns])
    ids, mask = theirs(marked, shown)
    answers = 1 + sum(m.role == "assistant" for m in shown.messages)
    assert np.flatnonzero(np.diff([0, *mask]) == 1).size == answers
    for tokenizer in (marked, unmarked):  # by the template's own mask, and by offsets
        encoder = Encoder(tokenizer, "chat")
        row = encoder.training_row(shown)
        assert row.ids.tolist() == ids
        assert row.loss_mask(answer_only=True).tolist() == [bool(x) for x in mask]
        assert row.loss_mask(answer_only=False).tolist() == [False] + [True] * (len(ids) - 1)
        prompt = encoder.prompt_row(shown)
        turns_before = [m._asdict() for m in shown.conversation()]
        found = tokenizer.apply_chat_template(turns_before, add_generation_prompt=True)
        assert prompt.ids.tolist() == found["input_ids"]
        # What decoding starts from is what the row begins with, up to the answer.
        assert row.ids[: row.prompt_length].tolist() == prompt.ids.tolist()
        assert encoder.decode(row.ids[row.prompt_length :]) == shown.references[0]


@pytest.mark.parametrize("name", chats.NAMES)
def test_white_space_around_a_turn_is_as_the_template_has_it(name):
    shown = example([Message("user", " a "), Message("assistant", " b\n")], answer="  Rome. ")
    marked, unmarked = chats.tokenizer(name), chats.tokenizer(name, marked=False)
    ids, mask = theirs(marked, shown)
    for tokenizer in (marked, unmarked):
        row = Encoder(tokenizer, "chat").training_row(shown)
        assert row.ids.tolist() == ids
        np.testing.assert_array_equal(row.loss_mask(True), np.asarray(mask, bool))


@pytest.mark.parametrize("name", ["llama3", "mistral", "zephyr"])
def test_a_row_begins_with_exactly_one_bos(name):
    # Llama 3's and Mistral's template writes BOS, and so may the tokenizer; Zephyr's leaves it to
    # the tokenizer, whose template then would lose it.
    tokenizer = chats.tokenizer(name, adds_bos=True)
    shown = example(FIRST)
    for row in (
        Encoder(tokenizer, "chat").training_row(shown),
        Encoder(tokenizer, "chat").prompt_row(shown),
        Encoder(tokenizer, "alpaca").training_row(example()),
    ):
        assert row.ids.tolist().count(tokenizer.bos_token_id) == 1
        assert row.ids[0] == tokenizer.bos_token_id
    ids, mask = theirs(tokenizer, shown)
    row = Encoder(tokenizer, "chat").training_row(shown)
    missing = int(name == "zephyr")
    assert row.ids.tolist()[missing:] == ids
    assert row.loss_mask(True).tolist()[missing:] == [bool(x) for x in mask]


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("name", chats.NAMES)
def test_control_tokens_in_data_are_text(name, marked):
    tokenizer = chats.tokenizer(name, marked)
    control = [t.content for t in tokenizer.added_tokens_decoder.values()]
    text = f"a{control[-1]} {' '.join(control)} b"
    messages = [Message("user", f"Say {text}"), Message("assistant", text)]
    shown = example(messages, instruction=text, answer=text)
    harmless = example(
        [Message(role, "ordinary") for role, _ in messages], "ordinary", answer="ordinary"
    )
    row, plain = (Encoder(tokenizer, "chat").training_row(e) for e in (shown, harmless))
    special = [i for i in row.ids if i in tokenizer.all_special_ids]
    assert special == [i for i in plain.ids if i in tokenizer.all_special_ids]
    assert tokenizer.decode(row.ids).count(text) == 4
    taught = row.ids[row.loss_mask(True)]
    assert tokenizer.decode(taught, skip_special_tokens=True).count(text) == 2
    # With private names for the template's control tokens the ids are otherwise the same.
    chat = Chat(tokenizer)
    ids = chat.row(harmless, "ordinary")[0]
    from jax_lora.data import control_tokens

    backend, private = control_tokens._private_names(tokenizer)
    written = tokenizer.apply_chat_template(
        [m._asdict() for m in harmless.conversation("ordinary")], tokenize=False
    )
    for known, hidden in private.items():
        written = written.replace(known, hidden)
    assert backend.encode(written, add_special_tokens=False).ids == ids


@pytest.mark.parametrize("template", ["alpaca", "tk", "plain"])
@pytest.mark.parametrize("name", ["mistral", "qwen2.5"])
def test_control_tokens_are_text_in_every_template(name, template):
    tokenizer = chats.tokenizer(name)
    special = set(tokenizer.all_special_ids)
    text = "x " + " ".join(t.content for t in tokenizer.added_tokens_decoder.values()) + " y"
    encoder = Encoder(tokenizer, template)
    row = encoder.training_row(example(instruction=text, text=text, answer=text))
    assert not special & set(row.ids[:-1].tolist())
    assert row.ids[-1] == tokenizer.eos_token_id
    assert encoder.decode(row.ids[row.prompt_length : -1]) == text


# As Qwen3's: an empty thought before the last answer, and in the prompt where thinking is off.
THINKS = """
{%- for m in messages %}
    {{- '<|im_start|>' + m['role'] + '\\n' }}
    {%- if m['role'] == 'assistant' and loop.last %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
    {{- m['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}""".lstrip()


@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_what_is_trained_is_what_a_model_that_thinks_is_asked_for(turns):
    tokenizer, shown = chats.tokenizer("chatml", marked=False), example(CONVERSATIONS[turns])
    tokenizer.chat_template = THINKS
    encoder = Encoder(tokenizer, "chat")
    row, prompt = encoder.training_row(shown), encoder.prompt_row(shown)
    before, whole = (
        tokenizer.apply_chat_template(
            [m._asdict() for m in some], enable_thinking=False, add_generation_prompt=prompts
        )["input_ids"]
        for some, prompts in (
            (shown.conversation(), True),
            (shown.conversation(shown.references[0]), False),
        )
    )
    assert prompt.ids.tolist() == before and row.ids.tolist() == whole
    assert row.ids[: row.prompt_length].tolist() == before
    assert encoder.decode(row.ids[row.prompt_length :]) == shown.references[0]
    assert row.loss_mask(answer_only=True)[row.prompt_length]


@pytest.mark.parametrize("written", ["<think>\\n", "Answer: "])
def test_a_prompt_that_no_row_begins_with_is_refused_for_training(written):
    # As DeepSeek-R1's, whose generation prompt opens a thought that its turns do not have.
    tokenizer = chats.tokenizer("chatml", marked=False)
    tokenizer.chat_template = chats.template("chatml", False).replace(
        "{{- '<|im_start|>assistant\\n' }}", f"{{{{- '<|im_start|>assistant\\n{written}' }}}}"
    )
    encoder = Encoder(tokenizer, "chat")
    assert encoder.prompt_row(example()).ids.size  # an untuned model may be asked
    with pytest.raises(ConfigError, match="config.data.template: found chat, whose template writ"):
        encoder.training_row(example())


def test_a_template_that_writes_no_end_gets_the_end_token():
    tokenizer = chats.tokenizer("chatml", marked=False)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    encoder = Encoder(tokenizer, "chat")
    row = encoder.training_row(example(FIRST))
    assert row.ids[-1] == tokenizer.eos_token_id and row.loss_mask(True)[-1]
    assert encoder.end_ids == (tokenizer.eos_token_id,)


def test_the_end_of_a_turn_ends_an_answer_whatever_the_tokenizer_says():
    tokenizer = chats.tokenizer("llama3", marked=False)
    tokenizer.eos_token = "<|end_of_text|>"
    expected = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    assert list(Encoder(tokenizer, "chat").end_ids) == expected


def test_instruction_and_input_are_one_turn_whose_input_is_cut():
    tokenizer = chats.tokenizer("llama3")
    encoder = Encoder(tokenizer, "chat", source_length=64, target_length=32)
    shown = example(instruction="Say it.", text="word " * 200)
    row = encoder.training_row(shown)
    assert row.truncated and 56 < row.prompt_length <= 64
    assert "Say it.\n\nword word" in row.prompt
    np.testing.assert_array_equal(row.ids[: row.prompt_length], encoder.prompt_row(shown).ids)
    with pytest.raises(RowTooLong, match="t t-0: the prompt has .* raise source_length"):
        encoder.training_row(example(instruction="word " * 200))


def test_what_a_template_refuses_is_one_line():
    tokenizer = chats.tokenizer("mistral")
    with pytest.raises(DataError, match="t t-0: refused by the chat template: Only user and"):
        Encoder(tokenizer, "chat").training_row(example([*FIRST, SYSTEM]))
    with pytest.raises(ConfigError, match="found alpaca and a conversation, t t-0; expected chat"):
        Encoder(tokenizer, "alpaca").training_row(example(FIRST))


def test_an_empty_loss_mask_is_refused_by_name():
    tokenizer = chats.tokenizer("chatml")
    tokenizer.chat_template = chats.template("chatml", True).replace("'assistant'", "'nobody'")
    with pytest.raises(DataError, match="t t-0: the chat template leaves no token .* in the loss"):
        Encoder(tokenizer, "chat").training_row(example())
    tokenizer.chat_template = chats.template("chatml", False).replace(
        "m['content'] + '<|im_end|>'", "m['content'][1:] + '<|im_end|>'"
    )
    with pytest.raises(DataError, match="t t-0: the template changes the text of its messages"):
        Encoder(tokenizer, "chat").training_row(example())


def test_a_jinja_file(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(
        "<|im_start|>user\n[{{ task }}] {{ instruction }}{% if input %} | {{ input | upper }}"
        "{% endif %}<|im_end|>\n<|im_start|>assistant\n"
    )
    tokenizer = chats.tokenizer("chatml")
    encoder = Encoder(tokenizer, str(path))
    row = encoder.prompt_row(example(instruction="Do it.", text="this"))
    assert row.prompt == ("<|im_start|>user\n[t] Do it. | THIS<|im_end|>\n<|im_start|>assistant\n")
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert row.ids.tolist() == tokenizer(row.prompt).input_ids
    assert [i for i in row.ids if i in (start, end)] == [start, end, start]
    row = encoder.prompt_row(example(instruction="Say <|im_end|>."))
    assert "Say <|im_end|>." in row.prompt
    assert [i for i in row.ids if i in (start, end)] == [start, end, start]
    for text, message in (
        ("{{ instruction ", "mine.jinja: not a Jinja template"),
        ("{{ references[0] }}", "mine.jinja: t t-0: 'references' is undefined"),
        ("{{ ''.__class__ }}", "mine.jinja: t t-0: access to attribute '__class__'"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            Encoder(tokenizer, str(path)).prompt_row(example())


def test_rows_know_their_mask():
    shown = example(FIRST)
    row = Encoder(chats.tokenizer("chatml"), "chat").training_row(shown)
    assert row.answers is not None
    first = int(np.flatnonzero(row.answers)[0])
    assert first < row.prompt_length  # the first answer is before the last one
    one = dataclasses.replace(row, answers=None)
    assert one.loss_mask(True).sum() == len(row.ids) - row.prompt_length
