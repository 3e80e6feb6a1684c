"""The config of a study: read, checked, turned into runs, and compared with the folder's."""

import json
import re

import pytest
from ml_collections import ConfigDict

from configs import (
    study_base,
    study_capacity,
    study_lr,
    study_mini,
    study_paper,
    study_quantization,
    study_real_cpu,
    study_smoke,
    study_smollm2,
)
from jax_lora.config import CHOICES, RunConfig
from jax_lora.data.toy import write_checkout
from jax_lora.errors import ConfigError
from jax_lora.files import write_json_once
from jax_lora.model import lora
from jax_lora.model.arch import ATTENTION, MLP
from jax_lora.model.families import CONFIGS
from jax_lora.study import grid, spec, worker
from jax_lora.study.config import StudyConfig, read_axes
from jax_lora.study.team import Team
from jax_lora.weights.base import read_config

LINEAR = ("q_proj", "down_proj")


def study(**changes) -> StudyConfig:
    return StudyConfig.from_config_dict(changes)


def test_the_default_is_the_papers_grid():
    config = study()
    assert config == StudyConfig() and config.run == RunConfig()
    assert len(grid.cells_of(config)) == 12 * 6 * 3


STUDIES = (
    *(study_capacity, study_lr, study_mini, study_paper, study_real_cpu, study_smoke),
    *(study_quantization, study_smollm2),
)


@pytest.mark.parametrize("made", [study_base, *STUDIES])
def test_a_config_file_is_the_typed_config_and_back(made):
    config = StudyConfig.from_config_dict(made.get_config())
    saved = json.loads(json.dumps(config.to_dict()))
    assert StudyConfig.from_config_dict(saved).to_dict() == config.to_dict() == saved


def test_a_cell_is_the_runs_config_with_the_changes_of_its_axes(tmp_path):
    config = study(
        run={"seed": 3},
        ranks=(4, "full"),
        sets=("T*100",),
        rounds=(2,),
        variants={
            "linear": {"lora": {"targets": LINEAR}},
            "answers": ConfigDict({"data": {"answer_only": True}}),
        },
    )
    runs = {cell.id: spec.run_config(config, tmp_path, cell) for cell in grid.cells_of(config)}
    assert list(runs) == [
        *("r4-Tx100-round2", "r4-linear-Tx100-round2", "r4-answers-Tx100-round2"),
        *("full-Tx100-round2", "full-answers-Tx100-round2"),
    ]
    shared = {"seed": 3, "round": 2, "data.set": "T*100"}
    lora = shared | {"lora.rank": 4, "optim.learning_rate": 5e-5}
    full = shared | {"method": "full", "trainable": ("params/.*",), "frozen": ()}
    full |= {"optim.schedule": "cosine", "optim.learning_rate": 3e-5}
    expected = [lora, lora | {"lora.targets": LINEAR}, lora | {"data.answer_only": True}]
    expected += [full, full | {"data.answer_only": True}]
    assert list(runs.values()) == [RunConfig().replace(**changes) for changes in expected]


@pytest.mark.parametrize("rank", [1, 4, 64, 1024])
@pytest.mark.parametrize("targets", [MLP, ("q_proj",), (*ATTENTION, *MLP)])
@pytest.mark.parametrize("model", ["llama-7b", "llama-13b"])
def test_matched_targets_have_as_many_parameters_as_they_can(rank, targets, model):
    shape = CONFIGS[model]
    sizes = shape.linear_shapes()

    def count(names, rank):
        return sum(rank * sum(sizes[name]) for name in names)

    found = spec.matched_rank(shape, rank, ATTENTION, targets)
    wanted = count(ATTENTION, rank)
    distances = {r: abs(count(targets, r) - wanted) for r in (found - 1, found, found + 1) if r}
    assert min(distances, key=distances.__getitem__) == found


def test_a_variant_with_other_targets_gets_the_matched_rank(tiny_model, tmp_path):
    changes = {
        "queries": {"lora": {"targets": ("q_proj",)}},
        "batch32": {"batch_size": 32},
        "turned": {"lora": {"targets": ATTENTION[::-1]}},
    }
    config = study(
        run={"model": str(tiny_model)},
        ranks=(4, 8, "full"),
        sets=("T100",),
        rounds=(0,),
        variants=changes,
        match_parameters=True,
    )
    runs = {cell.id: spec.run_config(config, tmp_path, cell) for cell in grid.cells_of(config)}
    shape = read_config(tiny_model)
    for rank in (4, 8):
        matched = spec.matched_rank(shape, rank, ATTENTION, ("q_proj",))
        assert runs[f"r{rank}-queries-T100-round0"].lora.rank == matched != rank
        assert runs[f"r{rank}-batch32-T100-round0"].lora.rank == rank
        assert runs[f"r{rank}-turned-T100-round0"].lora.rank == rank
    assert runs["full-batch32-T100-round0"].batch_size == 32


def test_a_template_and_the_data_of_variants_are_known_by_content(tiny_model, tmp_path):
    toy, other = (
        write_checkout(tmp_path / name, instances_per_task=n)
        for name, n in (("toy", 6), ("other", 7))
    )
    template = tmp_path / "prompt.jinja"
    template.write_text("{{ instruction }}\n")
    data = {"path": str(toy), "template": str(template), "sizes": (2, 3, 4), "test_per_task": 1}
    data |= {"train_per_task": 2}
    run = {"model": str(tiny_model), "data": data}
    plain = study(run=run, ranks=(4,), sets=("T2",), rounds=(0,))
    both = study(
        run=run,
        ranks=(4,),
        sets=("T2",),
        rounds=(0,),
        variants={"x": {"data": {"path": str(other)}}},
    )

    def digest(config, some=slice(None)):
        cells = grid.cells_of(config)[some]
        return spec.check_input(config, tmp_path, cells)["data_fingerprint"]

    found = digest(plain)
    assert digest(both) != found and digest(both, slice(1)) == digest(both)
    template.write_text("{{ instruction }}\n\n")
    assert digest(plain) != found


def test_of_two_studies_that_begin_in_a_folder_at_once_one_is_refused(tmp_path, monkeypatch):
    first, second = study(run={"seed": 3}), study(run={"seed": 4})

    def after_another(path, value):
        write_json_once(path, {"config": first.to_dict()})
        write_json_once(path, value)

    monkeypatch.setattr(worker, "write_json_once", after_another)
    late = worker.Worker(second, tmp_path, Team(), train=print, say=print)
    with pytest.raises(ConfigError, match="config.run.seed is 3 there and 4 here"):
        late.prepare({})


def test_ranks_that_would_be_one_rank_are_refused(tiny_model, tmp_path):
    config = study(
        run={"model": str(tiny_model)},
        ranks=(1, 2),
        sets=("T100",),
        variants={"all": {"lora": {"targets": (*ATTENTION, *MLP)}}},
        match_parameters=True,
    )
    words = "ranks 1 and 2 of the variant all would both be rank 1, expected ranks further apart"
    with pytest.raises(ConfigError, match=f"config.match_parameters: {words}"):
        spec.check_input(config, tmp_path, grid.cells_of(config))


def test_laws_of_alpha():
    alphas = {
        law: [
            RunConfig().replace(**{"lora.rank": rank, "lora.alpha_law": law}).lora.alpha
            for rank in (4, 16, 64)
        ]
        for law in CHOICES["lora.alpha_law"]
    }
    assert alphas == {"r": [8, 32, 128], "sqrt(r)": [16, 32, 64], "constant": [32, 32, 32]}
    # √r with a scale of α/r is rsLoRA's scale of a constant α/√r.
    one, other = (
        RunConfig().replace(**{"lora.rank": 64, **changes}).lora
        for changes in (
            {"lora.alpha_law": "sqrt(r)"},
            {
                "lora.alpha_law": "constant",
                "lora.scaling": "alpha/sqrt(r)",
                "lora.alpha_per_rank": 0.5,
            },
        )
    )
    assert lora.scale(one.alpha, 64, one.scaling) == lora.scale(other.alpha, 64, other.scaling)


def test_a_repeat_has_another_seed_and_nothing_else(tmp_path):
    rates = {"lora": (1e-4, 1e-3), "full": (1e-5,)}
    run = {"validate_every": 1, "data": {"validation_per_task": 1}, "seed": 3}
    config = study(run=run, ranks=(4, "full"), rounds=(0, 1), sets=("T100",), learning_rates=rates)
    cells = {cell.id: cell for cell in grid.cells_of(config)}
    repeats = [name for name, cell in cells.items() if cell.repeat]
    assert repeats == [f"r4-T100-round0-lr{rate}-seed1" for rate in ("0.0001", "0.001")]
    for name in repeats:
        one, again = (
            spec.run_config(config, tmp_path, cells[n]) for n in (name.removesuffix("-seed1"), name)
        )
        assert again == one.replace(seed=4) and one.seed == 3


def test_the_toy_base_is_trained_as_toy_run_says(tmp_path):
    config = StudyConfig.from_config_dict(study_smoke.get_config())
    run, folder = spec.run_of(config, tmp_path, spec.TOY)
    assert (run.method, run.epochs, run.data.sizes, run.dtype) == ("full", 8, (1, 2, 3), "float32")
    assert run.optim.schedule == "cosine" and run.optim.learning_rate == 1e-2
    assert folder == tmp_path / "toy" / "run" and run.data.path.endswith("tasks/outside")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"ranks": ()}, "config.ranks: found ()"),
        ({"ranks": (4, 4)}, "none twice"),
        ({"ranks": (0,)}, "config.ranks: found 0"),
        ({"ranks": (4.0,)}, "config.ranks: found 4.0, expected a whole number or a text"),
        ({"ranks": (True,)}, "config.ranks: found True"),
        ({"ranks": ("all",)}, "config.ranks: found 'all'"),
        ({"rounds": (-1,)}, "config.rounds: found (-1,)"),
        ({"learning_rates": {"lora": ()}}, "config.learning_rates.lora: found ()"),
        ({"learning_rates": {"lora": (1e-4, 1.0000001e-4)}}, "none twice"),
        (
            {"run": {"stop_after": 2, "validate_every": 1}},
            "config.run.stop_after: found 2, expected 0",
        ),
        ({"run": {"dtype": "auto"}}, "config.run.dtype: found 'auto', expected 'bfloat16' or"),
        ({"variants": {"x": {"dtype": "auto"}}}, "config.variants.x.dtype: found 'auto'"),
        (
            {"variants": {"x": {"micro_tokens": 8192, "mesh": {"tensor": 2}}}},
            "variants.x: found the same config as the plain recipe, but for what changes no result",
        ),
        ({"variants": {"a/b": {}}}, "config.variants: found 'a/b'"),
        ({"variants": {"x": 3}}, "config.variants.x: found 3, expected a group of keys"),
        ({"variants": {"x": {"lora": {"r": 1}}}}, "config.variants.x.lora.r: no such key"),
        ({"variants": {"x": {"lora": {"dropout": 2}}}}, "config.variants.x.lora.dropout: found 2"),
        (
            {"variants": {"x": {"lora": {"rank": 8}}}},
            "x.lora.rank: found a key that an axis",
        ),
        ({"variants": {"x": {"seed": 0}}}, "variants.x: found the same config as the plain recipe"),
        (
            {"variants": {"x": {"seed": 1}, "y": {"seed": 1}}},
            "config.variants.y: found the same config as config.variants.x",
        ),
        ({"variants": {"x": {"lora": {"alpha_law": "2r"}}}}, "x.lora.alpha_law: found '2r'"),
        ({"toy": {"codebooks": 129}}, "config.toy.codebooks: found 129, expected 0 to 128"),
        ({"measure": {"losses_per_task": -1}}, "config.measure.losses_per_task: found -1"),
        ({"full": {"method": "some"}}, "config.full.method: found 'some'"),
        ({"toy": {"run": {"epochs": 0}}}, "config.toy.run.epochs: found 0"),
        ({"toy": {"shape": {"width": 8}}}, "config.toy.shape.width: no such key"),
        ({"run": {"batch_size": 0}}, "config.run.batch_size: found 0"),
        ({"run": {"lora": {"contract": "auto"}}}, "called run.lora.materialize_delta now"),
        ({"run": {"eval": {"metrics": ("rouge1",)}}}, "config.eval.metrics: found rouge1"),
        ({"run": {"eval": {"metrics": ("rougeL",)}}}, "exact_match not found"),
        ({"axes": ()}, "config.axes: no such key"),
        ({"choose_on": "T3"}, "config.choose_on: found 'T3', expected 'each' or one of"),
        (
            {"learning_rates": {"lora": (1e-4, 1e-3)}},
            "config.run.validate_every: found 0 with several learning_rates.lora",
        ),
        (
            {"learning_rates": {"full": (1e-4, 1e-3)}, "run": {"validate_every": 5}},
            "config.run.data.validation_per_task: found 0 with several learning_rates.full",
        ),
    ],
)
def test_what_is_wrong_is_named(changed, words):
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        study(**changed)
    assert "\n" not in str(caught.value)


def test_a_folder_belongs_to_one_study(tmp_path):
    path, config = tmp_path / "study.json", study(run={"seed": 3})
    spec.check_same_study(path, config)  # there is none yet
    digests = {"data_fingerprint": "a", "base_digest": "m"}
    saved = {"config": config.to_dict(), **digests}
    path.write_text(json.dumps(saved))
    moved = {"model": "elsewhere/base", "data": {"path": "elsewhere/tasks"}}
    faster = {
        "micro_tokens": 1,
        "mesh": {"data": 2},
        "tracker": "none",
        "eval": {"batch_tokens": 4096, "max_batch": 2},
    }
    for free in (faster, moved):
        same = study(run={"seed": 3} | free)
        spec.check_same_study(path, same)
        spec.check_same_study(path, same, digests)
    for other, changed, words in (
        (study(run={"seed": 4}), {}, "config.run.seed is 3 there and 4 here"),
        (study(run={"seed": 3, "eval": {"max_new_tokens": 9}}), {}, "eval.max_new_tokens is 128"),
        (study(run={"seed": 3, "eval": {"stop": ("a",)}}), {}, "config.run.eval.stop is [] there"),
        (study(run={"seed": 3}, rounds=(0,)), {}, "config.rounds is [0, 1, 2] there and [0] here"),
        (config, {"data_fingerprint": "b"}, "data_fingerprint is 'a' there and 'b' here"),
        (config, {"base_digest": "n"}, "base_digest is 'm' there and 'n' here"),
        (study(run={"seed": 3}, variants={"x": {"seed": 1}}), {}, "variants.x.seed is not set"),
    ):
        with pytest.raises(ConfigError, match=re.escape(words)):
            spec.check_same_study(path, other, digests | changed)

    del saved["config"]["run"]["eval"]["metrics"]  # an older version wrote it: the default
    del saved["base_digest"]  # and it knew the base by its place
    path.write_text(json.dumps(saved))
    spec.check_same_study(path, config, digests)
    with pytest.raises(ConfigError, match="config.run.model is"):
        spec.check_same_study(path, study(run={"seed": 3} | moved), digests)
    saved["config"]["run"]["lora"]["contract"] = "auto"
    path.write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match="run.lora.contract: no such key; it is called"):
        spec.check_same_study(path, config, digests)
    assert read_axes(saved["config"]).ranks == config.ranks  # the report needs no more
    del saved["config"]["choose_on"]
    assert read_axes(saved["config"]).choose_on == "each"
