"""Frozen kernels in 8 and 4 bits, dequantized where they are read.

In the tree of a base a `QuantizedKernel` takes the position of a kernel (L, in, out). It is a
pytree whose arrays are stacked over the layers too, so that the scan over the layers slices what
is stored, and `product` dequantizes one kernel of one layer at a time. The outputs are always the
last axis: compilers vectorize along it, and a mesh cuts the blocks along the one before.

    Int8      symmetric, one scale per output; Int8Products multiplies integers
    NF4       QLoRA (Dettmers et al. 2023, arXiv:2305.14314), blocks of 64, double quantization
    GGUF      the blocks of a file of llama.cpp, see `gguf_blocks`
    Residual  one of these less a product A B, for PiSSA

`jax_lora.weights.quantize` makes them, on the host.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from jax_lora.errors import ConfigError
from jax_lora.model import gguf_blocks
from jax_lora.model.xla_cpu import einsum, from_bits

FORWARD, BACKWARD = "btd,df->btf", "btf,df->btd"  # products with a kernel (in, out)
Shard = Callable[..., Array]  # (x, logical axis of every dimension) → x, see `transformer`
NF4_BLOCK, NF4_GROUP = 64, 256  # weights per block constant, and block constants per group

# The 16 values of the NormalFloat: QLoRA, appendix E.
NF4_CODES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def dynamic_codes() -> np.ndarray:
    """The 256 values of the dynamic 8-bit float, ascending, float32: a sign, e zeros that stand
    for 10^-e, a one, and a fraction of the bits that are left, linear from 0.1 to 1.

    QLoRA quantizes its block constants to it: Dettmers et al. 2022 (arXiv:2110.02861), section
    1.3, as bitsandbytes tabulates it.
    """
    positive = []
    for bits in range(7):
        # Bit for bit as PyTorch's linspace: float32 steps from the nearer end, rounded once.
        count = np.arange(2**bits + 1)
        step = np.float64((np.float32(1) - np.float32(0.1)) / np.float32(2**bits))
        up, down = np.float32(0.1) + step * count, 1 - step * count[::-1]
        bounds = np.where(count < len(count) // 2, up, down).astype(np.float32)
        positive.append(np.float32(10.0 ** (bits - 6)) * (bounds[:-1] + bounds[1:]) / np.float32(2))
    found = np.concatenate(positive)
    return np.sort(np.concatenate([-found, [0.0], found, [1.0]])).astype(np.float32)


class QuantizedKernel(abc.ABC):
    """A frozen kernel as it is stored, of one layer, or with a leading axis of all layers."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the kernel: (in, out), behind the axis of the layers where there is one."""

    @abc.abstractmethod
    def dequantize(self, dtype: DTypeLike) -> Float[Array, "in out"]:
        """The kernel of one layer: computed in float32, then rounded once to `dtype`."""

    @abc.abstractmethod
    def shard(self, shard_activation: Shard, inputs: str, outputs: str) -> QuantizedKernel:
        """What is stored of one layer, sharded by the logical axes of the kernel's sides.

        It is no longer sharded by `fsdp`: bytes are gathered, not what they are dequantized to.
        """

    def times(self, spec: str, x: Array, platform: str) -> Array:
        """The product of x and the kernel of one layer, dequantized to x's dtype.

        Args:
          spec: FORWARD or BACKWARD.
          x: (B, T, in), or the gradient (B, T, out).
          platform: see `xla_cpu`.
        """
        return einsum(spec, x.dtype, x, self.dequantize(x.dtype), platform)

    def gathered(self, shard_activation: Shard, axes: tuple[str, str]) -> QuantizedKernel:
        """`shard` by the logical axes of the kernel's inputs and outputs, in a scan over layers.

        Without the barrier compilers gather the slice of a stack as (1, in, out), the inputs
        outermost, and to slice in this order first copy the whole stack into it.
        """
        return jax.lax.optimization_barrier(self).shard(shard_activation, *axes)


def _pytree(*data: str, meta: tuple[str, ...] = ()):
    return partial(jax.tree_util.register_dataclass, data_fields=list(data), meta_fields=list(meta))


@_pytree("values", "scale")
@dataclass(frozen=True)
class Int8(QuantizedKernel):
    """`values` (in, out) int8 times `scale` (out,) float32."""

    values: PyTree
    scale: PyTree

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def dequantize(self, dtype: DTypeLike) -> Float[Array, "in out"]:
        return (jnp.asarray(self.values).astype(jnp.float32) * self.scale).astype(dtype)

    def shard(self, shard_activation: Shard, inputs: str, outputs: str) -> Int8:
        values = shard_activation(self.values, inputs, outputs)
        return replace(self, values=values, scale=shard_activation(self.scale, outputs))


@_pytree("values", "scale")
@dataclass(frozen=True)
class Int8Products(Int8):
    """An `Int8` whose forward products are of integers, for hardware that is faster at them.

    x is rounded to 8 bits too, symmetric with a scale per token, as LLM.int8() does (Dettmers et
    al. 2022, arXiv:2208.07339, section 2.1) without its outliers in 16 bits. Sums are exact. The
    backward product is `Int8`'s.
    """

    def times(self, spec: str, x: Array, platform: str) -> Array:
        if spec != FORWARD:
            return super().times(spec, x, platform)
        wide = x.astype(jnp.float32)
        largest = jnp.abs(wide).max(-1, keepdims=True)
        levels = jnp.round(wide * 127 / jnp.where(largest > 0, largest, 1.0)).astype(jnp.int8)
        out = jnp.einsum(spec, levels, self.values, preferred_element_type=jnp.int32)
        return (out.astype(jnp.float32) * (largest / 127) * self.scale).astype(x.dtype)


def with_int8_products(tree: PyTree) -> PyTree:
    """The tree with `Int8Products` for each `Int8`."""
    return jax.tree.map(
        lambda x: Int8Products(x.values, x.scale) if isinstance(x, Int8) else x,
        tree,
        is_leaf=is_quantized,
    )


@_pytree("packed", "constants", "groups", "offset")
@dataclass(frozen=True)
class NF4(QuantizedKernel):
    """4-bit NormalFloats in blocks of 64 inputs, their constants in 8 bits in groups of 256.

    Attributes:
      packed: (in / 64, 32, out) uint8. A byte holds the codes of the inputs j and 32 + j of a
        block, the first in its low half.
      constants: (in / 64, out) uint8, codes of `dynamic_codes`.
      groups: (⌈in · out / 64 / 256⌉,) float32: what the codes of 256 constants are multiplied by.
        As in bitsandbytes they follow each other input by input, then output by output.
      offset: float32, the mean of the constants, which was subtracted before.
    """

    packed: PyTree
    constants: PyTree
    groups: PyTree
    offset: PyTree

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, blocks, half, out = self.packed.shape
        return (*stack, blocks * half * 2, out)

    def dequantize(self, dtype: DTypeLike) -> Float[Array, "in out"]:
        packed = jnp.asarray(self.packed)
        codes = jnp.concatenate([packed & 15, packed >> 4], axis=1)  # (in / 64, 64, out)
        # A lookup and no selections, whose constants XLA's compiler for GPUs stores at full size.
        values = jnp.take(np.array(NF4_CODES, np.float32), codes, mode="clip")
        kernel = values * self._constants()[:, None]
        return kernel.reshape(self.shape).astype(dtype)

    def _constants(self) -> Float[Array, "blocks out"]:
        blocks, out = self.constants.shape
        groups = jnp.broadcast_to(jnp.asarray(self.groups)[:, None], (len(self.groups), NF4_GROUP))
        groups = groups.reshape(-1)[: blocks * out].reshape(out, blocks).T
        centred = jnp.take(dynamic_codes(), self.constants, mode="clip") * groups
        # The product is rounded before the sum: a fused multiply-add would not round it.
        return jax.lax.optimization_barrier(centred) + self.offset

    def shard(self, shard_activation: Shard, inputs: str, outputs: str) -> NF4:
        packed = shard_activation(self.packed, inputs, None, outputs)
        constants = shard_activation(self.constants, inputs, outputs)
        return replace(self, packed=packed, constants=constants)


@_pytree("blocks", "kind", meta=("kinds",))
@dataclass(frozen=True)
class GGUF(QuantizedKernel):
    """The blocks of a GGUF file, bit for bit.

    Files give some layers more bits than others. Then a stack has several kinds, and the blocks
    of the smaller ones are padded.

    Attributes:
      blocks: (in / unit, bytes, out) uint8. A unit is the largest block among the kinds; smaller
        ones follow each other in it.
      kind: int32, the index of the layer's kind.
      kinds: names in `gguf_blocks.KINDS`.
    """

    blocks: PyTree
    kind: PyTree
    kinds: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, units, _, out = self.blocks.shape
        return (*stack, units * gguf_blocks.unit(self.kinds), out)

    def dequantize(self, dtype: DTypeLike) -> Float[Array, "in out"]:
        def read(name: str, blocks: Array) -> Array:
            kernel = gguf_blocks.dequantize(name, blocks, gguf_blocks.unit(self.kinds))
            return kernel.astype(dtype)

        readers = [partial(read, name) for name in self.kinds]
        if len(readers) == 1:
            return readers[0](jnp.asarray(self.blocks))
        return jax.lax.switch(self.kind, readers, jnp.asarray(self.blocks))

    def shard(self, shard_activation: Shard, inputs: str, outputs: str) -> GGUF:
        return replace(self, blocks=shard_activation(self.blocks, inputs, None, outputs))


@_pytree("stored", "a", "b", "scale")
@dataclass(frozen=True)
class Residual(QuantizedKernel):
    """`stored` less scale · A B: what PiSSA leaves of a quantized kernel, without rounding it.

    `stored`: another quantized kernel. `a` (in, R), `b` (R, out), `scale` (): float32.
    """

    stored: PyTree
    a: PyTree
    b: PyTree
    scale: PyTree

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def dequantize(self, dtype: DTypeLike) -> Float[Array, "in out"]:
        product = jnp.matmul(self.a, self.b, precision=jax.lax.Precision.HIGHEST)
        return (self.stored.dequantize(jnp.float32) - self.scale * product).astype(dtype)

    def shard(self, shard_activation: Shard, inputs: str, outputs: str) -> Residual:
        a, b = shard_activation(self.a, inputs, None), shard_activation(self.b, None, outputs)
        return Residual(self.stored.shard(shard_activation, inputs, outputs), a, b, self.scale)


def is_quantized(node: object) -> bool:
    """Whether a node of a tree is a quantized kernel; the `is_leaf` of functions on trees."""
    return isinstance(node, QuantizedKernel)


def as_float(kernel: PyTree, dtype: DTypeLike) -> Float[Array, "in out"]:
    """The kernel of one layer as numbers: a quantized one dequantized to `dtype`, any other in its
    own dtype, where it may be the bits of bfloat16 numbers."""
    if isinstance(kernel, QuantizedKernel):
        return kernel.dequantize(dtype)
    return from_bits(jnp.asarray(kernel))


def stored_shapes(
    quantization: str, shape: tuple[int, int, int], kinds: Sequence[str] = ()
) -> QuantizedKernel:
    """A quantized kernel as `jax.ShapeDtypeStruct`s.

    Args:
      quantization: "int8", "nf4" or "gguf".
      shape: (L, in, out).
      kinds: of the blocks of a GGUF file, each once and sorted.

    Raises:
      ConfigError: blocks do not divide the inputs, or no kinds for "gguf".
    """
    layers, size, out = shape
    array = jax.ShapeDtypeStruct
    if quantization == "int8":
        return Int8(array(shape, jnp.int8), array((layers, out), jnp.float32))
    if quantization == "gguf" and not kinds:
        raise ConfigError("config.model_quantization: found gguf, expected a GGUF file as model")
    block = gguf_blocks.unit(kinds) if quantization == "gguf" else NF4_BLOCK
    if size % block:
        raise ConfigError(
            f"config.model_quantization: found {quantization} and a kernel of {size} inputs, "
            f"expected a multiple of {block}"
        )
    if quantization == "gguf":
        blocks = (layers, size // block, gguf_blocks.unit_bytes(kinds), out)
        return GGUF(array(blocks, jnp.uint8), array((layers,), jnp.int32), tuple(kinds))
    blocks = size // block
    return NF4(
        array((layers, blocks, block // 2, out), jnp.uint8),
        array((layers, blocks, out), jnp.uint8),
        array((layers, -(-blocks * out // NF4_GROUP)), jnp.float32),
        array((layers,), jnp.float32),
    )


def kernel_shapes(tree: PyTree) -> PyTree:
    """The tree with a float32 `jax.ShapeDtypeStruct` for each quantized kernel."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32) if is_quantized(x) else x,
        tree,
        is_leaf=is_quantized,
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def product(
    platform: str,
    shard_activation: Shard,
    axes: tuple[str, str],
    x: Float[Array, "B T in"],
    kernel: QuantizedKernel,
) -> Float[Array, "B T out"]:
    """x times a quantized kernel; the gradient goes to x alone.

    Neither pass keeps the dequantized kernel, or what was gathered of the stored one. It is made
    anew when x, or the gradient, is there: without this dependence compilers would take it for a
    constant of a loop over tokens, or for the same in both passes, and keep those of all layers.

    Args:
      platform: see `xla_cpu`.
      shard_activation: see `transformer`.
      axes: of the kernel's inputs and outputs.
      x: activations.
      kernel: of one layer, sharded as it is stored.
    """
    return _times(FORWARD, platform, shard_activation, axes, x, kernel)


def _times(
    spec: str,
    platform: str,
    shard_activation: Shard,
    axes: tuple[str, str],
    x: Array,
    kernel: QuantizedKernel,
) -> Array:
    here = kernel.gathered(shard_activation, axes)
    x, here = jax.lax.optimization_barrier((x, here))
    return here.times(spec, x, platform)


def _product_forward(platform, shard_activation, axes, x, kernel):
    return product(platform, shard_activation, axes, x, kernel), kernel


def _product_backward(platform, shard_activation, axes, kernel, g):
    return _times(BACKWARD, platform, shard_activation, axes, g, kernel), None


product.defvjp(_product_forward, _product_backward)
