"""LoRA fine-tuning of LLaMA models in JAX, at any rank, on many instruction tasks.

    import jax_lora
    run = jax_lora.Run.open(jax_lora.RunConfig().replace(**{"lora.rank": 64}), "runs/r64")
    model = jax_lora.load("path/or/hub-id/or.gguf", adapter="runs/r16/adapter")
    model.generate(["### Instruction:\\n…"], max_new_tokens=32)
    jax_lora.parameter_table("llama-7b", rank=16)

Names load when they are first used, so that `jax_lora.evaluation.metrics` needs no JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax_lora.config import RunConfig
    from jax_lora.notebook import LoadedModel, load, parameter_table
    from jax_lora.run import Run

__version__ = "0.2.0"
_HOMES = {
    "LoadedModel": "notebook",
    "Run": "run",
    "RunConfig": "config",
    "load": "notebook",
    "parameter_table": "notebook",
}
__all__ = ["LoadedModel", "Run", "RunConfig", "load", "parameter_table"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'jax_lora' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jax_lora.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
