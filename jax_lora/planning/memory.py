"""The memory of a training step by formula: does it fit, before anything is compiled?

What a run holds is counted to the byte, from the trees that training has. What its functions need
besides is a formula: its coefficients say what XLA keeps alive at the worst moment of a layer. They
were read by hand off the compiled peaks in tests/recorded/aot.json, all of them, and for TPUs off
the compiler's own reports of buffers; no script fits them. Against the compilers:

  fitted: 35 rows, mean error 1.3%, worst 8.2%, 31 within 3%
  held out, 7B and above: 17 rows, mean error 1.3%, worst 9.6%, 16 within 3%
  held out, below 7B: 5 rows, mean error 15.1%, worst 42.9%, 1 within 3%
  quantized bases: 7 rows, mean error 3.7%, worst 7.0%, 4 within 3%

The held-out rows, tests/recorded/aot_held_out.json, were chosen before they were compiled, by the
rule in benchmarks/scale.py, and no coefficient was changed after them, nor after those of quantized
bases, tests/recorded/aot_quantized.json. The worst of each kind: Llama-3-70B in nf4 on 4 v5e needs
0.9 GiB more than the formula's 12.2, for the gathered table of the vocabulary; full fine-tuning of
Llama-3-8B on 8 H100 needs 2.2 GiB more than the formula says, Llama-3.2-1B on one v5e 1 GiB less
than its 4.8, Llama-3.2-3B fully on 8 v5e 1.7 GiB more than its 8.6. With a large vocabulary or a
small model, ask the compiler (plan.py --compile) where less than 3 GiB are left.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import lru_cache

import jax.numpy as jnp

from jax_lora.config import MeshSizes
from jax_lora.planning.steps import PlannedStep, trees, variables
from jax_lora.planning.targets import Device
from jax_lora.sharding import local_bytes

MOST_DEVICES = 128  # one row of the paper's batch on each

# Numbers per token and layer, in the activations' dtype, as multiples of (D, F): what the forward
# pass keeps for the backward pass besides the products of frozen kernels, and the working set of
# one layer in the backward pass.
_RESIDUALS = {"full": (1.0, 0.0), "products": (1.0, 0.0), "none": (5.0, 0.0)}
_BACKWARD = {"full": (7.0, 6.0), "products": (2.0, 3.0), "none": (2.0, 3.0)}


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    A run holds `base`, `adapters` and `optimizer`; during a step also `deltas` (the materialized
    A·B) and `gradients`, the sum over micro-batches. While a micro-batch is differentiated, there
    are besides: `micro_gradients`, its own gradients; `residuals`, what the forward pass keeps for
    the backward pass; `layer`, the working set of one layer; `logits`, those of a chunk, with
    their gradients. Computing A·B takes `materializing` at the start of a step, the optimizer
    `update` at its end.
    """

    base: int
    adapters: int
    optimizer: int
    deltas: int
    gradients: int
    micro_gradients: int
    residuals: int
    layer: int
    logits: int
    materializing: int
    update: int

    @property
    def held(self) -> int:
        """What exists during the whole step."""
        return self.base + self.adapters + self.optimizer + self.deltas + self.gradients

    @property
    def peak(self) -> int:
        """At the worst moment of a step."""
        backward = self.residuals + max(self.micro_gradients + self.layer, self.logits)
        return self.held + max(backward, self.deltas + self.materializing, self.update)


@lru_cache(maxsize=1024)
def memory(step: PlannedStep) -> Memory:
    """The bytes of a step on one device of its mesh."""
    mesh = step.abstract_mesh
    frozen, state, diff_params, _ = trees(step)
    adapters = local_bytes(variables(step)[0].get("lora", {}), mesh)
    gradients = local_bytes(diff_params, mesh)
    deltas = local_bytes(diff_params["deltas"], mesh)
    materializing = _materializing(step)
    # From the gradient of A·B, XLA computes those of A and B: so much of the two exists at once.
    factors = local_bytes(state.trainable, mesh) if step.resolved.materialized else 0
    update = factors + materializing if materializing else factors * 3 // 8
    return Memory(
        base=local_bytes((frozen, state.trainable), mesh) - adapters,
        adapters=adapters,
        optimizer=local_bytes((state.optimizer, state.step), mesh),
        deltas=deltas,
        gradients=gradients,
        micro_gradients=gradients,
        residuals=_residuals(step),
        layer=_layer(step, gradients),
        logits=_logits(step),
        materializing=materializing,
        update=update,
    )


def _residuals(step: PlannedStep) -> int:
    c, (d, f) = step.shape, _RESIDUALS[step.config.remat]
    tensor = step.resolved.mesh_sizes.tensor
    numbers = d * c.hidden_size + f * c.intermediate_size / tensor
    if step.config.remat != "full":
        # The products that the backward pass reads, and the result of the attention.
        heads = c.num_attention_heads * c.head_dim
        outs = sum(out for name, (_, out) in c.linear_shapes().items() if name != "down_proj")
        numbers += (outs - c.hidden_size + heads) / tensor + c.hidden_size
    return int(c.num_hidden_layers * step.rows * step.length * numbers * _width(step))


def _layer(step: PlannedStep, gradients: int) -> int:
    c, (d, f) = step.shape, _BACKWARD[step.config.remat]
    width, mesh = _width(step), step.resolved.mesh_sizes
    tokens = step.rows * step.length
    activations = tokens * (d * c.hidden_size + f * c.intermediate_size / mesh.tensor)
    scores = 0.0
    if step.resolved.attention == "xla":
        scores = step.rows * c.num_attention_heads / mesh.tensor * step.length**2 * 4
    if step.resolved.platform == "tpu":
        # What trains is cast for all layers at once, before the loops; kernels of a layer pass
        # through vector memory, but for the widest where `fsdp` gathers them.
        cast = gradients * width / 4 if width < 4 else 0
        widest = max(a * b for a, b in c.linear_shapes().values()) / mesh.tensor
        gathered = widest * width if mesh.fsdp > 1 else 0
        return int(activations * width + scores + cast + gathered)
    kernels, adapters = _numbers(step)
    return int((activations + kernels + adapters) * width + scores + _gathered(step))


def _numbers(step: PlannedStep) -> tuple[float, float]:
    # Numbers in the kernels and in the adapters (or their deltas A·B) of one layer.
    linear, resolved = step.shape.linear_shapes(), step.resolved
    tensor = resolved.mesh_sizes.tensor
    adapters = 0.0
    for name in step.config.lora.targets if resolved.is_lora else ():
        if name not in linear:  # outside the layers
            continue
        a, b = linear[name]
        adapters += a * b if name in resolved.materialized else step.config.lora.rank * (a + b)
    return sum(a * b for a, b in linear.values()) / tensor, adapters / tensor


def _gathered(step: PlannedStep) -> float:
    # What `fsdp` gathers: the adapters of one layer in float32. Those of all layers were cast
    # before the loops; a materialized delta was not.
    fsdp = step.resolved.mesh_sizes.fsdp
    if fsdp == 1:
        return 0.0
    _, adapters = _numbers(step)
    cast = 0 if step.resolved.materialized else step.shape.num_hidden_layers / fsdp
    return adapters * (4 + cast * _width(step))


def _materializing(step: PlannedStep) -> int:
    # On several devices: one B, of all layers where they have one, gathered.
    materialized, mesh = step.resolved.materialized, step.resolved.mesh_sizes
    if not materialized or mesh.fsdp == 1:
        return 0
    stacks = (step.shape.stack_shapes()[name] for name in materialized)
    widest = max(copies * size_out for copies, _, size_out in stacks)
    return 4 * step.config.lora.rank * widest // mesh.tensor


def _logits(step: PlannedStep) -> int:
    # In float32, their gradient, and the softmax between the two. What an adapter on lm_head adds
    # here was never compiled, and is not counted; its A, B and gradients are.
    c, tokens = step.shape, step.rows * step.length
    mesh = step.resolved.mesh_sizes
    found = min(step.config.loss_chunk, tokens) * c.vocab_size // mesh.tensor * 12
    if step.resolved.platform == "tpu":
        # The hidden states in the order of the chunks, and the table where `fsdp` does not cut it.
        table = c.vocab_size // mesh.tensor if mesh.fsdp == 1 else 0
        found += (table + 4 * tokens) * c.hidden_size * _width(step)
    return found


def _width(step: PlannedStep) -> int:
    return jnp.dtype(step.config.dtype).itemsize


def largest(step: PlannedStep, device: Device) -> int:
    """Most rows of a micro-batch that fit on one device, at most its share of the batch; or 0."""
    share = -(-step.batch_rows // step.resolved.row_groups)
    return bisect_right(
        range(1, share + 1),
        device.usable,
        key=lambda rows: memory(replace(step, rows=rows)).peak,
    )


def fewest(step: PlannedStep, device: Device) -> int | None:
    """Fewest devices, a power of two, on which one row each fits, sharded by `fsdp`; or None."""
    count = 1
    while count <= MOST_DEVICES:
        resolved = replace(step.resolved, mesh_sizes=MeshSizes(fsdp=count))
        if memory(replace(step, rows=1, resolved=resolved)).peak <= device.usable:
            return count
        count *= 2
    return None
