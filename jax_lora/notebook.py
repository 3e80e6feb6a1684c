"""The face for notebooks: a model in one call, its parameters in a table."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Float, PyTree
from numpy.typing import ArrayLike

from jax_lora.data.chat import taught_end_ids
from jax_lora.generation import greedy, scheduler
from jax_lora.model.arch import ATTENTION
from jax_lora.model.config import LlamaConfig
from jax_lora.model.transformer import Llama
from jax_lora.planning import counts
from jax_lora.training import trainable_mask
from jax_lora.weights import base as base_weights
from jax_lora.weights import origin, peft
from jax_lora.weights.tokenizers import base_end_ids, has_tokenizer, load_tokenizer

_apply = jax.jit(Llama.apply, static_argnums=0)


@dataclass(frozen=True)
class LoadedModel:
    """A base, perhaps with an adapter, and its tokenizer.

    Attributes:
      config: the base's shape.
      base: its parameters, a nested dict of arrays, layers stacked on axis 0.
      adapters: the adapter's tree (see `jax_lora.model.lora`), or None.
      tokenizer: a transformers tokenizer; None where the base has none, which `generate` needs.
      dtype: of the arithmetic.
      end_ids: any of these ends an answer, as in `eval.py`; by default the tokenizer's end token
        alone.
    """

    config: LlamaConfig
    base: PyTree
    adapters: PyTree | None
    tokenizer: Any  # the types of transformers allow what no tokenizer returns
    dtype: jnp.dtype
    end_ids: tuple[int, ...] = ()

    @property
    def variables(self) -> dict[str, PyTree]:
        """What the module is applied to."""
        lora_part = {} if self.adapters is None else {"lora": self.adapters}
        return {"params": self.base, **lora_part}

    @property
    def module(self) -> Llama:
        """The Flax module."""
        return Llama(self.config, dtype=self.dtype)

    @cached_property
    def _unstacked(self) -> greedy.Weights:
        return greedy.unstack_layers(self.variables)

    def logits(self, tokens: ArrayLike) -> Float[Array, "B T V"]:
        """Logits (B, T, V), float32, of token ids (B, T), one row or several of equal length.

        Raises:
          ValueError: not a (B, T) array of integers below the vocabulary's size.
        """
        ids = np.asarray(tokens)
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"tokens: found {ids.dtype} {ids.shape}, expected integers (B, T)")
        if ids.size:
            self._check_ids("tokens", int(ids.min()), int(ids.max()))
        return _apply(self.module, self.variables, jnp.asarray(ids, jnp.int32))

    def _check_ids(self, what: str, lowest: int, highest: int) -> None:
        """Refuse ids that the embedding table does not have: looked up, they would be NaN."""
        if not 0 <= lowest <= highest < self.config.vocab_size:
            raise ValueError(
                f"{what}: found ids {lowest} to {highest}, expected 0 to "
                f"{self.config.vocab_size - 1}"
            )

    def generate(self, prompts: Sequence[str] | str, max_new_tokens: int = 128) -> list[str]:
        """Greedy continuations of texts taken as they are: no template is put around them, and a
        control token such as `</s>` in a text is one. Answers end at `end_ids`; the texts of
        `eval.stop` are `Run.score`'s.

        The first call makes a second copy of the weights, one array per layer in place of stacks
        of all layers, and keeps it with the object: from then on it holds the model twice.

        Args:
          prompts: texts; one string is one prompt.
          max_new_tokens: where to stop an answer that does not end.

        Returns:
          The continuations, without special tokens, stripped.

        Raises:
          ValueError: an empty prompt, one with a token that the base's embeddings do not have, one
            that is too long for the base, or a base without a tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("generate: found a base without a tokenizer, expected one beside it")
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        rows = [self.tokenizer(prompt).input_ids for prompt in prompts]
        end = self.tokenizer.eos_token_id
        if end is not None and self.tokenizer("a").input_ids[-1:] == [end]:
            rows = [row[:-1] for row in rows]  # a tokenizer that ends every text
        if not all(rows):
            raise ValueError("prompts: found an empty one, expected at least one token each")
        if rows:
            self._check_ids("prompts", min(map(min, rows)), max(map(max, rows)))
        width = self._width(max(map(len, rows), default=1), max_new_tokens)
        ended = scheduler.answers(
            self.module,
            self._unstacked,
            rows,
            max_new_tokens=max_new_tokens,
            end_ids=self.end_ids or (() if end is None else (end,)),
            buckets=(width,),
            batch_tokens=64 * width,
            max_batch=64,
        )
        answers = dict(itertools.chain.from_iterable(ended))
        return [
            self.tokenizer.decode(
                answers[i].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
            ).strip()
            for i in range(len(rows))
        ]

    def _width(self, longest: int, max_new_tokens: int) -> int:
        """Slots for the longest prompt: a power of two, so that a session compiles a few shapes
        and not one per prompt, or less where the base's window has no more."""
        width = 1 << (longest - 1).bit_length()
        if window := self.config.sliding_window:
            width = max(longest, min(width, window - max_new_tokens))
        return width

    def parameters(self) -> pd.DataFrame:
        """A row a stacked leaf: module, shape, frozen, trainable.

        With an adapter its A and B count as trainable, without one every weight does.
        """
        rules = trainable_mask.LORA if self.adapters is not None else trainable_mask.FULL
        return counts.table(self.variables, trainable_mask.mask(self.variables, *rules))


def load(
    source: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
    dtype: str = "bfloat16",
    quantization: str = "none",
    *,
    any_base: bool = False,
) -> LoadedModel:
    """Load a LLaMA for use in Python.

    Args:
      source: a Hugging Face folder, a hub id, or a GGUF file of a llama.
      adapter: a folder in PEFT's format, such as a run's `adapter/`.
      dtype: of weights and arithmetic: "bfloat16", "float16" or "float32".
      quantization: of the linear layers, as `config.model_quantization`: "none", "int8", "nf4", or
        "gguf", the blocks of a GGUF file.
      any_base: take an adapter that was trained on another base, too.

    Raises:
      FileNotFoundError, ValueError: one line that names the file, what was found and expected;
        also an adapter that does not fit the base, that names another one as its own, or whose B
        is all zero.
    """
    if adapter is not None and not any_base:
        origin.check_base(adapter, peft.base_digest(adapter), source, "any_base=True")
    base_weights.check_quantization(source, quantization)
    config, base = base_weights.load(source, dtype, quantization=quantization)
    adapters = None
    if adapter is not None:
        origin.warn_of_another_form(adapter, peft.base_quantization(adapter), quantization)
        adapters = jax.tree.map(jnp.asarray, peft.load_trained(adapter, config).adapters)
    tokenizer, ends = None, ()
    if has_tokenizer(source):
        tokenizer = load_tokenizer(source)
        template = peft.template(adapter) if adapter is not None else None
        ends = base_end_ids(tokenizer, config.vocab_size, source)
        ends = tuple(dict.fromkeys((*ends, *taught_end_ids(tokenizer, template))))
    return LoadedModel(config, base, adapters, tokenizer, jnp.dtype(dtype), ends)


def parameter_table(
    model: str | os.PathLike[str] | LlamaConfig,
    rank: int | None,
    targets: Sequence[str] = ATTENTION,
) -> pd.DataFrame:
    """Frozen and trainable parameters by module, without loading weights.

    The share in the paper's Tables 1 and 2 is trainable / (frozen + trainable).

    Args:
      model: a name such as "llama-7b", a folder or GGUF file, or a configuration.
      rank: of the adapters; None is full fine-tuning.
      targets: the adapted linear layers.

    Returns:
      One row per leaf (stacked over the layers): module, shape, frozen, trainable.

    Raises:
      ValueError: a rank below 1, an unknown target.
      FileNotFoundError: a model that is no known name and no file.
    """
    if not isinstance(model, LlamaConfig):
        model = base_weights.known_or_read_config(model)
    return counts.parameter_table(model, rank, targets)
