"""The plan of a run in words: its parameters, its memory, its speed, and the compiler's verdict."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from jax_lora.config import RunConfig
from jax_lora.errors import ConfigError
from jax_lora.model.config import LlamaConfig
from jax_lora.model.gguf_blocks import Kinds
from jax_lora.planning import counts
from jax_lora.planning.compile import compile_step, devices
from jax_lora.planning.memory import MOST_DEVICES, Memory, fewest, largest, memory
from jax_lora.planning.operations import (
    Work,
    ceiling,
    dequantization_seconds,
    dequantized_bytes,
    operations,
)
from jax_lora.planning.steps import PlannedStep, planned_steps, step_count, variables
from jax_lora.planning.targets import Target, full_name, target
from jax_lora.text import table

GIB = 2**30


def plan(
    config: RunConfig,
    shape: LlamaConfig,
    model: str,
    target_name: str,
    tokens: int | None = None,
    compiled: bool = False,
    gguf_kinds: Kinds = (),
) -> Iterator[str]:
    """The plan of a run for a target, one text per section, as soon as it is known.

    Args:
      config: of the run.
      shape: of its base model.
      model: the name of the base model.
      target_name: see `jax_lora.planning.targets.target`.
      tokens: of an example on average; None is as many as the longest row has.
      compiled: compile the step as well.
      gguf_kinds: see `Resolved`.

    Raises:
      ConfigError: an unknown target or set, a mesh that the target does not have, an attention
        kernel that cannot run there, or more tokens than a row has.
    """
    where = target(target_name)
    steps = planned_steps(config, shape, where, gguf_kinds)
    worst = max(steps, key=lambda step: memory(step).peak)
    longest = max(steps, key=lambda step: step.length)
    if tokens is not None and not 1 <= tokens <= longest.length:
        raise ConfigError(
            f"--tokens: found {tokens}, expected 1 to {longest.length}, those of the longest row"
        )
    typical, count = replace(longest, length=tokens or longest.length), step_count(config)
    if compiled:
        devices(where, worst.devices)  # raises at once if the compiler is not installed
    yield f"{summary(model, worst, where)}\n"
    yield memory_report(memory(worst), worst, where)
    yield f"{fitting(longest, where)}\n"
    yield speed_report(f"{config.data.set}, {count} steps", count, typical, where)
    if compiled:
        yield f"\ncompiling for {worst.devices} × {where.kind}"
        yield compiled_report(memory(worst), worst, where)


def summary(model: str, step: PlannedStep, where: Target) -> str:
    """The method, the parameters and the devices."""
    config, resolved = step.config, step.resolved
    method = "full fine-tuning"
    if resolved.is_lora:
        kind = "DoRA" if config.lora.variant == "dora" else "LoRA"
        method = f"{kind} of rank {resolved.rank} on {', '.join(config.lora.targets)}"
        if resolved.materialized:
            method += f"; A·B materialized once per step for {', '.join(resolved.materialized)}"
    parameters = counts.table(*variables(step))
    frozen, trainable = (int(parameters[kind].to_numpy().sum()) for kind in ("frozen", "trainable"))
    mesh = " × ".join(f"{axis} {size}" for axis, size in resolved.mesh_sizes._asdict().items())
    if config.model_quantization != "none":
        method += f"; linear layers of the base in {config.model_quantization}"
    return (
        f"{model}, {method}\n"
        f"{frozen:,} frozen parameters, {trainable:,} trainable "
        f"({100 * trainable / (frozen + trainable):.3f}%)\n"
        f"{step.devices} × {where.kind} of {where.device.bytes / GIB:.2f} GiB; "
        f"mesh {mesh}\n"
        f"{config.dtype}, remat {config.remat}, attention {resolved.attention}; the micro-batch "
        f"that needs most memory: {step.rows} × {step.length} tokens per device"
    )


def memory_report(found: Memory, step: PlannedStep, where: Target) -> str:
    """Bytes by what they hold, and whether they fit."""
    rows = [
        ("base", found.base),
        ("adapters", found.adapters),
        ("optimizer", found.optimizer),
        ("A·B, materialized", found.deltas),
        ("gradients, summed", found.gradients),
        ("gradients of a micro-batch", found.micro_gradients),
        ("residuals of the forward pass", found.residuals),
        ("backward pass of one layer", found.layer),
        ("logits of a chunk", found.logits),
        ("peak", found.peak),
    ]
    text = table(("per device", "GiB"), [(name, f"{x / GIB:.2f}") for name, x in rows if x])
    return (
        f"{text}\nThe peak is less than the sum: not all of it exists at the same time.\n\n"
        f"by formula it {verdict(found.peak, step.devices, where)}"
    )


def fitting(step: PlannedStep, where: Target) -> str:
    """The largest micro-batch that fits, or how many devices one row takes."""
    if rows := largest(step, where.device):
        return (
            f"largest micro-batch that fits: {rows} × {step.length} tokens per device, "
            f"micro_tokens={rows * step.length}"
        )
    count = fewest(step, where.device)
    more = f"nor would it on {MOST_DEVICES} devices"
    if count is not None:
        more = f"{count} devices would do, --target={full_name(where.kind, count)}"
        more += f" --config.mesh.fsdp={count}"
    return f"not even one row of {step.length} tokens fits; {more}"


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


def speed_report(run: str, steps: int, step: PlannedStep, where: Target) -> str:
    """Operations per token, what is dequantized, the ceiling they set, the run's time at it."""
    found = operations(step)
    found["all"] = Work(*map(sum, zip(*found.values(), strict=True)))
    rows = [
        (name, *(f"{x / 1e9:.2f}" for x in (*work, work.total))) for name, work in found.items()
    ]
    device, tokens = where.device, step.batch_rows * step.length
    speed = ceiling(step, device)
    rate = f"{device.tflops:g} TFLOP/s in bfloat16 by {device.source}"
    if device.measured:
        rate = f"{device.measured:g} TFLOP/s measured, {rate}"
    hours = steps * tokens / speed / 3600
    dequantized = ""
    if moved := dequantized_bytes(step):
        dequantized = f"dequantizing moves {moved / GIB:.1f} GiB per device and step"
        if device.bandwidth:
            dequantized += f": {1e3 * dequantization_seconds(step, device):.0f} ms"
            dequantized += f" at {device.bandwidth / 1e12:g} TB/s, in the ceiling"
        dequantized += "\n"
    text = table(("10⁹ operations per token", "forward", "backward", "recomputed", "all"), rows)
    return (
        f"{text}\n"
        f"a step of {step.batch_rows} × {step.length} tokens: "
        f"{found['all'].total * tokens:.2e} operations\n"
        f"{dequantized}"
        f"ceiling: {speed:,.0f} tokens/s at {rate}\n"
        f"{run}: {hours / 24:.2g} days ({hours:.2g} hours) at the ceiling, "
        f"if every example had {step.length} tokens"
    )


def compiled_report(found: Memory, step: PlannedStep, where: Target) -> str:
    """What the compiler of the target says."""
    compiled = compile_step(step, where)
    rows = [
        (name, *(f"{x / GIB:.2f}" for x in (p.arguments, p.temporary, p.peak)), f"{p.seconds:.1f}")
        for name, p in compiled.programs.items()
    ]
    return (
        f"{table(('GiB per device', 'arguments', 'temporary', 'peak of the run', 's'), rows)}\n"
        f"compiled it {verdict(compiled.peak, step.devices, where)}\n"
        f"the formula's peak is {100 * (found.peak / compiled.peak - 1):+.1f}% of it"
    )
