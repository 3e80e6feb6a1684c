"""train.py and eval.py with the flags that a user gives, on a tiny model and our toy tasks."""

import json
import shutil
import signal
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_lora.data.toy import write_checkout
from jax_lora.model.transformer import Llama
from jax_lora.run import Run, scoring
from jax_lora.weights import gguf, hf
from tests.conftest import REPOSITORY
from tests.scripts import command, run

SMALL = [
    "--config.dtype=float32",
    "--config.max_steps=6",
    "--config.batch_size=8",
    "--config.micro_tokens=1024",
    "--config.checkpoint_every=2",
    "--config.optim.warmup_steps=1",
    "--config.optim.learning_rate=1e-3",
    "--config.data.test_per_task=2",
    "--config.data.train_per_task=4",
    "--config.data.buckets=(384,768)",
    "--config.data.source_length=640",
    "--config.eval.buckets=(768,)",
    "--config.eval.max_new_tokens=4",
]


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    return write_checkout(tmp_path_factory.mktemp("toy"), instances_per_task=12)


def training(
    model: Path, toy: Path, workdir: Path, *more: str, config: str = "lora.py:rank=2"
) -> list[str]:
    """Flags of train.py."""
    return [
        f"--config={REPOSITORY}/configs/{config}",
        f"--config.model={model}",
        f"--config.data.path={toy}",
        f"--workdir={workdir}",
        *SMALL,
        *more,
    ]


@pytest.fixture(scope="module")
def finished(tiny_model, toy, tmp_path_factory) -> Path:
    """A run that trained and was scored."""
    workdir = tmp_path_factory.mktemp("runs") / "r2"
    trained = run("train.py", *training(tiny_model, toy, workdir))
    assert trained.returncode == 0, trained.stderr
    assert "trainable" in trained.stdout and "lora.layers.self_attn.q_proj.a" in trained.stdout
    scored = run("eval.py", f"--workdir={workdir}", "--sets=unseen")
    assert scored.returncode == 0, scored.stderr
    assert "mean over tasks" in scored.stdout and "closed-label tasks" in scored.stdout
    return workdir


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_the_folder_holds_what_the_house_promises(finished):
    for name in (
        "config.json",
        "parameters.json",
        "metrics.jsonl",
        "checkpoints/6",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "eval/unseen/examples.jsonl",
        "eval/unseen/predictions.jsonl",
        "eval/unseen/scores.json",
    ):
        assert (finished / name).exists(), name
    assert list((finished / "tensorboard").iterdir())
    config = json.loads((finished / "config.json").read_text())
    assert config["config"]["lora"]["rank"] == 2
    assert {"versions", "device", "data_fingerprint"} <= config.keys()
    counted = json.loads((finished / "parameters.json").read_text())
    assert counted["trainable"] == 2 * 2 * ((64 + 64) * 2 + (64 + 32) * 2)
    metrics = lines(finished)
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(m["loss"]) and m["tokens_per_second"] > 0 for m in metrics)
    assert metrics[0]["learning_rate"] == 0.0 and metrics[1]["learning_rate"] == pytest.approx(1e-3)
    row = json.loads((finished / "eval/unseen/predictions.jsonl").read_text().splitlines()[0])
    assert {"id", "prediction", "truncated", "finished", "new_tokens"} <= row.keys()


def test_the_adapter_folder_is_the_last_checkpoint(finished):
    arguments = f"--workdir={finished}", "--sets=unseen", f"--adapter={finished}/adapter"
    scored = subprocess.run(command("eval.py", *arguments), capture_output=True, text=True)
    assert scored.returncode == 0, scored.stderr
    (other,) = finished.glob("eval-adapter-*")
    texts = [
        sorted((folder / "unseen" / "predictions.jsonl").read_text().splitlines())
        for folder in (finished / "eval", other)
    ]
    assert texts[0] == texts[1]


def test_show_prints_rows_and_trains_nothing(tiny_model, toy, tmp_path):
    done = run("train.py", *training(tiny_model, toy, tmp_path / "r"), "--show=2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" in the loss; a prompt of ") == 2
    assert not (tmp_path / "r").exists()


def test_the_untuned_base_stands_beside(finished):
    for arguments in (["--adapter=none"], []):
        scored = run("eval.py", f"--workdir={finished}", "--sets=unseen", *arguments)
        assert scored.returncode == 0, scored.stderr
    assert "untuned EM" in scored.stdout
    assert (finished / "eval-none/unseen/scores.json").is_file()


def test_a_terminated_run_goes_on_to_the_same_end(tiny_model, toy, finished, tmp_path):
    workdir = tmp_path / "r2"
    with subprocess.Popen(
        command("train.py", *training(tiny_model, toy, workdir)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr
        stderr = ""
        while " 1/6 " not in stderr:  # its progress bar
            letter = process.stderr.read(1)
            assert letter, stderr
            stderr += letter
        process.send_signal(signal.SIGTERM)
        stderr += process.stderr.read()
    if process.returncode:  # it may have been at its end already
        assert process.returncode == 75
        assert "rerun the same command to resume there" in stderr
    again = run("train.py", *training(tiny_model, toy, workdir))
    assert again.returncode == 0, again.stderr
    ours, theirs = lines(workdir), lines(finished)
    assert [(m["step"], m["loss"]) for m in ours] == [(m["step"], m["loss"]) for m in theirs]
    name = "adapter/adapter_model.safetensors"
    assert (workdir / name).read_bytes() == (finished / name).read_bytes()


def test_full_fine_tuning_trains_and_scores(tiny_model, toy, tmp_path):
    workdir = tmp_path / "full"
    trained = run("train.py", *training(tiny_model, toy, workdir, config="full.py"))
    assert trained.returncode == 0, trained.stderr
    assert "trainable 100.000%" in trained.stdout and not (workdir / "adapter").exists()
    scored = run("eval.py", f"--workdir={workdir}", "--sets=seen")
    assert scored.returncode == 0, scored.stderr
    out = tmp_path / "out"
    arguments = str(tiny_model), str(out), f"--merge={workdir}", "--dtype=float32"
    assert run("convert.py", *arguments).returncode == 0
    variables = scoring.load(workdir, Run.open(None, workdir).config, "last").variables
    found, (_, base) = hf.load(out, "float32")[1], gguf.load(tiny_model, "float32")
    jax.tree.map(np.testing.assert_array_equal, found, variables["params"])
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), found, base)
    assert min(jax.tree.leaves(moved)) > 0


def test_a_run_that_trained_norms_too_is_merged_whole_or_refused(tiny_model, toy, tmp_path):
    # Without a clip, which 0 turns off.
    rules = "--config.trainable=('lora/.*/[ab]','params/.*norm/scale')"
    workdir, out = tmp_path / "r", tmp_path / "out"
    more = (rules, "--config.max_steps=3", "--config.optim.clip_norm=0")
    trained = run("train.py", *training(tiny_model, toy, workdir, *more))
    assert trained.returncode == 0, trained.stderr
    arguments = str(tiny_model), str(out), f"--merge={workdir}", "--dtype=float32"
    merged = run("convert.py", *arguments)
    assert merged.returncode == 0, merged.stderr
    variables = scoring.load(workdir, Run.open(None, workdir).config, "last").variables
    found, (config, base) = hf.load(out, "float32")[1], gguf.load(tiny_model, "float32")
    assert np.abs(found["norm"]["scale"] - base["norm"]["scale"]).max() > 1e-4
    say = jax.jit(Llama(config, dtype=jnp.float32).apply)
    tokens = np.arange(32)[None]
    wanted = say(variables, tokens)
    np.testing.assert_allclose(say({"params": found}, tokens), wanted, rtol=0, atol=1e-5)
    adapter = f"--adapter={workdir}/adapter"
    refused = [f"--workdir={workdir}", adapter]
    assert_refused("eval.py", refused, workdir, "its run trained", "norm.scale of the base")


# ---------------------------------------------------------------- bad input: a line, 2, nothing


def assert_refused(script: str, arguments: list[str], workdir: Path, *words: str) -> None:
    before = sorted(workdir.rglob("*")) if workdir.exists() else None
    result = run(script, *arguments)
    assert result.returncode == 2, (result.returncode, result.stderr)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in result.stderr, result.stderr
    for word in words:
        assert word in errors[0], errors[0]
    assert (sorted(workdir.rglob("*")) if workdir.exists() else None) == before


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.lora.rnak=4", ("config.lora.rnak",)),
        ("--config.lora.rank=0", ("config.lora.rank: found 0", "at least 1")),
        ("--config.lora.rank=-4", ("config.lora.rank: found -4",)),
        ("--config.lora.targets=('q_proj','query')", ("found query", "expected some of q_proj")),
        ("--config.data.set=T99", ("found 'T99'", "T100")),
        ("--config.optim.schedule=step", ("found 'step'", "linear")),
        ("--config.lora.dropout=1.0", ("config.lora.dropout: found 1.0",)),
        ("--config.model=no/such-model", ("no/such-model",)),
        ("--config.data.path=no-such-folder", ("no-such-folder",)),
        ("--config.trainable=('lora/.*/c',)", ("lora/.*/c",)),
        ("--config.trainable=('lora/[ab',)", ("'lora/[ab', expected a regular expression",)),
        ("--config.data.source_length=20", ("source_length",)),
        ("--config.data.source_length=800", ("source_length: found 800", "at most 768")),
        ("--config.dtype=float16", ("dtype: found 'float16'", "bfloat16")),
        ("--config.optim.clip_norm=-1", ("optim.clip_norm: found -1.0",)),
        ("--config.max_steps=-1", ("max_steps: found -1",)),
    ],
)
def test_bad_flags(tiny_model, toy, tmp_path, flag, words):
    assert_refused(
        "train.py", training(tiny_model, toy, tmp_path / "r", flag), tmp_path / "r", *words
    )


def test_bad_config_files(tiny_model, toy, tmp_path):
    for config, words in (
        ("lora.py:rnak=4", ("rnak=4", "rank")),
        ("lora.py:rank=four", ("rank is 'four'", "int")),
        ("nothing.py", ("nothing.py",)),
    ):
        arguments = training(tiny_model, toy, tmp_path / "r", config=config)
        assert_refused("train.py", arguments, tmp_path / "r", *words)


def spoil_split(toy):
    (toy / "splits/default/train_tasks.txt").write_text("")
    return ("train_tasks.txt", "no task names")


def drop_split(toy):
    (toy / "splits/default/test_tasks.txt").unlink()
    return ("test_tasks.txt", "no such file")


def drop_task(toy):
    path = sorted((toy / "tasks").iterdir())[0]
    path.unlink()
    return (path.stem, "no such file")


def cut_task(toy):
    path = sorted((toy / "tasks").iterdir())[0]
    path.write_bytes(path.read_bytes()[:1000])
    return (path.name, "not valid JSON")


def empty_output(toy):
    path = sorted((toy / "tasks").iterdir())[0]
    record = json.loads(path.read_text())
    record["Instances"][3]["output"] = []
    path.write_text(json.dumps(record))
    return (path.name, "instance 3", "output")


@pytest.mark.parametrize("spoil", [spoil_split, drop_split, drop_task, cut_task, empty_output])
def test_bad_checkouts(tiny_model, toy, tmp_path, spoil):
    shutil.copytree(toy, tmp_path / "toy")
    words = spoil(tmp_path / "toy")
    assert_refused(
        "train.py", training(tiny_model, tmp_path / "toy", tmp_path / "r"), tmp_path / "r", *words
    )


def test_bad_models(toy, tmp_path, tiny_model):
    from jax_lora.weights import gguf, hf
    from jax_lora.weights.tokenizers import load_tokenizer
    from tests.weights import builders

    config, base = gguf.load(tiny_model, "float32")
    folder = tmp_path / "shards"
    hf.save(folder, config, base, load_tokenizer(tiny_model), "float32", shard_bytes=200_000)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    empty = tmp_path / "empty"
    shutil.copytree(folder, empty)
    for path in empty.glob("*.safetensors*"):
        path.unlink()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_model.read_bytes()[:-5000])
    other = tmp_path / "other.gguf"
    builders.write_gguf(other, builders.hf_weights(), architecture="qwen2")
    for model, words in (
        (folder, (shard.name,)),
        (empty, ("empty", "safetensors")),
        (cut, ("cut.gguf",)),
        (other, ("other.gguf", "qwen2")),
    ):
        assert_refused("train.py", training(model, toy, tmp_path / "r"), tmp_path / "r", *words)


def test_a_folder_of_another_run(tiny_model, toy, finished):
    arguments = training(tiny_model, toy, finished, "--config.lora.rank=3")
    assert_refused("train.py", arguments, finished, "config.lora.rank")


def test_a_folder_that_cannot_be_written(tiny_model, toy, tmp_path):
    # Root may write anywhere, so the folder is one that no one can write to.
    folder = Path("/proc/no-such-run")
    assert_refused("train.py", training(tiny_model, toy, folder), folder, "/proc/no-such-run")


def test_scoring_what_is_not_there(tmp_path, finished):
    assert_refused("eval.py", [f"--workdir={tmp_path}/r"], tmp_path / "r", "config.json")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(finished / "config.json", bare)
    assert_refused("eval.py", [f"--workdir={bare}"], bare, "no checkpoint")
    assert_refused("eval.py", [f"--workdir={finished}", "--sets=all"], finished, "'all'")
