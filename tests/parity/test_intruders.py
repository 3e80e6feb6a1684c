"""Intruder dimensions against PEFT's `reduce_intruder_dimension`, which counts them as it goes."""

from __future__ import annotations

import re

import numpy as np
import pytest

from jax_lora.config import RunConfig
from jax_lora.model.arch import LINEAR_NAMES
from jax_lora.run import Run
from jax_lora.study import update
from tests import reference
from tests.parity import training

torch = pytest.importorskip("torch")
intruders = pytest.importorskip("peft.tuners.lora.intruders")

pytestmark = [pytest.mark.parity, training.PEFT_WARNING]


@pytest.mark.parametrize("size", [0.05, 0.3, 1.0, 4.0])
def test_peft_counts_as_many(tmp_path, size):
    base = training.load_base(tmp_path / "model")
    adapters = reference.adapters(4)
    for group in adapters["layers"].values():
        for leaf in group.values():
            leaf["b"] = size * np.asarray(leaf["b"])
    alpha = 4 * reference.ALPHA / reference.RANK
    folder = tmp_path / "adapter"
    model = training.with_peft(base, folder, adapters, rank=4, alpha=alpha, dropout=0.0)
    lines: list[str] = []
    intruders.reduce_intruder_dimension(model, logging_sink=lines.append)
    theirs: dict[tuple[str, int], int] = {}
    said = re.compile(r"layers\.(\d+)\.\w+\.(\w+): (?:Intruders: (\d+)|No intruders)")
    for found in filter(None, map(said.search, lines)):
        theirs[found[2], int(found[1])] = int(found[3] or 0)
    assert len(theirs) == len(LINEAR_NAMES) * base.config.num_hidden_layers
    config = RunConfig().replace(**{"model": str(tmp_path / "model"), "lora.targets": LINEAR_NAMES})
    ours = (
        update.measure(Run.open(config, tmp_path))
        .set_index(["module", "layer"])["intruder_dimensions"]
        .to_dict()
    )
    assert ours == theirs
    assert sum(ours.values()) > 0 or size < 1
