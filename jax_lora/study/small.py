"""Tasks and a base of our own, small enough to study on two cores.

The toy tasks are split in two checkouts that share no train task: the base learns on one of them,
the grid is drawn from the other. Both have the same test tasks: the toy test tasks, of categories
that nobody trains on, and relatives of train tasks, of which a small model may solve some. The base
starts as a random LLaMA with a vocabulary of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jax_lora.data.instructions import read_checkout
from jax_lora.data.prompts import TEMPLATES
from jax_lora.data.toy import TASKS, write_checkout
from jax_lora.data.toy_pairs import codebook
from jax_lora.errors import ConfigError
from jax_lora.files import fresh_folder
from jax_lora.model.config import LlamaConfig
from jax_lora.model.transformer import Llama
from jax_lora.study.config import ToyShape
from jax_lora.weights import hf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END = "<|end|>"
CHECKOUTS = ("grid", "outside")


def write_tasks(
    folder: Path,
    instances: int,
    outside: Sequence[str],
    unseen: Sequence[str],
    codebooks: int = 0,
) -> None:
    """Write the checkouts `<folder>/grid` and `<folder>/outside`, with the same test tasks.

    Args:
      folder: must be new or empty.
      instances: of each task.
      outside: categories of train tasks that are excluded from the grid.
      unseen: train tasks that become test tasks of both.
      codebooks: train tasks of random pairs that the grid has in place of its others, see
        `jax_lora.data.toy_pairs`; the base learns as many others, or it would not know the letters.

    Raises:
      ConfigError: a category that no train task has, or all of them; a task that is no train task.
    """
    trained = [task for task in TASKS if task.split == "train"]
    categories = {task.category for task in trained}
    if not set(outside) < categories or not outside:
        raise ConfigError(
            f"config.toy.outside: found {tuple(outside)}, "
            f"expected some of {', '.join(sorted(categories))}"
        )
    if unknown := sorted(set(unseen) - {task.name for task in trained}):
        raise ConfigError(
            f"config.toy.unseen: found {', '.join(unknown)}, expected toy train tasks"
        )
    left = [task for task in trained if task.name not in unseen]
    tested = [*(task.name for task in TASKS if task.split == "test"), *unseen]
    books = {
        name: [codebook(i) for i in range(first, first + codebooks)]
        for name, first in (("grid", 0), ("outside", codebooks))
    }
    with fresh_folder(folder) as partial:
        for name in CHECKOUTS:
            tasks = (*TASKS, *books[name])
            root = write_checkout(partial / name, instances_per_task=instances, tasks=tasks)
            splits = root / "splits"
            names_of_checkout = [
                t.name for t in left if (t.category in outside) == (name == "outside")
            ]
            if name == "grid" and codebooks:
                names_of_checkout = []
            names_of_checkout += [book.name for book in books[name]]
            for split, names in (("train", names_of_checkout), ("test", tested)):
                lines = "".join(f"{task}\n" for task in names)
                (splits / "default" / f"{split}_tasks.txt").write_text(lines, encoding="utf-8")


def write_base(
    folder: Path, tasks: Path, template: str, vocabulary: int, seed: int, shape: ToyShape
) -> None:
    """Write a LLaMA with random weights as a Hugging Face folder.

    Args:
      folder: must be new or empty.
      tasks: from `write_tasks`; prompts with answers of all train tasks give the vocabulary.
      template: of these prompts, see `jax_lora.data.prompts`.
      vocabulary: tokens, at least 257.
      seed: of the weights.
      shape: of the model.
    """

    def texts() -> Iterable[str]:
        for name in CHECKOUTS:
            for task in read_checkout(tasks / name).train:
                for one in task.instances():
                    yield TEMPLATES[template](task.example(one)) + one.outputs[0]

    tokenizer = _tokenizer(texts(), vocabulary)
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **asdict(shape))
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = Llama(config, dtype=jnp.dtype("float32")).init(jax.random.key(seed), tokens)["params"]
    hf.save(folder, config, jax.device_get(params), tokenizer, "float32")


def _tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, words cut as GPT-2 cuts them."""
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=END, clean_up_tokenization_spaces=False
    )
