"""The study of real tasks from its trials to its report, with a model of two random layers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from jax_lora.model.config import LlamaConfig
from jax_lora.model.transformer import Llama
from jax_lora.study import plotting, svg
from jax_lora.weights import hf
from jax_lora.weights.tokenizers import load_tokenizer
from tests import scripts
from tests.conftest import REPOSITORY

FLAGS = (
    "--config.ranks=(4,)",
    "--config.sets=('T4','T12','T*4')",
    "--config.rounds=(0,)",
    "--config.learning_rates.lora=(1e-3,1e-1)",
    "--config.choose_on=T4",
    "--config.run.dtype=float32",
    "--config.run.data.sizes=(4,12,581)",
    "--config.run.data.test_per_task=1",
    "--config.run.optim.warmup_steps=0",
    "--config.run.eval.max_new_tokens=2",
    "--config.run.eval.buckets=(960,)",
)


@pytest.fixture
def base(smollm2, tmp_path):
    """A LLaMA that reads SmolLM2's tokens, so that prompts have their real lengths."""
    tokenizer = load_tokenizer(smollm2)
    config = LlamaConfig(len(tokenizer), 16, 32, 2, 2, 2, 8, tie_word_embeddings=True)
    params = Llama(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    hf.save(tmp_path / "base", config, jax.device_get(params), tokenizer, "float32")
    return tmp_path / "base"


@pytest.mark.slow
def test_trials_choices_scores_and_report(base, shared, tmp_path, monkeypatch):
    data = shared / "data" / "niv2"
    if not data.is_dir():
        pytest.skip("the real tasks in ../shared/data/niv2 are not here")
    workdir = tmp_path / "study"
    config = f"--config={REPOSITORY}/configs/study_real_cpu.py:model={base},data={data}"
    arguments = [f"--workdir={workdir}", config, *FLAGS]
    dry = scripts.run("study.py", *arguments, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "scoring: 3 cells answer 369 prompts" in dry.stdout  # 119 unseen and 4 seen ones each
    done = scripts.run("study.py", *arguments)
    assert done.returncode == 0, done.stderr
    # Two trials, a second seed, and the chosen rate on the two larger sets.
    assert done.stdout.startswith("5 of 5 done, 0 failed, 0 running")

    rates = pd.read_parquet(workdir / "rates.parquet")
    losses = rates[rates["repeat"] == 0].set_index("learning_rate")["validation_loss"]
    saved = json.loads((workdir / "choices" / "r4-T4-round0.json").read_text())
    assert saved["learning_rate"] == losses.idxmin() and np.isfinite(losses).all()
    results = pd.read_parquet(workdir / "results.parquet")
    lora = results[results["method"] == "lora"]
    assert set(lora["learning_rate"]) == {losses.idxmin()}
    counts = results[results["test"] == "unseen"].groupby("cell")["task"].nunique()
    assert len(counts) == 3 and set(counts) == {119}
    examples = results.groupby("set")["train_examples"].first()
    assert examples["T12"] == examples["T*4"] == 3 * examples["T4"]

    # Its text; figures are written in tests of the report.
    monkeypatch.setattr(plotting, "save", lambda figure, path: None)
    monkeypatch.setattr(svg, "element", lambda figure, name: "<svg></svg>")
    report = scripts.run("study.py", f"--workdir={workdir}", "--report")
    assert report.returncode == 0, report.stderr
    text = (workdir / "report" / "report.md").read_text()
    assert "3 of 3 cells are there." in text and "## Learning rates" in text
    assert "**Do more tasks with as many examples of each help, T4 to T12?**" in text
    assert "**Do more tasks with as many examples in all help, T\\*4 to T12?**" in text
    assert "**Do more examples of the same tasks help, T4 to T\\*4?**" in text
    assert "**Do higher ranks forget more?**" in text
    assert "**Is it the rank or the learning rate?**" in text
    again = scripts.run("study.py", *arguments)
    assert again.returncode == 0 and "begins" not in again.stderr
