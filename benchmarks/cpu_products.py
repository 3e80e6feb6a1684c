"""How the form of an operation decides its speed in XLA's CPU compiler (docs/decisions/0002).

    taskset -c 0 python benchmarks/cpu_products.py

Prints milliseconds of processor time, medians of calls in turn, so that a busy machine matters
little; on one core, since threads that wait would count. The shapes are SmolLM2-135M's.
"""

import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

BF16, F32 = jnp.bfloat16, jnp.float32
LOOP = 10  # writes per call
Ways = dict[str, tuple[Callable[..., jax.Array], tuple[jax.Array, ...]]]


def compare(
    name: str,
    ways: Ways,
    per_call: int = 1,
    calls: int = 15,
    options: Mapping[str, dict[str, str]] | None = None,
) -> None:
    """Print the time of every way, given as a function, its arguments and its compiler options."""
    compiled = {
        way: jax.jit(function, compiler_options=(options or {}).get(way))
        for way, (function, _) in ways.items()
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for call in range(calls + 1):
        for way, (_, arguments) in ways.items():
            start = time.process_time()
            compiled[way](*arguments).block_until_ready()
            if call:  # the first compiles
                seconds[way].append(time.process_time() - start)
    found = (f"{way} {1e3 * np.median(all_) / per_call:.3f}" for way, all_ in seconds.items())
    print(f"{name}, ms: {', '.join(found)}", flush=True)


def product(spec: str, result: DTypeLike) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """An einsum whose result is asked for in a dtype, and rounded to its arguments'."""

    def multiply(a: jax.Array, b: jax.Array) -> jax.Array:
        precision = "highest" if a.dtype == F32 else None
        out = jnp.einsum(spec, a, b, precision=precision, preferred_element_type=result)
        return out.astype(a.dtype)

    return multiply


def results() -> None:
    """The dtype of a product and of its result, in training."""
    x, w = jnp.ones((1024, 576), BF16), jnp.ones((576, 1536), BF16)
    in_float32 = product("td,df->tf", F32)
    ways: Ways = {
        "bfloat16": (product("td,df->tf", BF16), (x, w)),
        "bfloat16 with a float32 result": (product("td,df->tf", F32), (x, w)),
        "converted to float32": (lambda x, w: in_float32(x.astype(F32), w.astype(F32)), (x, w)),
        "float32": (in_float32, (x.astype(F32), w.astype(F32))),
    }
    compare("(1024 x 576)(576 x 1536)", ways)


def transposed() -> None:
    """The side of a kernel that is stored (out, in), in decoding."""
    for dtype in (F32, BF16):
        w = jnp.ones((1536, 576), dtype)
        for rows, tokens in ((1, 1), (8, 1), (32, 1)):
            x = jnp.ones((rows, tokens, 576), dtype)
            left, right = product("fd,btd->fbt", F32), product("btd,fd->btf", F32)
            ways: Ways = {
                "kernel on the left": (lambda w, x, p=left: p(w, x).transpose(1, 2, 0), (w, x)),
                "on the right": (lambda w, x, p=right: p(x, w), (w, x)),
            }
            compare(f"{dtype.__name__}, {rows} rows of {tokens} tokens by (1536 x 576)", ways)


def attention() -> None:
    """The order of the axes in attention."""
    b, t, k, g, h = 2, 512, 3, 3, 64
    shapes = {
        "heads first": ("bkgth,bksh->bkgts", (b, k, g, t, h), (b, k, t, h)),
        "tokens first": ("btkgh,bskh->bkgts", (b, t, k, g, h), (b, t, k, h)),
    }
    ways: Ways = {
        name: (product(spec, F32), (jnp.ones(q, BF16), jnp.ones(keys, BF16)))
        for name, (spec, q, keys) in shapes.items()
    }
    compare("scores of 2 x 512 tokens", ways)


def largest() -> None:
    """The index of the largest of 49,152 logits, as a product leaves them."""
    logits = jax.random.normal(jax.random.key(0), (49152, 32))

    def two(x: jax.Array) -> jax.Array:
        ids = jnp.arange(len(x))[:, None]
        return jnp.where(x == x.max(axis=0), ids, len(x)).min(axis=0)

    argmax = lambda x: jnp.argmax(x, axis=0)  # noqa: E731
    compare("argmax of 32 rows", {"argmax": (argmax, (logits,)), "two": (two, (logits,))})


def writes() -> None:
    """A token of each of 32 rows, written into a cache of 192 slots at its own place."""
    rows, at = jnp.arange(32)[:, None], jnp.arange(32)[:, None]

    def write(cache: jax.Array, new: jax.Array) -> jax.Array:
        def body(i: jax.Array, cache: jax.Array) -> jax.Array:
            return cache.at[rows, :, at + i].set(new, unique_indices=True)

        return jax.lax.fori_loop(0, LOOP, body, cache)

    ways: Ways = {}
    for name, dtype in (("bfloat16", BF16), ("its bits", jnp.uint16), ("float32", F32)):
        ways[name] = (write, (jnp.ones((32, 3, 192, 64), dtype), jnp.ones((32, 1, 3, 64), dtype)))
    compare("a write into the cache", ways, LOOP)


def reductions() -> None:
    """What the flag of `cli.set_xla_flags` costs: reductions that XLA does not fuse."""

    def softmax(x: jax.Array) -> jax.Array:
        x = jnp.exp(x - x.max(axis=-1, keepdims=True))
        return x / x.sum(axis=-1, keepdims=True)

    # Less the reductions, as compiler options can say it; the flag's own minus is for XLA_FLAGS.
    off = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
    for name, shape in (("256 x 49152 logits", (256, 49152)), ("attention", (2, 9, 128, 128))):
        ways: Ways = {way: (softmax, (jnp.ones(shape),)) for way in ("fused", "not fused")}
        compare(f"softmax of {name}", ways, options={"not fused": off})


if __name__ == "__main__":
    print(f"jax {jax.__version__}")
    for measure in (results, transposed, attention, largest, writes, reductions):
        measure()
