"""Bytes that the functions of a step take on one device: by the compiler, and by the plan.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.planning.arguments tiny cpu
    python -m tests.planning.arguments tiny a100-80gb

Prints one line of JSON per step and function: its label, the compiler's bytes, the plan's. On the
CPU, tiny is also the families whose leaves are others than LLaMA's.
"""

import json
import math
import sys
from typing import Any

from benchmarks import scale
from jax_lora.config import RunConfig
from jax_lora.model.config import LlamaConfig
from jax_lora.planning.compile import compile_step
from jax_lora.planning.memory import memory
from jax_lora.planning.steps import PlannedStep, planned
from jax_lora.planning.targets import target
from jax_lora.weights.hf_config import parse_config
from tests import reference

CONFIG = LlamaConfig(64, 32, 48, 2, 4, 2, 8)
FAMILIES = [parse_config(reference.config(name)) for name in ("Qwen2", "Qwen3")]


def tiny(
    platform: str, mesh: tuple[int, int, int], shape: LlamaConfig = CONFIG, **keys: Any
) -> PlannedStep:
    """A step of a tiny model, one row of 8 tokens per device."""
    keys |= dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True))
    config = RunConfig().replace(batch_size=8, attention="xla", loss_chunk=8, **keys)
    return planned(config, shape, platform, math.prod(mesh), rows=1, length=8)


STEPS = {
    ("tiny", "cpu"): [
        tiny("cpu", (2, 2, 2), **{"lora.rank": 3}),
        *(tiny("cpu", (2, 2, 2), shape, **{"lora.rank": 3}) for shape in FAMILIES),
    ],
    ("tiny", "a100-80gb"): [tiny("cuda", (1, 2, 1), **{"lora.rank": 3})],
    ("llama-7b", "cpu"): [
        tiny("cpu", (1, 8, 1), **{"lora.rank": 40}),
        tiny("cpu", (2, 2, 2), **scale.FULL),
        scale.step("llama-7b", 16, "cpu", mesh=(1, 8, 1)),
        scale.step("llama-7b", 4096, "cpu", mesh=(1, 8, 1)),
        scale.step("llama-7b", None, "cpu", mesh=(2, 4, 1)),
    ],
}


def by_plan(step: PlannedStep) -> dict[str, int]:
    """What each function takes of what the run holds."""
    held, resolved = memory(step), step.resolved
    scales = 0
    if resolved.is_lora:
        scales = 4 * step.shape.num_hidden_layers * len(step.config.lora.targets)
    tokens = step.rows * step.length
    # Token ids and loss weights, the sum of losses and the weight of the batch; for dropout the
    # examples' numbers and the step's.
    batch = tokens * (4 + 4) + 4 + 4 + (tokens * 4 + 4 if resolved.dropout else 0)
    trained = held.adapters - scales if resolved.is_lora else held.base
    adapters = held.deltas if resolved.materialized else held.adapters
    return {
        "accumulate": held.base + adapters + held.gradients + batch,
        "update": trained
        + held.optimizer
        + held.gradients
        + (scales if resolved.materialized else 0),
    }


def main() -> None:
    model, kind = sys.argv[1:]
    for step in STEPS[model, kind]:
        found = compile_step(step, target(kind)).programs
        for name, bytes_ in by_plan(step).items():
            label = f"{name}, rank {step.resolved.rank}, mesh {step.resolved.mesh_sizes}"
            label += f", {step.shape.family}, D {step.shape.hidden_size}"
            print(json.dumps([label, found[name].arguments, bytes_]), flush=True)


if __name__ == "__main__":
    main()
