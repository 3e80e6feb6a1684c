"""LoRA on a quantized base trains as on the same weights dequantized beforehand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_lora.config import OptimConfig
from jax_lora.errors import ConfigError
from jax_lora.model import lora, variants
from jax_lora.model.arch import LINEAR_NAMES
from jax_lora.model.transformer import Llama
from jax_lora.training import loop, trainable_mask
from jax_lora.training.optimizers import make_optimizer
from jax_lora.training.step import State, make_step
from tests import quantized
from tests.quantized import FORMS, TOY
from tests.training.test_step import global_batch

STEPS = 20


@functools.cache  # what is dequantized has one form: its step is compiled once
def functions_of(remat, materialized, dropout):
    optimizer = make_optimizer(OptimConfig(), optax.constant_schedule(1e-2))
    model = Llama(TOY, jnp.float32, remat=remat)
    options = dict(seed=3, dropout_rate=dropout, loss_chunk=8, materialized=materialized)
    return optimizer, make_step(model, optimizer, **options)


def train(params, adapters, *, remat="full", materialized=(), dropout=0.1, steps=STEPS):
    """Losses and what was trained, after AdamW steps."""
    everything = {"params": params, "lora": adapters}
    mask = trainable_mask.mask(everything, *trainable_mask.LORA)
    trainable, frozen = trainable_mask.partition(everything, mask)
    trainable = jax.tree.map(jnp.array, trainable)  # a step donates them
    optimizer, functions = functions_of(remat, materialized, dropout)
    state = State(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))
    taken = list(loop.train(state, frozen, [global_batch(4, 4)] * steps, functions))
    return np.array([float(report.loss) for _, report in taken]), taken[-1][0].trainable["lora"]


def drawn(rank=4):
    return lora.init(jax.random.key(1), TOY, rank, alpha=8.0, targets=LINEAR_NAMES)


def assert_equal(promise, what, one, other):
    losses = np.abs(one[0] - other[0]) / np.abs(other[0])
    leaves = zip(jax.tree.leaves(one[1]), jax.tree.leaves(other[1]), strict=True)
    moved = max(float(np.abs(x - y).max()) for x, y in leaves)
    promise(f"{what}: loss, relative", losses.max(), 1e-5)
    promise(f"{what}: A, B and m", moved, 1e-5)
    assert other[0][-1] < other[0][0]


@pytest.mark.parametrize("form", FORMS)
def test_twenty_steps_equal_those_on_dequantized_weights(form, promise):
    params, dense = quantized.base(form)
    assert_equal(
        promise,
        "20 AdamW steps on int8, nf4 and GGUF blocks, as on the weights dequantized before",
        *(train(tree, drawn()) for tree in (params, dense)),
    )


@pytest.mark.parametrize(
    "options",
    [dict(remat="none"), dict(remat="products"), dict(materialized=LINEAR_NAMES), dict(dora=True)],
)
def test_remat_materialized_deltas_and_dora_do_too(options, promise):
    params, dense = quantized.base("nf4")
    adapters = drawn()
    if options.pop("dora", False):
        adapters = variants.with_magnitudes(adapters, params)
    what = "5 AdamW steps on nf4 with any remat, materialized deltas or DoRA"
    options["steps"] = 5
    assert_equal(promise, what, *(train(tree, adapters, **options) for tree in (params, dense)))


def test_pissa_starts_from_the_dequantized_weights(promise):
    params, dense = quantized.base("nf4")
    like = drawn()
    starts = [variants.pissa(tree, TOY, like) for tree in (params, dense)]
    for x, y in zip(*map(jax.tree.leaves, starts), strict=True):
        np.testing.assert_array_equal(x, y)
    rests = [variants.without(tree, starts[0]) for tree in (params, dense)]
    what = "5 AdamW steps of PiSSA on nf4"
    assert_equal(promise, what, *(train(tree, starts[0], steps=5) for tree in rests))


def test_a_kernel_that_trains_is_refused():
    params, _ = quantized.base("nf4")
    everything = {"params": params, "lora": drawn()}
    rules = (r"lora/.*/[ab]", r"params/layers/mlp/up_proj/kernel"), (r"lora/.*/scale", r"params/.*")
    mask = trainable_mask.mask(everything, *rules)
    with pytest.raises(ConfigError, match="found nf4 and params/layers/mlp/up_proj/kernel, which"):
        trainable_mask.check_kernels_frozen(mask["params"], "nf4")
    trainable_mask.check_kernels_frozen(mask["params"], "none")
