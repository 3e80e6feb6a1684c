"""The scoring of a run: what to score, on which devices, and the files that come of it."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from jax_lora import sharding
from jax_lora.config import MeshSizes, RunConfig
from jax_lora.errors import ConfigError, DataError
from jax_lora.evaluation import evaluate, metrics
from jax_lora.files import write_json
from jax_lora.generation import greedy, scheduler, stop_texts
from jax_lora.model import lora
from jax_lora.model.config import LlamaConfig
from jax_lora.model.quantization import is_quantized, with_int8_products
from jax_lora.model.transformer import Llama
from jax_lora.planning import counts
from jax_lora.run import folder as run_folder
from jax_lora.run import initial_weights, inputs
from jax_lora.run import score_tables as tables
from jax_lora.run.training import holding, running
from jax_lora.training import trainable_mask
from jax_lora.training.checkpoints import Checkpoints, step_named
from jax_lora.weights import base as base_weights
from jax_lora.weights import origin, peft

logger = logging.getLogger(__name__)
Put = Callable[..., PyTree]


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
    variables: dict[str, PyTree]
    origin: str
    digest: str


def on_host(_: object, array: PyTree) -> PyTree:
    """Leave the base in the host's memory, from which decoding takes it layer by layer: the device
    holds it once, so that what could be trained on it can be scored on it."""
    return array


def load(
    workdir: Path,
    config: RunConfig,
    adapter: str,
    put: Put | None = None,
    checkpoint: str = "last",
) -> Scored:
    """Load what is to be scored, as `config.eval` says.

    Args:
      workdir: the run's folder.
      config: of the run.
      adapter: "last", the last checkpoint; "none", the bare base; or a PEFT folder.
      put: see `initial_weights.load_base`.
      checkpoint: of the run, where `adapter` is "last": "last", "best" or a step.

    Raises:
      ConfigError, DataError, OSError: one line that names the file or the flag.
    """
    shape = base_weights.read_config(config.model)
    if adapter == "last":
        scored = _load_checkpoint(workdir, config, shape, put, checkpoint)
    else:
        scored = _load_adapter(config, shape, adapter, put)
    if config.eval.int8_products:
        scored.variables["params"] = with_int8_products(scored.variables["params"])
    return scored


def _load_adapter(config: RunConfig, shape: LlamaConfig, adapter: str, put: Put | None) -> Scored:
    frozen = jax.tree.map(lambda _: False, counts.base_shapes(shape))
    variables = {}
    if adapter != "none":
        adapters = peft.load_trained(adapter, shape).adapters
        trained_on = peft.base_quantization(adapter)
        origin.warn_of_another_form(adapter, trained_on, config.model_quantization)
        variables["lora"] = jax.tree.map(jnp.asarray, adapters)
    variables["params"] = initial_weights.load_base(
        config.model, config.dtype, frozen, put, config.model_quantization
    )
    if adapter == "none":
        return Scored(shape, variables, f"{config.model}, untuned", "")
    digest = peft.digest(adapter)
    return Scored(shape, variables, f"{config.model} with {adapter} ({digest})", digest)


def _load_checkpoint(
    workdir: Path, config: RunConfig, shape: LlamaConfig, put: Put | None, checkpoint: str
) -> Scored:
    # The folder must exist before Orbax looks into it: it would make it.
    path = workdir / "checkpoints"
    manager = Checkpoints(path, single_process=True) if path.is_dir() else None
    if manager is None or manager.latest() is None:
        raise DataError(f"{path}: no checkpoint, expected a run that trained (or --adapter=none)")
    chosen = step_named(path, checkpoint)
    is_lora = config.method == "lora"
    shapes: dict[str, PyTree] = {"params": counts.base_shapes(shape)}
    if is_lora:
        shapes["lora"] = initial_weights.adapters_of(config, shape)
    mask = trainable_mask.mask(shapes, config.trainable, config.frozen)
    params = initial_weights.load_base(
        config.model, config.dtype, mask["params"], put, config.model_quantization
    )
    variables = {"params": params}
    if is_lora:
        variables["lora"], variables["params"] = initial_weights.on_base(
            shapes["lora"],
            variables["params"],
            shape,
            init=config.lora.init,
            variant=config.lora.variant,
            folder=workdir / "pissa",
            dtype=config.dtype,
        )
    trainable, frozen = trainable_mask.partition(variables, mask)
    step, trained = manager.restore_trainable(trainable, chosen)
    variables = trainable_mask.combine(trained, frozen)
    # Master copies of the base are for training; answers are made in the dtype of the arithmetic.
    variables["params"] = jax.tree.map(
        lambda x: x if is_quantized(x) else x.astype(config.dtype),
        variables["params"],
        is_leaf=is_quantized,
    )
    if is_lora and lora.does_nothing(variables["lora"]):
        raise DataError(f"{path}: every B is zero, expected a trained adapter")
    return Scored(shape, variables, f"{config.model} after step {step}", digest(trained))


def digest(tree: PyTree) -> str:
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
    return [sharding.make_mesh(MeshSizes(tensor=share), group) for group in groups]


def generators(
    config: RunConfig,
    model: Llama,
    variables: PyTree,
    meshes: Sequence[Mesh],
    end_ids: tuple,
    stop: stop_texts.Stop | None = None,
) -> list[functools.partial[scheduler.Answers]]:
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
            stop=stop,
        )
        for mesh in meshes
    ]


def side_by_side(
    each: list[functools.partial[scheduler.Answers]], meshes: Sequence[Mesh]
) -> Sequence[scheduler.Generate]:
    """The `generators` of several copies as they are; that of a single device as batches."""
    return scheduler.batches(each[0]) if [mesh.size for mesh in meshes] == [1] else each


def folder_name(adapter: str, checkpoint: str = "last") -> str:
    """`eval` for the run's own result, `eval-best` or `eval-step-N` for that of another checkpoint,
    `eval-none` for the base's; those of other adapters are told apart by what they hold, as a run's
    is always called "adapter"."""
    if adapter == "last":
        return {"last": "eval", "best": "eval-best"}.get(checkpoint, f"eval-step-{checkpoint}")
    if adapter == "none":
        return "eval-none"
    return f"eval-{Path(adapter).resolve().name}-{peft.digest(adapter)}"


def _check_what(workdir: Path, config: RunConfig, adapter: str, checkpoint: str) -> None:
    # What can be wrong in the question itself, asked before the data is read.
    metrics.check_names(config.eval.metrics)
    if checkpoint != "last":
        if adapter != "last":
            raise ConfigError(
                f"--checkpoint: found {checkpoint!r} with --adapter={adapter}, expected one of them"
            )
        step_named(workdir / "checkpoints", checkpoint)


def _settings(config: RunConfig, scored: Scored, end_ids: Sequence[int]) -> dict[str, object]:
    # What answers depend on, besides the data and the base.
    settings: dict[str, object] = {
        "origin": scored.origin,
        "weights_digest": scored.digest,
        "version": run_folder.package_version(),
        "config": config.identity(),
        "max_new_tokens": config.eval.max_new_tokens,
        "end_ids": list(end_ids),
        "stop": list(config.eval.stop),
    }
    if config.eval.int8_products:
        settings["int8_products"] = True
    return settings


def score(
    workdir: Path,
    config: RunConfig,
    names: Sequence[str],
    adapter: str = "last",
    checkpoint: str = "last",
    *,
    say: Callable[[str], None],
    put: Put | None = None,
    overwrite: bool = False,
) -> None:
    """Answer the test sets and score them; answers that are there are not made again.

    Args:
      workdir: the run's folder.
      config: of the run, perhaps with another `eval`.
      names: of the test sets, see `inputs.test_sets`.
      say: gets the table of a set as soon as its scores.json is written, from another thread.
      adapter, checkpoint, put: see `load`.
      overwrite: make all answers again.

    Raises:
      ConfigError, DataError, OSError: before any compute.
      RunFailed: a fault while running.
    """
    _check_what(workdir, config, adapter, checkpoint)
    meshes = copies(config)
    if config.eval.devices_per_copy > 1:
        put = on_host
    data, sets = inputs.data(config), inputs.test_sets(config, names)
    digests = {
        "data_fingerprint": inputs.fingerprint(config),
        "base_digest": inputs.base_digest(config.model),
    }
    run_folder.check_same_run(workdir, config, digests)
    encoder = inputs.encoder(config)
    rows, end_ids = inputs.asked(config, encoder, sets)
    for name in names:
        if not rows[name]:
            raise DataError(f"{config.data.path}: found no example of {name}, expected some")
    with holding("no answer was made; quantize the base, or raise eval.devices_per_copy"):
        scored = load(workdir, config, adapter, put, checkpoint)
    settings = digests | _settings(config, scored, end_ids)
    results = workdir / folder_name(adapter, checkpoint)
    for name in names:
        evaluate.write_examples(results / name, rows[name])
        evaluate.write_labels(results / name, data.answers, sets[name].tasks)
    model = Llama(scored.shape, dtype=jnp.dtype(config.dtype))
    stop = inputs.stop_rule(config)
    each = generators(config, model, scored.variables, meshes, end_ids, stop)
    generate = scheduler.round_robin(side_by_side(each, meshes))
    scored_origin = scored.origin
    del scored
    answer = functools.partial(evaluate.predict, generate, encoder, end_ids=end_ids, stop=stop)

    def settings_of(name: str) -> dict[str, object]:
        # The template is a file of the tokenizer's, which no other digest is of.
        if config.data.template != "chat" or inputs.is_dated(config):
            return settings
        return settings | {"prompts_digest": inputs.rows_digest([row for _, row in rows[name]])}

    def finish(name: str) -> None:
        scores = evaluate.score(results / name, config.eval.metrics)
        write_json(results / name / "scores.json", scores)
        before = None
        if adapter != "none":
            before = tables.untuned_scores(workdir / "eval-none" / name, settings_of(name))
        text = tables.score_table(scores, before, config.eval.metrics)
        say(f"\n{name}: {scored_origin}\n{text}\n{results / name / 'scores.json'}")

    safe = "rerun the same command to resume from the answers that are written"
    with running(lambda _: safe), ThreadPoolExecutor(1) as beside:
        scoring = []
        for name in names:
            evaluate.write_predictions(
                results / name, rows[name], answer, settings_of(name), overwrite=overwrite
            )
            scoring.append(beside.submit(finish, name))  # while the next set is answered
        for one in scoring:
            one.result()
