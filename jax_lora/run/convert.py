"""Any LLaMA as a Hugging Face folder, adapters merged into it; or an adapter as a PEFT folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from jax_lora.data.chat import taught_end_ids
from jax_lora.files import check_vacant, fresh_folder, read_json
from jax_lora.run import hub
from jax_lora.run.model_card import write_card
from jax_lora.run.run import Run
from jax_lora.weights import base, hf, merge, origin, peft, tokenizers
from jax_lora.weights.fold import fold_scale

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Say = Callable[[str], None]


def convert(
    source: str,
    destination: str,
    dtype: str = "bfloat16",
    adapter: str | None = None,
    say: Say = lambda text: None,
    *,
    any_base: bool = False,
    push_to: str | None = None,
) -> None:
    """Write a model as a Hugging Face folder, which appears whole or not at all.

    Memory: the model as it is stored (a GGUF: in float32), one shard, and for a merge one layer or
    the output head in float32; a run that trained the base: the model in float32.

    Args:
      source: folder, hub id or GGUF file.
      destination: a new or empty folder. Its `jax_lora.json` names the base by digest.
      dtype: of the weights that are written.
      adapter: a PEFT folder or a run's folder, merged into the weights: each kernel in float32,
        dequantized where it was trained on a quantized base, then rounded to `dtype` once. A run
        that trained weights of the base is written from its last checkpoint.
      say: gets how far the rounding moves the logits of 32 fixed tokens.
      any_base: merge an adapter that was trained on another base, too.
      push_to: a repository of the hub, "org/name", to send the folder to, with a model card.

    Raises:
      ConfigError, DataError, OSError: one line that names the file.
      RunFailed: the folder is written, and sending it failed.
    """
    destination = str(check_vacant(destination))
    hub.check(push_to)
    path = hf.resolve(source)
    # What is small is read first.
    base.check(path)
    tokenizer = tokenizers.load_tokenizer(path)
    generation = _generation(path, tokenizer, peft.template(adapter) if adapter else None)
    if adapter and not any_base:
        origin.check_base(adapter, peft.base_digest(adapter), path, "--any-base")

    quantization = peft.base_quantization(adapter) if adapter else "none"
    trained = bool(adapter) and bool(peft.trained_base(adapter))
    if adapter and trained:
        config, params = Run.open(None, peft.run_of(adapter)).weights(base=source)
    else:
        found = peft.load_trained(adapter, base.read_config(path)) if adapter else None
        base.check_quantization(path, quantization)
        config, params = base.load(
            path,
            stored_dtype(path) if found else dtype,
            put=lambda _, array: array,
            quantization=quantization,
        )
        if found:
            params = merge.merge(params, found.adapters)
            config = merge.merged_config(config, params)

    with fresh_folder(destination) as partial:
        hf.save(partial, config, params, tokenizer, dtype, generation=generation)
        # Of a folder that was converted before, the first base.
        more = {"digest": base.digest(partial)}
        if quantization != "none":
            more["quantization"] = quantization
        if adapter:
            more["adapter"] = "trained base" if trained else peft.digest(adapter)
        origin.write(partial, source, origin.digests(path)[-1], **more)
        if push_to:
            write_card(partial, push_to, source, adapter)
    if adapter:
        change, largest = merge.rounding_change(config, params, dtype)
        say(f"{dtype} moves a logit by up to {change:.3g} (logits up to {largest:.3g})")
    hub.push(destination, push_to, say)


def convert_adapter(
    source: str,
    destination: str,
    say: Say = lambda text: None,
    *,
    fold: bool = False,
    push_to: str | None = None,
) -> None:
    """Write an adapter as a PEFT folder, which appears whole or not at all.

    Args:
      source: a PEFT folder or a run's folder.
      destination: a new or empty folder.
      say: gets where the folder was sent to.
      fold: as plain LoRA of one rank and α/r, see `weights.fold`.
      push_to: as for `convert`.

    Raises:
      ConfigError, DataError, OSError: one line that names the file.
      RunFailed: the folder is written, and sending it failed.
    """
    destination = str(check_vacant(destination))
    hub.check(push_to)
    peft.check_complete(source)
    found = peft.load(source)
    found = fold_scale(found, source) if fold else found
    with fresh_folder(destination) as partial:
        peft.save(
            partial,
            found.adapters,
            rank=found.rank,
            alpha=found.alpha,
            dropout=found.dropout,
            base_name=found.base_name,
            use_rslora=found.use_rslora,
            ranks=found.ranks,
            alphas=found.alphas,
            base_digest=peft.base_digest(source),
            quantization=peft.base_quantization(source),
            template=peft.template(source),
        )
        if push_to:
            write_card(partial, push_to, found.base_name, source)
    hub.push(destination, push_to, say)


def is_adapter(source: str) -> bool:
    """Whether a source is the folder of an adapter, or of a run that holds one."""
    return (peft.resolve(source) / "adapter_config.json").is_file()


def _generation(
    path: Path, tokenizer: PreTrainedTokenizerFast, template: str | None
) -> Mapping[str, object]:
    """The generation settings of a source, with all ids that end its answers wherever it names
    them, and the one that a merged run of the chat template was taught."""
    file = path / "generation_config.json"
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    known: dict[str, object] = {name: getattr(tokenizer, name) for name in names}
    if path.is_dir() and file.is_file():
        known = read_json(file, dict)
    given = known.get("eos_token_id")
    ids = [
        *tokenizers.base_end_ids(tokenizer, base.read_config(path).vocab_size, path),
        *taught_end_ids(tokenizer, template),
    ]
    named = given if isinstance(given, list) else [given]
    if any(i not in named for i in ids):
        ids = list(dict.fromkeys(ids))
        known["eos_token_id"] = ids if len(ids) > 1 else ids[0]
    return known


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
