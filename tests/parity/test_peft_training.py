"""LoRA and its variants against PEFT: gradients, and twenty steps of training.

On the seven linear layers of a block and on lm_head."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_lora.config import OptimConfig
from jax_lora.data.loader import MicroBatch
from jax_lora.model import lora, variants
from jax_lora.model.arch import GROUP, TARGETS
from jax_lora.model.transformer import Llama
from jax_lora.training import trainable_mask
from jax_lora.training.optimizers import make_optimizer, schedule
from tests.parity import training
from tests.parity.dropout import DropoutMasks

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
optimizers = pytest.importorskip("peft.optimizers")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.parity, training.PEFT_WARNING]
STEPS, WARMUP = 20, 3
RANK, WIDE, SCALE = 4, 64, 4.0  # α/r
KINDS = ("LoRA", "rsLoRA", "DoRA", "PiSSA", "LoRA, BA formed first", "DoRA, BA formed first")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return training.load_base(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def taken():
    return training.batches(4, (4, 24), (4, 24)) * (STEPS // 4)  # few, to be learnt by heart


@pytest.fixture(scope="module")
def trainers(base):
    model = Llama(base.config, dtype=jnp.float32)
    formed = lora.materialized_targets(base.config, WIDE, TARGETS)
    assert formed == TARGETS and lora.materialized_targets(base.config, RANK, TARGETS) == ()
    return {False: training.Ours(model), True: training.Ours(model, materialized=formed)}


def both(kind: str, base: training.Base, folder, moved: bool = False) -> tuple[Any, Any]:
    """Our variables and a torch model that start alike: as a run does or, if `moved`, elsewhere."""
    if kind == "PiSSA":
        return _pissa(base)
    rank = WIDE if "formed" in kind else RANK
    scaling = "alpha/sqrt(r)" if kind == "rsLoRA" else "alpha/r"
    alpha = SCALE * (rank**0.5 if kind == "rsLoRA" else rank)
    adapters = lora.init(
        jax.random.key(5), base.config, rank, alpha=alpha, targets=TARGETS, scaling=scaling
    )
    if "DoRA" in kind:
        adapters = variants.with_magnitudes(adapters, base.params)
    if moved:
        adapters = _moved(adapters)
    model = training.with_peft(
        base, folder, adapters, rank=rank, alpha=alpha, use_rslora=kind == "rsLoRA"
    )
    return {"params": base.params, "lora": adapters}, model


def _moved(adapters: Any) -> Any:
    rng = np.random.default_rng(0)

    def move(path, x):
        noise = 0.1 * rng.normal(size=x.shape).astype(np.float32)
        return {"b": x + noise, "m": x * (1 + noise)}.get(path[-1].key, x)

    return jax.tree_util.tree_map_with_path(move, adapters)


def _pissa(base: training.Base) -> tuple[Any, Any]:
    # Singular values far apart, each 0.9 of the one before it: where two are alike, rounding
    # decides which vectors are the first.
    params = base.params
    for name in TARGETS:
        left, values, right = np.linalg.svd(lora.kernel(params, name), full_matrices=False)
        values = values[:, :1] * 0.9 ** np.arange(values.shape[1], dtype=np.float32)
        kernel = jnp.asarray((left * values[:, None, :]) @ right)
        params = lora.with_kernel(params, name, kernel)
    model = base.load()
    weights = training.base_tensors(base.config, params)
    model.load_state_dict({name: torch.tensor(weight) for name, weight in weights.items()})
    alpha = SCALE * RANK
    settings = peft.LoraConfig(
        r=RANK, lora_alpha=alpha, target_modules=list(TARGETS), init_lora_weights="pissa"
    )
    model = peft.get_peft_model(model, settings)
    like = lora.init(jax.random.key(0), base.config, RANK, alpha=alpha, targets=TARGETS)
    adapters = variants.pissa(params, base.config, like)
    # A singular vector may be turned round, which a training run follows; take PEFT's side.
    ref = training.torch_tensors(model)
    for name, leaf in lora.by_target(adapters).items():
        places = [f"layers.{i}.{GROUP[name]}.{name}" for i in (0, 1)] if name in GROUP else [name]
        theirs = [ref[f"{place}.lora_A.weight"] for place in places]
        sign = np.sign(np.einsum("ldr,lrd->lr", leaf["a"], np.stack(theirs)))
        leaf["a"], leaf["b"] = leaf["a"] * sign[:, None, :], leaf["b"] * sign[:, :, None]
    return {"params": variants.without(params, adapters), "lora": adapters}, model


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(base, taken, trainers, tmp_path, promise, kind):
    variables, model = both(kind, base, tmp_path, moved=True)
    if "formed" in kind:
        # At this rank PEFT's own float32 gradient is 7e-6 off its float64 one, ours 6e-6, each by
        # another order of sums: the reference is what both approximate.
        model, kind = model.double(), f"{kind}, PEFT in float64"
    expected = training.backward(model, taken[0])
    found, loss = trainers["formed" in kind].gradients(variables, trainable_mask.LORA, taken[0])
    error = training.worst_error(
        training.adapter_tensors(found["lora"]), training.torch_tensors(model, gradients=True)
    )
    promise(f"{kind}: loss", abs(loss - expected), 1e-5)
    promise(f"{kind}: ‖g − g_ref‖ / ‖g_ref‖ of every A, B and m", error, 1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "LoRA+ on DoRA"])
def test_adamw(base, taken, trainers, tmp_path, promise, kind):
    variables, model = both(kind, base, tmp_path)
    start = training.torch_tensors(model)
    plus = {"lr": 1e-3, "loraplus_lr_ratio": 16.0} if "LoRA+" in kind else {}
    rate = plus.get("lr", 1e-2)
    config = OptimConfig(loraplus_lr_ratio=plus.get("loraplus_lr_ratio", 1.0))
    made = make_optimizer(config, schedule("linear", rate, WARMUP, STEPS))
    found, losses, norms = trainers["formed" in kind].train(
        variables, trainable_mask.LORA, taken, made
    )
    if plus:
        ref = optimizers.create_loraplus_optimizer(model, torch.optim.AdamW, **plus)
    else:
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        ref = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    linear = transformers.get_linear_schedule_with_warmup(ref, WARMUP, STEPS)
    expected, expected_norms = training.theirs(model, taken, ref, linear, clip=1.0)
    assert max(expected_norms) > 1.0 and losses[-1] < losses[0] - 0.3
    found, ref = training.adapter_tensors(found["lora"]), training.torch_tensors(model)
    what = f"{kind}, {STEPS} AdamW steps"
    promise(f"{what}: losses", np.abs(np.subtract(losses, expected)).max(), 1e-4)
    error = training.worst_error(found, ref, start)
    promise(f"{what}: ‖θ − θ_ref‖ / ‖θ_ref − θ₀‖ of every A, B and m", error, 1e-3)


def test_sgd(base, taken, trainers, tmp_path, promise):
    variables, model = both("LoRA", base, tmp_path)
    start = training.torch_tensors(model)
    found, losses, _ = trainers[False].train(variables, trainable_mask.LORA, taken, optax.sgd(0.1))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    expected, _ = training.theirs(model, taken, torch.optim.SGD(weights, lr=0.1))
    found, ref = training.adapter_tensors(found["lora"]), training.torch_tensors(model)
    what = f"LoRA, {STEPS} SGD steps"
    promise(f"{what}: losses", np.abs(np.subtract(losses, expected)).max(), 1e-4)
    error = training.worst_error(found, ref)
    promise(f"{what}: ‖θ − θ_ref‖ / ‖θ_ref‖ of every A and B", error, 1e-5)
    error = training.worst_error(found, ref, start)
    promise(f"{what}: ‖θ − θ_ref‖ / ‖θ_ref − θ₀‖ of every A and B", error, 1e-3)


def test_pissa_starts_as_pefts(base, promise):
    variables, model = _pissa(base)
    ours = training.base_tensors(base.config, variables["params"])
    rest = {
        name.replace(".base_layer", "").removeprefix("base_model.model."): weight.numpy()
        for name, weight in model.state_dict().items()
        if "lora_" not in name
    }
    promise("PiSSA: what is left of every weight", training.worst_error(ours, rest), 1e-5)
    adapters = training.adapter_tensors(variables["lora"])
    error = training.worst_error(adapters, training.torch_tensors(model))
    promise("PiSSA: A and B at the start, but for their signs", error, 1e-5)


def test_pissa_ends_as_plain_lora(base, tmp_path, promise):
    like = lora.init(jax.random.key(0), base.config, RANK, alpha=SCALE * RANK, targets=TARGETS)
    start = variants.pissa(base.params, base.config, like)
    trained, ids = _moved(start), np.arange(24)[None] % 61
    variables = {"params": variants.without(base.params, start), "lora": trained}
    logits = Llama(base.config, dtype=jnp.float32).apply(variables, ids)
    model = training.with_peft(
        base, tmp_path, variants.since(trained, start), rank=2 * RANK, alpha=2 * SCALE * RANK
    )
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    error = np.abs(logits - expected).max()
    promise("PiSSA, saved as LoRA of twice the rank for the whole base: logits", error, 1e-4)


# ---------------------------------------------------------------- dropout


RATE, TOKENS, EXAMPLE = 0.1, 7, 6  # test_dropout.py's rate and columns: its programs serve here


@pytest.fixture(scope="module")
def dropped(base):
    """A base, and our masks for one example in it: target → mask / keep (L, T, in)."""
    read = DropoutMasks(base.config, base.params, RATE)
    seen = [read.scaled(EXAMPLE, place) for place in range(1, TOKENS)]
    # The first token's cannot be read; it is embedded at zero, where a mask changes nothing.
    found = {name: np.stack([seen[0][name], *(s[name] for s in seen)], axis=1) for name in TARGETS}
    return read.variables["params"], found


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_dropout_acts_where_pefts_does(base, dropped, tmp_path, promise, kind):
    params, seen = dropped

    class Fixed(torch.nn.Module):
        def __init__(self, mask):
            super().__init__()
            self.mask = torch.tensor(mask, dtype=torch.float32)

        def forward(self, x):
            return x * self.mask

    variables, model = both(kind, base, tmp_path, moved=True)
    for i, layer in enumerate(model.base_model.model.model.layers):
        for name, group in GROUP.items():
            module = getattr(getattr(layer, group), name)
            module.lora_dropout["default"] = Fixed(seen[name][i])
    model.base_model.model.lm_head.lora_dropout["default"] = Fixed(seen["lm_head"][0])
    model.get_input_embeddings().weight.data[0] = 0.0
    ids = np.random.default_rng(1).integers(1, 61, (1, TOKENS)).astype(np.int32)
    ids[0, 0] = 0
    weights = (np.arange(TOKENS)[None] > 2).astype(np.float32)
    batch = [MicroBatch(ids, weights, np.full_like(ids, EXAMPLE))]
    expected = training.backward(model.train(), batch)
    ours = training.Ours(Llama(base.config, dtype=jnp.float32), dropout_rate=RATE)
    found, loss = ours.gradients(variables | {"params": params}, trainable_mask.LORA, batch)
    error = training.worst_error(
        training.adapter_tensors(found["lora"]), training.torch_tensors(model, gradients=True)
    )
    what = f"{kind} with dropout, PEFT given our masks"
    promise(f"{what}: loss", abs(loss - expected), 1e-5)
    promise(f"{what}: ‖g − g_ref‖ / ‖g_ref‖ of every A, B and m", error, 1e-5)
