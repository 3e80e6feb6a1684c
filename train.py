"""Fine-tune a LLaMA on Natural Instructions, with LoRA or fully.

    python train.py --config=configs/lora.py:rank=16 --workdir=runs/r16

The work folder then holds the resolved config, parameter counts, metrics, TensorBoard events,
checkpoints and, for LoRA, the adapter in PEFT's format. The same command goes on where an
interrupted run stopped.
"""

from __future__ import annotations

import functools
import json
import math
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tqdm
from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import config_flags

from jax_lora import cli, inputs, sharding
from jax_lora.data.batches import Batches
from jax_lora.data.prompts import Row
from jax_lora.model import attention, lora, variants
from jax_lora.model.transformer import Llama
from jax_lora.model.xla_cpu import bitcast_bf16
from jax_lora.planning import counts
from jax_lora.training import loop, masks
from jax_lora.training.checkpoints import Checkpoints
from jax_lora.training.step import State, adamw, make_step, schedule
from jax_lora.weights import base as base_weights
from jax_lora.weights import peft

CHOICES = {
    "method": ("lora", "full"),
    "dtype": ("bfloat16", "float32"),  # gradients of this loss underflow in float16
    "data.answer": ("first", "random"),
    "data.loss_mean": ("tokens", "examples"),
    "lora.contract": ("auto", "never"),
}

if __name__ == "__main__":  # study.py, which imports this file, has flags of its own
    _CONFIG = config_flags.DEFINE_config_file(
        "config", help_string="configs/*.py", lock_config=True
    )
    _WORKDIR = flags.DEFINE_string("workdir", None, "the run's folder")
    _VERIFY = flags.DEFINE_boolean(
        "verify", False, "read every file of a large checkout, whatever its size and time say"
    )
    _COORDINATOR = flags.DEFINE_string(
        "coordinator", "", "of many processes: host:port of the first; auto where a cluster knows"
    )
    _PROCESSES = flags.DEFINE_integer("processes", -1, "how many processes there are")
    _PROCESS = flags.DEFINE_integer("process", -1, "which of them this is, from 0")


def main(_):
    cli.keep_memory()
    cli.keep_programs()
    with cli.input_errors():
        if _CONFIG.value is None:
            raise ValueError("--config: found none, expected a file such as configs/lora.py")
        if not _WORKDIR.value:
            raise ValueError("--workdir: found none, expected the run's folder")
        sharding.join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    run(_CONFIG.value, Path(_WORKDIR.value), verify=_VERIFY.value)


def run(config: Any, workdir: Path, verify: bool = False) -> None:
    """Train a run to its end, or go on with it, on all devices of all processes.

    Args:
      config: a ConfigDict like that of configs/base.py.
      workdir: the run's folder.
      verify: see `instructions.read_checkout`.
    """
    logging.set_verbosity(logging.WARNING)  # Orbax tells every file it writes
    first = jax.process_index() == 0  # of all processes, the one that writes and talks
    say, tell = (said, print) if first else (silent, silent)
    with cli.input_errors():
        # -------------------------------------------------------------- input, before any compute
        for key in ("model", "data.path"):
            if not config[key]:
                raise ValueError(f"--config.{key}: found none, expected a folder or a hub id")
        for key, values in CHOICES.items():
            if config[key] not in values:
                raise ValueError(f"--config.{key}: found {config[key]!r}, expected one of {values}")
        at_least_1 = ("epochs", "log_every", "checkpoint_every", "unroll", "loss_chunk")
        for key in (*at_least_1, "eval.max_new_tokens"):
            if config[key] < 1:
                raise ValueError(f"--config.{key}: found {config[key]}, expected at least 1")
        for key in ("max_steps", "optim.clip_norm"):
            if config[key] < 0:
                raise ValueError(f"--config.{key}: found {config[key]}, expected 0 or more")
        if config.seed < 0 or len(config.data.sizes) != 3:
            raise ValueError(
                f"--config.seed and data.sizes: found {config.seed} and {config.data.sizes}, "
                "expected 0 or more and three sizes"
            )
        if config.data.source_length > max(config.eval.buckets):
            raise ValueError(
                f"--config.data.source_length: found {config.data.source_length}, expected at most "
                f"{max(config.eval.buckets)}, the largest of --config.eval.buckets"
            )
        mesh = sharding.make_mesh([config.mesh[axis] for axis in sharding.AXES])
        mesh = mesh if mesh.size > 1 else None
        if config.lora.init == "pissa" and jax.process_count() > 1:
            raise ValueError(
                f"--config.lora.init: found pissa in {jax.process_count()} processes, expected one "
                "that has the whole base"
            )
        o = config.optim
        model_config = base_weights.read_config(config.model)
        platform = jax.default_backend()
        attend = config.attention
        lengths = tuple(config.data.buckets)
        if attend == "auto":
            attend = attention.best(platform, config.dtype, model_config.head_dim, lengths)
        attention.check(attend, platform, config.dtype, model_config.head_dim, lengths)
        shapes = {"params": counts.base_shapes(model_config)}
        if config.method == "lora":
            draw = functools.partial(
                inputs.new_adapters, model_config, **cli.adapter_options(config)
            )
            drawn = config.lora.init in (*lora.INITS, "pissa")  # else read
            shapes["lora"] = sharding.make(draw, mesh) if drawn else draw()
        trains = masks.mask(shapes, config.trainable, config.frozen)
        say("reading tasks")
        checkout = inputs.open_checkout(config.data.path, config.data.categories, verify)
        resolved = {
            "config": json.loads(config.to_json_best_effort()),
            "data_fingerprint": checkout.fingerprint,
        }
        cli.check_same_run(workdir / "config.json", resolved)
        sets = inputs.task_sets(*cli.data_options(config))
        if config.data.set not in sets:
            raise ValueError(
                f"--config.data.set: found {config.data.set!r}, expected one of {', '.join(sets)}"
            )
        taskset = sets[config.data.set]

        say("encoding examples")
        encoder = inputs.encoder(*cli.encoder_options(config))
        rows = inputs.training_rows(encoder, taskset, config.data.answer, config.seed)
        batches, total = batches_of(config, rows, mesh)
        rate = schedule(o.schedule, o.learning_rate, o.warmup_steps, total)

        # -------------------------------------------------------------- model, adapters, mask
        say("loading the base model")
        place = sharding.placer(mesh) if mesh else None
        params = inputs.load_base(config.model, config.dtype, trains["params"], place)
        model = Llama(
            model_config,
            dtype=jnp.dtype(config.dtype),
            remat=config.remat,
            unroll=config.unroll,
            attention=attend,
        )
        jax.eval_shape(model.apply, shapes, jnp.zeros((1, 2), jnp.int32))  # checks the module
        materialized = ()
        if config.method == "lora" and config.lora.contract == "auto":
            materialized = lora.materialized_targets(
                model_config, config.lora.rank, config.lora.targets
            )
        optimizer = adamw(
            rate,
            b1=o.b1,
            b2=o.b2,
            eps=o.eps,
            weight_decay=o.weight_decay,
            clip_norm=o.clip_norm or None,
            b_ratio=o.b_ratio,
        )
        functions = make_step(
            model,
            optimizer,
            seed=config.seed,
            dropout_rate=config.lora.dropout if config.method == "lora" else 0.0,
            packed=config.data.packed,
            materialized=materialized,
            loss_chunk=config.loss_chunk,
            mesh=mesh,
        )
        # -------------------------------------------------------------- the folder
        parameters = counts.table(shapes, trains)
        device = jax.devices()[0]
        resolved["versions"] = cli.versions()
        resolved["device"] = f"{len(jax.devices())} × {device.device_kind} ({device.platform})"
        frozen_count, trainable_count = (
            int(parameters[k].to_numpy().sum()) for k in ("frozen", "trainable")
        )
        share = 100 * trainable_count / (frozen_count + trainable_count)
        with cli.all_or_nothing(workdir, mine=first):
            if first:
                cli.write_json(workdir / "config.json", resolved)
                cli.write_json(
                    workdir / "parameters.json",
                    {
                        "frozen": frozen_count,
                        "trainable": trainable_count,
                        "trainable_percent": share,
                        "modules": parameters.to_dict("records"),
                    },
                )
            variables = {"params": params}
            if config.method == "lora":
                variables["lora"], variables["params"] = inputs.on_base(
                    shapes["lora"],
                    params,
                    model_config,
                    init=config.lora.init,
                    variant=config.lora.variant,
                    folder=workdir / "pissa",
                )
            start, variables = sharding.place((jnp.zeros((), jnp.int32), variables), mesh)
            trainable, frozen = masks.partition(variables, trains)
            frozen = bitcast_bf16(frozen, model.platform)
            state = State(start, trainable, sharding.make(optimizer.init, mesh, trainable))
            del shapes, params, variables, trainable  # a resumed run holds one copy of what trains
            checkpoints = Checkpoints(workdir / "checkpoints")
            start = checkpoints.latest() or 0
            if start:
                state = checkpoints.restore(state)
            metrics = cli.MetricsLog(workdir, start) if first else None

    # ------------------------------------------------------------------ what will happen
    tell(
        cli.table(
            ("module", "shape", "frozen", "trainable"),
            [
                (r["module"], "×".join(map(str, r["shape"])), r["frozen"], r["trainable"])
                for r in parameters.to_dict("records")
            ]
            + [("all", "", frozen_count, trainable_count)],
        )
    )
    cut = sum(row.truncated for row in rows)
    tell(
        f"trainable {share:.3f}% of the parameters; {taskset.name}: {len(taskset.tasks)} tasks, "
        f"{len(rows)} examples, {cut} inputs cut to fit; {total} steps of {config.batch_size}"
    )

    # ------------------------------------------------------------------ training
    if start:
        tell(f"going on from step {start}")
    bar = tqdm.tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, disable=not first)
    began, tokens, padded = time.perf_counter(), 0, 0
    before = None  # the step before: read only once the next one is on its way
    last = start

    def log(report):
        loss, norm = float(report.loss), float(report.gradient_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"loss {loss} and gradient norm {norm} at step {report.step}: try a lower "
                "optim.learning_rate in another --workdir"
            )
        values = {
            "loss": loss,
            "learning_rate": float(jnp.asarray(rate(report.step - 1))),
            "gradient_norm": norm,
            "tokens_per_second": tokens / (time.perf_counter() - began),
            "padding_percent": 100 * padded / max(1, tokens + padded),
            "examples": batches.examples_until(report.step),
            "loss_tokens": report.loss_tokens,
        }
        if metrics and (report.step % config.log_every == 0 or report.step == total):
            metrics.write(report.step, values)
        bar.set_postfix_str(
            f"loss {loss:.3f}, lr {values['learning_rate']:.1e}, "
            f"{values['tokens_per_second']:.0f} tokens/s, {values['padding_percent']:.0f}% padding"
        )
        bar.update()

    def what_stays():
        step = checkpoints.latest()
        if step is None:
            return "there is no checkpoint yet, the same command starts over"
        return f"the last checkpoint is step {step}, the same command goes on there"

    with cli.running(what_stays), StopRequest() as stop:
        put = functools.partial(sharding.place_rows, mesh=mesh)
        steps = loop.train(state, frozen, batches.stream(start, total), functions, put)
        for state, report in steps:
            if before is not None:
                log(before)
            before, last = report, report.step
            tokens, padded = tokens + report.tokens, padded + report.padded
            stopping = sharding.anywhere(stop.asked, report.gradient_norm)
            if last == total or last % config.checkpoint_every == 0 or stopping:
                log(before)
                before = None
                checkpoints.save(state)
            if stopping:
                break
        bar.close()
        if metrics:
            metrics.close()
        checkpoints.close()
        if last < total:
            raise SystemExit(f"stopped at step {last} of {total}; the same command goes on there")

        # -------------------------------------------------------------- the adapter
        if config.method == "lora":
            adapters = sharding.whole(masks.combine(state.trainable, frozen)["lora"])
            rank, alpha = config.lora.rank, config.lora.alpha_per_rank * config.lora.rank
            rslora = config.lora.scaling == "alpha/sqrt(r)"
            if config.lora.init == "pissa":
                # For the whole base, whose principal part the adapters held at the start.
                adapters = variants.since(adapters, peft.load(workdir / "pissa").adapters)
                rank, alpha = 2 * rank, alpha * (2**0.5 if rslora else 2)
            if first:
                peft.save(
                    workdir / "adapter",
                    jax.device_get(adapters),
                    rank=rank,
                    alpha=alpha,
                    dropout=config.lora.dropout,
                    base_name=config.model,
                    use_rslora=rslora,
                )
            tell(f"adapter: {workdir / 'adapter'}")
            if any(jax.tree.leaves(trains["params"])):
                tell("it holds A and B alone; what else trained is in the checkpoint")
    tell(f"{time.perf_counter() - began:.0f} s of training, {tokens:,} tokens; {workdir}")


def batches_of(config: Any, rows: Sequence[Row], mesh: Mesh | None = None) -> tuple[Batches, int]:
    """The batches of a run and the number of its steps."""
    batches = Batches(
        rows,
        batch_size=config.batch_size,
        seed=config.seed,
        buckets=config.data.buckets,
        micro_tokens=config.micro_tokens,
        answer_only=config.data.answer_only,
        by_example=config.data.loss_mean == "examples",
        pad_id=0,
        packed=config.data.packed,
        row_parts=sharding.row_parts(mesh),
    )
    total = batches.steps_per_epoch * config.epochs
    return batches, min(total, config.max_steps) if config.max_steps else total


class StopRequest:
    """Ctrl-C or SIGTERM asks for a checkpoint after the running step; a second one kills."""

    def __init__(self):
        self.asked = False

    def __enter__(self):
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number, _):
        self.asked = True
        signal.signal(number, signal.SIG_DFL)


def said(text: str) -> None:
    """A line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def silent(_: str) -> None:
    """What all processes but the first say."""


if __name__ == "__main__":
    app.run(main, flags_parser=functools.partial(cli.parse_flags, flags.FLAGS))
