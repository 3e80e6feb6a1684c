"""Write any Llama (a Hugging Face folder, a hub id, a GGUF file) as a Hugging Face folder.

    python convert.py SmolLM2-135M-Instruct.Q4_1.gguf smollm2 --dtype=float32
    python convert.py huggyllama/llama-7b merged --merge=runs/r2048

The new folder holds config.json, safetensors, generation_config.json and the tokenizer; it
appears whole or not at all. --merge takes a PEFT folder, or the folder of a run, and puts that
adapter into the weights; it prints how far the rounding moves the logits of 32 fixed tokens. A run
that trained weights of the base, all or some, is written from its last checkpoint, on the base SRC.
"""

from jax_lora import stops

if __name__ == "__main__":
    stops.stop_on_signals()

import argparse
from collections.abc import Sequence

from jax_lora import cli


def main(arguments: Sequence[str] | None = None) -> None:
    from jax_lora.weights.tree import DTYPES

    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="convert.py", description=summary)
    parser.add_argument("source", metavar="SRC", help="folder, .gguf file or hub id (org/name)")
    parser.add_argument("destination", metavar="DST", help="new or empty folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights")
    parser.add_argument("--merge", metavar="ADAPTER", help="PEFT or run folder, into the weights")
    options = parser.parse_args(arguments)
    with cli.exit_codes():
        from jax_lora.run.convert import convert

        convert(options.source, options.destination, options.dtype, options.merge, say=print)
    print(f"wrote {options.destination}")


if __name__ == "__main__":
    main()
