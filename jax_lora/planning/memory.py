"""The memory of a training step by formula: does it fit, before anything is compiled?

What a run holds is counted to the byte, from the very trees that training has. What its functions
need besides is a formula: its coefficients say what XLA keeps alive at the worst moment of a
layer. They were read off the compiled peaks in tests/recorded/aot.json, which the whole meets
within 10%. Where a TPU's compiler keeps other things than CUDA's, its own reports of buffers say.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import lru_cache

import jax.numpy as jnp

from jax_lora.planning.setup import Setup, trees, variables
from jax_lora.planning.targets import Device
from jax_lora.sharding import local_bytes

MOST_DEVICES = 128  # a row each, of the paper's batch

# Bytes a token of a layer, in multiples of (D, F) numbers of the activations' dtype: what the
# forward pass keeps for the backward pass beside the products of frozen kernels, and the working
# set of one layer going back.
_KEPT = {"full": (1.0, 0.0), "products": (1.0, 0.0), "none": (5.0, 0.0)}
_WORKING = {"full": (7.0, 6.0), "products": (2.0, 3.0), "none": (2.0, 3.0)}


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    The run holds `base`, `adapters` and `optimizer`; during a step also `deltas` (A B, formed
    once) and `gradients`, the sum over micro-batches. While a micro-batch is differentiated there
    are besides: `fresh`, its own gradients; `kept`, what the forward pass left for the backward
    pass; `layer`, the working set of one layer; `logits`, those of a chunk and what belongs to
    them. A B needs `forming` at the start of a step, the optimizer `update` at its end.
    """

    base: int
    adapters: int
    optimizer: int
    deltas: int
    gradients: int
    fresh: int
    kept: int
    layer: int
    logits: int
    forming: int
    update: int

    @property
    def held(self) -> int:
        """What is there all along a step."""
        return self.base + self.adapters + self.optimizer + self.deltas + self.gradients

    @property
    def peak(self) -> int:
        """At the worst moment of a step."""
        backward = self.kept + max(self.fresh + self.layer, self.logits)
        return self.held + max(backward, self.deltas + self.forming, self.update)


@lru_cache(maxsize=1024)
def memory(setup: Setup) -> Memory:
    """The bytes of a step on one device of the setup's mesh."""
    mesh = setup.abstract_mesh
    frozen, state, working, _ = trees(setup)
    adapters = local_bytes(variables(setup)[0].get("lora", {}), mesh)
    gradients = local_bytes(working, mesh)
    deltas = local_bytes(working["deltas"], mesh)
    forming = _forming(setup)
    # Taking the gradient of A B apart, XLA has so much of A's and B's at once.
    taken = local_bytes(state.trainable, mesh) if setup.materialized else 0
    update = taken + forming if forming else taken * 3 // 8
    return Memory(
        base=local_bytes((frozen, state.trainable), mesh) - adapters,
        adapters=adapters,
        optimizer=local_bytes((state.optimizer, state.step), mesh),
        deltas=deltas,
        gradients=gradients,
        fresh=gradients,
        kept=_kept(setup),
        layer=_layer(setup, gradients),
        logits=_logits(setup),
        forming=forming,
        update=update,
    )


def _kept(setup: Setup) -> int:
    c, (d, f) = setup.config, _KEPT[setup.remat]
    numbers = d * c.hidden_size + f * c.intermediate_size / setup.mesh[2]
    if setup.remat != "full":  # the products that a backward pass reads, and attention's result
        heads = c.num_attention_heads * c.head_dim
        outs = sum(out for name, (_, out) in c.linear_shapes().items() if name != "down_proj")
        numbers += (outs - c.hidden_size + heads) / setup.mesh[2] + c.hidden_size
    return int(c.num_hidden_layers * setup.rows * setup.length * numbers * _width(setup))


def _layer(setup: Setup, working: int) -> int:
    c, (d, f) = setup.config, _WORKING[setup.remat]
    width, tensor = _width(setup), setup.mesh[2]
    tokens = setup.rows * setup.length
    activations = tokens * (d * c.hidden_size + f * c.intermediate_size / tensor)
    scores = 0.0
    if setup.attention == "xla":
        scores = setup.rows * c.num_attention_heads / tensor * setup.length**2 * 4
    if setup.platform == "tpu":
        # What trains is cast for all layers at once, before the loops; kernels of a layer pass
        # through vector memory, but for the widest where `fsdp` gathers them.
        cast = working * width / 4 if width < 4 else 0
        widest = max(a * b for a, b in c.linear_shapes().values()) / tensor
        gathered = widest * width if setup.mesh[1] > 1 else 0
        return int(activations * width + scores + cast + gathered)
    kernels, adapters = _numbers(setup)
    return int((activations + kernels + adapters) * width + scores + _borrowed(setup))


def _numbers(setup: Setup) -> tuple[float, float]:
    # Numbers in the kernels and in the adapters (or their A B) of one layer.
    linear, tensor = setup.config.linear_shapes(), setup.mesh[2]
    adapters = 0.0
    for name in setup.targets if setup.rank is not None else ():
        a, b = linear[name]
        adapters += a * b if name in setup.materialized else (setup.rank or 0) * (a + b)
    return sum(a * b for a, b in linear.values()) / tensor, adapters / tensor


def _borrowed(setup: Setup) -> float:
    # What `fsdp` gathers: the adapters of a layer in float32. Those of all layers were cast before
    # the loops, an A B was not.
    if setup.mesh[1] == 1:
        return 0.0
    adapters = _numbers(setup)[1]
    cast = 0 if setup.materialized else setup.config.num_hidden_layers / setup.mesh[1]
    return adapters * (4 + cast * _width(setup))


def _forming(setup: Setup) -> int:
    # A B beside the last step's, and on several devices one B of all layers, gathered.
    if not setup.materialized or setup.mesh[1] == 1:
        return 0
    linear, c = setup.config.linear_shapes(), setup.config
    widest = max(linear[name][1] for name in setup.materialized)
    return 4 * c.num_hidden_layers * (setup.rank or 0) * widest // setup.mesh[2]


def _logits(setup: Setup) -> int:
    # In float32, their gradient, and the softmax between the two.
    c, tokens = setup.config, setup.rows * setup.length
    found = min(setup.loss_chunk, tokens) * c.vocab_size // setup.mesh[2] * 12
    if setup.platform == "tpu":  # the states in the order of the chunks, and a table that is whole
        table = c.vocab_size // setup.mesh[2] if setup.mesh[1] == 1 else 0
        found += (table + 4 * tokens) * c.hidden_size * _width(setup)
    return found


def _width(setup: Setup) -> int:
    return jnp.dtype(setup.dtype).itemsize


def largest(setup: Setup, device: Device) -> int:
    """Most rows of a micro-batch that fit on a device, at most its share of the batch; 0: none."""
    share = -(-setup.batch_rows // setup.row_parts)
    return bisect_right(
        range(1, share + 1),
        device.usable,
        key=lambda rows: memory(replace(setup, rows=rows)).peak,
    )


def fewest(setup: Setup, device: Device) -> int | None:
    """Fewest devices, a power of two, on which one row each fits, everything cut by `fsdp`."""
    count = 1
    while count <= MOST_DEVICES:
        alone = replace(setup, rows=1, mesh=(1, count, 1))
        if memory(alone).peak <= device.usable:
            return count
        count *= 2
    return None
