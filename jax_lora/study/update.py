"""What training changed in the weights of a cell: a row per adapted matrix.

LoRA's ΔW = s·A·B is that of the PEFT adapter that a run writes; full fine-tuning's (and DoRA's) is
W_after − W_base of the same matrices, `config.run.lora.targets`, so that the two can be compared.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
import pandas as pd
from jaxtyping import PyTree

from jax_lora.model import lora
from jax_lora.model.arch import BY_NAME
from jax_lora.run import Run
from jax_lora.study import Frame, spectra
from jax_lora.weights import base as base_weights
from jax_lora.weights import peft
from jax_lora.weights.merge import MergedKernel

COLUMNS = (
    "module", "layer", "norm", "relative_norm", "effective_rank", "stable_rank", "rank_90",
    "intruder_dimensions", "values",
)  # fmt: skip


def measure(run: Run) -> Frame:
    """The spectrum of ΔW and the intruder dimensions of W + ΔW, matrix by matrix, in float64.

    Args:
      run: that trained.

    Returns:
      COLUMNS: module and layer; norm, ‖ΔW‖_F, and relative_norm, its ratio to ‖W‖_F;
      effective_rank, stable_rank, rank_90 (`variance_rank`) and intruder_dimensions, see
      `spectra`; values, the singular values of ΔW, falling.
    """
    targets = run.config.lora.targets
    before, adapters = _base(run.config.model, targets), _adapters(run)
    trained = {} if adapters else run.weights()[1]
    rows = []
    for name in targets:
        kernel, directions = before[name]
        if adapters:
            after: PyTree = MergedKernel(kernel, adapters[name])
        else:
            after = lora.kernel(trained, name)
        for layer in range(len(kernel)):
            w, tuned = (np.asarray(x[layer], float) for x in (kernel, after))
            values = _values(adapters.get(name), layer)
            if values is None:
                values = np.linalg.svd(tuned - w, compute_uv=False)
            intruders = spectra.intruder_dimensions(directions[layer], tuned)
            rows.append((name, layer, *_numbers(values, w), int(intruders), values))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _numbers(values: np.ndarray, w: np.ndarray) -> tuple[float, ...]:
    """norm, relative_norm, effective_rank, stable_rank, rank_90."""
    norm = float(np.linalg.norm(values))
    ranks = (spectra.effective_rank, spectra.stable_rank, spectra.variance_rank)
    return norm, norm / float(np.linalg.norm(w)), *(float(rank(values)) for rank in ranks)


def _adapters(run: Run) -> Mapping[str, PyTree]:
    """The adapters of a LoRA run by module; none where weights of the base trained."""
    if run.config.method != "lora" or peft.trained_base(run.workdir):
        return {}
    return lora.by_target(peft.load(run.workdir).adapters)


def _values(adapter: PyTree | None, layer: int) -> np.ndarray | None:
    """The singular values of one layer's s·A·B; None for an update that is not this."""
    if adapter is None or "m" in adapter:
        return None
    one = {name: np.asarray(adapter[name][layer], float)[None] for name in ("a", "b", "scale")}
    return spectra.spectrum(**one).values[0]


@functools.lru_cache(maxsize=1)  # the cells of a study share it
def _base(model: str, targets: tuple[str, ...]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The kernels (L, in, out) of the base and their output directions (L, out, K), float32."""
    wanted = {(*BY_NAME[name].tree_path, "kernel") for name in targets}
    if "lm_head" in targets:
        wanted.add(("embed_tokens", "embedding"))  # which may be tied to it

    def put(path: tuple[str, ...], array: np.ndarray) -> np.ndarray | None:
        return array if path in wanted else None

    base = base_weights.load(model, "float32", put)[1]
    kernels = {name: lora.kernel(base, name) for name in targets}

    def directions(kernel: np.ndarray) -> np.ndarray:
        layers = (spectra.output_directions(layer.astype(float)) for layer in kernel)
        return np.stack([found.astype(np.float32) for found in layers])

    return {name: (kernels[name], directions(kernels[name])) for name in targets}
