"""The errors that become one line.

A script prints these, and an `OSError` that names its path, as one line with exit code 2. Every
other exception is a fault of ours and shows its traceback. JAX_LORA_TRACEBACK=1 shows all of them.
"""


class ConfigError(ValueError):
    """A setting that a user can fix: the key, what was found and what is expected."""


class DataError(ValueError):
    """A file that a user can fix: the path, what was found and what is expected."""
