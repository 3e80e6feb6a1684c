"""What took long to find out is written down in the user's cache folder, and only read next time.

A file of the cache holds `{key: [guard, value]}` behind a line with the sha256 of that text. An
entry counts as long as its guard is the one asked for, a file as long as its text has that hash;
whatever else is found is made anew. Files are renamed into place, so processes may share them:
the last one to write wins, and a reader finds a whole file or none.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from jax_lora.files import write_bytes

logger = logging.getLogger(__name__)


def cache_folder() -> Path | None:
    """`$JAX_LORA_CACHE`, else `$XDG_CACHE_HOME/jax_lora`, else `~/.cache/jax_lora`.

    Returns:
        The folder, which need not exist; None for a user without a home.
    """
    if given := os.environ.get("JAX_LORA_CACHE"):
        return Path(given)
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # the specification says to ignore such a path
        try:
            base = Path.home() / ".cache"
        except RuntimeError:
            return None
    return base / "jax_lora"


def remembered(
    path: Path | None,
    guards: Mapping[str, str],
    make: Callable[[str], object],
    *,
    verify: bool = False,
) -> dict:
    """The value of every key: from the file where its guard still holds, else made and stored.

    A cache that cannot be written costs time, not the run: it is logged.

    Arguments:
        path: a file of the cache, which then holds these keys and no others; None keeps nothing.
        guards: key -> what its value was made from, such as the size and time of a file.
        make: key -> value, anything that JSON can hold. What comes from the file has lists for
            tuples.
        verify: make every value anew; those that the file had otherwise are logged.
    """
    known = _load(path) if path else {}
    held = {key: known[key][1] for key in guards if key in known and known[key][0] == guards[key]}
    result = {key: held[key] if key in held and not verify else make(key) for key in guards}
    wrong = [key for key in held if verify and held[key] != result[key]]
    if wrong:
        logger.warning("%s: %d wrong, made anew, the first is %s", path, len(wrong), wrong[0])
    if path and (wrong or held.keys() != guards.keys()):
        _save(path, {key: (guards[key], value) for key, value in result.items()})
    return result


def _load(path: Path) -> dict:
    try:
        head, _, body = path.read_bytes().partition(b"\n")
    except OSError:
        return {}
    if head != hashlib.sha256(body).hexdigest().encode():
        logger.warning("%s: damaged, made anew", path)
        return {}
    return json.loads(body)


def _save(path: Path, entries: Mapping[str, object]) -> None:
    body = json.dumps(entries).encode()
    try:
        write_bytes(path, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    except OSError as error:
        logger.warning("%s: not written, so it takes as long next time (%s)", path, error)
