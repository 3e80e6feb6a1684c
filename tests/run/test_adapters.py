"""Adapters that a run is given: from another base, or in some layers only."""

from __future__ import annotations

import functools
import shutil

import jax
import numpy as np
import pytest

from jax_lora.config import RunConfig
from jax_lora.errors import ConfigError, DataError
from jax_lora.files import read_json, write_json
from jax_lora.model import lora
from jax_lora.run import Run, initial_weights, inputs, prepare
from jax_lora.run.convert import convert_adapter
from jax_lora.weights import base, hf, peft
from jax_lora.weights.tokenizers import load_tokenizer
from tests.run.test_hub import trained  # noqa: F401  (a fixture)
from tests.weights.test_convert import adapter
from tests.weights.test_peft import BOTH, TINY, chosen


@pytest.mark.parametrize("call", ["score", "check"])
def test_an_adapter_of_another_base_is_not_scored_unless_asked_for(trained, tmp_path, call):  # noqa: F811
    saved, other = Run.open(None, trained).config, "0" * 64
    config = saved.replace(**{"data.path": str(tmp_path / "missing")})
    run = Run.open(config, trained)
    tree = adapter(tmp_path / "a")
    peft.save(tmp_path / "a", tree, rank=3, alpha=6, base_digest=other)
    score = {
        "score": lambda **more: run.score(None, str(tmp_path / "a"), **more),
        "check": lambda **more: run.check(str(tmp_path / "a"), **more),
    }[call]
    with pytest.raises(DataError) as caught:
        score()
    text = str(caught.value)
    assert other[:12] in text and base.digest(config.model)[:12] in text and "--any_base" in text
    with pytest.raises((DataError, OSError)) as caught:
        score(any_base=True)  # gets as far as the data, which is not there
    assert "any_base" not in str(caught.value) and "missing" in str(caught.value)


def test_a_run_names_its_base_in_its_adapter(trained):  # noqa: F811
    saved = read_json(trained / "config.json")
    assert peft.base_digest(trained) == peft.base_digest(trained / "adapter")
    assert peft.base_digest(trained) == saved["base_digest"]


def test_training_does_not_start_from_an_adapter_of_some_layers(tmp_path):
    chosen(tmp_path, BOTH, layers_to_transform=[1])
    with pytest.raises(ConfigError, match="found layers without an adapter of q_proj, down_proj"):
        start_from(tmp_path, ("q_proj", "down_proj"))


def start_from(folder, targets):
    return initial_weights.new_adapters(
        TINY,
        rank=3,
        alpha=6,
        targets=targets,
        scaling=lora.SCALINGS[0],
        seed=0,
        init=str(folder),
        variant="lora",
    )


def test_training_does_not_start_from_layers_of_lower_rank(tmp_path):
    # Zeros that pad A and B would never train.
    low = jax.tree.map(
        np.array, lora.init(jax.random.key(0), TINY, 3, alpha=6, targets=("q_proj",))
    )
    low["layers"]["self_attn"]["q_proj"]["a"][0, :, 2:] = 0
    low["layers"]["self_attn"]["q_proj"]["b"][0, 2:] = 0
    ranks, alphas = {"q_proj": (2, 3)}, {"q_proj": (4.0, 6.0)}
    peft.save(tmp_path, low, rank=3, alpha=6, ranks=ranks, alphas=alphas)
    config = RunConfig().replace(**{"lora.rank": 3, "lora.init": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"found ranks \[2, 3\] of q_proj, expected 3, lora.rank"):
        initial_weights.check_start(config, TINY)


def test_an_adapter_whose_run_trained_the_base_too_is_not_taken_alone(tmp_path):
    run = tmp_path / "run"
    peft.save(
        run / "adapter",
        lora.init(jax.random.key(0), TINY, 3, alpha=6, targets=("q_proj",)),
        rank=3,
        alpha=6,
    )
    modules = [{"module": "norm.scale", "trainable": 16}, {"module": "lora.q_proj", "trainable": 9}]
    write_json(run / "parameters.json", {"modules": modules})
    config = RunConfig().replace(**{"lora.rank": 3, "lora.init": str(run / "adapter")})
    for take in (
        lambda: initial_weights.check_start(config, TINY),
        lambda: convert_adapter(str(run), str(tmp_path / "out")),
    ):
        with pytest.raises(
            DataError, match="its run trained norm.scale of the base, too; expected adap"
        ):
            take()
    assert not (tmp_path / "out").exists()


def test_what_a_run_trained_of_its_base_is_known_wherever_its_adapter_lies(
    tiny_run, tmp_path, monkeypatch
):
    trainable = ("lora/.*/[ab]", "params/norm/scale")
    frozen = ("lora/.*/scale", "params/(?!norm/).*")
    config = tiny_run(max_steps=2, trainable=trainable, frozen=frozen)
    Run.open(config, tmp_path / "run").train()
    made = tmp_path / "run" / "adapter"
    shutil.copytree(made, tmp_path / "copy")
    (tmp_path / "link").symlink_to(made)
    monkeypatch.chdir(made)
    for folder in (".", str(tmp_path / "link"), str(tmp_path / "copy"), str(made)):
        assert peft.trained_base(folder) == ["norm.scale"], folder
        with pytest.raises(DataError, match="its run trained norm.scale of the base, too"):
            peft.check_complete(folder)


def test_a_scale_that_could_not_be_written_back_is_refused_at_the_start(tmp_path):
    tree = lora.init(jax.random.key(0), TINY, 24, alpha=16, targets=("q_proj",))
    peft.save(tmp_path / "a", tree, rank=24, alpha=16)
    options = dict(seed=0, rank=24, targets=("q_proj",), scaling="alpha/r", variant="lora")
    start = functools.partial(initial_weights.new_adapters, TINY, init=str(tmp_path / "a"))
    start(alpha=16, **options)
    with pytest.raises(ConfigError, match="give the adapter's own lora.alpha_per_rank"):
        start(alpha=24 * 0.66667, **options)


def test_a_base_that_replaces_another_is_read_anew(tiny_run, tiny_model, tmp_path):
    """In one process, as a notebook has it."""
    path = tmp_path / "base"
    shape, params = base.load(str(tiny_model), "float32")
    tokenizer = load_tokenizer(tiny_model)
    hf.save(path, shape, params, tokenizer, "float32")
    config = tiny_run(model=str(path))
    trains = jax.tree.map(lambda _: False, base.load(str(path), "float32")[1])

    def seen():
        params = initial_weights.load_base(str(path), "float32", trains)
        return inputs.base_digest(str(path)), jax.device_get(params["norm"]["scale"])

    before, encoder = seen(), inputs.encoder(config)
    assert seen()[0] == before[0] and inputs.encoder(config) is encoder
    params["norm"]["scale"] = params["norm"]["scale"] + 1
    shutil.rmtree(path)
    hf.save(path, shape, params, tokenizer, "float32")
    after = seen()
    assert after[0] != before[0] and (after[1] == before[1] + 1).all()
    assert inputs.encoder(config) is not encoder


def test_training_does_not_start_from_an_adapter_of_another_base(tiny_run, tmp_path):
    config = tiny_run(max_steps=2)
    shape = base.read_config(config.model)
    tree = jax.device_get(initial_weights.adapters_of(config, shape))
    start = config.replace(**{"lora.init": str(tmp_path / "a")})
    facts = {"rank": config.lora.rank, "alpha": config.lora.alpha}
    peft.save(tmp_path / "a", tree, **facts, base_digest="0" * 64)
    with pytest.raises(DataError, match="expected one of .*jax_lora.json overrides this"):
        prepare.read_inputs(start, tmp_path / "run")
    peft.save(tmp_path / "a", tree, **facts, base_digest=base.digest(config.model))
    given = prepare.read_inputs(start, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, given.shapes["lora"], tree)
    # A run that has begun goes on, and is scored, wherever its start lies.
    (tmp_path / "old").mkdir()
    prepare.write_start(given, tmp_path / "old")
    peft.save(tmp_path / "a", tree, **facts, base_digest="0" * 64)
    initial_weights.adapters_of(start, shape)
    with pytest.raises(ConfigError, match="init_digest"):  # but not from another adapter
        leaf = next(iter(lora.by_target(tree).values()))
        leaf["b"] = leaf["b"] + 1
        peft.save(tmp_path / "a", tree, **facts)
        prepare.read_inputs(start, tmp_path / "old")
