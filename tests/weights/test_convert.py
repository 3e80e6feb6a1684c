"""convert.py: any source in, a Hugging Face folder out, one line and nothing else on bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from safetensors.numpy import load_file, save_file
from transformers import GenerationConfig

import convert
import jax_lora
from jax_lora import RunConfig
from jax_lora.model.transformer import Llama
from jax_lora.run import inputs
from jax_lora.run.convert import stored_dtype
from jax_lora.weights import gguf, hf, peft
from jax_lora.weights.base import digest
from jax_lora.weights.tokenizers import load_tokenizer
from tests.data import chats
from tests.weights.builders import CORPUS, D, F, flat, hf_weights, tiny_bpe, write_gguf, write_hf


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
    assert stored == {dtype} == {stored_dtype(out)}
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
    (tmp_path / "two" / "generation_config.json").unlink()  # config.json alone has the list
    convert.main([str(tmp_path / "two"), str(tmp_path / "three"), "--dtype=float32"])
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "three" / name).read_text())["eos_token_id"] == [0, 5]
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    assert all(one[k].tobytes() == two[k].tobytes() for k in one)


def test_every_end_id_is_kept_wherever_the_source_names_it(tmp_path):
    keys = tiny_bpe("smollm") | {"eot_token_id": 7}
    source = tmp_path / "tiny.gguf"
    write_gguf(source, hf_weights(len(keys["tokens"])), tokenizer=keys)
    convert.main([str(source), str(tmp_path / "one")])
    one = json.loads((tmp_path / "one" / "generation_config.json").read_text())
    assert one["eos_token_id"] == [0, 7] and one["bos_token_id"] == 1
    # Now generation_config.json names one, and config.json still both.
    settings = json.dumps({"eos_token_id": 5, "top_k": 3})
    (tmp_path / "one" / "generation_config.json").write_text(settings)
    convert.main([str(tmp_path / "one"), str(tmp_path / "two")])
    two = json.loads((tmp_path / "two" / "generation_config.json").read_text())
    assert two == {"eos_token_id": [0, 5, 7], "top_k": 3}


def test_the_tokenizers_own_end_is_kept_where_a_file_names_another(tmp_path, source):
    """Training puts it behind every answer."""
    convert.main([str(source), str(tmp_path / "one")])
    end = json.loads((tmp_path / "one" / "generation_config.json").read_text())["eos_token_id"]
    for name in ("config.json", "generation_config.json"):
        path = tmp_path / "one" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 5}))
    convert.main([str(tmp_path / "one"), str(tmp_path / "two")])
    for name in ("config.json", "generation_config.json"):
        found = json.loads((tmp_path / "two" / name).read_text())["eos_token_id"]
        assert found == [end, 5] != [5, 5]


def test_an_adapter_of_the_first_layers_stays_one_of_them(tmp_path):
    """The number of layers, which only the base knows, is not needed for it."""
    adapter(tmp_path / "a", layers=4)
    path = tmp_path / "a" / "adapter_config.json"
    settings = json.loads(path.read_text()) | {"layers_to_transform": [0, 1]}
    path.write_text(json.dumps(settings))
    weights = tmp_path / "a" / "adapter_model.safetensors"
    kept = {k: v for k, v in load_file(weights).items() if ".layers.2." not in k}
    kept = {k: v for k, v in kept.items() if ".layers.3." not in k}
    save_file(kept, weights)
    convert.main([str(tmp_path / "a"), str(tmp_path / "b")])
    one, two = (peft.load(tmp_path / name, 4) for name in ("a", "b"))
    assert one.ranks == two.ranks and {len(ranks) for ranks in two.ranks.values()} == {4}
    assert all(not any(ranks[2:]) and all(ranks[:2]) for ranks in two.ranks.values())
    assert jax.tree.all(jax.tree.map(np.array_equal, one.adapters, two.adapters))


def test_bad_input_is_one_line_exit_code_2_and_nothing_written(tmp_path, source, capsys):
    (tmp_path / "cut.gguf").write_bytes(source.read_bytes()[:-100])
    keys = tiny_bpe("tekken")
    write_gguf(tmp_path / "nemo.gguf", hf_weights(len(keys["tokens"])), tokenizer=keys)
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    out = str(tmp_path / "out")
    before = sorted(p.name for p in tmp_path.iterdir())
    for arguments, message in [
        ([str(tmp_path / "none"), out], "no such folder or file"),
        ([str(tmp_path / "cut.gguf"), out], "damaged or cut short at"),
        ([str(tmp_path / "nemo.gguf"), out], "found 'tekken', expected one of smollm"),
        ([str(tmp_path / "empty"), out], "no config.json"),
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


# ---------------------------------------------------------------- --merge

SIZES = {"q_proj": ("self_attn", D, D), "down_proj": ("mlp", F, D)}


def adapter(folder, dora=False, layers=2):
    """Save an adapter of rank 3, α 6; returns its tree."""
    rng = np.random.default_rng(3)
    tree: dict = {"layers": {}}
    for name, (group, size_in, size_out) in SIZES.items():
        tree["layers"][group] = {
            name: {
                "a": rng.normal(size=(layers, size_in, 3)).astype(np.float32) / 8,
                "b": rng.normal(size=(layers, 3, size_out)).astype(np.float32) / 8,
                "scale": np.full(layers, 2, np.float32),
            }
        }
        if dora:
            m = rng.uniform(0.5, 1, size=(layers, size_out)).astype(np.float32)
            tree["layers"][group][name]["m"] = m
    peft.save(folder, tree, rank=3, alpha=6)
    return tree


@pytest.mark.parametrize("stored", [".gguf", "bfloat16"])
def test_an_adapter_is_merged_in_float32_and_rounded_once(tmp_path, tiny_model, stored, capsys):
    source = tiny_model
    if stored != ".gguf":
        source = tmp_path / "folder"
        convert.main([str(tiny_model), str(source), f"--dtype={stored}"])
    run = tmp_path / "run"
    tree = adapter(run / "adapter")
    capsys.readouterr()
    saved = {}
    for dtype in ("float32", "bfloat16"):
        convert.main([str(source), str(tmp_path / dtype), f"--merge={run}", f"--dtype={dtype}"])
        said, done = capsys.readouterr().out.splitlines()
        assert said.startswith(f"{dtype} moves a logit by up to ")
        assert (float(said.split()[7]) == 0) is (dtype == "float32")
        assert done == f"wrote {tmp_path / dtype}"
        saved[dtype] = load_file(tmp_path / dtype / "model.safetensors")
    base = load_file(source / "model.safetensors") if source.is_dir() else None
    if base is None:
        convert.main([str(source), str(tmp_path / "plain"), "--dtype=float32"])
        base = load_file(tmp_path / "plain" / "model.safetensors")
    for name, found in saved["float32"].items():
        wanted = base[name].astype(np.float32)
        target = name.split(".")[-2]
        if target in SIZES:
            leaf, i = tree["layers"][SIZES[target][0]][target], int(name.split(".")[2])
            a, b = (leaf[key][i].astype(np.float64) for key in ("a", "b"))
            np.testing.assert_allclose(found, wanted + 2 * (a @ b).T, rtol=0, atol=1e-7)
        else:
            assert np.array_equal(found, wanted)
        half = saved["bfloat16"][name]
        assert half.dtype.name == "bfloat16" and np.array_equal(found.astype(half.dtype), half)


def test_an_adapter_that_cannot_be_merged_is_one_line_and_nothing_written(
    tmp_path, tiny_model, capsys
):
    tree = adapter(tmp_path / "zero")
    for modules in tree["layers"].values():
        for leaf in modules.values():
            leaf["b"][:] = 0
    peft.save(tmp_path / "zero", tree, rank=3, alpha=6)
    adapter(tmp_path / "deep", layers=3)
    adapter(tmp_path / "part")
    path = tmp_path / "part" / "adapter_config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"target_modules": ["q_proj", "v_proj", "down_proj"]}))
    before = sorted(p.name for p in tmp_path.iterdir())
    for folder, message in [
        ("none", "adapter_config.json: no such file, expected a PEFT adapter folder or a run's"),
        ("zero", "every B is zero, expected a trained adapter"),
        ("deep", "found a tensor of layer 2, expected 2 layers"),
        (
            "part",
            "found no complete (A, B) for 0.self_attn.v_proj, 1.self_attn.v_proj; expected them",
        ),
    ]:
        with pytest.raises(SystemExit) as stop:
            convert.main(
                [str(tiny_model), str(tmp_path / "out"), "--merge", str(tmp_path / folder)]
            )
        captured = capsys.readouterr()
        assert stop.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1
        assert captured.err.startswith(f"error: {tmp_path / folder}") and message in captured.err
    assert sorted(p.name for p in tmp_path.iterdir()) == before


# ---------------------------------------------------------------- which base


def refused(*arguments) -> bool:
    try:
        convert.main([str(one) for one in arguments])
    except SystemExit as stop:
        assert stop.code == 2
        return True
    return False


@pytest.fixture
def bases(tmp_path, source):
    """A base, another one of the same shape, and the first one converted."""
    other = tmp_path / "other.gguf"
    keys = tiny_bpe("llama-bpe")
    write_gguf(other, hf_weights(len(keys["tokens"])), tokenizer=keys)
    convert.main([str(source), str(tmp_path / "converted")])
    convert.main([str(tmp_path / "converted"), str(tmp_path / "again"), "--dtype=float32"])
    return source, other, tmp_path / "converted", tmp_path / "again"


def test_a_merge_into_another_base_is_refused_with_both_digests(tmp_path, bases, capsys):
    source, other, converted, again = bases
    tree, one = adapter(tmp_path / "a"), digest(source)
    peft.save(tmp_path / "a", tree, rank=3, alpha=6, base_name=str(source), base_digest=one)
    capsys.readouterr()
    merge = f"--merge={tmp_path / 'a'}"
    assert refused(other, tmp_path / "out", merge)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(tmp_path / "a") in said
    assert one[:12] in said and digest(other)[:12] in said and "--any-base" in said
    assert not (tmp_path / "out").exists()
    assert not refused(other, tmp_path / "forced", merge, "--any-base")
    for i, same in enumerate((source, converted, again)):
        assert not refused(same, tmp_path / f"merged{i}", merge)
        named = json.loads((tmp_path / f"merged{i}" / "jax_lora.json").read_text())
        assert (named["base"], named["base_digest"]) == (str(same), one)
        assert named["adapter"] == peft.digest(tmp_path / "a")
    # What was merged is another base, and so is a conversion whose weights were changed.
    assert refused(tmp_path / "merged0", tmp_path / "twice", merge)
    shutil.copyfile(tmp_path / "merged1" / "model.safetensors", converted / "model.safetensors")
    assert refused(converted, tmp_path / "twice", merge)


def test_an_adapter_that_names_no_base_is_merged_and_a_run_names_its_own(tmp_path, bases):
    source, other, *_ = bases
    adapter(tmp_path / "run" / "adapter")
    merge = f"--merge={tmp_path / 'run'}"
    assert not refused(other, tmp_path / "one", merge)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"base_digest": digest(source)}))
    assert refused(other, tmp_path / "two", merge)
    assert not refused(source, tmp_path / "two", merge)
    assert not refused(tmp_path / "run", tmp_path / "exported")
    named = json.loads((tmp_path / "exported" / "jax_lora.json").read_text())
    assert named["base_digest"] == digest(source)
    assert refused(other, tmp_path / "three", f"--merge={tmp_path / 'exported'}")


def test_flags_that_do_not_fit_the_source_are_refused(tmp_path, source, capsys):
    adapter(tmp_path / "a")
    for arguments, message in [
        ([tmp_path / "a", "--merge", tmp_path / "a"], "--merge: found an adapter, "),
        ([source, "--fold-scale"], f"--fold-scale: found {source} as SRC, expected an adapter"),
    ]:
        assert refused(arguments[0], tmp_path / "out", *arguments[1:])
        assert capsys.readouterr().err.startswith(f"error: {message}")


# ---------------------------------------------------------------- what ends an answer


def chat_run(folder, template="chat", swapped=None):
    """A base whose tokenizer ends texts with <|endoftext|> and turns with <|im_end|>, and the
    folder of a run on it; `swapped` exchanges a token's row of the output head with <|im_end|>'s.
    """
    tokenizer = chats.tokenizer("qwen2.5")
    tokenizer.eos_token = "<|endoftext|>"
    weights = hf_weights(len(tokenizer))
    if swapped is not None:
        pair = [swapped, tokenizer.convert_tokens_to_ids("<|im_end|>")]
        weights["lm_head.weight"][pair] = weights["lm_head.weight"][pair[::-1]]
    folder.mkdir()
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    source = write_hf(folder / "base", weights, vocab_size=len(tokenizer), **ids)
    tokenizer.save_pretrained(source)
    adapter(folder / "run" / "adapter")
    config = RunConfig().replace(model=str(source), **{"data.template": template})
    saved = {"config": config.to_dict(), "base_digest": digest(source)}
    (folder / "run" / "config.json").write_text(json.dumps(saved))
    return config, folder / "run", tokenizer


@pytest.mark.parametrize("template", ["chat", "alpaca"])
@pytest.mark.parametrize("given", ["run", "run/adapter", "exported"])
def test_a_merged_folder_ends_answers_as_eval_does(tmp_path, template, given):
    config, run, tokenizer = chat_run(tmp_path / "a", template)
    source = tmp_path / "a" / given
    if given == "exported":
        convert.main([str(run), str(source)])
    out = tmp_path / "out"
    convert.main([config.model, str(out), f"--merge={source}"])
    wanted = list(inputs.end_ids(config))
    names = ["<|endoftext|>", "<|im_end|>"][: 1 + (template == "chat")]
    assert tokenizer.convert_ids_to_tokens(wanted) == names
    for name in ("config.json", "generation_config.json"):
        found = json.loads((out / name).read_text())["eos_token_id"]
        assert (found if isinstance(found, list) else [found]) == wanted
    found = GenerationConfig.from_pretrained(out).eos_token_id
    assert (found if isinstance(found, list) else [found]) == wanted
    for one in (jax_lora.load(config.model, source), jax_lora.load(out)):
        assert list(one.end_ids) == wanted


@pytest.mark.parity
def test_against_hf_a_merged_folder_generates_up_to_the_end_of_the_turn(tmp_path):
    torch = pytest.importorskip("torch")
    load = pytest.importorskip("transformers").LlamaForCausalLM.from_pretrained
    prompt = "What is the capital of France?"

    def answer(folder, **more):
        config, run, tokenizer = chat_run(folder, **more)
        convert.main([config.model, str(folder / "m"), f"--merge={run}", "--dtype=float32"])
        ids = torch.tensor([tokenizer(prompt).input_ids])
        model = load(folder / "m", dtype=torch.float32)
        given = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "do_sample": False}
        found = model.generate(ids, max_new_tokens=12, **given)[0, ids.shape[1] :].tolist()
        ours = jax_lora.load(config.model, run, "float32").generate(prompt, 12)
        assert ours == [tokenizer.decode(found, skip_special_tokens=True).strip()]
        return found, tokenizer.convert_tokens_to_ids("<|im_end|>")

    free, end = answer(tmp_path / "free")
    length = next(n for n in range(3, 12) if free[n] not in free[:n])
    assert len(free) == 12 and end not in free
    ended, _ = answer(tmp_path / "ended", swapped=free[length])
    assert ended == [*free[:length], end]


# ---------------------------------------------------------------- against transformers and PEFT


@pytest.mark.parity
def test_against_hf_a_converted_gguf_knows_the_capital_of_france(tmp_path, smollm2):
    # That its weights are transformers' own reading of the GGUF is a test of test_smollm2.py.
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    convert.main([str(smollm2), str(tmp_path / "out"), "--dtype=float32"])
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    tokens = torch.tensor([tokenizer("The capital of France is").input_ids])
    with torch.no_grad():
        assert tokenizer.decode(model(tokens).logits[0, -1].argmax()) == " Paris"


@pytest.mark.parity
# peft 0.21 asks transformers 5.23 for an attribute by its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("dora", [False, True])
def test_against_peft_the_merged_folder_says_what_the_adapted_model_says(
    tmp_path, tiny_model, dora
):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("peft")
    load = pytest.importorskip("transformers").LlamaForCausalLM.from_pretrained
    adapter(tmp_path / "adapter", dora)
    convert.main([str(tiny_model), str(tmp_path / "base"), "--dtype=float32"])
    to = [str(tmp_path / "merged"), "--dtype=float32", "--merge", str(tmp_path / "adapter")]
    convert.main([str(tmp_path / "base"), *to])

    tokens = np.random.default_rng(0).integers(0, 250, (2, 16))
    with torch.no_grad():
        found = load(tmp_path / "merged")(torch.tensor(tokens)).logits.numpy()
        model = theirs.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")
        merged = model.merge_and_unload()(torch.tensor(tokens)).logits.numpy()
        untuned = load(tmp_path / "base")(torch.tensor(tokens)).logits.numpy()
    config, base = hf.load(tmp_path / "base", "float32")
    variables = {"params": base, "lora": peft.load(tmp_path / "adapter").adapters}
    ours = Llama(config, np.float32).apply(variables, tokens)
    largest = np.abs(merged).max()
    assert np.abs(found - merged).max() / largest < 1e-5
    assert np.abs(ours - merged).max() / largest < 1e-5
    assert np.abs(untuned - merged).max() / largest > 1e-2
