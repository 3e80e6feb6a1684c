"""The network against transformers, case by case (values recorded by tests/record.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_lora.model.dropout import Dropout
from jax_lora.model.transformer import Llama
from jax_lora.model.xla_cpu import einsum
from jax_lora.weights import hf
from tests import reference


@pytest.fixture(scope="module")
def recorded():
    with np.load(reference.RECORDED) as file:
        return dict(file)


def load(tmp_path, case):
    config, base = hf.load(reference.write(tmp_path / case, case), "float32")
    return config, {"params": base}


@pytest.mark.parametrize("case", reference.CASES)
def test_logits_equal_transformers(tmp_path, recorded, case, promise):
    config, variables = load(tmp_path, case)
    logits = Llama(config, dtype=jnp.float32).apply(variables, reference.tokens())
    assert logits.dtype == jnp.float32
    promise(
        f"recorded logits of {len(reference.CASES)} kinds of LLaMA (largest absolute difference)",
        np.abs(logits - recorded[f"{case}/logits"]).max(),
        1e-4,
    )


def test_scan_remat_and_unroll_do_not_change_the_result(tmp_path):
    config, variables = load(tmp_path, "gqa")
    variables["lora"] = reference.adapters()
    dropout = Dropout(jax.random.split(jax.random.key(3), reference.tokens().shape), 0.5)

    def value_and_grad(**options):
        model = Llama(config, dtype=jnp.float32, **options)
        run = lambda v: jnp.sum(model.apply(v, reference.tokens(), dropout) ** 2)  # noqa: E731
        return jax.jit(jax.value_and_grad(run))(variables)

    plain = value_and_grad()
    for options in ({"remat": "full"}, {"remat": "products"}, {"unroll": 2}):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-3),
            value_and_grad(**options),
            plain,
        )


def test_what_follows_a_token_cannot_influence_it(tmp_path):
    config, variables = load(tmp_path, "gqa")
    model, ids = Llama(config, dtype=jnp.float32), reference.tokens()
    changed = ids.copy()
    changed[:, 10:] = 0
    before, after = (model.apply(variables, x)[:, :10] for x in (ids, changed))
    np.testing.assert_array_equal(before, after)


def test_bfloat16_is_near_float32(tmp_path, recorded):
    config, variables = load(tmp_path, "gqa")
    logits = Llama(config, dtype=jnp.bfloat16).apply(variables, reference.tokens())
    error = np.abs(logits - recorded["gqa/logits"]).mean()
    assert 0 < error < 0.02


def test_dropout_is_a_function_of_the_example_alone(tmp_path):
    # The masks of one example are the same whatever it is batched with and however it is padded.
    config, variables = load(tmp_path, "gqa")
    variables["lora"] = reference.adapters()
    model, ids = Llama(config, dtype=jnp.float32), jnp.asarray(reference.tokens())
    keys = jax.random.split(jax.random.key(3), ids.shape)
    together = model.apply(variables, ids, Dropout(keys, 0.5))
    single = model.apply(variables, ids[1:, :16], Dropout(keys[1:, :16], 0.5))
    np.testing.assert_allclose(together[1:, :16], single, rtol=0, atol=1e-4)
    other = model.apply(variables, ids, Dropout(keys[::-1], 0.5))
    assert np.abs(other - together).max() > 0.1


def test_an_unknown_remat_is_refused(tmp_path):
    config, variables = load(tmp_path, "mha")
    with pytest.raises(ValueError, match="remat: found 'some'"):
        Llama(config, remat="some").apply(variables, reference.tokens())


@pytest.mark.parametrize(
    ("spec", "x", "w"),
    [
        ("btd,df->btf", (2, 64, 48), (48, 96)),  # a linear layer
        ("btd,dr->btr", (2, 64, 48), (48, 3)),  # A
        ("btr,rf->btf", (2, 64, 3), (3, 96)),  # B
        ("btd,dv->btv", (2, 64, 48), (48, 320)),  # the head
        ("btd,vd->btv", (2, 64, 48), (320, 48)),  # the head, tied
        ("bkgth,bksh->bkgts", (2, 2, 3, 64, 16), (2, 2, 64, 16)),  # attention scores
        ("bkgts,bksh->bkgth", (2, 2, 3, 64, 64), (2, 2, 64, 16)),  # attention mix
    ],
)
def test_products_and_their_gradients_in_bfloat16(spec, x, w):
    # Against float32 on the same rounded numbers; also that the compiler takes every shape.
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = (jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys[:2], (x, w), strict=True))
    master = w.astype(jnp.float32)  # as in full fine-tuning: its gradient must stay float32
    out, pull = jax.vjp(lambda x, w: einsum(spec, jnp.bfloat16, x, w, "cpu"), x, master)
    g = jax.random.normal(keys[2], out.shape, jnp.bfloat16)
    found = (out, *jax.jit(lambda g: jax.tree.map(jnp.asarray, pull(g)))(g))
    wide, pull = jax.vjp(lambda x, w: jnp.einsum(spec, x, w), x.astype(jnp.float32), master)
    expected = (wide, *pull(g.astype(jnp.float32)))
    assert [f.dtype for f in found] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    for ours, theirs, tolerance in zip(found, expected, (0.01, 0.01, 1e-5), strict=True):
        error = jnp.linalg.norm(ours.astype(jnp.float32) - theirs) / jnp.linalg.norm(theirs)
        assert error < tolerance
