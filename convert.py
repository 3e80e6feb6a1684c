"""Write any Llama (a Hugging Face folder, a hub id, a GGUF file) as a Hugging Face folder.

    python convert.py SmolLM2-135M-Instruct.Q4_1.gguf smollm2 --dtype=float32
    python convert.py huggyllama/llama-7b merged --merge=runs/r2048

The new folder holds config.json, safetensors, generation_config.json and the tokenizer; it
appears whole or not at all. It needs memory for the model in that dtype and one shard of it.

--merge takes a PEFT folder, or the folder of a run, and puts that adapter into the weights: each
kernel in float32, then rounded to --dtype once. It prints how far the rounding moves the logits of
32 fixed tokens: those of the merged float32 weights against those of the rounded ones, both
computed in float32. Memory: the model as it is stored (a GGUF: in float32), one shard, and one
layer or the output head in float32.

A run that trained weights of the base, all or some, is written from its last checkpoint, on the
base SRC; then --merge takes the run's folder, and memory for the model in float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import eval as scoring
from jax_lora.cli import input_errors
from jax_lora.model.config import LlamaConfig
from jax_lora.weights import base, hf, merge, peft, tokenizers
from jax_lora.weights.tree import DTYPES


def convert(source: str, destination: str, dtype: str, adapter: str | None) -> None:
    # ------------------------------------------------------------ what is asked for
    hf.check_vacant(destination)
    path = hf.resolve(source)

    # ------------------------------------------------------------ what is small, so first
    tokenizer = tokenizers.load_tokenizer(path)
    generation_path = path / "generation_config.json"
    generation = hf.read_json(generation_path) if generation_path.is_file() else None

    # ------------------------------------------------------------ the weights
    if adapter and peft.trained_base(adapter):
        config, params = of_run(source, peft.run_of(adapter))
    else:
        found = peft.load_trained(adapter, base.read_config(path)) if adapter else None
        kept = stored_dtype(path) if found else dtype
        config, params = base.load(path, kept, place=lambda _, array: array)
        params = merge.merge(params, found.adapters) if found else params

    # ------------------------------------------------------------ the new folder
    hf.save(destination, config, params, tokenizer, dtype, generation=generation)
    if adapter:
        change, largest = merge.rounding_change(config, params, dtype)
        print(f"{dtype} moves a logit by up to {change:.3g} (logits up to {largest:.3g})")


def of_run(source: str, folder: Path) -> tuple[LlamaConfig, dict[str, Any]]:
    """The shape, and the weights in float32, of a run's last checkpoint on its base `source`."""
    _, config = scoring.read_run(folder)
    config.model, config.dtype = source, "float32"
    model_config, variables, _ = scoring.load_variables(folder, config, "last")
    params = variables["params"]
    return model_config, merge.merge(params, variables["lora"]) if "lora" in variables else params


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


def main(arguments: Sequence[str] | None = None) -> None:
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="convert.py", description=summary)
    parser.add_argument("source", metavar="SRC", help="folder, .gguf file or hub id (org/name)")
    parser.add_argument("destination", metavar="DST", help="new or empty folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights")
    parser.add_argument("--merge", metavar="ADAPTER", help="PEFT or run folder, into the weights")
    options = parser.parse_args(arguments)
    with input_errors():
        convert(options.source, options.destination, options.dtype, options.merge)
    print(f"wrote {options.destination}")


if __name__ == "__main__":
    main()
