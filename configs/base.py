"""Every key of a run, for the command line; the other files in this folder are short diffs of it.

The keys, their units, defaults and domains are documented in one place, jax_lora/config.py, so that
the package alone holds the paper's recipe. Override any key on the command line:
--config.optim.learning_rate=1e-4
"""

from typing import Any

from ml_collections import ConfigDict

from jax_lora.config import RunConfig


def get_config() -> Any:  # a ConfigDict, whose attributes have no types
    return ConfigDict(tuples(RunConfig().to_dict()))


def tuples(tree: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts with tuples for lists: --config.data.buckets=(128,256) is read into a tuple."""
    kinds = {dict: tuples, list: tuple}
    return {key: kinds.get(type(value), lambda x: x)(value) for key, value in tree.items()}


def override(config: Any, arg: str | None, **keys: str) -> Any:
    """Apply the part behind the colon of --config=FILE:name=value,name=value.

    Args:
      config: changed and returned.
      arg: what stands behind the colon.
      keys: short name → dotted key, such as rank="lora.rank".

    Raises:
      ValueError: a name that is not among `keys`, or a value of another type.
    """
    for part in filter(None, (arg or "").split(",")):
        name, found, value = part.partition("=")
        if not found or name not in keys:
            raise ValueError(
                f"--config: found {part!r}, expected name=value with {', '.join(keys)}"
            )
        group, _, key = keys[name].rpartition(".")
        owner = config[group] if group else config
        try:
            owner[key] = type(owner[key])(value)
        except ValueError:
            kind = type(owner[key]).__name__
            raise ValueError(f"--config: {name} is {value!r}, expected {kind}") from None
    return config


SHORT = dict(
    rank="lora.rank",
    set="data.set",
    round="round",
    lr="optim.learning_rate",
    model="model",
    data="data.path",
)
