"""Folders sent to the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from jax_lora.errors import ConfigError, RunFailed, one_line

# What transformers and PEFT read of a folder. Left in a repository that is written to again, such
# files would be read beside the new ones: an adapter on top of a model it is merged into.
_READ = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "*token*.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
    "jax_lora.json",
)


def check(repository: str | None) -> None:
    """Make sure, before any work, that a repository can be written to.

    Args:
      repository: "org/name"; None for none.

    Raises:
      ConfigError: no such name, no token, a token that the hub does not take or that may only
        read, no connection.
    """
    if repository is None:
        return
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ConfigError(f"--push: found {repository!r}, expected ORG/NAME")
    from huggingface_hub import HfApi

    try:
        user = HfApi().whoami()
    except Exception as error:  # the hub's client has many kinds; the user needs one line
        raise ConfigError(
            f"--push: found no access to the hub, expected the token of `hf auth login` or "
            f"HF_TOKEN: {_reason(error)}"
        ) from None
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise ConfigError("--push: found a token that may only read, expected one that may write")


def push(folder: str, repository: str | None, say: Callable[[str], None]) -> None:
    """Send a folder to a repository of the hub, which is made if need be, as one commit.

    In a repository that exists, the commit replaces the files of the folder's names and takes away
    what else there is of a model, an adapter or a tokenizer; other files stay.

    Args:
      folder: all of it is sent.
      repository: "org/name"; None sends nothing.
      say: gets the address.

    Raises:
      RunFailed: the hub refused it; how to send the folder later.
    """
    if repository is None:
        return
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    try:
        url = api.create_repo(repository, exist_ok=True)
        root = Path(folder)
        paths = sorted(path for path in root.rglob("*") if path.is_file())
        names = [path.relative_to(root).as_posix() for path in paths]
        there = api.list_repo_files(repository)
        old = [name for name in there if name not in names and _is_read(name)]
        # `upload_folder` may split a folder into several commits, of which some may fail.
        api.create_commit(
            repository,
            [
                *(CommitOperationDelete(name) for name in old),
                *(CommitOperationAdd(*pair) for pair in zip(names, paths, strict=True)),
            ],
            commit_message="Upload with jax_lora",
        )
    except Exception as error:
        raise RunFailed(
            f"--push: {repository}: {_reason(error)}; {folder} is written: send it with "
            f"`hf upload {repository} {folder}`"
        ) from error
    say(f"sent to {url}" + (f", without its old {', '.join(old)}" if old else ""))


def _is_read(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _READ) and "/" not in name


def _reason(error: BaseException) -> str:
    """What went wrong, in one line: the hub's own words, where it answered at all."""
    return ": ".join(dict.fromkeys(_reasons(error)))


def _reasons(error: BaseException | None) -> Iterator[str]:
    from huggingface_hub.errors import HfHubHTTPError

    while error is not None:
        if isinstance(error, HfHubHTTPError):
            # Its text is a page of advice for downloads. The query of an address may be a key.
            answer, url = error.response, str(error.response.request.url).partition("?")[0]
            text = one_line(Exception(error.server_message or answer.reason_phrase))
            yield f"{answer.status_code} {text} ({answer.request.method} {url})"
            return
        yield one_line(error)
        error = error.__cause__
