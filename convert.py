"""Write any Llama (a Hugging Face folder, a hub id, a GGUF file) as a Hugging Face folder.

    python convert.py .cache/SmolLM2-135M-Instruct.Q4_1.gguf smollm2 --dtype=float32
    python convert.py huggyllama/llama-7b merged --merge=runs/r2048
    python convert.py runs/r2048 adapter --fold-scale --push=ORG/NAME

The new folder holds config.json, safetensors, generation_config.json and the tokenizer; it
appears whole or not at all. --merge takes a PEFT folder, or the folder of a run, and puts that
adapter into the weights; it prints how far the rounding moves the logits of 32 fixed tokens. A run
that trained weights of the base, all or some, is written from its last checkpoint, on the base SRC.

Where SRC is itself such an adapter, DST is a PEFT folder. --fold-scale makes it a plain LoRA of
one rank, for servers that ignore rsLoRA and patterns of ranks. docs/adapters.md has more.
"""

from jax_lora import signals

if __name__ == "__main__":
    signals.stop_on_signals()

import argparse
from collections.abc import Sequence

from jax_lora import cli
from jax_lora.errors import ConfigError


def main(arguments: Sequence[str] | None = None) -> None:
    from jax_lora.weights.tree import DTYPES

    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="convert.py", description=summary)
    parser.add_argument("source", metavar="SRC", help="folder, .gguf file or hub id (org/name)")
    parser.add_argument("destination", metavar="DST", help="new or empty folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of a model's weights")
    parser.add_argument("--merge", metavar="ADAPTER", help="PEFT or run folder, into the weights")
    parser.add_argument("--any-base", action="store_true", help="merge into another base, too")
    parser.add_argument("--fold-scale", action="store_true", help="SRC, an adapter, as plain LoRA")
    parser.add_argument("--push", metavar="ORG/NAME", help="send DST to the hub, with a model card")
    options = parser.parse_args(arguments)
    with cli.exit_codes():
        cli.check_platform()
        from jax_lora.run.convert import convert, convert_adapter, is_adapter

        source, destination = options.source, options.destination
        more = {"say": cli.say, "push_to": options.push}
        if is_adapter(source):
            if options.merge:
                raise ConfigError(f"--merge: found an adapter, {source}, as SRC, expected a model")
            convert_adapter(source, destination, fold=options.fold_scale, **more)
        elif options.fold_scale:
            raise ConfigError(f"--fold-scale: found {source} as SRC, expected an adapter")
        else:
            adapter, any_base = options.merge, options.any_base
            convert(source, destination, options.dtype, adapter, any_base=any_base, **more)
    cli.say(f"wrote {destination}")


if __name__ == "__main__":
    main()
