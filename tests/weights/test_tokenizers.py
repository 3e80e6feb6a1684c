"""Tokenizers against the recorded ids of llama.cpp and SentencePiece."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from jax_lora.errors import DataError
from jax_lora.weights import gguf, hf
from jax_lora.weights.tokenizers import base_end_ids, check_vocabulary, load_tokenizer
from tests.weights.builders import (
    CORPUS,
    hf_weights,
    refusal,
    tiny_bpe,
    tiny_sentencepiece,
    write_gguf,
)

TOKENS = json.loads((Path(__file__).resolve().parents[1] / "recorded" / "tokens.json").read_text())


def tiny(folder: Path, keys, metadata=None) -> Path:
    path = folder / "tiny.gguf"
    write_gguf(path, hf_weights(len(keys["tokens"])), tokenizer=keys, metadata=metadata)
    return path


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2", "gpt-2", "default"])
def test_byte_level_ids_are_llama_cpps(tmp_path, pre):
    tokenizer = load_tokenizer(tiny(tmp_path, tiny_bpe(pre)))
    for text in CORPUS:
        ids = tokenizer(text).input_ids
        assert ids == TOKENS[pre][text], text
        assert tokenizer.decode(ids[1:] if pre == "llama-bpe" else ids) == text


def test_the_recorded_pre_tokenizers_differ_from_one_another():
    kinds = [TOKENS[pre] for pre in ("smollm", "llama-bpe", "qwen2", "gpt-2", "default")]
    assert all(a != b for i, a in enumerate(kinds) for b in kinds[:i])


@pytest.mark.parametrize(("prefix", "name"), [(True, "llama"), (False, "llama without prefix")])
def test_sentencepiece_ids_are_llama_cpps(tmp_path, prefix, name):
    tokenizer = load_tokenizer(tiny(tmp_path, tiny_sentencepiece(prefix)))
    for text in CORPUS:
        ids = tokenizer(text).input_ids
        assert ids == TOKENS[name][text], text
        if "<s>" not in text:
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)


def test_smollm2_ids_are_llama_cpps(smollm2):
    tokenizer = load_tokenizer(smollm2)
    for text in CORPUS:
        ids = tokenizer(text).input_ids
        assert ids == TOKENS["smollm2"][text], text
        assert tokenizer.decode(ids) == text
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert special == (1, 2, 2) and tokenizer.unk_token_id == 0
    assert "<|im_start|>" in tokenizer.chat_template


def test_the_files_word_on_special_tokens_is_kept(tmp_path):
    keys: dict = tiny_bpe("smollm") | {"add_bos_token": True, "add_eos_token": True}
    tokenizer = load_tokenizer(
        tiny(tmp_path, keys, {"tokenizer.chat_template": "{{ messages[0].content }}!"})
    )
    plain = TOKENS["smollm"]["Hello world"]
    assert tokenizer("Hello world").input_ids == [1, *plain, 0]
    assert tokenizer("Hello world", add_special_tokens=False).input_ids == plain
    assert tokenizer.chat_template == "{{ messages[0].content }}!"
    user = len(keys["tokens"]) - 1
    found = tokenizer.decode([1, *plain, user, 0], skip_special_tokens=True)
    assert found == "Hello world<user>"  # control tokens vanish, user-defined ones do not
    keys = tiny_sentencepiece(True) | {"add_bos_token": False}
    assert (
        load_tokenizer(tiny(tmp_path, keys))("hello").input_ids
        == TOKENS["llama"]["hello the world"][1:2]
    )
    del keys["bos_token_id"], keys["eos_token_id"], keys["unknown_token_id"]
    assert load_tokenizer(tiny(tmp_path, keys)).eos_token_id == 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (tiny_bpe("tekken"), "found 'tekken', expected one of smollm, llama-bpe, qwen2, "),
        (tiny_bpe("gpt-2") | {"model": "t5"}, "model: found 't5', expected gpt2 or llama"),
        (tiny_bpe("gpt-2") | {"token_type": [1]}, "token_type: found 1, expected"),
        (tiny_bpe("gpt-2") | {"eos_token_id": 9999}, "eos token: found id 9999, expected below"),
        (tiny_sentencepiece(True) | {"scores": None}, "scores: found nothing"),
        (
            tiny_bpe("gpt-2") | {"tokens": ["a"] * 4, "token_type": [1] * 4},
            "tokens: found 4 tokens, some twice",
        ),
    ],
)
def test_tokenizers_that_cannot_be_built_are_refused(tmp_path, keys, message):
    path = tiny(tmp_path, keys)
    found = refusal(load_tokenizer, path)
    assert message in found and found.startswith(str(path))


def test_llamas_tokenizer_model_alone_is_sentencepiece(shared):
    tokenizer = load_tokenizer(shared / "tokenizers" / "llama")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, 32000)
    for text, ids in TOKENS["sentencepiece"].items():
        assert tokenizer(text).input_ids == [1, *ids], text
        assert tokenizer.decode(ids) == text


END = "<|im_end|>"
DECODER = {"32000": {"content": END, "special": True}}
OTHER_ENDS = {
    "a piece, in tokenizer_config.json": ({"tokenizer_config": {"eos_token": "<0x0A>"}}, 13),
    "a table": (
        {"tokenizer_config": {"eos_token": {"__type": "AddedToken", "content": "<0x0A>"}}},
        13,
    ),
    "special_tokens_map.json": ({"special_tokens_map": {"eos_token": "<0x0A>"}}, 13),
    "both": (
        {
            "tokenizer_config": {"eos_token": "<0x0A>"},
            "special_tokens_map": {"eos_token": "<0x0B>"},
        },
        14,
    ),
    "a map that is not read": (
        {
            "tokenizer_config": {"eos_token": END, "added_tokens_decoder": DECODER},
            "special_tokens_map": {"eos_token": "<0x0A>"},
        },
        32000,
    ),
    "added": ({"tokenizer_config": {"eos_token": END, "added_tokens_decoder": DECODER}}, 32000),
    "added_tokens.json": (
        {"added_tokens": {END: 32000}, "special_tokens_map": {"eos_token": END}},
        32000,
    ),
}


def with_settings(shared, folder, files):
    folder.mkdir()
    shutil.copy(shared / "tokenizers" / "llama" / "tokenizer.model", folder)
    for name, keys in files.items():
        (folder / f"{name}.json").write_text(json.dumps(keys))
    return folder


@pytest.mark.parametrize("case", OTHER_ENDS)
def test_the_end_token_beside_tokenizer_model_is_the_one_that_the_folder_names(
    shared, tmp_path, case
):
    files, wanted = OTHER_ENDS[case]
    tokenizer = load_tokenizer(with_settings(shared, tmp_path / "m", files))
    assert tokenizer.eos_token_id == wanted and tokenizer.bos_token_id == 1
    if wanted == 32000:
        assert tokenizer(f"a{END}").input_ids[-1] == 32000


def test_an_end_token_that_tokenizer_model_lacks_is_refused(shared, tmp_path):
    folder = with_settings(shared, tmp_path / "m", {"tokenizer_config": {"eos_token": END}})
    found = refusal(load_tokenizer, folder)
    assert found.startswith(f"{folder}: eos_token: found {END!r}, expected a token of tokenizer.mo")


@pytest.mark.parity
@pytest.mark.parametrize("case", OTHER_ENDS)
def test_against_hf_the_end_token_beside_tokenizer_model(shared, tmp_path, case):
    pytest.importorskip("sentencepiece")
    transformers = pytest.importorskip("transformers")
    files, _ = OTHER_ENDS[case]
    folder = with_settings(shared, tmp_path / "m", files)
    theirs, ours = transformers.LlamaTokenizer.from_pretrained(folder), load_tokenizer(folder)
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.eos_token == theirs.eos_token and len(ours) == len(theirs)


@pytest.mark.parity
def test_against_hf_a_text_behind_a_control_token(shared, tmp_path):
    """`legacy: false` beside tokenizer.model, as in Vicuna 1.5: no space is put behind one. Spaces
    in a row are left out: transformers 5 joins them before SentencePiece itself does."""
    pytest.importorskip("sentencepiece")
    transformers = pytest.importorskip("transformers")
    files = {"tokenizer_config": {"legacy": False, "add_bos_token": False}}
    folder = with_settings(shared, tmp_path / "m", files)
    theirs, ours = transformers.LlamaTokenizer.from_pretrained(folder), load_tokenizer(folder)
    texts = [text for text in CORPUS if "  " not in f" {text}"]
    for text in (*texts, "a</s>USER: a</s> b", "</s>a", "USER: hi</s>\n\nUSER"):
        assert ours(text).input_ids == theirs(text).input_ids, text
        assert ours.decode(ours(text).input_ids) == theirs.decode(theirs(text).input_ids)


@pytest.mark.parametrize(("legacy", "space"), [(False, False), (True, True), (None, True)])
def test_a_space_behind_a_control_token(shared, tmp_path, legacy, space):
    files = {} if legacy is None else {"tokenizer_config": {"legacy": legacy}}
    tokenizer = load_tokenizer(with_settings(shared, tmp_path / "m", files))
    found = tokenizer.convert_ids_to_tokens(tokenizer("a</s>USER").input_ids)
    assert found[:3] == ["<s>", "▁a", "</s>"]
    assert found[3].startswith("▁") is space


def test_a_tokenizer_survives_being_saved(shared, tmp_path):
    from transformers import AutoTokenizer

    sources = [tiny(tmp_path, tiny_bpe(pre)) for pre in ("llama-bpe",)]
    for source in (*sources, shared / "tokenizers" / "llama"):
        tokenizer = load_tokenizer(source)
        folder = tmp_path / source.name.split(".")[0]
        config, base = gguf.load(sources[0])
        hf.save(folder, config, base, tokenizer)
        for again in (load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)):
            for text in CORPUS:
                assert again(text).input_ids == tokenizer(text).input_ids
            assert again.eos_token_id == tokenizer.eos_token_id
        (folder / "tokenizer_config.json").unlink()
        assert load_tokenizer(folder)("Hello").input_ids == tokenizer("Hello").input_ids
        raw = json.loads((folder / "generation_config.json").read_text())
        assert raw["eos_token_id"] == tokenizer.eos_token_id


def test_damaged_tokenizers_are_named(shared, tmp_path):
    assert "no tokenizer, expected tokenizer.json" in refusal(load_tokenizer, tmp_path)
    model = (shared / "tokenizers" / "llama" / "tokenizer.model").read_bytes()
    path = tmp_path / "tokenizer.model"
    for content in (b"", model[:1000], model[:-3], b"IQ== 0\nIg== 1\n"):
        path.write_bytes(content)
        assert str(path) in refusal(load_tokenizer, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "its tokenizer cannot be read" in refusal(load_tokenizer, tmp_path)


@pytest.mark.parametrize("name", ["bos", "eos", "pad"])
def test_special_tokens_beyond_the_model_are_refused(tmp_path, name):
    tokenizer = load_tokenizer(tiny(tmp_path, tiny_bpe("smollm")))
    size = len(tokenizer)
    check_vocabulary(tokenizer, size, "here")
    tokenizer.add_special_tokens({f"{name}_token": "<new>"})
    said = f"here: {name} token '<new>': found id {size}, expected below the model's vocab_size"
    assert refusal(check_vocabulary, tokenizer, size, "here") == f"{said} {size}"
    check_vocabulary(tokenizer, size + 1, "here")


# ---------------------------------------------------------------- ends


def test_every_end_id_that_the_files_name_ends_an_answer(tmp_path):
    keys = tiny_bpe("smollm") | {"eot_token_id": 7}
    path = tiny(tmp_path, keys)
    tokenizer = load_tokenizer(path)
    size = len(tokenizer)
    assert base_end_ids(tokenizer, size, path) == (0, 7)
    folder = tmp_path / "m"
    tokenizer.save_pretrained(folder)
    for generation, config, expected in (
        (None, None, (0,)),
        ([5, 6], 4, (0, 5, 6, 4)),
        (6, [0, 6, size, -1, None], (0, 6)),  # what cannot be generated ends nothing
    ):
        for name, ids in (("generation_config", generation), ("config", config)):
            (folder / f"{name}.json").write_text(json.dumps({"eos_token_id": ids}))
        assert base_end_ids(tokenizer, size, folder) == expected
    (folder / "config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(DataError, match="config.json: eos_token_id: found '</s>', expected ids"):
        base_end_ids(tokenizer, size, folder)


def test_a_chat_template_in_a_file_of_its_own(tmp_path):
    for keys, name in ((tiny_bpe("smollm"), "a"), (tiny_sentencepiece(True), "b")):
        folder = tmp_path / name
        folder.mkdir()
        load_tokenizer(tiny(folder, keys)).save_pretrained(folder)
        (folder / "tiny.gguf").unlink()
        (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}\n")
        assert load_tokenizer(folder).chat_template == "{{ messages[0]['content'] }}\n"


def test_an_end_token_is_a_token_of_its_own(tmp_path):
    tokenizer = load_tokenizer(tiny(tmp_path, tiny_bpe("smollm")))
    check_vocabulary(tokenizer, len(tokenizer), tmp_path)
    for token in ("", "<nothing>", None):
        tokenizer.save_pretrained(tmp_path / "t")
        path = tmp_path / "t" / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": token}))
        with pytest.raises(
            DataError, match="eos token: found .*, expected a token of its own|below"
        ):
            check_vocabulary(load_tokenizer(tmp_path / "t"), len(tokenizer), tmp_path)
