"""Score a run: greedy answers, exact match and Rouge-L on its seen and unseen tasks.

    python eval.py --workdir=runs/r16 --sets=seen,unseen

`seen` is the intra-task test set of the run's round (held-out examples of its smallest task set,
whatever set was trained on), `unseen` the official test tasks. Answers stream to disk; the same
command goes on after an interruption, and only scores where all answers are there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jax_lora import check as invariance
from jax_lora import cli, inputs, sharding
from jax_lora.data.batches import bucket_for
from jax_lora.evaluation import evaluate
from jax_lora.generation import greedy, scheduler
from jax_lora.model import lora
from jax_lora.model.transformer import Llama
from jax_lora.planning import counts
from jax_lora.training import masks
from jax_lora.training.checkpoints import Checkpoints
from jax_lora.weights import base as base_weights
from jax_lora.weights import peft
from jax_lora.weights.hf import read_json

if __name__ == "__main__":  # study.py, which imports this file, has flags of its own
    _WORKDIR = flags.DEFINE_string("workdir", None, "the run's folder, made by train.py")
    _SETS = flags.DEFINE_list("sets", ["seen", "unseen"], "test sets: seen, unseen")
    _ADAPTER = flags.DEFINE_string(
        "adapter", "last", "last: the latest checkpoint; none: the untuned base; or a PEFT folder"
    )
    _DEVICES_PER_COPY = flags.DEFINE_integer(
        "devices_per_copy",
        None,
        "devices that share one copy of the weights; instead of the config's",
        lower_bound=1,
    )
    _MAX_NEW_TOKENS = flags.DEFINE_integer(
        "max_new_tokens", None, "instead of the config's", lower_bound=1
    )
    _CHECK = flags.DEFINE_boolean(
        "check", False, "in place of scoring: do answers and updates depend on how work is cut?"
    )
    _CHECK_PROMPTS = flags.DEFINE_integer(
        "check_prompts", 64, "prompts of --check; a quarter of them train", lower_bound=4
    )


def main(_):
    cli.keep_memory()
    cli.keep_programs()
    with cli.input_errors():
        if not _WORKDIR.value:
            raise ValueError("--workdir: found none, expected a folder that train.py made")
        workdir = Path(_WORKDIR.value)
    given = {
        "max_new_tokens": _MAX_NEW_TOKENS.value,
        "devices_per_copy": _DEVICES_PER_COPY.value,
    }
    instead = {key: value for key, value in given.items() if value is not None}
    if _CHECK.value:
        check(workdir, _ADAPTER.value, _CHECK_PROMPTS.value, instead)
    else:
        run(workdir, _SETS.value, _ADAPTER.value, instead, place=on_host)


def on_host(_, array: Any) -> Any:
    """Leave the base on the host, from which `greedy.unstack_layers` takes it layer by layer:
    the device holds it once, so that what could be trained on it can be scored on it."""
    return array


def run(
    workdir: Path,
    names: Sequence[str],
    adapter: str,
    instead: Mapping[str, int],
    place: Callable[..., Any] | None = None,
) -> None:
    """Score a run's folder on the test sets `names`; see the flags. `instead`: of the config's
    `eval`. For `place` see `inputs.load_base`: the cells of a study share a base that is on the
    device, where one device can hold it."""
    logging.set_verbosity(logging.WARNING)
    with cli.input_errors():
        # -------------------------------------------------------------- the run
        said, config = read_run(workdir)
        config.eval.update(instead)
        copies = copies_of(config)
        if config.eval.devices_per_copy > 1:
            place = on_host
        for name in names:
            if name not in ("seen", "unseen"):
                raise ValueError(f"--sets: found {name!r}, expected seen, unseen or both")

        # -------------------------------------------------------------- examples
        checkout = inputs.open_checkout(config.data.path, config.data.categories)
        cli.check_same_run(workdir / "config.json", {"data_fingerprint": checkout.fingerprint})
        sets = inputs.task_sets(*cli.data_options(config))
        encoder = inputs.encoder(*cli.encoder_options(config))
        rows = {name: inputs.prompt_rows(encoder, sets[name]) for name in names}
        longest = max(len(row.ids) for pairs in rows.values() for _, row in pairs)
        bucket_for(longest, config.eval.buckets)

        # -------------------------------------------------------------- the model
        model_config, variables, origin = load_variables(workdir, config, adapter, place)
        model = Llama(model_config, dtype=jnp.dtype(config.dtype), unroll=config.unroll)
        end_ids = (encoder.tokenizer.eos_token_id,)
        settings = {"origin": origin, "config": said["config"]}
        settings["max_new_tokens"] = config.eval.max_new_tokens
        results = workdir / folder_name(adapter)
        for name in names:
            folder = results / name
            evaluate.write_examples(folder, rows[name])
            evaluate.write_labels(folder, checkout, sets[name].tasks)

    # ------------------------------------------------------------------ answers and scores
    generate = scheduler.round_robin(generators(config, model, variables, copies, end_ids))
    answer = functools.partial(evaluate.predict, generate, encoder, end_ids=end_ids)
    del variables

    def report(name: str) -> None:
        folder = results / name
        scores = evaluate.score(folder)
        cli.write_json(folder / "scores.json", scores)
        before = None
        if adapter != "none":
            before = untuned_scores(workdir / "eval-none" / name, settings)
        table = f"{name}: {origin}\n{score_table(scores, before)}\n{folder / 'scores.json'}"
        print(f"\n{table}", flush=True)

    with (
        cli.running(lambda: "the same command goes on from the answers that are written"),
        ThreadPoolExecutor(1) as beside,
    ):
        reports = []
        for name in names:
            evaluate.write_predictions(results / name, rows[name], answer, settings)
            reports.append(beside.submit(report, name))  # while the next set is answered
        for one in reports:
            one.result()


def read_run(workdir: Path) -> tuple[dict, Any]:
    """(config.json, its config) of a folder that train.py made."""
    said = read_json(workdir / "config.json")
    if not isinstance(said, dict) or "data_fingerprint" not in said:
        raise ValueError(f"{workdir}/config.json: found no run's config, expected train.py's")
    return said, ConfigDict(said["config"])


def check(workdir: Path, adapter: str, prompts: int, instead: Mapping[str, int]) -> None:
    """Print what changes when answers and updates are batched otherwise; exit code 1 if any
    answer in float32 does, or an update by more than rounding."""
    logging.set_verbosity(logging.WARNING)
    with cli.input_errors():
        _, config = read_run(workdir)
        config.eval.update(instead)
        copies = copies_of(config)
        sets = inputs.task_sets(*cli.data_options(config))
        encoder = inputs.encoder(*cli.encoder_options(config))
        # Every so many examples, so that all tasks take part.
        seen = sets["seen"].examples
        some = seen[:: -(-len(seen) // prompts)]
        asked, tasks = [encoder.prompt_row(e) for e in some], [e.task for e in some]
        train = sets["T" + str(config.data.sizes[0])].examples
        trained = [encoder.training_row(e) for e in train[:: -(-len(train) // (prompts // 4))]]
        dtypes = dict.fromkeys((config.dtype, "float32"))

    bad, several = False, len(jax.devices()) > 1
    mesh = sharding.make_mesh((1, -1, 1)) if several else None
    for dtype in dtypes:
        config.dtype = dtype
        with cli.input_errors():
            model_config, variables, origin = load_variables(workdir, config, adapter)
        model = Llama(model_config, dtype=jnp.dtype(dtype), unroll=config.unroll)
        end_ids = (encoder.tokenizer.eos_token_id,)
        one, *others = generators(config, model, variables, copies, end_ids)
        print(f"\n{origin}, {dtype}: answers to {len(asked)} prompts that change", flush=True)
        many = scheduler.round_robin([one, *others]) if others else None
        for name, changed in invariance.answers(one, asked, tasks, config.eval.buckets, many):
            print(f"  {name:<32}{changed:>4}  {100 * changed / len(asked):5.1f}%", flush=True)
            bad |= dtype == "float32" and changed > 0
    if config.method == "lora" and adapter == "last":
        trains = masks.mask(variables, tuple(config.trainable), tuple(config.frozen))
        print(f"\nfloat32: a step on {len(trained)} examples at once, and cut otherwise")
        model = model.clone(remat="full")
        for name, loss, gradient in invariance.updates(
            model, variables, trains, trained, dropout_rate=config.lora.dropout, mesh=mesh
        ):
            print(f"  {name:<32}loss {loss:.1e}  gradient {gradient:.1e}, relative", flush=True)
            bad |= loss > 1e-5 or gradient > 1e-5
    if not several:
        print("\non several devices: one device here, not tried")
    if bad:
        raise SystemExit("error: results depend on how work is cut")


def copies_of(config: Any) -> list[Mesh]:
    """This process's devices, those together that share one copy of the weights."""
    devices, share = jax.local_devices(), config.eval.devices_per_copy
    if share < 1 or len(devices) % share:
        raise ValueError(
            f"devices_per_copy: found {share}, expected a divisor of the number of devices here, "
            f"{len(devices)}"
        )
    groups = (devices[i : i + share] for i in range(0, len(devices), share))
    return [sharding.make_mesh((1, 1, share), group) for group in groups]


def generators(
    config: Any, model: Llama, variables: Any, copies: Sequence[Mesh], end_ids: tuple
) -> list[Any]:
    """`scheduler.answers` on each copy's devices, all but the prompts and their groups bound."""
    return [
        functools.partial(
            scheduler.answers,
            model.clone(shard_activation=sharding.Activations(mesh)),
            greedy.unstack_layers(variables, mesh),
            max_new_tokens=config.eval.max_new_tokens,
            end_ids=end_ids,
            buckets=tuple(config.eval.buckets),
            batch_tokens=config.eval.batch_tokens,
            max_batch=config.eval.max_batch,
        )
        for mesh in copies
    ]


def untuned_scores(folder: Path, settings: dict) -> dict | None:
    """The untuned base's scores to put beside, where they were made with the same settings."""
    if not (folder / "scores.json").is_file():
        return None
    theirs = read_json(folder / "settings.json")
    same = theirs | {"origin": None} == settings | {"origin": None}
    return read_json(folder / "scores.json") if same else None


def folder_name(adapter: str) -> str:
    """`eval` for the run's own result, `eval-none` for the base's; those of other adapters are
    told apart by what they hold, as a run's is always called "adapter"."""
    if adapter == "last":
        return "eval"
    if adapter == "none":
        return "eval-none"
    return f"eval-{Path(adapter).resolve().name}-{peft.digest(adapter)}"


def load_variables(
    workdir: Path, config: Any, adapter: str, place: Callable[..., Any] | None = None
):
    """(model config, variables to score, what they are: goes into settings.json)."""
    model_config = base_weights.read_config(config.model)
    frozen = jax.tree.map(lambda _: False, counts.base_shapes(model_config))
    if adapter == "none":
        params = inputs.load_base(config.model, config.dtype, frozen, place)
        return model_config, {"params": params}, f"{config.model}, untuned"
    if adapter != "last":
        adapters = peft.load_trained(adapter, model_config).adapters
        params = inputs.load_base(config.model, config.dtype, frozen, place)
        variables = {"params": params, "lora": jax.tree.map(jnp.asarray, adapters)}
        return model_config, variables, f"{config.model} with {adapter} ({peft.digest(adapter)})"

    # The folder must exist before Orbax looks into it: it would make it.
    checkpoints = workdir / "checkpoints"
    manager = Checkpoints(checkpoints, alone=True) if checkpoints.is_dir() else None
    if manager is None or manager.latest() is None:
        raise FileNotFoundError(
            f"{checkpoints}: no checkpoint, expected a run that trained (or --adapter=none)"
        )
    shapes = {"params": counts.base_shapes(model_config)}
    if config.method == "lora":
        shapes["lora"] = inputs.new_adapters(model_config, **cli.adapter_options(config))
    trains = masks.mask(shapes, tuple(config.trainable), tuple(config.frozen))
    variables = {"params": inputs.load_base(config.model, config.dtype, trains["params"], place)}
    if config.method == "lora":
        variables["lora"], variables["params"] = inputs.on_base(
            shapes["lora"],
            variables["params"],
            model_config,
            init=config.lora.init,
            variant=config.lora.variant,
            folder=workdir / "pissa",
        )
    trainable, frozen = masks.partition(variables, trains)
    variables = masks.combine(manager.restore_trainable(trainable), frozen)
    # Master copies of the base are for training; answers are made in the dtype of the arithmetic.
    variables["params"] = jax.tree.map(lambda x: x.astype(config.dtype), variables["params"])
    if config.method == "lora" and lora.does_nothing(variables["lora"]):
        raise ValueError(f"{checkpoints}: every B is zero, expected a trained adapter")
    return model_config, variables, f"{config.model} after step {manager.latest()}"


def score_table(scores: dict, before: dict | None) -> str:
    """Scores by task and over all, the untuned base's beside them where it was scored."""
    header = ["task", "n", "EM", "Rouge-L", "majority EM", "out of options %"]
    header += ["untuned EM", "untuned R-L"] if before else []
    rows: list[list] = []
    for name, task in scores["tasks"].items():
        row = [name[:44], task["examples"], task["exact_match"], task["rougeL"]]
        row += [task.get("majority_baseline"), task.get("out_of_options")]
        if before:
            row += [before["tasks"][name][key] for key in ("exact_match", "rougeL")]
        rows.append(row)
    official = scores["metrics"]
    for category in sorted({task["category"] for task in scores["tasks"].values()}):
        key = "_".join(category.lower().split())
        own = [t["examples"] for t in scores["tasks"].values() if t["category"] == category]
        row = [f"category {category}"[:44], sum(own)]
        row += [official[f"exact_match_for_{key}"], official[f"rougeL_for_{key}"], None, None]
        if before:
            row += [before["metrics"][f"{m}_for_{key}"] for m in ("exact_match", "rougeL")]
        rows.append(row)
    count = sum(t["examples"] for t in scores["tasks"].values())
    for label, suffix in (("mean over examples", ""), ("mean over tasks", "_over_tasks")):
        row = [label, count, official[f"exact_match{suffix}"], official[f"rougeL{suffix}"]]
        row += [None, None]
        if before:
            row += [before["metrics"][f"{key}{suffix}"] for key in ("exact_match", "rougeL")]
        rows.append(row)
    if closed := scores.get("closed_label"):
        row = [f"{closed['tasks']} closed-label tasks", None, closed["exact_match"], None]
        row += [closed["majority_baseline"], closed["out_of_options"]]
        if before:
            row += [before["closed_label"]["exact_match"], None]
        rows.append(row)
    return cli.table(header, rows)


if __name__ == "__main__":
    app.run(main, flags_parser=functools.partial(cli.parse_flags, flags.FLAGS))
