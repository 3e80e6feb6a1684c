"""The layers of a LLaMA-shaped model, stated once: what each is called, reads and writes.

Shapes, biases, shardings, parameter tables, adapter keys, file formats and memory are derived from
these three tables. A block of the model is

    x ── input_layernorm ── self_attn: q, k, v ── (q_norm, k_norm) ── attention ── o ── + x
      ── post_attention_layernorm ── mlp: down(silu(gate) · up) ── + x

with the names of Hugging Face, which PEFT shares; families differ in flags, see `families`.
"""

from __future__ import annotations

from typing import NamedTuple


class Linear(NamedTuple):
    """A linear layer.

    Attributes:
      name: Hugging Face's and PEFT's.
      group: the submodule of the block that holds it, "self_attn" or "mlp"; "" outside the blocks.
      inputs, outputs: the logical axes of the two dimensions of its kernel, see
        `Llama.shard_activation`; their sizes are `LlamaConfig.size`.
      gguf: llama.cpp's name.
    """

    name: str
    group: str
    inputs: str
    outputs: str
    gguf: str

    @property
    def path(self) -> tuple[str, ...]:
        """Of its parameters in the tree of a block, or of the model outside the blocks."""
        return (self.group, self.name) if self.group else (self.name,)

    @property
    def tree_path(self) -> tuple[str, ...]:
        """Of its parameters in the tree of the model."""
        return ("layers", *self.path) if self.group else self.path

    @property
    def is_row_parallel(self) -> bool:
        """Whether tensor parallelism cuts its inputs, as Megatron's row-parallel layers; else it
        cuts the outputs (Shoeybi et al. 2019, arXiv:1909.08053)."""
        return self.outputs == "embed"


class Norm(NamedTuple):
    """An RMS norm of a block: its path in the block's tree, the axis of its scale, llama.cpp's
    name; `of_heads`: it exists in families that norm queries and keys (`Family.qk_norm`) only."""

    path: tuple[str, ...]
    axis: str
    gguf: str
    of_heads: bool = False


LINEARS = (
    Linear("q_proj", "self_attn", "embed", "heads", "attn_q"),
    Linear("k_proj", "self_attn", "embed", "kv_heads", "attn_k"),
    Linear("v_proj", "self_attn", "embed", "kv_heads", "attn_v"),
    Linear("o_proj", "self_attn", "heads", "embed", "attn_output"),
    Linear("gate_proj", "mlp", "embed", "mlp", "ffn_gate"),
    Linear("up_proj", "mlp", "embed", "mlp", "ffn_up"),
    Linear("down_proj", "mlp", "mlp", "embed", "ffn_down"),
)
OUTSIDE = (Linear("lm_head", "", "embed", "vocab", "output"),)  # the blocks; one copy of each
NORMS = (
    Norm(("input_layernorm",), "embed", "attn_norm"),
    Norm(("post_attention_layernorm",), "embed", "ffn_norm"),
    Norm(("self_attn", "q_norm"), "head", "attn_q_norm", of_heads=True),
    Norm(("self_attn", "k_norm"), "head", "attn_k_norm", of_heads=True),
)

# What is derived from them. The order of TARGETS, those that may have an adapter, numbers them for
# random keys: a new one goes last.
LINEAR_NAMES = tuple(linear.name for linear in LINEARS)
ATTENTION = tuple(linear.name for linear in LINEARS if linear.group == "self_attn")
MLP = tuple(linear.name for linear in LINEARS if linear.group == "mlp")
GROUP = {linear.name: linear.group for linear in LINEARS}
BY_NAME = {linear.name: linear for linear in (*LINEARS, *OUTSIDE)}
TARGETS = tuple(BY_NAME)
