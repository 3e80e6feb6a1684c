"""What decides the memory and the work of a training step, and its arrays as shapes.

The trees are training's own: the same mask, optimizer, step and sharding table, nothing allocated.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from jax_lora import sharding
from jax_lora.model.config import ATTENTION, GROUP, LlamaConfig
from jax_lora.model.transformer import Llama
from jax_lora.planning import counts
from jax_lora.training import masks
from jax_lora.training.step import Micro, State, Step, adamw, make_step


@dataclass(frozen=True)
class Setup:
    """A training step, as far as memory and work go.

    Attributes:
      config: the base model.
      rank: of the adapters; None is full fine-tuning, without any.
      rows, length: of a micro-batch: the rows that a device computes (each of the data × fsdp
        groups has as many) and the tokens of each, padding included.
      batch_rows: rows of a whole optimizer step.
      targets, variant: of the adapters; variant "lora" or "dora".
      materialized: targets whose A B is formed once a step, see `lora.materialized_targets`.
      trainable, frozen: the mask's regular expressions.
      dtype: of frozen weights and arithmetic.
      remat, attention: see `Llama`.
      loss_chunk, dropout, packed: see `make_step`.
      loss_share: of the positions that are loss tokens.
      mesh: sizes of data, fsdp and tensor.
      platform: of the devices, as in `Device`: a TPU's compiler keeps other things alive.
    """

    config: LlamaConfig
    rank: int | None
    rows: int = 4
    length: int = 1024
    batch_rows: int = 128
    targets: tuple[str, ...] = ATTENTION
    variant: str = "lora"
    materialized: tuple[str, ...] = ()
    trainable: tuple[str, ...] = masks.LORA[0]
    frozen: tuple[str, ...] = masks.LORA[1]
    dtype: str = "bfloat16"
    remat: str = "full"
    attention: str = "cudnn"
    loss_chunk: int = 1024
    dropout: float = 0.05
    packed: bool = False
    loss_share: float = 1.0
    mesh: tuple[int, int, int] = (1, 1, 1)
    platform: str = "cuda"

    @property
    def devices(self) -> int:
        """In the mesh."""
        return int(np.prod(self.mesh))

    @property
    def row_parts(self) -> int:
        """Groups of devices with rows of their own."""
        return self.mesh[0] * self.mesh[1]

    @property
    def abstract_mesh(self) -> AbstractMesh:
        """The mesh without devices."""
        return AbstractMesh(self.mesh, sharding.AXES)


class Trees(NamedTuple):
    """The arrays of a step as `jax.ShapeDtypeStruct`s, laid out on a mesh.

    `frozen` and `state` are what a run holds, `working` is what a step differentiates and its
    gradients look like, `micro` a micro-batch of all devices.
    """

    frozen: Any
    state: State
    working: Any
    micro: Micro


def functions(setup: Setup, mesh: Mesh | None = None) -> tuple[Step, optax.GradientTransformation]:
    """The step that training compiles, and its optimizer."""
    model = Llama(
        setup.config,
        dtype=jnp.dtype(setup.dtype),
        remat=setup.remat,
        attention=setup.attention,
        platform=setup.platform,
    )
    optimizer = adamw(optax.constant_schedule(0.0))
    step = make_step(
        model,
        optimizer,
        seed=0,
        dropout_rate=setup.dropout,
        packed=setup.packed,
        materialized=setup.materialized,
        loss_chunk=setup.loss_chunk,
        mesh=mesh,
    )
    return step, optimizer


_base = lru_cache(maxsize=16)(counts.base_shapes)  # tracing a model takes longer than the rest


@lru_cache(maxsize=64)
def variables(setup: Setup) -> tuple[Any, Any]:
    """Shapes of {"params": …, "lora": …} in the dtypes of a run, and the mask.

    Raises:
      ValueError: a rank below 1, an unknown target, or expressions that `masks.mask` refuses.
    """
    tree: dict[str, Any] = {"params": _base(setup.config)}
    if setup.rank is not None:
        tree["lora"] = counts.adapter_shapes(setup.config, setup.rank, setup.targets)
        layers = setup.config.num_hidden_layers
        for name in setup.targets:
            leaf = tree["lora"]["layers"][GROUP[name]][name]
            leaf["scale"] = jax.ShapeDtypeStruct((layers,), jnp.float32)
            if setup.variant == "dora":
                leaf["m"] = jax.ShapeDtypeStruct((layers, leaf["b"].shape[2]), jnp.float32)
    trains = masks.mask(tree, setup.trainable, setup.frozen)

    def held(x, trained):
        return jax.ShapeDtypeStruct(x.shape, jnp.float32 if trained else jnp.dtype(setup.dtype))

    tree["params"] = jax.tree.map(held, tree["params"], trains["params"])
    return tree, trains


def trees(setup: Setup, mesh: Mesh | AbstractMesh | None = None) -> Trees:
    """The arrays of a step on a mesh, by default on the setup's own, without devices."""
    mesh = mesh or setup.abstract_mesh
    trainable, frozen = masks.partition(*variables(setup))
    step, optimizer = functions(setup)
    number: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state = State(number, trainable, jax.eval_shape(optimizer.init, trainable))
    working = jax.eval_shape(step.prepare, state, frozen)
    shape = (setup.rows * setup.row_parts, setup.length)
    where = NamedSharding(mesh, sharding.ROWS)
    micro: Any = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=where)
        for dtype in (jnp.int32, jnp.bool_, jnp.int32)
    ]
    return Trees(
        frozen=sharding.abstract(frozen, mesh),
        state=sharding.abstract(state, mesh),
        working=sharding.abstract(working, mesh),
        micro=Micro(*micro),
    )
