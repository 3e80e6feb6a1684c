"""Peak memory and seconds per training step of one GGUF base, in each form that it can be kept in.

    python -m benchmarks.quantized .cache/SmolLM2-135M-Instruct.Q4_1.gguf --forms=none,gguf

Every form has a process of its own: the base is read, LoRA of rank 16 on q, k, v and o is put on
it, and steps are taken on one micro-batch of random tokens, in float32, with remat "full". The
peak is that of the process (ru_maxrss), which counts the pages of the file that are mapped, too;
before the base is read it is the interpreter and its packages. Seconds are of the wall clock and of
the processor, which other processes disturb less. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import resource
import time
from typing import Any

import numpy as np

from benchmarks.measure import WARM, in_child
from jax_lora.text import table

MIB = 2**20


def measure(model: str, form: str, rows: int, length: int, steps: int, dtype: str) -> Any:
    """The measurements of one form, in this process."""
    from jax_lora import cli

    cli.keep_memory()  # as train.py does, but all is compiled anew, so that peaks compare
    cli.set_xla_flags()
    import jax
    import jax.numpy as jnp
    import optax

    from jax_lora import sharding
    from jax_lora.config import RunConfig
    from jax_lora.data.loader import MicroBatch
    from jax_lora.run import initial_weights
    from jax_lora.training import loop, trainable_mask
    from jax_lora.training.resolve import resolve
    from jax_lora.training.step import State
    from jax_lora.weights import base

    before = _peak()
    config = RunConfig().replace(model=model, model_quantization=form, dtype=dtype)
    config = config.replace(**{"lora.dropout": 0.0, "loss_chunk": 128})
    shape = base.read_config(model)
    kinds = base.check_quantization(model, form)
    resolved = resolve(config, shape, jax.default_backend(), 1, kinds)
    params = base.load(model, dtype, quantization=form)[1]
    held = sum(x.nbytes for x in jax.tree.leaves(params))
    variables = {"params": params, "lora": initial_weights.adapters_of(config, shape)}
    mask = trainable_mask.mask(variables, config.trainable, config.frozen)
    trainable, frozen = trainable_mask.partition(variables, mask)
    optimizer = resolved.optimizer(optax.constant_schedule(1e-4))
    state = State(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))
    loaded = _peak()
    tokens = np.random.default_rng(0).integers(0, shape.vocab_size, (rows, length), np.int32)
    segments = np.broadcast_to(np.arange(rows, dtype=np.int32)[:, None], tokens.shape)
    micro = MicroBatch(tokens, np.ones(tokens.shape, np.float32), segments)
    step, losses, seconds = resolved.step(optimizer, None), [], []
    put = lambda batch: sharding.shard_batch(batch, None)  # noqa: E731
    start = np.array([time.perf_counter(), time.process_time()])
    for taken, report in loop.train(state, frozen, [[micro]] * (WARM + steps), step, put):
        jax.block_until_ready(taken)
        losses.append(float(report.loss))
        now = np.array([time.perf_counter(), time.process_time()])
        seconds.append(now - start)
        start = now
    return {
        "base": held,
        "before": before,
        "loaded": loaded,
        "peak": _peak(),
        "seconds": np.median(seconds[WARM:], axis=0).tolist(),
        "losses": losses,
    }


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="a GGUF file, or another base for other forms than gguf")
    parser.add_argument("--forms", default="none,gguf")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    rows = []
    for form in given.forms.split(","):
        arguments = given.rows, given.length, given.steps, given.dtype
        found = in_child(measure, given.model, form, *arguments)
        if "error" in found:
            raise SystemExit(f"{form}: {found['error']}")
        sizes = (f"{found[key] / MIB:.0f}" for key in ("base", "before", "loaded", "peak"))
        first, last = found["losses"][0], found["losses"][-1]
        times = (f"{seconds:.2f}" for seconds in found["seconds"])
        rows.append((form, *sizes, *times, f"{first:.4f} to {last:.4f}"))
    head = ("form", "base, MiB", "peak before it", "with it", "of training")
    head += ("s per step", "of the processor", "loss")
    print(table(head, rows))


if __name__ == "__main__":
    main()
