"""The errors that a script turns into one line and an exit code.

    ConfigError, DataError, OSError with a path    2: the input is wrong
    RunFailed                                      1: a fault while running
    Stopped                                        75: a stop was asked for, and can be resumed

Every other exception is a fault of ours and shows its traceback; JAX_LORA_TRACEBACK=1 shows all.

The rule for who raises what:
- A setting is wrong: `ConfigError`. What a file holds is wrong: `DataError`.
- A file that the user named is not there, or cannot be read or written: an `OSError` with
  `filename`, either the one that `open` raises or `MissingFileError(ENOENT, text, path)`.
  An `OSError` with one argument has no `filename`: do not raise one.
- A library that reads a user's file raises whatever it likes (json, safetensors, tokenizers). The
  reader, the function that was given the path, catches that and raises a `DataError` with the path.
- A caller inside the package is wrong: a plain `ValueError` or `TypeError`, which stays one.
"""

import errno

_LOST = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EIO,
    errno.ESTALE,
    errno.ENODEV,
    errno.ENXIO,
    errno.ENOTCONN,
}


def is_lost_disk(error: BaseException | None) -> bool:
    """Whether a disk that is full, read-only or gone is behind an error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _LOST:
            return True
        error = error.__cause__
    return False


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class where it has none: libraries write pages."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(error: BaseException) -> str:
    """All of an error's text in one line, or its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


class ConfigError(ValueError):
    """A setting that a user can fix: the key, what was found and what is expected."""


class DataError(ValueError):
    """A file that a user can fix: the path, what was found and what is expected."""


class RunFailed(RuntimeError):
    """A fault while running: what happened, what is safe and how to resume."""


class Stopped(RuntimeError):
    """The run was asked to stop and left a checkpoint: where it stands and how to resume."""


class MissingFileError(FileNotFoundError):
    """A file that is not there, and what was expected: `MissingFileError(ENOENT, text, path)`."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"
