"""LoRA fine-tuning of LLaMA models in JAX, at any rank, on many instruction tasks.

    import jax_lora
    model = jax_lora.load("path/or/hub-id/or.gguf", adapter="runs/r16/adapter")
    model.generate(["### Instruction:\\n…"], max_new_tokens=32)
    jax_lora.parameter_table("llama-7b", rank=16)

Names load when they are first used, so that `jax_lora.evaluation.metrics` needs no JAX.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax_lora.notebook import LoadedModel, load, parameter_table

__version__ = "0.1.0"
__all__ = ["LoadedModel", "load", "parameter_table"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'jax_lora' has no attribute {name!r}")
    from jax_lora import notebook

    return getattr(notebook, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
