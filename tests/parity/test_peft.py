"""Adapters against PEFT: what they compute at any rank, and how A is drawn."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jax_lora.model import lora
from jax_lora.model.arch import GROUP, LINEAR_NAMES
from jax_lora.model.transformer import Llama
from jax_lora.weights import peft as our_peft
from tests import reference
from tests.parity import training

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.parity, training.PEFT_WARNING]
RANKS = (1, 4, 40, 64, 512)  # the model's kernels have sides of 16, 32 and 48


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return training.load_base(tmp_path_factory.mktemp("model"))


# ---------------------------------------------------------------- forward


@pytest.mark.parametrize("rank", RANKS)
def test_logits_at_any_rank(base, tmp_path, promise, rank):
    adapters, ids = reference.adapters(rank), reference.tokens()
    alpha = reference.ALPHA / reference.RANK * rank
    model = training.with_peft(base, tmp_path, adapters, rank=rank, alpha=alpha, dropout=0.5)
    variables = {"params": base.params, "lora": our_peft.load(tmp_path).adapters}
    logits = Llama(base.config, dtype=jnp.float32).apply(variables, ids)
    with torch.no_grad():
        expected = model.eval()(torch.tensor(ids, dtype=torch.int64)).logits.numpy()
        dropped = model.train()(torch.tensor(ids, dtype=torch.int64)).logits.numpy()
    assert np.abs(dropped - expected).max() > 0.1  # the adapter matters, and so would its dropout
    promise(
        f"logits with adapters on all seven layers, ranks {', '.join(map(str, RANKS))}, dropout "
        "off in evaluation (largest absolute difference)",
        np.abs(logits - expected).max(),
        1e-4,
    )


# ---------------------------------------------------------------- how A is drawn

DRAWS, RANK = 10_000, 4


@pytest.fixture(scope="module", params=["kaiming", "gaussian"])
def drawn(request, base):
    """A of down_proj in the first layer (draws, in, r), ours and PEFT's; and all of ours."""

    def draw(key):
        return lora.init(
            key, base.config, RANK, alpha=8.0, targets=LINEAR_NAMES, a_init=request.param
        )["layers"]

    ours = jax.vmap(draw)(jax.random.split(jax.random.key(0), DRAWS))
    start = {"kaiming": True, "gaussian": "gaussian"}[request.param]
    settings = peft.LoraConfig(r=RANK, init_lora_weights=start, target_modules=["down_proj"])
    layer = peft.inject_adapter_in_model(settings, base.load()).model.layers[0].mlp.down_proj
    weight = layer.lora_A["default"].weight
    theirs = np.empty((DRAWS, *weight.shape[::-1]), np.float32)
    torch.manual_seed(0)
    for a in theirs:
        layer.reset_lora_parameters("default", start)
        a[:] = weight.detach().numpy().T
    return SimpleNamespace(name=request.param, ours=ours, theirs=theirs)


def test_how_a_is_drawn(drawn, promise):
    a = np.asarray(drawn.ours["mlp"]["down_proj"]["a"], np.float64)[:, 0]
    theirs = drawn.theirs.astype(np.float64)
    assert a.shape == theirs.shape == (DRAWS, 48, RANK)
    what = f"A over {DRAWS:,} draws, {drawn.name}"
    if drawn.name == "kaiming":
        bound = 48**-0.5
        for one in (a, theirs):
            promise(f"{what}: largest |A| · √in less 1", abs(np.abs(one).max() / bound - 1), 1e-5)
    for power, moment in ((1, "mean"), (2, "variance")):
        x, y = a.ravel() ** power, theirs.ravel() ** power
        error = abs(x.mean() - y.mean()) / np.hypot(x.std(), y.std()) * x.size**0.5
        promise(f"{what}: {moment} against PEFT's, in standard errors", error, 4.0)
    distance = stats.ks_2samp(a.ravel(), theirs.ravel(), method="asymp").statistic
    critical = 1.95 * (2 / a.size) ** 0.5  # at a level of 0.001
    promise(f"{what}: Kolmogorov-Smirnov distance to PEFT's", distance, critical)


def test_draws_are_independent_and_b_is_zero(drawn, promise):
    # The first 32 entries of every layer's A, which all kernels have.
    leaves = [drawn.ours[GROUP[name]][name] for name in LINEAR_NAMES]
    places = np.stack([leaf["a"][:, i, :32] for leaf in leaves for i in range(2)])
    what = f"A over {DRAWS:,} draws, {drawn.name}"
    promise(
        f"{what}: correlation between layers and targets, in standard errors",
        training.correlation(places),
        4.5,
    )
    some = np.asarray(leaves[0]["a"])[::100].reshape(DRAWS // 100, -1)
    assert training.correlation(some) < 4.5 and len(np.unique(some[:, 0])) == DRAWS // 100
    promise("B at the start (largest)", max(np.abs(leaf["b"]).max() for leaf in leaves), 0.0)
