"""Say before the launch whether a run fits, how fast it could be, and how long it takes.

    python plan.py --config=configs/lora_7b_a100.py:rank=2048 --target=a100-80gb
    python plan.py --config=configs/full_7b_8xa100.py --target=a100-80gb-8 --compile

Only the config is read: no data, no weights, and no accelerator is needed. --config.model may be
a known name such as llama-13b; where it is empty, the model is llama-7b. --compile also asks the
compiler of the target: it takes a minute or so, and the extra cuda12 or cuda13, or tpu.
"""

from __future__ import annotations

import functools
import math
import os
from dataclasses import replace
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs here: take no accelerator

import jax
from absl import app, flags
from ml_collections import config_flags

from jax_lora import cli
from jax_lora.model import attention, lora
from jax_lora.model.config import CONFIGS
from jax_lora.model.transformer import REMAT
from jax_lora.planning import counts
from jax_lora.planning.compile import compile_step, devices
from jax_lora.planning.memory import MOST_DEVICES, Memory, fewest, largest, memory
from jax_lora.planning.operations import Work, ceiling, operations
from jax_lora.planning.setup import Setup, variables
from jax_lora.planning.targets import DEVICES, Target, full_name, target
from jax_lora.weights import base as base_weights

GIB = 2**30
TRAIN_TASKS = 756  # of Tall, as the paper counts them
CHOICES = {
    "method": ("lora", "full"),
    "dtype": ("bfloat16", "float32"),
    "remat": REMAT,
    "lora.contract": ("auto", "never"),
    "lora.variant": ("lora", "dora"),
}

if __name__ == "__main__":  # the tests and study.py import this file and have flags of their own
    _CONFIG = config_flags.DEFINE_config_file(
        "config", help_string="configs/*.py", lock_config=True
    )
    _TARGET = flags.DEFINE_string("target", None, f"{', '.join(DEVICES)}; or N of them: NAME-N")
    _TOKENS = flags.DEFINE_integer(
        "tokens", None, "of an example on average, for speed and days; by default the most"
    )
    _COMPILE = flags.DEFINE_boolean("compile", False, "compile the step for the target as well")


def main(_):
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot read such programs back
    with cli.input_errors():
        if _CONFIG.value is None:
            raise ValueError("--config: found none, expected a file such as configs/lora.py")
        if not _TARGET.value:
            raise ValueError(f"--target: found none, expected one of {', '.join(DEVICES)}")
        run(_CONFIG.value, _TARGET.value, _TOKENS.value, _COMPILE.value)


def run(config: Any, name: str, tokens: int | None = None, compiled: bool = False) -> None:
    """Print the plan of a config, a ConfigDict like that of configs/base.py, for a target.

    Args:
      config: of the run.
      name: of the target, see `jax_lora.planning.targets.target`.
      tokens: of an example on average; None is as many as the longest row has.
      compiled: compile the step as well.
    """
    where = target(name)
    shapes = setups(config, where)
    steps = step_count(config)
    setup = max(shapes, key=lambda one: memory(one).peak)
    longest = max(shapes, key=lambda one: one.length)
    if tokens is not None and not 1 <= tokens <= longest.length:
        raise ValueError(f"--tokens: found {tokens}, expected 1 to {longest.length}, a row's most")
    if compiled:
        devices(where, setup.devices)  # is the compiler there?
    found = memory(setup)
    say_what(config.model or "llama-7b", setup, where)
    say_memory(found, setup, where)
    say_what_fits(longest, where)
    typical = replace(longest, length=tokens or longest.length)
    say_speed(f"{config.data.set}, {steps} steps", steps, typical, where)
    if compiled:
        say_compiled(found, setup, where)


# ---------------------------------------------------------------- what the config asks for


def setups(config: Any, where: Target) -> list[Setup]:
    """A setup for every shape of micro-batch that the config trains on."""
    for key, values in CHOICES.items():
        if config[key] not in values:
            raise ValueError(f"--config.{key}: found {config[key]!r}, expected one of {values}")
    for key in ("batch_size", "micro_tokens", "loss_chunk", "epochs"):
        if config[key] < 1:
            raise ValueError(f"--config.{key}: found {config[key]}, expected at least 1")
    name = config.model or "llama-7b"
    shape = CONFIGS[name] if name in CONFIGS else base_weights.read_config(name)
    full = config.method == "full"
    rank = None if full else config.lora.rank
    targets = tuple(config.lora.targets)
    materialized = ()
    if not full and config.lora.contract == "auto":
        materialized = lora.materialized_targets(shape, config.lora.rank, targets)
    platform, kernel = where.device.platform, config.attention
    lengths = tuple(config.data.buckets)
    if kernel == "auto":
        kernel = attention.best(platform, config.dtype, shape.head_dim, lengths)
    attention.check(kernel, platform, config.dtype, shape.head_dim, lengths)
    found = Setup(
        config=shape,
        rank=rank,
        targets=targets,
        variant="lora" if full else config.lora.variant,
        materialized=materialized,
        trainable=tuple(config.trainable),
        frozen=tuple(config.frozen),
        dtype=config.dtype,
        remat=config.remat,
        attention=kernel,
        loss_chunk=config.loss_chunk,
        dropout=0.0 if full else config.lora.dropout,
        packed=config.data.packed,
        mesh=mesh_sizes(config.mesh, where),
        platform=platform,
    )
    share = -(-config.batch_size // found.row_parts)  # of the batch, that a device computes
    return [
        replace(
            found,
            length=length,
            rows=min(share, max(1, config.micro_tokens // length)),
            batch_rows=config.batch_size,
        )
        for length in lengths
    ]


def mesh_sizes(mesh: Any, where: Target) -> tuple[int, int, int]:
    """Sizes of data, fsdp and tensor on the target's devices; a target without a number has as
    many as the config's mesh."""
    sizes = [mesh.data, mesh.fsdp, mesh.tensor]
    known = math.prod(size for size in sizes if size != -1)
    count = where.count or known
    if sizes.count(-1) <= 1 and known > 0:
        sizes = [count // known if size == -1 else size for size in sizes]
    if min(sizes) < 1 or math.prod(sizes) != count:
        raise ValueError(
            f"--config.mesh: found {mesh.data} × {mesh.fsdp} × {mesh.tensor}, expected sizes that "
            f"multiply to {count}, the target's devices; with --config.mesh.fsdp=-1 fsdp takes "
            "what the others leave"
        )
    data, fsdp, tensor = sizes
    return data, fsdp, tensor


def step_count(config: Any) -> int:
    """Steps of the run, if no task has fewer examples than the config asks for."""
    d = config.data
    tasks = {f"T{size}": size for size in d.sizes} | {"Tall": TRAIN_TASKS}
    tasks |= dict.fromkeys((f"T*{d.sizes[0]}", f"T*{d.sizes[-1]}"), d.sizes[1])
    if d.set not in tasks:
        raise ValueError(f"--config.data.set: found {d.set!r}, expected one of {', '.join(tasks)}")
    steps = -(-tasks[d.set] * d.train_per_task // config.batch_size) * config.epochs
    return min(steps, config.max_steps) if config.max_steps else steps


# ---------------------------------------------------------------- what is printed


def say_what(model: str, setup: Setup, where: Target) -> None:
    """The run, its parameters and the devices, in words."""
    method = "full fine-tuning"
    if setup.rank is not None:
        kind = "DoRA" if setup.variant == "dora" else "LoRA"
        method = f"{kind} of rank {setup.rank} on {', '.join(setup.targets)}"
        if setup.materialized:
            method += f"; A·B formed once a step for {', '.join(setup.materialized)}"
    table = counts.table(*variables(setup))
    frozen, trainable = (int(table[kind].to_numpy().sum()) for kind in ("frozen", "trainable"))
    data, fsdp, tensor = setup.mesh
    print(f"{model}, {method}")
    print(
        f"{frozen:,} frozen parameters, {trainable:,} trainable "
        f"({100 * trainable / (frozen + trainable):.3f}%)"
    )
    print(
        f"{setup.devices} × {where.kind} of {where.device.bytes / GIB:.2f} GiB; "
        f"mesh data {data} × fsdp {fsdp} × tensor {tensor}"
    )
    print(
        f"{setup.dtype}, remat {setup.remat}, attention {setup.attention}; the micro-batch that "
        f"needs most: {setup.rows} × {setup.length} tokens on a device"
    )


def say_memory(found: Memory, setup: Setup, where: Target) -> None:
    """Bytes by what they hold, and the verdict."""
    rows = [
        ("base", found.base),
        ("adapters", found.adapters),
        ("optimizer", found.optimizer),
        ("A·B, formed once a step", found.deltas),
        ("gradients, summed", found.gradients),
        ("gradients of a micro-batch", found.fresh),
        ("activations, kept for the backward pass", found.kept),
        ("activations of a layer, going back", found.layer),
        ("logits of a chunk", found.logits),
        ("peak", found.peak),
    ]
    print()
    print(cli.table(("on one device", "GiB"), [(k, f"{v / GIB:.2f}") for k, v in rows if v]))
    print("The peak is that of the worst moment: not all of it is there at once.\n")
    print(f"by formula it {verdict(found.peak, setup.devices, where)}")


def say_what_fits(setup: Setup, where: Target) -> None:
    """The largest micro-batch, or how many devices it takes."""
    best = largest(setup, where.device)
    if best:
        print(
            f"largest micro-batch that fits: {best} × {setup.length} tokens on a device, "
            f"micro_tokens={best * setup.length}"
        )
        return
    count = fewest(setup, where.device)
    more = f"nor would it on {MOST_DEVICES} devices"
    if count is not None:
        more = f"{count} devices would do, --target={full_name(where.kind, count)}"
        more += f" --config.mesh.fsdp={count}"
    print(f"not even a row of {setup.length} tokens fits; {more}")


def verdict(peak: int, count: int, where: Target) -> str:
    """Whether a peak fits each of `count` devices, and by how much."""
    device = where.device
    left = device.usable - peak
    text = f"{'does not fit' if left < 0 else 'fits'}: {peak / GIB:.1f} GiB of "
    text += f"{device.usable / GIB:.1f} usable{f' on each of {count}' if count > 1 else ''}, "
    if left < 0:
        return text + f"{-left / GIB:.1f} GiB too much"
    text += f"{left / GIB:.1f} GiB left"
    if device.platform == "cuda" and peak > 0.75 * device.bytes:
        text += f"; set XLA_PYTHON_CLIENT_MEM_FRACTION={device.usable / device.bytes:.2f}"
    return text


def say_speed(run: str, steps: int, setup: Setup, where: Target) -> None:
    """Operations of a token, the ceiling that they set, and the time of the run there."""
    found = operations(setup)
    found["all"] = Work(*map(sum, zip(*found.values(), strict=True)))
    rows = [
        (name, *(f"{x / 1e9:.2f}" for x in (*work, work.total))) for name, work in found.items()
    ]
    print()
    print(cli.table(("10⁹ operations a token", "forward", "backward", "again", "all"), rows))
    device, tokens = where.device, setup.batch_rows * setup.length
    speed = ceiling(setup, device)
    rate = f"{device.tflops:g} TFLOP/s in bfloat16 by {device.source}"
    if device.measured:
        rate = f"{device.measured:g} TFLOP/s measured, {rate}"
    print(
        f"a step of {setup.batch_rows} × {setup.length} tokens: "
        f"{found['all'].total * tokens:.2e} operations"
    )
    print(f"ceiling: {speed:,.0f} tokens/s at {rate}")
    hours = steps * tokens / speed / 3600
    print(
        f"{run}: {hours / 24:.2g} days ({hours:.2g} hours) at the ceiling, "
        f"were every example {setup.length} tokens"
    )


def say_compiled(found: Memory, setup: Setup, where: Target) -> None:
    """What the compiler of the target says."""
    print(f"\ncompiling for {setup.devices} × {where.kind}", flush=True)
    compiled = compile_step(setup, where)
    rows = [
        (name, *(f"{x / GIB:.2f}" for x in (p.arguments, p.temporary, p.peak)), p.seconds)
        for name, p in compiled.programs.items()
    ]
    print(cli.table(("GiB on one device", "arguments", "temporary", "run's peak", "s"), rows))
    print(f"compiled it {verdict(compiled.peak, setup.devices, where)}")
    print(f"the formula's peak is {100 * (found.peak / compiled.peak - 1):+.1f}% of it")


if __name__ == "__main__":
    app.run(main, flags_parser=functools.partial(cli.parse_flags, flags.FLAGS))
