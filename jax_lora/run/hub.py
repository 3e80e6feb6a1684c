"""Folders sent to the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Callable

from jax_lora.errors import ConfigError, RunFailed, first_line


def check(repository: str | None) -> None:
    """Make sure, before any work, that a repository can be written to.

    Args:
      repository: "org/name"; None for none.

    Raises:
      ConfigError: no such name, no token, a token that the hub does not take, no connection.
    """
    if repository is None:
        return
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ConfigError(f"--push: found {repository!r}, expected ORG/NAME")
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as error:  # the hub's client has many kinds; the user needs one line
        raise ConfigError(
            f"--push: found no access to the hub, expected the token of `hf auth login` or "
            f"HF_TOKEN: {first_line(error)}"
        ) from None


def push(folder: str, repository: str | None, say: Callable[[str], None]) -> None:
    """Send a folder to a repository of the hub, which is made if need be, as one commit.

    Args:
      folder: all of it is sent.
      repository: "org/name"; None sends nothing.
      say: gets the address.

    Raises:
      RunFailed: the hub refused it; how to send the folder later.
    """
    if repository is None:
        return
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repository, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload with jax_lora"
        )
    except Exception as error:
        raise RunFailed(
            f"--push: {repository}: {first_line(error)}; {folder} is written: send it with "
            f"`hf upload {repository} {folder}`"
        ) from error
    say(f"sent to {url}")
