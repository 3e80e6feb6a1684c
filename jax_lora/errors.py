"""The errors that a script turns into one line and an exit code.

    ConfigError, DataError, OSError with a path    2: the input is wrong
    RunFailed                                      1: a fault while running
    Stopped                                        75: a stop was asked for, and can be resumed

Every other exception is a fault of ours and shows its traceback; JAX_LORA_TRACEBACK=1 shows all.
"""


class ConfigError(ValueError):
    """A setting that a user can fix: the key, what was found and what is expected."""


class DataError(ValueError):
    """A file that a user can fix: the path, what was found and what is expected."""


class RunFailed(RuntimeError):
    """A fault while running: what happened, what is safe and how to resume."""


class Stopped(RuntimeError):
    """The run was asked to stop and left a checkpoint: where it stands and how to resume."""
