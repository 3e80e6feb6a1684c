"""DoRA, PiSSA and rsLoRA: where they start, and what they keep (against PEFT: tests/parity)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_lora.model import lora, variants
from jax_lora.model.arch import ATTENTION, LINEAR_NAMES
from jax_lora.model.config import LlamaConfig
from jax_lora.model.transformer import Llama
from jax_lora.run import initial_weights
from jax_lora.weights import peft
from tests import reference

TINY = LlamaConfig(61, 32, 48, 2, 4, 2, 8)
MODEL = Llama(TINY, dtype=jnp.float32)
OPTIONS = dict(
    seed=0,
    rank=3,
    alpha=6.0,
    targets=LINEAR_NAMES,
    scaling="alpha/r",
    init="kaiming",
    variant="lora",
)


@pytest.fixture(scope="module")
def base():
    return MODEL.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


def logits(params, adapters=None):
    variables = {"params": params} | ({"lora": adapters} if adapters else {})
    return np.asarray(MODEL.apply(variables, jnp.asarray(reference.tokens())))


@pytest.mark.parametrize("change", [{"variant": "dora"}, {"init": "pissa"}])
def test_a_new_variant_is_the_base(base, change, tmp_path):
    options = OPTIONS | change
    chosen = {key: options[key] for key in ("init", "variant")}
    adapters = initial_weights.new_adapters(TINY, **options)
    adapters, params = initial_weights.on_base(
        adapters, base, TINY, **chosen, folder=tmp_path / "start"
    )
    lora.check(adapters, TINY)
    np.testing.assert_allclose(logits(params, adapters), logits(base), rtol=0, atol=1e-5)


def test_pissa_holds_the_largest_singular_values(base):
    like = lora.init(jax.random.key(1), TINY, 3, alpha=6.0, targets=("q_proj",))
    made = variants.pissa(base, TINY, like)["layers"]["self_attn"]["q_proj"]
    kernel = np.asarray(base["layers"]["self_attn"]["q_proj"]["kernel"], np.float64)
    for layer in range(2):
        u, s, v = np.linalg.svd(kernel[layer])
        best = u[:, :3] * s[:3] @ v[:3]
        found = made["scale"][layer] * made["a"][layer] @ made["b"][layer]
        np.testing.assert_allclose(found, best, rtol=0, atol=1e-6)
        # shared evenly
        np.testing.assert_allclose(
            np.linalg.norm(made["a"][layer], axis=0), np.linalg.norm(made["b"][layer], axis=1), 1e-4
        )


def test_pissa_refuses_more_than_there_is(base):
    like = lora.init(jax.random.key(1), TINY, 17, alpha=6.0, targets=("k_proj",))
    with pytest.raises(ValueError, match="pissa at rank 17 .* found \\(32, 16\\) in k_proj"):
        variants.pissa(base, TINY, like)


def test_what_pissa_learnt_is_an_adapter_of_the_whole_base(base, tmp_path):
    options = OPTIONS | {"init": "pissa"}
    adapters = initial_weights.new_adapters(TINY, **options)
    folder = tmp_path / "start"
    folder.mkdir()  # as an interrupted writer leaves it
    start, params = initial_weights.on_base(
        adapters, base, TINY, init="pissa", variant="lora", folder=folder
    )
    keys = iter(jax.random.split(jax.random.key(5), 99))
    moved = jax.tree_util.tree_map_with_path(
        lambda path, x: (
            x if path[-1].key == "scale" else x + 0.05 * jax.random.normal(next(keys), x.shape)
        ),
        start,
    )
    found = logits(base, variants.since(moved, start))
    np.testing.assert_allclose(found, logits(params, moved), rtol=0, atol=1e-4)
    assert np.abs(found - logits(base)).max() > 0.01
    # A second look finds the very same start.
    again, rest = initial_weights.on_base(
        adapters, base, TINY, init="pissa", variant="lora", folder=folder
    )
    jax.tree.map(np.testing.assert_array_equal, (again, rest), (start, params))


def test_the_scale_of_rslora():
    made = lora.init(jax.random.key(0), TINY, 16, alpha=8.0, scaling="alpha/sqrt(r)")
    np.testing.assert_array_equal(made["layers"]["self_attn"]["q_proj"]["scale"], [2.0, 2.0])
    with pytest.raises(ValueError, match="lora scaling: found 'r'"):
        lora.init(jax.random.key(0), TINY, 16, alpha=8.0, scaling="r")


def test_an_adapter_trained_elsewhere_is_the_start(tmp_path):
    trained = reference.adapters()
    peft.save(tmp_path / "there", trained, rank=reference.RANK, alpha=reference.ALPHA)
    options = OPTIONS | {"init": str(tmp_path / "there")}
    jax.tree.map(
        np.testing.assert_array_equal, initial_weights.new_adapters(TINY, **options), trained
    )
    for change, message in (
        ({"rank": 4, "alpha": 8.0}, r"down_proj/a is \(2, 48, 3\), expected \(2, 48, 4\)"),
        ({"alpha": 3.0}, "scale is .*2.*, expected 1.0"),
        ({"targets": ATTENTION}, r"down_proj/a is \(2, 48, 3\), expected None"),
        ({"variant": "dora"}, r"down_proj/m is None, expected \(2, 32\)"),
    ):
        with pytest.raises(ValueError, match=message):
            initial_weights.new_adapters(TINY, **(options | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"variant": "vera"}, ValueError, "lora variant: found 'vera'"),
        ({"variant": "dora", "init": "pissa"}, ValueError, "found dora and pissa"),
        ({"init": "orthogonal"}, ValueError, "lora init: found 'orthogonal'"),
    ],
)
def test_choices_are_checked(change, error, message):
    with pytest.raises(error, match=message):
        initial_weights.new_adapters(TINY, **(OPTIONS | change))
