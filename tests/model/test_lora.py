"""Adapters against PEFT (values recorded by tests/record.py), and their own promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_lora.data.loader import MicroBatch
from jax_lora.model import lora
from jax_lora.model.arch import GROUP, LINEAR_NAMES
from jax_lora.model.config import LlamaConfig
from jax_lora.model.families import CONFIGS
from jax_lora.model.transformer import Llama
from jax_lora.training.loss import loss_sum
from jax_lora.weights import hf
from tests import reference

TINY = LlamaConfig(61, 32, 48, 2, 4, 2, 8)


@pytest.fixture(scope="module")
def recorded():
    with np.load(reference.RECORDED) as file:
        return dict(file)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = reference.write(tmp_path_factory.mktemp("model"), reference.ADAPTED)
    return hf.load(folder, "float32")[1]


def test_adapted_logits_equal_peft(base, recorded):
    model = Llama(TINY, dtype=jnp.float32)
    logits = model.apply({"params": base, "lora": reference.adapters()}, reference.tokens())
    np.testing.assert_allclose(logits, recorded["lora/logits"], rtol=0, atol=1e-4)


def test_loss_and_gradients_equal_peft(base, recorded):
    model = Llama(TINY, dtype=jnp.float32)
    mask = reference.loss_mask()
    tokens = jnp.asarray(reference.tokens())
    micro = MicroBatch(tokens, jnp.asarray(mask, jnp.float32), jnp.zeros_like(tokens))

    def loss(adapters):
        variables = {"params": base, "lora": adapters}
        return loss_sum(model, variables, micro, chunk=16) / mask.sum()

    value, gradients = jax.value_and_grad(loss)(reference.adapters())
    np.testing.assert_allclose(value, recorded["lora/loss"], rtol=1e-5)
    for name in LINEAR_NAMES:
        for layer in range(2):
            ours = gradients["layers"][GROUP[name]][name]
            place = f"lora/gradient/layers.{layer}.{GROUP[name]}.{name}"
            for leaf, theirs in (("a", "lora_A"), ("b", "lora_B")):
                expected = recorded[f"{place}.{theirs}"].T
                error = np.linalg.norm(ours[leaf][layer] - expected) / np.linalg.norm(expected)
                assert error < 1e-5, (name, layer, leaf, error)


@pytest.mark.parametrize("rank", [1, 4, 40])  # 40 is above the smaller side of every kernel
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_adapters_leave_the_logits_bit_equal(base, rank, dtype):
    adapters = lora.init(jax.random.key(0), TINY, rank, alpha=2.0 * rank, targets=LINEAR_NAMES)
    model = Llama(TINY, dtype=jnp.dtype(dtype))
    plain = model.apply({"params": base}, reference.tokens())
    adapted = model.apply({"params": base, "lora": adapters}, reference.tokens())
    np.testing.assert_array_equal(plain, adapted)


def test_a_is_drawn_as_peft_draws_it():
    # torch's kaiming_uniform_(a=√5) on a (r, in) weight: uniform within ±√(6 / (1 + 5) / in).
    config = CONFIGS["smollm2-135m"]
    adapters = lora.init(jax.random.key(1), config, 64, alpha=128.0)
    a = np.asarray(adapters["layers"]["self_attn"]["o_proj"]["a"])
    bound = 576**-0.5
    assert a.shape == (30, 576, 64)
    assert -bound <= a.min() < -0.999 * bound and 0.999 * bound < a.max() <= bound
    assert abs(a.std() - bound / 3**0.5) < 1e-3 * bound
    assert len(np.unique(a[:, 0, 0])) == 30  # no two layers alike
    again = lora.init(jax.random.key(1), config, 64, alpha=128.0, targets=("o_proj",))
    np.testing.assert_array_equal(again["layers"]["self_attn"]["o_proj"]["a"], a)
    gaussian = lora.init(jax.random.key(1), config, 8, alpha=16.0, a_init="gaussian")
    drawn = np.asarray(gaussian["layers"]["self_attn"]["q_proj"]["a"])
    assert abs(drawn.std() - 1 / 8) < 1e-3
    scale = gaussian["layers"]["self_attn"]["q_proj"]["scale"]
    np.testing.assert_array_equal(scale, np.full(30, 2.0, np.float32))


def test_padding_a_rank_with_zeros_is_exact(base):
    # Unequal ranks live in one stacked tree: the padded model equals the true one.
    model, narrow = Llama(TINY, dtype=jnp.float32), reference.adapters()

    def pad(leaf):
        a, b = leaf["a"], leaf["b"]
        wide = np.pad(a, ((0, 0), (0, 0), (0, 5))), np.pad(b, ((0, 0), (0, 5), (0, 0)))
        return dict(zip(("a", "b", "scale"), (*wide, leaf["scale"]), strict=True))

    groups = narrow["layers"]
    wide = {"layers": {g: {n: pad(x) for n, x in groups[g].items()} for g in groups}}
    logits = [model.apply({"params": base, "lora": x}, reference.tokens()) for x in (narrow, wide)]
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-5)


def test_check_names_what_would_be_ignored():
    good = lora.init(jax.random.key(0), TINY, 4, alpha=8.0)
    lora.check(good, TINY)
    leaf = good["layers"]["self_attn"]["q_proj"]
    for wrong, message in (
        ({"layers": {"self_attn": {"q_porj": leaf}}}, "q_porj"),
        ({"layers": {"mlp": {"q_proj": leaf}}}, "layers/mlp/q_proj"),
        ({"layers": {"self_attn": {"k_proj": leaf}}}, r"k_proj/b: found \(2, 4, 32\), expected"),
        ({"layers": {"self_attn": {"q_proj": {"a": leaf["a"], "b": leaf["b"]}}}}, "scale: found"),
        ({"layers": {}}, "found nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            lora.check(wrong, TINY)


@pytest.mark.parametrize("rank", [0, -1, 1.5, True])
def test_a_bad_rank_is_refused(rank):
    with pytest.raises(ValueError, match="lora rank: found"):
        lora.check_rank(rank)
    if type(rank) is int:  # others contradict the annotation, which the tests execute
        with pytest.raises(ValueError, match="lora rank: found"):
            lora.init(jax.random.key(0), TINY, rank, alpha=1.0)


@pytest.mark.parametrize("targets", [(), ("q_proj", "query"), ("q_proj", "q_proj")])
def test_bad_targets_are_refused(targets):
    with pytest.raises(ValueError, match="lora targets: found"):
        lora.init(jax.random.key(0), TINY, 4, alpha=1.0, targets=targets)
