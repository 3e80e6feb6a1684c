"""What the CPU's compiler makes of the model: what is slow in it, and what is wrong."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_lora.config import RunConfig
from jax_lora.model.config import LlamaConfig
from jax_lora.model.transformer import Llama
from jax_lora.training.resolve import resolve

SHAPE = LlamaConfig(256, 32, 48, 5, 4, 2, 8, tie_word_embeddings=True)
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 24), np.int32)


def loss_and_gradient(dtype, **options):
    model = Llama(SHAPE, dtype=dtype, **options)
    variables = jax.jit(model.init)(jax.random.key(0), TOKENS)

    def loss(embedding, layers):
        params = {**layers["params"], "embed_tokens": embedding}
        return jnp.sum(jax.nn.log_softmax(model.apply({"params": params}, TOKENS)) ** 2)

    return jax.jit(jax.value_and_grad(loss)), variables["params"]["embed_tokens"], variables


@pytest.mark.parametrize("remat", ["full", "products"])
def test_saved_activations_are_not_stacked_in_float32(remat):
    step, *arguments = loss_and_gradient(jnp.bfloat16, remat=remat)
    program = step.lower(*arguments).compile().as_text()
    assert re.search(r"u16\[5,2,24,", program)
    assert not re.search(r"(f32|bf16)\[5,2,(24|2),", program)


@pytest.mark.parametrize("remat", ["full", "products"])
def test_gradients_pass_what_is_saved_as_bits(remat):
    step, *arguments = loss_and_gradient(jnp.bfloat16, remat=remat)
    plain, *_ = loss_and_gradient(jnp.bfloat16)
    found, expected = step(*arguments), plain(*arguments)
    exact = loss_and_gradient(jnp.float32)[0](*arguments)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    (g,), (e,), (x,) = (jax.tree.leaves(tree[1]) for tree in (found, expected, exact))
    assert np.linalg.norm(g - x) <= 1.1 * np.linalg.norm(e - x) + 1e-6 * np.linalg.norm(x)


@pytest.mark.parametrize(
    ("platform", "changes", "layers"),
    [
        ("cpu", {"remat": "none"}, 5),
        ("cpu", {"remat": "full"}, 1),
        ("cpu", {"remat": "products"}, 1),
        ("cpu", {"remat": "none", "unroll": 2}, 2),
        ("cuda", {"remat": "none"}, 1),
    ],
)
def test_without_remat_a_cpu_has_no_scan(platform, changes, layers):
    assert resolve(RunConfig().replace(**changes), SHAPE, platform, 1).model().unroll == layers
