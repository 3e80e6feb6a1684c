"""Write any Llama (a Hugging Face folder, a hub id, a GGUF file) as a Hugging Face folder.

    python convert.py SmolLM2-135M-Instruct.Q4_1.gguf smollm2 --dtype=float32

The new folder holds config.json, safetensors, generation_config.json and the tokenizer; it
appears whole or not at all. It needs memory for the model in that dtype and one shard of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from jax_lora.cli import input_errors
from jax_lora.weights import base, hf, tokenizers
from jax_lora.weights.tree import DTYPES


def convert(source: str, destination: str, dtype: str) -> None:
    # ------------------------------------------------------------ what is asked for
    hf.check_vacant(destination)
    path = hf.resolve(source)

    # ------------------------------------------------------------ the tokenizer: small, so first
    tokenizer = tokenizers.load_tokenizer(path)
    generation_path = path / "generation_config.json"
    generation = hf.read_json(generation_path) if generation_path.is_file() else None

    # ------------------------------------------------------------ the weights, kept in numpy
    config, params = base.load(path, dtype, place=lambda _, array: array)

    # ------------------------------------------------------------ the new folder
    hf.save(destination, config, params, tokenizer, dtype, generation=generation)


def main(arguments: Sequence[str] | None = None) -> None:
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="convert.py", description=summary)
    parser.add_argument("source", metavar="SRC", help="folder, .gguf file or hub id (org/name)")
    parser.add_argument("destination", metavar="DST", help="new or empty folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights")
    options = parser.parse_args(arguments)
    with input_errors():
        convert(options.source, options.destination, options.dtype)
    print(f"wrote {options.destination}")


if __name__ == "__main__":
    main()
