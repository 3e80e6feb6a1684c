"""Quantized kernels and toys, made for tests without the package's readers of files."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType, quants

from jax_lora.model import gguf_blocks
from jax_lora.model.arch import LINEARS
from jax_lora.model.config import LlamaConfig
from jax_lora.model.quantization import GGUF, NF4, Int8, is_quantized
from jax_lora.model.transformer import Llama
from jax_lora.weights import quantize

GGUF_KINDS = tuple(gguf_blocks.KINDS)
# Of several kinds: blocks of 32 and 256 weights, of other sizes in bytes.
FORMS = ("int8", "nf4", "Q8_0", "Q4_1", "Q4_K", "Q4_K+Q6_K", "Q6_K+Q8_0")
TOY = LlamaConfig(61, 256, 256, 2, 4, 2, 64)


def gguf_rows(kind: str, rows: int, size: int, seed: int) -> np.ndarray:
    """Random blocks of a kind, (rows, bytes): every bit of the integers is drawn.

    The weights are of a usual size: those of K kinds are products of three numbers.
    """
    one, rng = gguf_blocks.KINDS[kind], np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows, size // one.weights, one.bytes), np.uint8)
    for at in one.scales:
        scales = rng.normal(0, 2e-5 if one.weights == 256 else 1e-3, blocks.shape[:2]).astype(
            np.float16
        )
        blocks[..., at : at + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def gguf_reference(kind: str, rows: np.ndarray) -> np.ndarray:
    """What the `gguf` package makes of blocks, (rows, numbers) float32."""
    return quants.dequantize(rows, GGMLQuantizationType[kind])


def gguf_kernel(kinds: list[str], shape: tuple[int, int], seed: int) -> tuple[GGUF, np.ndarray]:
    """Stacked random blocks, a kind per layer, and what they stand for, (L, in, out)."""
    names, (size, out) = tuple(sorted(set(kinds))), shape
    unit, most = gguf_blocks.unit(names), gguf_blocks.unit_bytes(names)
    blocks = np.full((len(kinds), size // unit, most, out), 255, np.uint8)
    dense = []
    for i, kind in enumerate(kinds):
        rows = gguf_rows(kind, out, size, seed + i)
        units = rows.reshape(out, size // unit, -1)
        blocks[i, :, : units.shape[2]] = units.transpose(1, 2, 0)
        dense.append(gguf_reference(kind, rows).T)
    index = np.array([names.index(kind) for kind in kinds], np.int32)
    return GGUF(jnp.asarray(blocks), jnp.asarray(index), names), np.stack(dense)


def quantized(form: str, kernel: np.ndarray, seed: int = 0):
    """A stacked kernel (L, in, out) as it is stored in a form among `FORMS`."""
    if form not in ("int8", "nf4"):
        kinds = (form.split("+") * len(kernel))[: len(kernel)]
        return gguf_kernel(kinds, kernel.shape[1:], seed)[0]
    make, function = {"int8": (Int8, quantize.int8), "nf4": (NF4, quantize.nf4)}[form]
    layers = [function(np.ascontiguousarray(one.T)) for one in kernel]
    return make(**{name: jnp.stack([one[name] for one in layers]) for name in layers[0]})


@functools.cache
def base(form: str, config: LlamaConfig = TOY):
    """A toy's base, its linear layers stored in a form, and the same dequantized to float32."""
    params = Llama(config).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    params["layers"] = {name: dict(tree) for name, tree in params["layers"].items()}
    for seed, linear in enumerate(LINEARS):
        leaf = dict(params["layers"][linear.group][linear.name])
        leaf["kernel"] = quantized(form, np.asarray(leaf["kernel"]), 10 * seed)
        params["layers"][linear.group][linear.name] = leaf
    return params, dequantized(params)


@jax.jit
def dequantized(params):
    """The base with float32 arrays for its quantized kernels."""

    def whole(leaf):
        if not is_quantized(leaf):
            return leaf
        return jax.lax.map(lambda one: one.dequantize(jnp.float32), leaf)

    return jax.tree.map(whole, params, is_leaf=is_quantized)
