"""The scoring of a run: what to score, on which devices, and the files that come of it."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax.sharding import Mesh

from jax_lora import sharding
from jax_lora.config import RunConfig
from jax_lora.data.batches import bucket_for
from jax_lora.errors import ConfigError, DataError
from jax_lora.evaluation import evaluate
from jax_lora.files import read_json, write_json
from jax_lora.generation import greedy, scheduler, stop_texts
from jax_lora.model import lora
from jax_lora.model.config import LlamaConfig
from jax_lora.model.transformer import Llama
from jax_lora.planning import counts
from jax_lora.run import folder as run_folder
from jax_lora.run import inputs
from jax_lora.run.training import running
from jax_lora.text import table
from jax_lora.training import masks
from jax_lora.training.checkpoints import Checkpoints
from jax_lora.weights import base as base_weights
from jax_lora.weights import peft

logger = logging.getLogger(__name__)
Place = Callable[..., Any]


@dataclass(frozen=True)
class Scored:
    """A model that is scored.

    Attributes:
      shape: of the base.
      variables: {"params": base, "lora": adapters}, in the dtype of the arithmetic.
      origin: what they are, in words.
      digest: of what was trained: the adapters or the restored weights; "" for the bare base.
    """

    shape: LlamaConfig
    variables: dict[str, Any]
    origin: str
    digest: str


def on_host(_: Any, array: Any) -> Any:
    """Leave the base in the host's memory, from which decoding takes it layer by layer: the device
    holds it once, so that what could be trained on it can be scored on it."""
    return array


def load(workdir: Path, config: RunConfig, adapter: str, place: Place | None = None) -> Scored:
    """Load what is to be scored.

    Args:
      workdir: the run's folder.
      config: of the run.
      adapter: "last", the last checkpoint; "none", the bare base; or a PEFT folder.
      place: see `inputs.load_base`.

    Raises:
      DataError, OSError: one line that names the file.
    """
    shape = base_weights.read_config(config.model)
    if adapter == "last":
        return _load_last(workdir, config, shape, place)
    frozen = jax.tree.map(lambda _: False, counts.base_shapes(shape))
    variables = {}
    if adapter != "none":
        adapters = peft.load_trained(adapter, shape).adapters
        variables["lora"] = jax.tree.map(jnp.asarray, adapters)
    variables["params"] = inputs.load_base(config.model, config.dtype, frozen, place)
    if adapter == "none":
        return Scored(shape, variables, f"{config.model}, untuned", "")
    digest = peft.digest(adapter)
    return Scored(shape, variables, f"{config.model} with {adapter} ({digest})", digest)


def _load_last(workdir: Path, config: RunConfig, shape: LlamaConfig, place: Place | None) -> Scored:
    # The folder must exist before Orbax looks into it: it would make it.
    path = workdir / "checkpoints"
    manager = Checkpoints(path, alone=True) if path.is_dir() else None
    if manager is None or manager.latest() is None:
        raise DataError(f"{path}: no checkpoint, expected a run that trained (or --adapter=none)")
    is_lora = config.method == "lora"
    shapes: dict[str, Any] = {"params": counts.base_shapes(shape)}
    if is_lora:
        shapes["lora"] = inputs.adapters_of(config, shape)
    mask = masks.mask(shapes, config.trainable, config.frozen)
    variables = {"params": inputs.load_base(config.model, config.dtype, mask["params"], place)}
    if is_lora:
        variables["lora"], variables["params"] = inputs.on_base(
            shapes["lora"],
            variables["params"],
            shape,
            init=config.lora.init,
            variant=config.lora.variant,
            folder=workdir / "pissa",
        )
    trainable, frozen = masks.partition(variables, mask)
    trained = manager.restore_trainable(trainable)
    variables = masks.combine(trained, frozen)
    # Master copies of the base are for training; answers are made in the dtype of the arithmetic.
    variables["params"] = jax.tree.map(lambda x: x.astype(config.dtype), variables["params"])
    if is_lora and lora.does_nothing(variables["lora"]):
        raise DataError(f"{path}: every B is zero, expected a trained adapter")
    origin = f"{config.model} after step {manager.latest()}"
    return Scored(shape, variables, origin, digest(trained))


def digest(tree: Any) -> str:
    """The identity of a tree of arrays by their bytes."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        found.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()[:16]


def copies(config: RunConfig) -> list[Mesh]:
    """Meshes of this process's devices; the devices of one share one copy of the weights.

    Raises:
      ConfigError: a share that does not divide their number.
    """
    devices, share = jax.local_devices(), config.eval.devices_per_copy
    if len(devices) % share:
        raise ConfigError(
            f"devices_per_copy: found {share}, expected a divisor of the number of devices here, "
            f"{len(devices)}"
        )
    groups = (devices[i : i + share] for i in range(0, len(devices), share))
    return [sharding.make_mesh((1, 1, share), group) for group in groups]


def generators(
    config: RunConfig, model: Llama, variables: Any, meshes: Sequence[Mesh], end_ids: tuple
) -> list[Any]:
    """`scheduler.answers` on each copy's devices, all but the prompts and their groups bound."""
    return [
        functools.partial(
            scheduler.answers,
            model.clone(shard_activation=sharding.Activations(mesh)),
            greedy.unstack_layers(variables, mesh=mesh),
            max_new_tokens=config.eval.max_new_tokens,
            end_ids=end_ids,
            buckets=config.eval.buckets,
            batch_tokens=config.eval.batch_tokens,
            max_batch=config.eval.max_batch,
        )
        for mesh in meshes
    ]


def folder_name(adapter: str) -> str:
    """`eval` for the run's own result, `eval-none` for the base's; those of other adapters are
    told apart by what they hold, as a run's is always called "adapter"."""
    if adapter == "last":
        return "eval"
    if adapter == "none":
        return "eval-none"
    return f"eval-{Path(adapter).resolve().name}-{peft.digest(adapter)}"


def score(
    workdir: Path,
    config: RunConfig,
    names: Sequence[str],
    adapter: str = "last",
    *,
    say: Callable[[str], None],
    place: Place | None = None,
    overwrite: bool = False,
) -> None:
    """Answer the test sets and score them; answers that are there are not made again.

    Args:
      workdir: the run's folder.
      config: of the run, perhaps with another `eval`.
      names: of the test sets, see `inputs.test_sets`.
      say: gets the table of a set as soon as its scores.json is written, from another thread.
      adapter, place: see `load`.
      overwrite: make all answers again.

    Raises:
      ConfigError, DataError, OSError: before any compute.
      RunFailed: a fault while running.
    """
    meshes = copies(config)
    if config.eval.devices_per_copy > 1:
        place = on_host
    data, sets = inputs.data(config), inputs.test_sets(config, names)
    digests = {
        "data_fingerprint": inputs.fingerprint(config),
        "base_digest": inputs.base_digest(config.model),
    }
    run_folder.check_same_run(workdir, config, digests)
    encoder, strict = inputs.encoder(config), inputs.is_strict(config)
    rows = {name: inputs.prompt_rows(encoder, sets[name], strict) for name in names}
    for name in names:
        if not rows[name]:
            raise DataError(f"{config.data.path}: found no example of {name}, expected some")
        bucket_for(max(len(row.ids) for _, row in rows[name]), config.eval.buckets)

    scored = load(workdir, config, adapter, place)
    end_ids = inputs.end_ids(config)
    settings = digests | {
        "origin": scored.origin,
        "weights_digest": scored.digest,
        "version": run_folder.package_version(),
        "config": config.identity(),
        "max_new_tokens": config.eval.max_new_tokens,
        "end_ids": list(end_ids),
        "stop": list(config.eval.stop),
    }
    results = workdir / folder_name(adapter)
    for name in names:
        evaluate.write_examples(results / name, rows[name])
        evaluate.write_labels(results / name, data.answers, sets[name].tasks)
    model = Llama(scored.shape, dtype=jnp.dtype(config.dtype), unroll=config.unroll)
    generate = scheduler.round_robin(generators(config, model, scored.variables, meshes, end_ids))
    stop = config.eval.stop
    generate = stop_texts.stopped(generate, stop, encoder.decode_all)
    origin = scored.origin
    del scored
    answer = functools.partial(evaluate.predict, generate, encoder, end_ids=end_ids, stop=stop)

    def finish(name: str) -> None:
        scores = evaluate.score(results / name)
        write_json(results / name / "scores.json", scores)
        before = None
        if adapter != "none":
            before = untuned_scores(workdir / "eval-none" / name, settings)
        say(f"\n{name}: {origin}\n{score_table(scores, before)}\n{results / name / 'scores.json'}")

    safe = "rerun the same command to resume from the answers that are written"
    with running(lambda _: safe), ThreadPoolExecutor(1) as beside:
        scoring = []
        for name in names:
            evaluate.write_predictions(
                results / name, rows[name], answer, settings, overwrite=overwrite
            )
            scoring.append(beside.submit(finish, name))  # while the next set is answered
        for one in scoring:
            one.result()


def untuned_scores(folder: Path, settings: Mapping[str, Any]) -> dict | None:
    """The untuned base's scores to show beside, where they were made with the same settings."""
    if not (folder / "scores.json").is_file():
        return None
    theirs = read_json(folder / "settings.json")
    own = ("origin", "weights_digest")
    if {k: v for k, v in theirs.items() if k not in own} != {
        k: v for k, v in settings.items() if k not in own
    }:
        return None
    return read_json(folder / "scores.json")


def score_frame(workdir: Path, names: Sequence[str], adapter: str = "last") -> pd.DataFrame:
    """The scores of a run: one row per test set and task, percentages."""
    results = workdir / folder_name(adapter)
    return pd.DataFrame(
        {"set": name, "task": task, **values}
        for name in names
        for task, values in read_json(results / name / "scores.json")["tasks"].items()
    )


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
    return table(header, rows)
