"""Any LLaMA as a Hugging Face folder, adapters and what a run trained merged into it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jax_lora.files import check_vacant, read_json
from jax_lora.run.run import Run
from jax_lora.weights import base, hf, merge, peft, tokenizers


def convert(
    source: str,
    destination: str,
    dtype: str = "bfloat16",
    adapter: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Write a model as a Hugging Face folder, which appears whole or not at all.

    Memory: the model as it is stored (a GGUF: in float32), one shard, and for a merge one layer or
    the output head in float32; a run that trained the base: the model in float32.

    Args:
      source: folder, hub id or GGUF file.
      destination: a new or empty folder.
      dtype: of the weights that are written.
      adapter: a PEFT folder or a run's folder, merged into the weights: each kernel in float32,
        then rounded to `dtype` once. A run that trained weights of the base is written from its
        last checkpoint.
      say: gets how far the rounding moves the logits of 32 fixed tokens.

    Raises:
      ConfigError, DataError, OSError: one line that names the file.
    """
    check_vacant(destination)
    path = hf.resolve(source)
    # What is small is read first.
    tokenizer = tokenizers.load_tokenizer(path)
    generation_path = path / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else None
    if generation is None and path.is_dir():
        known = read_json(path / "config.json", dict)
        if isinstance(known.get("eos_token_id"), list):  # of which the tokenizer knows one
            names = ("bos_token_id", "eos_token_id", "pad_token_id")
            generation = {name: known.get(name) for name in names}

    if adapter and peft.trained_base(adapter):
        config, params = Run.open(None, peft.run_of(adapter)).weights(base=source)
    else:
        found = peft.load_trained(adapter, base.read_config(path)) if adapter else None
        config, params = base.load(
            path, stored_dtype(path) if found else dtype, put=lambda _, array: array
        )
        params = merge.merge(params, found.adapters) if found else params

    hf.save(destination, config, params, tokenizer, dtype, generation=generation)
    if adapter:
        change, largest = merge.rounding_change(config, params, dtype)
        say(f"{dtype} moves a logit by up to {change:.3g} (logits up to {largest:.3g})")


def stored_dtype(path: Path) -> str:
    """The narrowest dtype that holds the weights of a source as they are."""
    if path.is_dir():
        with hf.open_tensors(path) as (files, _):
            kinds = {file.get_slice(name).get_dtype() for name, file in files.items()}
        if kinds == {"BF16"}:
            return "bfloat16"
        if kinds == {"F16"}:
            return "float16"
    return "float32"
