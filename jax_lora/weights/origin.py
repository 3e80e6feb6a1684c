"""`jax_lora.json`: the base that an adapter was trained on, or that a folder was made from.

It lies beside the files of an adapter or of a model, since PEFT warns of keys that it does not
know in `adapter_config.json`, and older versions refuse them:

    base           name or path of the base
    base_digest    of the base, see `jax_lora.weights.base.digest`
    quantization   of the base's linear layers, where there is one: `config.model_quantization`
    template       of an adapter: "chat" where the run that it is from had that `data.template`
    base_trained   of an adapter: the weights of the base that the run that it is from trained, too
    adapter        of a merged model: the digest of the adapter in it
    digest         of a converted model: its own, so that weights changed since then are noticed
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from jax_lora.errors import DataError
from jax_lora.files import read_json, write_json
from jax_lora.weights import base, hf

logger = logging.getLogger(__name__)
NAME = "jax_lora.json"


def write(
    folder: str | os.PathLike[str],
    name: str | None,
    base_digest: str | None,
    **more: object,
) -> None:
    """Name the base of what is in a folder; without a digest, remove the name of another."""
    path = Path(folder) / NAME
    if base_digest is None:
        path.unlink(missing_ok=True)
    else:
        write_json(path, {"base": name, "base_digest": base_digest, **more})


def read(folder: str | os.PathLike[str]) -> dict[str, object]:
    """What `write` wrote; nothing where there is no file.

    Raises:
      DataError: it is no JSON object.
    """
    path = Path(folder) / NAME
    return read_json(path, dict) if path.is_file() else {}


def warn_of_another_form(folder: str | os.PathLike[str], trained: str, found: str) -> None:
    """Say that an adapter meets its base in another form than the one it was trained on.

    Args:
      folder: of the adapter.
      trained, found: the quantization of the base then and now.
    """
    if trained != found:
        logger.warning(
            "%s: trained on a base with model_quantization=%s and used on one with %s, whose "
            "weights differ by rounding; eval.py --check says how far logits move",
            folder,
            trained,
            found,
        )


def digests(source: str | os.PathLike[str]) -> list[str]:
    """The digests that stand for a base: its own, and that of the base it was converted from.

    A merged folder is another base than the one it was made from, and so is a folder whose
    weights are no longer those that were written.
    """
    found, path = [base.digest(source)], hf.resolve(source)
    named = read(path) if path.is_dir() else {}
    if "adapter" not in named and named.get("digest") == found[0]:
        found.append(str(named["base_digest"]))
    return found


def check_base(
    folder: str | os.PathLike[str], wanted: object, source: str | os.PathLike[str], override: str
) -> None:
    """Make sure that an adapter meets the base that it was trained on.

    Args:
      folder: of the adapter, for the message.
      wanted: the digest that it names; None where it names none.
      source: the base.
      override: the flag that leaves this out.

    Raises:
      DataError: another base; both digests.
    """
    if wanted is None:
        return
    found = digests(source)
    if wanted not in found:
        raise DataError(
            f"{folder}: found an adapter of the base with digest {str(wanted)[:12]}, expected one "
            f"of {source}, whose digest is {found[0][:12]}; {override} overrides this"
        )
