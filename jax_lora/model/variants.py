"""DoRA and PiSSA as changes of a LoRA tree and of the base, each after its paper and PEFT's code.

DoRA    a leaf m (L, out) beside a, b, scale      the module divides by the norms itself
PiSSA   a, b hold the largest singular parts      the base keeps the rest of its weights
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from jax_lora.errors import ConfigError
from jax_lora.model import lora
from jax_lora.model.config import LlamaConfig
from jax_lora.model.quantization import Residual, as_float, is_quantized


def with_magnitudes(adapters: PyTree, params: PyTree, dtype: DTypeLike = jnp.float32) -> PyTree:
    """A DoRA adapter that changes nothing yet (Liu et al. 2024, arXiv:2402.09353).

    Args:
      adapters: a new LoRA tree, every B zero.
      params: the base.
      dtype: that the module dequantizes quantized kernels to.

    Returns:
      The tree with m (L, out) = ‖W‖, float32, one norm per output, in every target.
    """

    def norms(name, leaf):
        kernel = lora.kernel(params, name)

        def norm(one: PyTree) -> jax.Array:
            return jnp.linalg.norm(as_float(one, dtype).astype(jnp.float32), axis=0)

        return {**leaf, "m": jax.lax.map(norm, jax.tree.map(jnp.asarray, kernel))}

    return lora.map_targets(norms, adapters)


def pissa(params: PyTree, config: LlamaConfig, like: PyTree) -> PyTree:
    """Adapters that hold the principal part of the kernels (Meng et al. 2024, arXiv:2404.02948).

    scale · A B is the best approximation of W of this rank; the singular values are shared evenly
    by A and B, as PEFT's `init_lora_weights="pissa"` does. What is left of the base is
    `without(params, adapters)`. Computed on the host in float32: the signs of singular vectors
    are the library's choice, so keep the result rather than make it again.

    Args:
      params: the base.
      config: its shape.
      like: adapters of the rank, targets and scale that are wanted.

    Raises:
      ValueError: a rank above the smaller side of a kernel, which has no more singular values.
    """

    def principal(name, leaf):
        rank, sides = leaf["a"].shape[-1], config.stack_shapes()[name][1:]
        if rank > min(sides):
            raise ConfigError(
                f"lora init: pissa at rank {rank} needs kernels of at least that many rows and "
                f"columns, found {sides} in {name}"
            )
        a, b, stack = [], [], lora.kernel(params, name)
        for i, factor in enumerate(leaf["scale"]):
            kernel = as_float(jax.tree.map(lambda x, i=i: x[i], stack), jnp.float32)
            left, values, right = np.linalg.svd(np.asarray(kernel, np.float32), full_matrices=False)
            root = np.sqrt(values[:rank] / float(factor))
            a.append(left[:, :rank] * root)
            b.append(root[:, None] * right[:rank])
        return {
            "a": jnp.asarray(np.stack(a)),
            "b": jnp.asarray(np.stack(b)),
            "scale": leaf["scale"],
        }

    return lora.map_targets(principal, like)


def without(params: PyTree, adapters: PyTree) -> PyTree:
    """The base less what the adapters add: W - scale · A B, rounded once to W's dtype.

    A quantized kernel stays as it is: its `Residual` subtracts the product where it is read.
    """

    def rest(parts):
        w, a, b, factor = parts
        product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        return (w.astype(jnp.float32) - factor * product).astype(w.dtype)

    for name, leaf in lora.by_target(adapters).items():
        kernel = lora.kernel(params, name)
        if is_quantized(kernel):
            # Copies, as training donates the adapters' arrays.
            product = (jnp.array(leaf[part]) for part in ("a", "b", "scale"))
            kernel = Residual(kernel, *product)
        else:
            kernel = jax.lax.map(rest, (kernel, leaf["a"], leaf["b"], leaf["scale"]))
        params = lora.with_kernel(params, name, kernel)
    return params


def since(adapters: PyTree, start: PyTree) -> PyTree:
    """What training added to the adapters, as adapters of twice the rank for the whole base.

    scale · (A B - A₀ B₀) = scale · [A A₀] [B; -B₀]: how PEFT saves a PiSSA run as plain LoRA.
    """

    first_of = lora.by_target(start)

    def joined(name, leaf):
        first = first_of[name]
        return {
            "a": jnp.concatenate([leaf["a"], first["a"]], axis=2),
            "b": jnp.concatenate([leaf["b"], -first["b"]], axis=1),
            "scale": leaf["scale"],
        }

    return lora.map_targets(joined, adapters)
