"""A config, a model's shape and a platform, resolved into what training runs.

What a config leaves open ("auto", -1) is decided here, once. The run and the planner build their
model, mask, optimizer and step from the same `Resolved`, so that what is planned is what runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jax_lora.config import MeshSizes, RunConfig
from jax_lora.model import attention, lora, xla_cpu
from jax_lora.model.config import LlamaConfig
from jax_lora.model.gguf_blocks import Kinds
from jax_lora.model.transformer import Llama
from jax_lora.training.optimizers import make_optimizer, schedule
from jax_lora.training.step import Step, make_step


@dataclass(frozen=True)
class Resolved:
    """A run's config with nothing left open; from `resolve`.

    Attributes:
      config: as it was given, but for its dtype.
      shape: of the base model.
      platform: "cpu", "gpu"/"cuda" or "tpu".
      mesh_sizes: their product is the number of devices.
      attention: the kernel, among `attention.KERNELS`.
      materialized: the targets whose delta s·A·B is formed once per step.
      gguf_kinds: of the base's blocks, where the config keeps those of a GGUF file.
    """

    config: RunConfig
    shape: LlamaConfig
    platform: str
    mesh_sizes: MeshSizes
    attention: str
    materialized: tuple[str, ...]
    gguf_kinds: Kinds = ()

    @property
    def is_lora(self) -> bool:
        """Whether there are adapters."""
        return self.config.method == "lora"

    @property
    def rank(self) -> int | None:
        """Of the adapters; None in full fine-tuning."""
        return self.config.lora.rank if self.is_lora else None

    @property
    def dropout(self) -> float:
        """On the input of A; 0 where there is no A."""
        return self.config.lora.dropout if self.is_lora else 0.0

    @property
    def row_groups(self) -> int:
        """Groups of devices that compute different rows: data × fsdp."""
        return self.mesh_sizes.data * self.mesh_sizes.fsdp

    @property
    def unroll(self) -> int:
        """Layers per iteration of the scan.

        A scan writes all that the backward pass reads into stacks and copies it out of them.
        Without remat that is nearly everything: see docs/performance.md, and `xla_cpu` for CPUs.
        In unrolled layers it would also keep what quantized kernels are dequantized to.
        """
        c, depth = self.config, self.shape.num_hidden_layers
        is_plain = c.remat == "none" and c.model_quantization == "none"
        unrolls = self.platform != "tpu" and is_plain
        return min(c.unroll or (depth if unrolls else 1), depth)

    @property
    def unstacks(self) -> bool:
        """Whether frozen kernels are one array per layer, see `unstacked`: on one GPU that
        unrolls all layers, unless the adapters' start is computed from the stacks."""
        fits = self.platform in ("gpu", "cuda") and math.prod(self.mesh_sizes) == 1
        lora, quantization = self.config.lora, self.config.model_quantization
        reads_stacks = self.is_lora and (lora.variant == "dora" or lora.init == "pissa")
        plain = quantization == "none" and not reads_stacks
        return fits and plain and self.unroll == self.shape.num_hidden_layers

    def model(self) -> Llama:
        """The Flax module that training applies."""
        c = self.config
        return Llama(
            self.shape,
            dtype=jnp.dtype(c.dtype),
            remat=c.remat,
            unroll=self.unroll,
            attention=self.attention,
            platform=self.platform,
        )

    def schedule(self, total_steps: int) -> optax.Schedule:
        """The learning rate by step."""
        o = self.config.optim
        return schedule(o.schedule, o.learning_rate, o.warmup_steps, total_steps)

    def optimizer(self, rate: optax.Schedule) -> optax.GradientTransformation:
        """The optimizer at that learning rate."""
        return make_optimizer(self.config.optim, rate)

    def step(self, optimizer: optax.GradientTransformation, mesh: Mesh | None) -> Step:
        """The compiled functions of a step; `mesh` None is one device."""
        c = self.config
        return make_step(
            self.model(),
            optimizer,
            seed=c.seed,
            dropout_rate=self.dropout,
            packed=c.data.packed,
            materialized=self.materialized,
            loss_chunk=c.loss_chunk,
            mesh=mesh,
        )


def with_dtype(config: RunConfig, platform: str) -> RunConfig:
    """The config with its "auto" dtype chosen: bfloat16, but for a CPU that lacks it (this one)."""
    if config.dtype != "auto":
        return config
    fast = platform != "cpu" or xla_cpu.has_bfloat16_products()
    return config.replace(dtype="bfloat16" if fast else "float32")


def resolve(
    config: RunConfig, shape: LlamaConfig, platform: str, devices: int, gguf_kinds: Kinds = ()
) -> Resolved:
    """Decide what a config leaves open.

    Args:
      config: of the run.
      shape: of its base model.
      platform: of the devices: "cpu", "gpu"/"cuda" or "tpu".
      devices: how many there are.
      gguf_kinds: see `Resolved`.

    Raises:
      ConfigError: a mesh that does not fit the devices, an attention kernel that cannot run, a
        LoRA target that the model does not have, or rows longer than its sliding window.
    """
    config = with_dtype(config, platform)
    lengths = config.data.buckets
    shape.check_length(max(lengths))
    kernel = config.attention
    if kernel == "auto":
        kernel = attention.best(platform, config.dtype, shape.head_dim, lengths)
    attention.check(kernel, platform, config.dtype, shape.head_dim, lengths)
    if config.method == "lora":
        lora.check_targets(config.lora.targets)
        lora.check_init(config.lora.init, shape, config.lora.targets)
    materialized = ()
    if config.method == "lora" and config.lora.materialize_delta == "auto":
        materialized = lora.materialized_targets(shape, config.lora.rank, config.lora.targets)
    sizes = config.mesh.sizes(devices)
    return Resolved(config, shape, platform, sizes, kernel, materialized, gguf_kinds)
