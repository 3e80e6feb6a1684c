"""How the form of a bfloat16 product decides its speed on a CPU (docs/decisions/0002).

python benchmarks/cpu_products.py
"""

import time

import jax
import jax.numpy as jnp


def milliseconds(spec: str, x: tuple[int, ...], w: tuple[int, ...], result: type) -> float:
    """Median time of one einsum of bfloat16 ones, its result asked for in a dtype."""
    product = jax.jit(
        lambda a, b: jnp.einsum(spec, a, b, preferred_element_type=result).astype(jnp.bfloat16)
    )
    a, b = jnp.ones(x, jnp.bfloat16), jnp.ones(w, jnp.bfloat16)
    product(a, b).block_until_ready()
    times = []
    for _ in range(50):
        start = time.perf_counter()
        product(a, b).block_until_ready()
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[25]


def main() -> None:
    for name, result in (("bfloat16", jnp.bfloat16), ("float32", jnp.float32)):
        ms = milliseconds("td,df->tf", (1024, 576), (576, 1536), result)
        print(f"(1024 x 576)(576 x 1536), result {name}: {ms:.2f} ms, {1.812 / ms:.2f} TFLOP/s")
    b, t, k, g, h = 2, 512, 3, 3, 64
    for name, scores, mix, q, kv in (
        ("tokens first", "btkgh,bskh->bkgts", "bkgts,bskh->btkgh", (b, t, k, g, h), (b, t, k, h)),
        ("heads first", "bkgth,bksh->bkgts", "bkgts,bksh->bkgth", (b, k, g, t, h), (b, k, t, h)),
    ):
        first = milliseconds(scores, q, kv, jnp.float32)
        second = milliseconds(mix, (b, k, g, t, t), kv, jnp.float32)
        print(f"attention of 2 x 512 tokens, {name}: scores {first:.2f} ms, mix {second:.2f} ms")


if __name__ == "__main__":
    main()
