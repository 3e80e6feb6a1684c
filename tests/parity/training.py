"""The same training twice: by `training/step.py`, as train.py drives it, and by torch.

Both see the same micro-batches of unequal token counts, with loss on the answers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_lora.data.loader import MicroBatch
from jax_lora.model import lora
from jax_lora.model.arch import GROUP
from jax_lora.model.config import LlamaConfig
from jax_lora.model.transformer import Llama
from jax_lora.training import loop, trainable_mask
from jax_lora.training.step import State, make_step
from jax_lora.weights import hf, tree
from jax_lora.weights import peft as our_peft
from tests import reference

Batch = list[MicroBatch]  # a global batch
Tensors = dict[str, np.ndarray]


def batches(steps: int, *shapes: tuple[int, int]) -> list[Batch]:
    """Global batches of micro-batches of these shapes (rows, columns).

    Rows of 6 tokens and more, right-padded; the first one of every global batch is empty.
    """
    rng = np.random.default_rng(11)
    made = []
    for _ in range(steps):
        batch, first = [], 0  # the position of the micro-batch's first example
        for rows, columns in shapes:
            lengths = rng.integers(6, columns + 1, rows) * (first + np.arange(rows) > 0)
            prompts = rng.integers(2, np.maximum(lengths - 2, 3))
            at = np.arange(columns)
            real = at < lengths[:, None]
            tokens = np.where(real, rng.integers(0, 61, (rows, columns)), 0).astype(np.int32)
            segment_ids = np.where(real, first + np.arange(rows)[:, None], -1).astype(np.int32)
            weights = (real & (at >= prompts[:, None])).astype(np.float32)
            batch.append(MicroBatch(tokens, weights, segment_ids))
            first += rows
        made.append(batch)
    return made


def loss_tokens(batch: Batch) -> int:
    return sum(int(micro.loss_weights[:, 1:].sum()) for micro in batch)


# An optimizer that changes nothing; its state is the last gradient.
KEEP = optax.GradientTransformation(
    lambda weights: jax.tree.map(jnp.zeros_like, weights),
    lambda gradients, state, weights=None: (jax.tree.map(jnp.zeros_like, gradients), gradients),
)


class Ours:
    """Training of a model; forward and backward pass are compiled once for all optimizers."""

    def __init__(self, model: Llama, **options: Any):
        options = dict(seed=3, dropout_rate=0.0, loss_chunk=32) | options
        self.make = cache(lambda optimizer: make_step(model, optimizer, **options))
        self.kept = self.make(KEEP)

    def gradients(
        self, variables: Any, rules: Any, batch: Batch, step: int = 0
    ) -> tuple[Any, float]:
        """Gradients of the mean loss of a global batch, and that loss."""
        state, (report,) = self._run(variables, rules, [batch], KEEP, self.kept, step)
        return state.optimizer, float(report.loss)

    def train(
        self,
        variables: Any,
        rules: Any,
        taken: Iterable[Batch],
        optimizer: optax.GradientTransformation,
    ) -> tuple[Any, list[float], list[float]]:
        """A step for every global batch: what trained, the losses and the gradient norms."""
        functions = self.kept._replace(update=self.make(optimizer).update)
        state, reports = self._run(variables, rules, taken, optimizer, functions)
        losses, norms = zip(
            *((float(r.loss), float(r.gradient_norm)) for r in reports), strict=True
        )
        return state.trainable, list(losses), list(norms)

    def _run(self, variables, rules, taken, optimizer, functions, step=0):
        trainable, frozen = trainable_mask.partition(
            variables, trainable_mask.mask(variables, *rules)
        )
        trainable = jax.tree.map(jnp.copy, trainable)  # a step donates its buffers
        state = State(jnp.asarray(step, jnp.int32), trainable, optimizer.init(trainable))
        *steps, (last, report) = loop.train(state, frozen, taken, functions)
        return last, [*(report for _, report in steps), report]


# ---------------------------------------------------------------- torch

# peft 0.21 asks transformers 5.23 for an attribute by its old name.
PEFT_WARNING = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


class Base(NamedTuple):
    """The same toy for ours and, by `load()`, for torch."""

    config: LlamaConfig
    params: Any
    load: Callable[[], Any]


def load_base(folder: Path, case: str = reference.ADAPTED) -> Base:
    """Write a case of `reference.py` into a folder and read it."""
    reference.write(folder, case)

    def load() -> Any:
        import torch  # pyright: ignore[reportMissingImports]
        import transformers

        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )

    return Base(*hf.load(folder, "float32"), load)


def with_peft(base: Base, folder: Path, adapters: Any, **said: Any) -> Any:
    """A torch model with our adapters, through the files that we write."""
    import peft  # pyright: ignore[reportMissingImports]

    our_peft.save(folder, adapters, **said)
    return peft.PeftModel.from_pretrained(base.load(), folder, is_trainable=True)


def theirs(
    model: Any,
    taken: Iterable[Batch],
    optimizer: Any,
    scheduler: Any = None,
    clip: float | None = None,
) -> tuple[list[float], list[float]]:
    """The same steps with transformers' own loss and a torch optimizer."""
    import torch  # pyright: ignore[reportMissingImports]

    losses, norms = [], []
    for batch in taken:
        optimizer.zero_grad()
        losses.append(backward(model, batch))
        weights = [p for p in model.parameters() if p.requires_grad]
        limit = float("inf") if clip is None else clip
        norms.append(float(torch.nn.utils.clip_grad_norm_(weights, limit)))
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return losses, norms


def backward(model: Any, batch: Batch) -> float:
    """Add the gradients of a global batch's mean loss, as transformers' Trainer accumulates."""
    import torch  # pyright: ignore[reportMissingImports]

    total = 0.0
    for micro in batch:
        ids = torch.tensor(micro.tokens, dtype=torch.int64)
        labels = torch.where(torch.tensor(micro.loss_weights > 0), ids, -100)
        # A row of padding alone attends to all: in float64 a softmax over nothing is no number.
        attended = (micro.segment_ids >= 0) | (micro.segment_ids < 0).all(1, keepdims=True)
        real = torch.tensor(attended, dtype=torch.int64)
        loss = model(
            ids, attention_mask=real, labels=labels, num_items_in_batch=loss_tokens(batch)
        ).loss
        loss.backward()
        total += float(loss.detach())
    return total


# ---------------------------------------------------------------- leaves by their HF names


def base_tensors(config: Any, base: Any) -> Tensors:
    """Base weights, or gradients of them, by Hugging Face's names."""
    return {name: fetch() for name, _, fetch in tree.disassemble(config, base, "float32")}


_PEFT = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector.weight"}


def adapter_tensors(adapters: Any) -> Tensors:
    """Adapters, or gradients of them, by the ends of PEFT's names."""
    found = {}
    for name, module in lora.by_target(adapters).items():
        for leaf, end in _PEFT.items():
            for i, x in enumerate(module.get(leaf, ())):
                at = f"layers.{i}.{GROUP[name]}.{name}" if name in GROUP else name
                found[f"{at}.{end}"] = np.asarray(x).T
    return found


def torch_tensors(model: Any, gradients: bool = False) -> Tensors:
    """What trains in a torch model, by the names of the functions above."""
    found = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            if name.startswith(wrapped := "base_model.model."):  # by PEFT
                name = name.removeprefix(wrapped).removeprefix("model.").replace(".default", "")
            found[name] = (weight.grad if gradients else weight).detach().numpy().copy()
    return found


def worst_error(ours: Tensors, ref: Tensors, start: Mapping[str, np.ndarray] | None = None):
    """The largest ‖θ − θ_ref‖ / ‖θ_ref‖ of a tensor, or / ‖θ_ref − θ₀‖ where a start is given."""
    assert ours.keys() == ref.keys()

    def error(name: str) -> float:
        scale = ref[name] if start is None else ref[name] - start[name]
        return float(np.linalg.norm(ours[name] - ref[name]) / np.linalg.norm(scale))

    return max(map(error, ref))


def correlation(rows: np.ndarray) -> float:
    """The largest correlation between any two of `rows` (n, …), in standard errors."""
    rows = np.asarray(rows, np.float64).reshape(len(rows), -1)
    found = np.corrcoef(rows)[~np.eye(len(rows), dtype=bool)]
    return float(np.abs(found).max() * rows.shape[1] ** 0.5)
