"""Bytes that the functions of a step take on one device: by the compiler, and by the plan.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.planning.arguments tiny cpu
    python -m tests.planning.arguments tiny a100-80gb

Prints a line of JSON for every setup and function: its label, the compiler's bytes, the plan's.
"""

import json
import sys

from benchmarks import scale
from jax_lora.model.config import ATTENTION, LlamaConfig
from jax_lora.planning.compile import compile_step
from jax_lora.planning.memory import memory
from jax_lora.planning.setup import Setup
from jax_lora.planning.targets import target
from jax_lora.training import masks

CONFIG = LlamaConfig(64, 32, 48, 2, 4, 2, 8)
TINY = dict(rows=1, length=8, batch_rows=8, attention="xla", loss_chunk=8)
FULL = dict(trainable=masks.FULL[0], frozen=masks.FULL[1], dropout=0.0)
SETUPS = {
    ("tiny", "cpu"): [Setup(CONFIG, 3, mesh=(2, 2, 2), **TINY)],
    ("tiny", "a100-80gb"): [Setup(CONFIG, 3, mesh=(1, 2, 1), **TINY)],
    ("llama-7b", "cpu"): [
        Setup(CONFIG, 40, mesh=(1, 8, 1), materialized=ATTENTION, **TINY),
        Setup(CONFIG, None, mesh=(2, 2, 2), **TINY, **FULL),
        scale.setup("llama-7b", 16, "cpu", mesh=(1, 8, 1)),
        scale.setup("llama-7b", 4096, "cpu", mesh=(1, 8, 1)),
        scale.setup("llama-7b", None, "cpu", mesh=(2, 4, 1)),
    ],
}


def planned(setup: Setup) -> dict[str, int]:
    """By the plan: what each function takes of what the run holds."""
    held = memory(setup)
    scales = 4 * setup.config.num_hidden_layers * len(setup.targets) if setup.rank else 0
    tokens = setup.rows * setup.length
    # Token ids and loss mask, the sum of losses and the weight of the batch; for dropout the
    # examples' numbers and the step's.
    batch = tokens * (4 + 1) + 4 + 4 + (tokens * 4 + 4 if setup.dropout else 0)
    trained = held.adapters - scales if setup.rank else held.base
    adapters = held.deltas if setup.materialized else held.adapters
    return {
        "accumulate": held.base + adapters + held.gradients + batch,
        "update": trained + held.optimizer + held.gradients + (scales if setup.materialized else 0),
    }


def main() -> None:
    model, kind = sys.argv[1:]
    for setup in SETUPS[model, kind]:
        found = compile_step(setup, target(kind)).programs
        for name, bytes_ in planned(setup).items():
            label = f"{name}, rank {setup.rank}, mesh {setup.mesh}, D {setup.config.hidden_size}"
            print(json.dumps([label, found[name].arguments, bytes_]), flush=True)


if __name__ == "__main__":
    main()
