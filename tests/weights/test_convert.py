"""convert.py: any source in, a Hugging Face folder out, one line and nothing else on bad input."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from safetensors.numpy import load_file

import convert
from jax_lora.weights import gguf, hf
from jax_lora.weights.tokenizers import load_tokenizer
from tests.weights.builders import CORPUS, flat, hf_weights, tiny_bpe, write_gguf


@pytest.fixture
def source(tmp_path):
    keys = tiny_bpe("llama-bpe")
    path = tmp_path / "tiny.gguf"
    weights = hf_weights(len(keys["tokens"]))
    write_gguf(path, weights, GGMLQuantizationType.Q8_0, tokenizer=keys)
    return path


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_gguf_becomes_the_same_model_in_a_folder(tmp_path, source, dtype, capsys):
    out = tmp_path / "out"
    convert.main([str(source), str(out), f"--dtype={dtype}"])
    assert capsys.readouterr().out == f"wrote {out}\n"
    config, base = gguf.load(source, dtype)
    again, found = hf.load(out, dtype)
    assert again == config
    wanted = dict(flat(base))
    assert all(np.array_equal(array, wanted[path]) for path, array in flat(found))
    stored = {str(v.dtype) for v in load_file(out / "model.safetensors").values()}
    assert stored == {dtype}
    raw = json.loads((out / "config.json").read_text())
    assert (raw["torch_dtype"], raw["bos_token_id"], raw["eos_token_id"]) == (dtype, 1, 0)
    before, after = load_tokenizer(source), load_tokenizer(out)
    assert all(before(text).input_ids == after(text).input_ids for text in CORPUS)


def test_a_folder_becomes_a_folder_with_its_own_generation_settings(tmp_path, source):
    convert.main([str(source), str(tmp_path / "one"), "--dtype=float32"])
    settings = {"eos_token_id": [0, 5], "bos_token_id": 1, "temperature": 0.6}
    (tmp_path / "one" / "generation_config.json").write_text(json.dumps(settings))
    convert.main([str(tmp_path / "one"), str(tmp_path / "two"), "--dtype=float32"])
    assert json.loads((tmp_path / "two" / "generation_config.json").read_text()) == settings
    assert json.loads((tmp_path / "two" / "config.json").read_text())["eos_token_id"] == [0, 5]
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    assert all(one[k].tobytes() == two[k].tobytes() for k in one)


def test_bad_input_is_one_line_exit_code_2_and_nothing_written(tmp_path, source, capsys):
    (tmp_path / "cut.gguf").write_bytes(source.read_bytes()[:-100])
    keys = tiny_bpe("qwen2")
    write_gguf(tmp_path / "qwen.gguf", hf_weights(len(keys["tokens"])), tokenizer=keys)
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    out = str(tmp_path / "out")
    before = sorted(p.name for p in tmp_path.iterdir())
    for arguments, message in [
        ([str(tmp_path / "none"), out], "no such folder or file"),
        ([str(tmp_path / "cut.gguf"), out], "damaged or cut short at"),
        ([str(tmp_path / "qwen.gguf"), out], "found 'qwen2', expected one of smollm"),
        ([str(tmp_path / "empty"), out], "no tokenizer"),
        ([str(source), str(tmp_path / "full")], "expected a new or empty folder"),
        ([str(source), str(source)], "expected a new or empty folder"),
    ]:
        with pytest.raises(SystemExit) as stop:
            convert.main(arguments)
        captured = capsys.readouterr()
        assert stop.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1
        assert captured.err.startswith("error: ") and message in captured.err
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    with pytest.raises(SystemExit) as stop:
        convert.main([str(source), out, "--dtype=int8"])
    assert stop.value.code == 2


def test_as_a_program_it_says_one_line_and_nothing_more(tmp_path, source):
    convert.main([str(source), str(tmp_path / "one")])
    (tmp_path / "one" / "model.safetensors").unlink()  # found only after the tokenizer is read
    command = [sys.executable, convert.__file__, str(tmp_path / "one"), str(tmp_path / "two")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    expected = f"error: {tmp_path / 'one'}: no weights, expected model.safetensors or "
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr == expected + "model.safetensors.index.json\n"
    assert not (tmp_path / "two").exists()


@pytest.mark.parity
def test_against_hf_a_converted_gguf_knows_the_capital_of_france(tmp_path, smollm2):
    # That its weights are transformers' own reading of the GGUF is a test of test_gguf.py.
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    convert.main([str(smollm2), str(tmp_path / "out"), "--dtype=float32"])
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    tokens = torch.tensor([tokenizer("The capital of France is").input_ids])
    with torch.no_grad():
        assert tokenizer.decode(model(tokens).logits[0, -1].argmax()) == " Paris"
