"""The recorded values: DoRA against PEFT's, without torch; and all of them, made again with it."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_lora.data.loader import MicroBatch
from jax_lora.model.transformer import Llama
from jax_lora.training import trainable_mask
from tests import record, reference
from tests.parity import training


def test_dora(tmp_path, promise):
    with np.load(reference.RECORDED) as file:
        recorded = dict(file)
    base = training.load_base(tmp_path)
    model, ids = Llama(base.config, dtype=jnp.float32), reference.tokens()
    variables = {"params": base.params, "lora": reference.adapters(dora=True)}
    error = np.abs(model.apply(variables, ids) - recorded["dora/logits"]).max()
    promise("DoRA, recorded: logits (largest absolute difference)", error, 1e-4)
    batch = [
        MicroBatch(
            ids,
            reference.loss_mask().astype(np.float32),
            np.tile(np.arange(2)[:, None], ids.shape[1]),
        )
    ]
    found, loss = training.Ours(model).gradients(variables, trainable_mask.LORA, batch)
    promise("DoRA, recorded: loss", abs(loss - recorded["dora/loss"]), 1e-5)
    ours = training.adapter_tensors(found["lora"])
    ref = {name: recorded[f"dora/gradient/{name.removesuffix('.weight')}"] for name in ours}
    error = training.worst_error(ours, ref)
    promise("DoRA, recorded: ‖g − g_ref‖ / ‖g_ref‖ of every A, B and m", error, 1e-5)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # of transformers and PEFT, about one another
def test_the_references_still_say_what_is_recorded(tmp_path):
    record.write(tmp_path)
    record.check(tmp_path)
