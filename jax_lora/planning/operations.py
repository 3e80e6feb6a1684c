"""The operations of a training step, counted from shapes, and the speed that they allow.

A multiplication and an addition are two operations. Only matrix products are counted: the rest of
a layer is a percent of them. Padding counts, since it is computed like any token. Dequantizing the
kernels of a quantized base is no product; it takes the time that its bytes need.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_lora.model.arch import GROUP, LINEAR_NAMES
from jax_lora.model.quantization import is_quantized
from jax_lora.planning.steps import PlannedStep, variables
from jax_lora.planning.targets import Device


class Work(NamedTuple):
    """Operations per token: of the forward pass, of the backward pass, and of what the backward
    pass recomputes because the forward pass did not keep it."""

    forward: float
    backward: float
    recomputed: float

    @property
    def total(self) -> float:
        """All three."""
        return sum(self)


def operations(step: PlannedStep) -> dict[str, Work]:
    """Operations per token, averaged over a step: of layers, attention, adapters, vocabulary.

    The backward pass of a product is one product where its kernel is frozen and two where it
    trains. Under remat "full" a layer is recomputed except for its last product, whose result
    nothing reads; under "products" the attention and the adapters are. The attention scores are
    always recomputed. The product with the vocabulary is computed for the loss tokens only.
    """
    c = step.shape
    layers, linear = c.num_hidden_layers, c.linear_shapes()
    _, trains = variables(step)
    trained = trains["params"]
    remat = step.config.remat
    everything, nothing = remat == "full", remat == "none"

    parts = {}
    products = [2.0 * layers * linear[name][0] * linear[name][1] for name in LINEAR_NAMES]
    backward = sum(
        product * (2 if trained["layers"][GROUP[name]][name]["kernel"] else 1)
        for name, product in zip(LINEAR_NAMES, products, strict=True)
    )
    recomputed = sum(products) - products[LINEAR_NAMES.index("down_proj")] if everything else 0.0
    parts["layers"] = Work(sum(products), backward, recomputed)

    pairs = 2.0 * layers * step.length * c.num_attention_heads * c.head_dim * _squares(step)
    parts["attention"] = Work(pairs, 2 * pairs, pairs / 2 if nothing else pairs)

    if step.resolved.is_lora:
        each = [_adapter(step, name) for name in step.config.lora.targets]
        parts["adapters"] = Work(*(sum(side) for side in zip(*each, strict=True)))

    product = 2.0 * c.vocab_size * c.hidden_size * step.loss_share
    tied = c.tie_word_embeddings
    head = trained["embed_tokens"]["embedding"] if tied else trained["lm_head"]["kernel"]
    parts["vocabulary"] = Work(product, product * (2 if head else 1), 0.0)
    return parts


def _adapter(step: PlannedStep, name: str) -> Work:
    # Of one target, all its layers together. That of the head sees the loss tokens alone, and
    # nothing of it is recomputed.
    (layers, a, b), rank = step.shape.stack_shapes()[name], step.resolved.rank or 0
    share = 1.0 if name in GROUP else step.loss_share
    product = 2.0 * layers * a * b
    dense, skinny = share * product, share * 2.0 * layers * rank * (a + b)
    if name in step.resolved.materialized:  # A·B, and from its gradient those of A and B, per step
        once = product * rank / (step.batch_rows * step.length)
        forward, backward = dense + once, 2 * dense + 2 * once
    else:
        forward, backward = skinny, 2 * skinny
    if step.config.lora.variant == "dora":  # the norms of W + s·A·B; after dropout, x·W once more
        if name not in step.resolved.materialized:
            forward += product * rank / (step.rows * step.resolved.row_groups * step.length)
        if step.resolved.dropout:
            forward, backward = forward + dense, backward + dense
    is_kept = step.config.remat == "none" or name not in GROUP
    return Work(forward, backward, 0.0 if is_kept else forward)


def _squares(step: PlannedStep) -> float:
    # What a kernel computes, relative to the causal half of the pairs of tokens: `attention.xla`
    # cuts rows into n parts and computes rectangles, (n + 1)/n of it.
    if step.resolved.attention != "xla":
        return 1.0
    t = step.length
    return 1.0 + 1.0 / next((n for n in (8, 4, 2) if t % n == 0 and t // n >= 128), 1)


def dequantized_bytes(step: PlannedStep) -> float:
    """Bytes that dequantizing moves through the memory of one device in a step: each kernel is
    read as it is stored and written in the activations' dtype, in every pass of every micro-batch.

    The product that reads what was written is part of `operations`; of what PiSSA takes off, only
    the bytes of A and B are counted. 0 if the base is not quantized.
    """
    micro_batches = -(-step.batch_rows // (step.resolved.row_groups * step.rows))
    width, total = jnp.dtype(step.config.dtype).itemsize, 0.0
    layers = variables(step)[0]["params"]["layers"]
    for name, group in GROUP.items():
        kernel = layers[group][name]["kernel"]
        if not is_quantized(kernel):
            continue
        # Remat "full" computes a layer once more, but for its last product.
        passes = 3 if step.config.remat == "full" and name != "down_proj" else 2
        stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kernel))
        total += passes * (stored + math.prod(kernel.shape) * width)
    return micro_batches * total / step.resolved.mesh_sizes.tensor  # `fsdp` gathers what is stored


def ceiling(step: PlannedStep, device: Device) -> float:
    """Tokens per second, padding included, that the step's devices allow: their arithmetic and,
    where it is known, the bandwidth of their memory for what is dequantized."""
    work = sum(part.total for part in operations(step).values())
    tokens = step.batch_rows * step.length
    seconds = work * tokens / (device.rate * step.devices) + dequantization_seconds(step, device)
    return tokens / seconds


def dequantization_seconds(step: PlannedStep, device: Device) -> float:
    """Seconds per step that `dequantized_bytes` take; 0 where the bandwidth is not known."""
    return dequantized_bytes(step) / device.bandwidth if device.bandwidth else 0.0
