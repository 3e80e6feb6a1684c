"""What newer papers measure of a trained cell, beside its answers: `jax_lora.study.MEASURES`."""

from __future__ import annotations

import functools
import math
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from jax_lora.config import RunConfig
from jax_lora.data.toy_pairs import VALUE_BITS
from jax_lora.errors import DataError
from jax_lora.run import Run, inputs, losses
from jax_lora.study import TESTS, Frame, update
from jax_lora.study.config import MeasureConfig


class Measured(NamedTuple):
    """The measurements of a cell.

    Attributes:
      columns: that all rows of the cell have in common, among `MEASURES`.
      reference_losses: by test set and task, nats per token: the mean over an example's tokens,
        then over the examples of the task.
      update: see `update.measure`; None where it was not asked for.
    """

    columns: dict[str, float | None]
    reference_losses: dict[tuple[str, str], float]
    update: Frame | None


def measure(asked: MeasureConfig, run: Run, is_probe: bool) -> Measured:
    """Measure a run that trained.

    Args:
      asked: what to measure.
      run: of the cell.
      is_probe: it trained on the random pairs of `data.toy_pairs`.
    """
    lora, is_lora = run.config.lora, run.config.method == "lora"
    columns: dict[str, float | None] = {
        "adapter_rank": lora.rank if is_lora else None,
        "alpha": lora.alpha if is_lora else None,
    }
    text = text_of(asked.text)
    # Before the run's own model is loaded: two of them may not fit.
    before = _base_text_loss(_of_base(run.config), text)
    model = run.losses()
    after = model.text(text)
    columns |= {"text_loss": after, "forgetting": after - before}
    if is_probe:
        columns["memorized_bits"] = memorized_bits(model)
    references = _reference_losses(model, asked.losses_per_task)
    del model
    changed = update.measure(run) if asked.spectra else None
    if changed is not None:
        for name in ("effective_rank", "intruder_dimensions"):
            columns[name] = float(changed[name].mean())
    # What a resumed cell measures again may differ in the last digits that a BLAS gives.
    rounded = {name: None if x is None else float(f"{x:.6g}") for name, x in columns.items()}
    return Measured(rounded, references, changed)


def memorized_bits(model: losses.Losses) -> float:
    """How many bits of its random pairs a model has learned by heart.

    The values are uniform and independent of the keys: a model that knows none of N pairs needs
    VALUE_BITS each to name them, on average, and one that has them by heart none. What it needs is
    the summed loss of the values, end tokens included. No clip: a model that is sure of wrong
    values is below zero.

    Source: Morris et al. (2025), "How much do language models memorize?", arXiv:2505.24832, of
    uniform random data.
    """
    found: Frame = model.references(inputs.training_set(model.config))
    nats = float((found["loss"] * found["tokens"]).sum())
    return len(found) * VALUE_BITS - nats / math.log(2)


def _reference_losses(model: losses.Losses, per_task: int) -> dict[tuple[str, str], float]:
    if not per_task:
        return {}
    found: dict[tuple[str, str], float] = {}
    for test, taskset in inputs.test_sets(model.config, TESTS).items():
        losses_of_set: Frame = model.references(taskset, per_task)
        for task, loss in losses_of_set.groupby("task")["loss"].mean().items():
            found[test, task] = float(f"{loss:.6g}")
    return found


def text_of(path: str) -> str:
    """The text of forgetting: a file's, or for "" the passage of this package.

    That is from Charles Darwin, "On the Origin of Species", first edition (1859), the beginning of
    the Introduction, in the public domain; Project Gutenberg has it as book 1228.

    Raises:
      DataError, OSError: a file that is empty, or no text in UTF-8.
    """
    if not path:
        return resources.files("jax_lora.study").joinpath("passage.txt").read_text("utf-8")
    try:
        text = Path(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error}), expected a text") from None
    if not text.strip():
        raise DataError(f"{path}: found no text, expected some to measure forgetting by")
    return text


@functools.lru_cache(maxsize=1)  # the cells of a study share it
def _base_text_loss(config: RunConfig, text: str) -> float:
    return losses.load(Path(), config, "none").text(text)


def _of_base(run: RunConfig) -> RunConfig:
    """The same for all cells with this base, and what decides the lengths that rows are padded to,
    on which dynamic rotary scaling depends."""
    return RunConfig().replace(
        model=run.model,
        dtype=run.dtype,
        model_quantization=run.model_quantization,
        micro_tokens=max(run.data.buckets),  # a row at a time
        **{
            "data.buckets": run.data.buckets,
            "data.source_length": run.data.source_length,
            "data.target_length": run.data.target_length,
            "eval.buckets": run.eval.buckets,
            "eval.int8_products": run.eval.int8_products,
        },
    )
