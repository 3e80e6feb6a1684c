"""DoRA and PiSSA as changes of a LoRA tree and of the base, each after its paper and PEFT's code.

DoRA    a leaf m (L, out) beside a, b, scale      the module divides by the norms itself
PiSSA   a, b hold the largest singular parts      the base keeps the rest of its weights
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from jax_lora.errors import ConfigError
from jax_lora.model.config import LlamaConfig
from jax_lora.model.quantization import Residual, as_float, is_quantized


def _map_targets(adapters: PyTree, change: Callable[[str, str, PyTree], PyTree]) -> PyTree:
    return {
        "layers": {
            group: {name: change(group, name, leaf) for name, leaf in members.items()}
            for group, members in adapters["layers"].items()
        }
    }


def with_magnitudes(adapters: PyTree, params: PyTree, dtype: DTypeLike = jnp.float32) -> PyTree:
    """A DoRA adapter that changes nothing yet (Liu et al. 2024, arXiv:2402.09353).

    Args:
      adapters: a new LoRA tree, every B zero.
      params: the base.
      dtype: that the module dequantizes quantized kernels to.

    Returns:
      The tree with m (L, out) = ‖W‖, float32, one norm per output, in every target.
    """

    def norms(group, name, leaf):
        kernel = params["layers"][group][name]["kernel"]

        def norm(one: PyTree) -> jax.Array:
            return jnp.linalg.norm(as_float(one, dtype).astype(jnp.float32), axis=0)

        return {**leaf, "m": jax.lax.map(norm, jax.tree.map(jnp.asarray, kernel))}

    return _map_targets(adapters, norms)


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

    def principal(group, name, leaf):
        rank = leaf["a"].shape[-1]
        if rank > min(config.linear_shapes()[name]):
            raise ConfigError(
                f"lora init: pissa at rank {rank} needs kernels of at least that many rows and "
                f"columns, found {config.linear_shapes()[name]} in {name}"
            )
        a, b, stack = [], [], params["layers"][group][name]["kernel"]
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

    return _map_targets(like, principal)


def without(params: PyTree, adapters: PyTree) -> PyTree:
    """The base less what the adapters add: W - scale · A B, rounded once to W's dtype.

    A quantized kernel stays as it is: its `Residual` subtracts the product where it is read.
    """
    layers = {key: dict(value) for key, value in params["layers"].items()}
    for group, members in adapters["layers"].items():
        for name, leaf in members.items():
            kernel = layers[group][name]["kernel"]
            if is_quantized(kernel):
                # Copies, as training donates the adapters' arrays.
                product = (jnp.array(leaf[part]) for part in ("a", "b", "scale"))
                kernel = Residual(kernel, *product)
                layers[group][name] = {**layers[group][name], "kernel": kernel}
                continue

            def rest(parts):
                w, a, b, factor = parts
                product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
                return (w.astype(jnp.float32) - factor * product).astype(w.dtype)

            kernel = jax.lax.map(rest, (kernel, leaf["a"], leaf["b"], leaf["scale"]))
            layers[group][name] = {**layers[group][name], "kernel": kernel}
    return {**params, "layers": layers}


def since(adapters: PyTree, start: PyTree) -> PyTree:
    """What training added to the adapters, as adapters of twice the rank for the whole base.

    scale · (A B - A₀ B₀) = scale · [A A₀] [B; -B₀]: how PEFT saves a PiSSA run as plain LoRA.
    """

    def joined(group, name, leaf):
        first = start["layers"][group][name]
        return {
            "a": jnp.concatenate([leaf["a"], first["a"]], axis=2),
            "b": jnp.concatenate([leaf["b"], -first["b"]], axis=1),
            "scale": leaf["scale"],
        }

    return _map_targets(adapters, joined)
