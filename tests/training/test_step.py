"""A step: what it changes, what it leaves, and that cutting the batch does not matter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_lora.config import OptimConfig
from jax_lora.data.loader import MicroBatch
from jax_lora.model import lora
from jax_lora.model.arch import TARGETS
from jax_lora.model.config import LlamaConfig
from jax_lora.model.transformer import Llama
from jax_lora.training import loop, trainable_mask
from jax_lora.training.loss import loss_sum
from jax_lora.training.optimizers import make_optimizer, schedule
from jax_lora.training.step import State, make_step
from tests import reference

TINY = LlamaConfig(61, 32, 48, 2, 4, 2, 8)
MODEL = Llama(TINY, dtype=jnp.float32)
# An optimizer that changes nothing; its state is the gradient.
KEEP = optax.GradientTransformation(
    lambda weights: jax.tree.map(jnp.zeros_like, weights),
    lambda gradients, state, weights=None: (jax.tree.map(jnp.zeros_like, gradients), gradients),
)
SGD = optax.sgd(0.1)


@pytest.fixture(scope="module")
def recorded():
    with np.load(reference.RECORDED) as file:
        return dict(file)


@functools.cache
def _drawn():
    params = MODEL.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    adapters = lora.init(jax.random.key(1), TINY, 4, alpha=8.0, targets=TARGETS)
    return jax.device_get({"params": params, "lora": adapters})


def variables():
    """New buffers, as a step donates those of what trains."""
    return jax.tree.map(jnp.array, _drawn())


@functools.cache
def adamw(rate):
    """One for all tests of a rate, so that they share a `compiled_step`."""
    return make_optimizer(OptimConfig(), optax.constant_schedule(rate))


@functools.cache
def compiled_step(optimizer, **options):
    """`make_step` with a seed of 3: tests with the same options trace and compile it once."""
    return make_step(MODEL, optimizer, seed=3, **options)


def global_batch(cut: int, examples: int = 8):
    """The same `examples` rows, as micro-batches of `cut` rows."""
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, 61, (examples, 16)).astype(np.int32)
    lengths = rng.integers(6, 17, examples).astype(np.int32)
    real = np.arange(16) < lengths[:, None]
    weights = (real & (np.arange(16) >= 3)).astype(np.float32)
    segment_ids = np.where(real, np.arange(examples)[:, None], -1).astype(np.int32)
    parts = (tokens, weights, segment_ids)
    return [MicroBatch(*(x[i : i + cut] for x in parts)) for i in range(0, examples, cut)]


def run(rules, batches, steps=2, dropout=0.1, rate=1e-2, optimizer=None):
    everything = variables()
    before = jax.tree.map(np.array, everything)  # a step donates the buffers of what trains
    trainable, frozen = trainable_mask.partition(
        everything, trainable_mask.mask(everything, *rules)
    )
    optimizer = optimizer or adamw(rate)
    functions = compiled_step(optimizer, dropout_rate=dropout, loss_chunk=8)
    start = State(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))
    steps_taken = list(loop.train(start, frozen, [batches] * steps, functions))
    return before, steps_taken[-1][0], frozen, [report for _, report in steps_taken]


def test_a_step_changes_what_trains_and_nothing_else():
    before, state, frozen, _ = run(trainable_mask.LORA, global_batch(8))
    after = trainable_mask.combine(state.trainable, frozen)
    for path, leaf in jax.tree_util.tree_leaves_with_path(after):
        name = trainable_mask.leaf_name(path)
        old = before
        for key in path:
            old = old[key.key]
        same = bool(jnp.all(leaf == old))
        assert same == (not name.endswith(("/a", "/b"))), name


def test_optimizer_state_exists_for_trainable_leaves_only():
    _, state, _, _ = run(trainable_mask.LORA, global_batch(8), steps=1)
    moments = [x for x in jax.tree.leaves(state.optimizer) if x.ndim]
    sizes = [x.size for x in jax.tree.leaves(state.trainable)]
    assert sorted(x.size for x in moments) == sorted(sizes * 2)
    assert len(sizes) == 2 * len(TARGETS)


def test_full_fine_tuning_is_the_same_code():
    full = ((r"params/.*",), (r"lora/.*",))
    before, state, _, reports = run(full, global_batch(8), steps=3)
    assert reports[-1].loss < reports[0].loss
    changed = jax.tree.map(
        lambda x, y: bool(jnp.any(x != y)), before["params"], state.trainable["params"]
    )
    assert all(jax.tree.leaves(changed))


@pytest.mark.parametrize("cut", [4, 1])
def test_cutting_the_global_batch_changes_only_rounding(cut):
    # 1 × 8, 2 × 4 and 8 × 1, dropout on: the same loss and the same update (plain SGD: Adam turns
    # rounding of near-zero gradients into whole steps).
    whole, parts = (
        run(trainable_mask.LORA, global_batch(n), steps=2, dropout=0.5, optimizer=SGD)
        for n in (8, cut)
    )
    for one, other in zip(whole[3], parts[3], strict=True):
        np.testing.assert_allclose(one.loss, other.loss, rtol=1e-6)
    for x, y in zip(
        jax.tree.leaves(whole[1].trainable), jax.tree.leaves(parts[1].trainable), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)


def test_dropout_is_fresh_every_step_and_off_at_rate_zero():
    # B is drawn and nothing moves, so losses differ by their masks alone.
    everything = variables()
    for leaf in lora.by_target(everything["lora"]).values():
        leaf["b"] = jax.random.normal(jax.random.key(4), leaf["b"].shape)
    trainable, frozen = trainable_mask.partition(
        everything, trainable_mask.mask(everything, *trainable_mask.LORA)
    )

    def losses(rate):
        still = optax.sgd(0.0)
        functions = compiled_step(still, dropout_rate=rate)
        state = State(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, trainable), still.init(None))
        taken = loop.train(state, frozen, [global_batch(8)] * 3, functions)
        return [float(report.loss) for _, report in taken]

    assert len(set(losses(0.0))) == 1
    assert len(set(losses(0.2))) == 3


def test_chunks_equal_the_plain_loss():
    batch = global_batch(8)[0]
    micro = jax.tree.map(jnp.asarray, batch)
    params = {"params": variables()["params"]}

    def plain(v):
        logits = MODEL.apply(v, micro.tokens)[:, :-1]
        each = optax.softmax_cross_entropy_with_integer_labels(logits, micro.tokens[:, 1:])
        return jnp.sum(each * micro.loss_weights[:, 1:])

    for chunk in (5, 16, 1000):
        ours = lambda v, chunk=chunk: loss_sum(MODEL, v, micro, chunk=chunk)  # noqa: E731
        (value, grads), (expected, reference_grads) = (
            jax.jit(jax.value_and_grad(f))(params) for f in (ours, plain)
        )
        np.testing.assert_allclose([value, jax.jit(ours)(params)], expected, rtol=1e-5)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-5), grads, reference_grads
        )


def test_the_logits_of_few_tokens_are_not_padded_to_a_chunk():
    """They are what little memory is lowered for by `config.micro_tokens`."""
    micro = jax.tree.map(jnp.asarray, global_batch(8)[0])
    params = {"params": variables()["params"]}
    found = {}
    for chunk in (micro.tokens.size, 100_000):
        value = jax.value_and_grad(lambda v, c=chunk: loss_sum(MODEL, v, micro, chunk=c))
        found[chunk] = str(jax.make_jaxpr(value)(params))
    assert found[micro.tokens.size] == found[100_000]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_schedules_equal_transformers(recorded, kind):
    ours = schedule(kind, 1.0, 5, 30)
    rates = [float(ours(step)) for step in range(30)]
    np.testing.assert_allclose(rates, recorded[f"schedule/{kind}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("step", 1.0, 5, 30), "schedule: found 'step'"),
        (("linear", 1.0, 30, 30), "warmup_steps: found 30, expected 0 to 29"),
    ],
)
def test_bad_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        schedule(*arguments)


def test_a_bad_dropout_rate_is_refused():
    with pytest.raises(ValueError, match="lora dropout: found 1.0"):
        make_step(MODEL, optax.sgd(1.0), seed=0, dropout_rate=1.0)


def test_the_clip_sees_the_trainable_gradient_alone():
    # The reported norm is that of the gradients of A and B; at step 0 only B's are not zero.
    _, _, _, reports = run(trainable_mask.LORA, global_batch(8), steps=1, dropout=0.0)
    everything = variables()
    batch = global_batch(8)[0]
    micro = jax.tree.map(jnp.asarray, batch)

    def loss(adapters):
        return loss_sum(MODEL, everything | {"lora": adapters}, micro, chunk=16)

    gradients = jax.jit(jax.grad(loss))(everything["lora"])
    for leaf in lora.by_target(gradients).values():
        leaf["scale"] = jnp.zeros(())
    expected = optax.tree.norm(gradients) / reports[0].loss_tokens
    np.testing.assert_allclose(reports[0].gradient_norm, expected, rtol=1e-5)


def gradients(batches, *, materialized=(), packed=False, dropout=0.3, variant="lora"):
    """Loss and gradient of a global batch, B (and m) drawn so that everything matters, and so small
    that float32 has digits to spare: at 0.3 a CPU without AVX-512 was 1.4e-5 off."""
    everything = variables()
    keys = iter(jax.random.split(jax.random.key(4), 99))
    for leaf in lora.by_target(everything["lora"]).values():
        leaf["b"] = 0.1 * jax.random.normal(next(keys), leaf["b"].shape)
        if variant == "dora":
            leaf["m"] = 1 + jax.random.uniform(next(keys), leaf["b"].shape[::2])
    trainable, frozen = trainable_mask.partition(
        everything, trainable_mask.mask(everything, *trainable_mask.LORA)
    )
    options = dict(dropout_rate=dropout, loss_chunk=8)
    functions = compiled_step(KEEP, materialized=materialized, packed=packed, **options)
    state = State(jnp.zeros((), jnp.int32), trainable, KEEP.init(trainable))
    ((after, report),) = loop.train(state, frozen, [batches], functions)
    return float(report.loss), after.optimizer


def assert_same(one, other, tolerance=1e-5):
    np.testing.assert_allclose(one[0], other[0], rtol=tolerance)
    for x, y in zip(jax.tree.leaves(one[1]), jax.tree.leaves(other[1]), strict=True):
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("materialized", [TARGETS, ("q_proj", "down_proj")])
def test_one_formed_product_equals_two(materialized, variant):
    # Gradients of A, B and m, dropout on, over two micro-batches.
    batches = global_batch(4)
    one, other = (gradients(batches, materialized=c, variant=variant) for c in (materialized, ()))
    assert_same(one, other)


def test_packed_rows_give_the_unpacked_gradient():
    # Two examples per row, the same masks of dropout: the same loss and gradient.
    (whole,) = global_batch(8)
    tokens, weights = np.zeros((4, 32), np.int32), np.zeros((4, 32), np.float32)
    segment_ids = np.full((4, 32), -1, np.int32)
    for r in range(4):
        start = 0
        for i in (r, r + 4):
            real = whole.segment_ids[i] >= 0
            end = start + real.sum()
            tokens[r, start:end] = whole.tokens[i][real]
            weights[r, start:end] = whole.loss_weights[i][real]
            segment_ids[r, start:end] = i
            start = end
    packed = gradients([MicroBatch(tokens, weights, segment_ids)], packed=True)
    assert_same(packed, gradients([whole]))


def test_an_example_may_weigh_the_same_however_long():
    (batch,) = global_batch(8)
    weights = batch.loss_weights / batch.loss_weights.sum(axis=1, keepdims=True)
    whole, gradient = gradients([batch._replace(loss_weights=weights)], dropout=0.0)
    alone = [gradients([MicroBatch(*(x[i : i + 1] for x in batch))], dropout=0.0) for i in range(8)]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 8, *(one[1] for one in alone))
    assert_same((whole, gradient), (np.mean([one[0] for one in alone]), mean))


def test_groups_of_positions_change_only_the_order():
    (batch,) = global_batch(8)
    micro = jax.tree.map(jnp.asarray, batch)
    params = {"params": variables()["params"]}

    def loss(variables, groups):
        return loss_sum(MODEL, variables, micro, chunk=8, groups=groups)

    one, four = (
        jax.jit(jax.value_and_grad(functools.partial(loss, groups=n)))(params) for n in (1, 4)
    )
    assert_same(four, one)


def test_lora_plus_moves_b_faster():
    batches = global_batch(8)
    moved = []
    for ratio in (1.0, 16.0):
        config = OptimConfig(weight_decay=0.1, loraplus_lr_ratio=ratio)
        optimizer = make_optimizer(config, optax.constant_schedule(1e-3))
        before, state, _, _ = run(trainable_mask.LORA, batches, steps=1, optimizer=optimizer)
        moved.append((before["lora"], state.trainable["lora"]))
    for path, start in jax.tree_util.tree_leaves_with_path(moved[0][0]):
        if path[-1].key == "scale":
            continue
        slow, fast = (np.asarray(_at(after, path)) - start for _, after in moved)
        ratio = 16.0 if path[-1].key == "b" else 1.0
        np.testing.assert_allclose(fast, ratio * slow, rtol=1e-3, atol=1e-9)


def _at(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree
