"""A run as an object: what train.py, eval.py, convert.py, studies and notebooks open."""

from jax_lora.run.run import Run

__all__ = ["Run"]
