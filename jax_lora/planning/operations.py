"""The operations of a training step, counted from shapes, and the speed they allow.

A multiplication and an addition are two operations. Matrix products only: the rest of a layer is
a percent of them. Padding counts, it is computed like any token.
"""

from __future__ import annotations

from typing import NamedTuple

from jax_lora.model.config import GROUP, LINEAR
from jax_lora.planning.setup import Setup, variables
from jax_lora.planning.targets import Device


class Work(NamedTuple):
    """Operations a token: of the forward pass, of the backward pass, and of what the backward
    pass computes again because the forward pass did not keep it."""

    forward: float
    backward: float
    again: float

    @property
    def total(self) -> float:
        """All three."""
        return sum(self)


def operations(setup: Setup) -> dict[str, Work]:
    """Operations a token, averaged over a step: of layers, attention, adapters, vocabulary.

    Going back through a product is one product where its kernel is frozen and two where it
    trains. Under remat "full" a layer is computed again but for its last product, whose result
    nothing reads; under "products" attention and the adapters are. Attention's scores are computed
    again always. The vocabulary's product is there for the loss tokens alone.
    """
    c = setup.config
    layers, linear = c.num_hidden_layers, c.linear_shapes()
    _, trains = variables(setup)
    trained = trains["params"]
    everything, nothing = setup.remat == "full", setup.remat == "none"

    parts = {}
    products = [2.0 * layers * linear[name][0] * linear[name][1] for name in LINEAR]
    backward = sum(
        product * (2 if trained["layers"][GROUP[name]][name]["kernel"] else 1)
        for name, product in zip(LINEAR, products, strict=True)
    )
    again = sum(products) - products[LINEAR.index("down_proj")] if everything else 0.0
    parts["layers"] = Work(sum(products), backward, again)

    pairs = 2.0 * layers * setup.length * c.num_attention_heads * c.head_dim * _squares(setup)
    parts["attention"] = Work(pairs, 2 * pairs, pairs / 2 if nothing else pairs)

    if setup.rank is not None:
        each = [_adapter(setup, name) for name in setup.targets]
        forward, backward = (sum(side) for side in zip(*each, strict=True))
        parts["adapters"] = Work(forward, backward, 0.0 if nothing else forward)

    product = 2.0 * c.vocab_size * c.hidden_size * setup.loss_share
    tied = c.tie_word_embeddings
    head = trained["embed_tokens"]["embedding"] if tied else trained["lm_head"]["kernel"]
    parts["vocabulary"] = Work(product, product * (2 if head else 1), 0.0)
    return parts


def _adapter(setup: Setup, name: str) -> tuple[float, float]:
    # Forward and backward of one target, its layers together.
    a, b = setup.config.linear_shapes()[name]
    layers, rank = setup.config.num_hidden_layers, setup.rank or 0
    dense, skinny = 2.0 * layers * a * b, 2.0 * layers * rank * (a + b)
    if name in setup.materialized:  # A B is formed, and its gradient taken apart, once a step
        once = dense * rank / (setup.batch_rows * setup.length)
        forward, backward = dense + once, 2 * dense + 2 * once
    else:
        forward, backward = skinny, 2 * skinny
    if setup.variant == "dora":  # the norms of W + s A B; and, after dropout, x W once more
        if name not in setup.materialized:
            forward += dense * rank / (setup.rows * setup.row_parts * setup.length)
        if setup.dropout:
            forward, backward = forward + dense, backward + dense
    return forward, backward


def _squares(setup: Setup) -> float:
    # What a kernel computes of the causal half of the pairs of tokens: `attention.xla` cuts rows
    # into n parts and takes rectangles, (n + 1)/n of it.
    if setup.attention != "xla":
        return 1.0
    t = setup.length
    return 1.0 + 1.0 / next((n for n in (8, 4, 2) if t % n == 0 and t // n >= 128), 1)


def ceiling(setup: Setup, device: Device) -> float:
    """Tokens a second, padding counted, that the arithmetic of the setup's devices allows."""
    work = sum(part.total for part in operations(setup).values())
    return device.rate * setup.devices / work
