"""Every reader of a user's file, and the file damaged: one of our errors, and it names the file."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from transformers import dynamic_module_utils as hf_modules

from jax_lora.data import hub, instructions
from jax_lora.data.toy import write_checkout
from jax_lora.errors import DataError
from jax_lora.evaluation import evaluate
from jax_lora.weights import base, hf, peft
from jax_lora.weights.tokenizers import load_tokenizer
from tests.weights.builders import (
    LLAMA3,
    hf_weights,
    tiny_bpe,
    tiny_sentencepiece,
    write_gguf,
    write_hf,
)


def model(folder):
    return write_hf(folder / "m", hf_weights(), rope_scaling=LLAMA3)


def config_json(folder):
    source = model(folder)
    return source / "config.json", lambda: base.load(source, "float32")


def weights(folder):
    source = model(folder)
    return source / "model.safetensors", lambda: base.load(source, "float32")


def index(folder):
    source = folder / "shards"
    hf.save(source, *hf.load(model(folder), "float32"), dtype="float32", shard_bytes=50_000)
    return source / "model.safetensors.index.json", lambda: base.load(source, "float32")


def gguf_model(folder):
    path = folder / "tiny.gguf"
    keys = tiny_bpe("smollm")
    write_gguf(path, hf_weights(len(keys["tokens"])), tokenizer=keys)
    return path, lambda: base.load(path, "float32")


def gguf_tokenizer(folder):
    path = folder / "tiny.gguf"
    keys = tiny_sentencepiece(True)
    write_gguf(path, hf_weights(len(keys["tokens"])), tokenizer=keys)
    return path, lambda: load_tokenizer(path)


def tokenizer_folder(folder):
    path, _ = gguf_model(folder)
    load_tokenizer(path).save_pretrained(folder / "t")
    return folder / "t"


def tokenizer_json(folder):
    source = tokenizer_folder(folder)
    return source / "tokenizer.json", lambda: load_tokenizer(source)


def tokenizer_config(folder):
    source = tokenizer_folder(folder)
    return source / "tokenizer_config.json", lambda: load_tokenizer(source)


def sentencepiece(folder):
    def piece(text, kind):
        raw = text.encode()
        inner = b"\x0a" + bytes([len(raw)]) + raw + b"\x18" + bytes([kind])
        return b"\x0a" + bytes([len(inner)]) + inner

    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{b:02X}>", 6) for b in range(256))]
    body = b"".join(piece(*each) for each in [*pieces, ("▁", 1), ("a", 1), ("▁a", 1)])
    # The trainer's model_type 2 and byte_fallback 1; the normalizer keeps white space.
    path = folder / "tokenizer.model"
    path.write_bytes(body + b"\x12\x05\x18\x02\x98\x02\x01" + b"\x1a\x02\x20\x00")
    settings = folder / "tokenizer_config.json"
    added = {"262": {"content": "<pad>", "special": True}}
    settings.write_text(json.dumps({"added_tokens_decoder": added, "add_bos_token": True}))
    return path, lambda: load_tokenizer(folder)


def sentencepiece_config(folder):
    path, read = sentencepiece(folder)
    return path.with_name("tokenizer_config.json"), read


def adapter(folder):
    config = hf.read_config(model(folder))
    rng = np.random.default_rng(0)
    leaf = {
        "a": rng.normal(size=(2, 64, 4)).astype(np.float32),
        "b": rng.normal(size=(2, 4, 64)).astype(np.float32),
        "scale": np.full(2, 2.0, np.float32),
    }
    peft.save(folder / "a", {"layers": {"self_attn": {"q_proj": leaf}}}, rank=4, alpha=8)
    table = {"modules": [{"module": "lora.q_proj", "trainable": True}]}
    (folder / "a" / "parameters.json").write_text(json.dumps(table))
    return folder / "a", lambda: peft.load_trained(folder / "a", config)


def adapter_config(folder):
    source, read = adapter(folder)
    return source / "adapter_config.json", read


def adapter_weights(folder):
    source, read = adapter(folder)
    return source / "adapter_model.safetensors", read


def parameters(folder):
    source, read = adapter(folder)
    return source / "parameters.json", read


def checkout(folder):
    root = write_checkout(folder / "c", instances_per_task=2)

    def read():
        found = instructions.read_checkout(root)
        return [task.instances() for task in (*found.train, *found.test)]

    return root, read


def task(folder):
    root, read = checkout(folder)
    return sorted((root / "tasks").iterdir())[0], read


def split(folder):
    root, read = checkout(folder)
    return root / "splits" / "default" / "train_tasks.txt", read


def categories(folder):
    path = folder / "categories.json"
    path.write_text(json.dumps({"tasks": [{"task": "a", "category": "b"}]}))
    return path, lambda: hub._read_categories(path)


def hub_rows(folder):
    for part in ("train", "test"):
        row = {"task_name": part, "definition": "d", "inputs": "i", "targets": "t", "id": "1"}
        (folder / "hub" / part).mkdir(parents=True)
        (folder / "hub" / part / "rows.jsonl").write_text(json.dumps(row) + "\n")
    path = folder / "hub" / "train" / "rows.jsonl"
    return path, lambda: hub.read_hub(folder / "hub", cache=folder / "arrow")


def scored(folder, name):
    example = {"task": "t", "category": "c", "id": "1", "input": "", "prompt": ""}
    said = {"task": "t", "id": "1", "prediction": "a", "truncated": False, "finished": True}
    (folder / "examples.jsonl").write_text(json.dumps(example | {"references": ["a"]}) + "\n")
    (folder / "predictions.jsonl").write_text(json.dumps(said | {"new_tokens": 1}) + "\n")
    (folder / "labels.json").write_text(json.dumps({"t": {"a": 1, "b": 1}}))
    return folder / name, lambda: evaluate.score(folder)


def examples(folder):
    return scored(folder, "examples.jsonl")


def predictions(folder):
    return scored(folder, "predictions.jsonl")


def labels(folder):
    return scored(folder, "labels.json")


READERS = [config_json, weights, index, gguf_model, gguf_tokenizer, tokenizer_json]
READERS += [tokenizer_config, sentencepiece, sentencepiece_config, adapter_config, adapter_weights]
READERS += [parameters, task, split, categories, hub_rows, examples, predictions, labels]


def damages(path: Path):
    """Other contents for a file: cut, with bytes flipped, and JSON of other shapes."""
    whole, rng = path.read_bytes(), random.Random(0)
    # The native parsers of `datasets` and `tokenizers` end the process over some damage, which no
    # reader can catch: a file that was cut has to do.
    if "hub" in path.parts or path.name == "tokenizer.json":
        yield from (whole[:cut] for cut in (4, 9, len(whole) // 3, len(whole) // 2, len(whole) - 2))
        return
    for cut in {0, 1, 4, 9, len(whole) // 2, len(whole) - 2}:
        yield whole[:cut]
    for _ in range(30):
        damaged = bytearray(whole)
        damaged[rng.randrange(min(len(damaged), 2000))] = rng.randrange(256)
        yield bytes(damaged)
    if path.suffix not in (".json", ".jsonl"):
        return
    yield from (b"[]", b"null", b'"x"', b"{}", b"[" * 50_000, b"[]\n", b"{}\n")
    tree = json.loads(whole)
    for key, old in list(tree.items()):
        for new in (None, -1, 1.5, 10**30, "x", [], [{}], {"a": {}}, {"0": "x"}, True):
            yield json.dumps(tree | {key: new}).encode() + b"\n"
            if isinstance(old, dict):
                for inner in list(old)[:8]:
                    yield json.dumps(tree | {key: old | {inner: new}}).encode() + b"\n"
        yield json.dumps({k: v for k, v in tree.items() if k != key}).encode() + b"\n"


@pytest.mark.filterwarnings("ignore")  # of the libraries, about what they are made to read
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_a_damaged_file_is_our_error_and_named(reader, tmp_path):
    path, read = reader(tmp_path)
    read()
    refused = 0
    for content in damages(path):
        path.write_bytes(content)
        try:
            read()  # much damage changes a value into another that is as good
        except DataError as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error)
            refused += 1
        except OSError as error:
            assert error.filename is not None, repr(error)
            refused += 1
    assert refused >= 5


@pytest.mark.filterwarnings("ignore")
def test_code_in_a_base_folder_is_never_run(tmp_path, monkeypatch):
    """Without trust_remote_code=False, transformers asks on the terminal and takes yes."""
    folder, ran = tokenizer_folder(tmp_path), tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as Own\n"
    (folder / "own.py").write_text(code)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    path.write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr(hf_modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    try:
        load_tokenizer(folder)
    except DataError as error:
        assert str(folder) in str(error) and "\n" not in str(error)
    assert not ran.exists()
