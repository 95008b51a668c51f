"""Hardware ceilings measured with JAX: copy bandwidth, and matmul FLOP/s in f32 and in bf16 with f32 sums.

    copy bandwidth   bytes read + bytes written per second by `a * 1.0000001` in place, over an array of the given bytes:
                     2 * nbytes / t. A small array stays in the caches, as the weights of a small model do.
    matmul           2 m k n / t of a product [m k] x [k n], f32 out, of operands f32 or bf16: at [2048]^3 (GPU: [8192]^3)
                     for the general ceiling, or over a list of shapes one after another.

Each loop runs inside one jit with a number of iterations unknown to the compiler, and each iteration reads the result of the
previous one, so nothing is hoisted or merged. A ceiling is the best of several calls.
"""

import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Contracted dimensions of the two operands. "dx" and "dw" are the two products of the backward pass.
CONTRACTIONS = {"forward": ((1,), (0,)), "dx": ((1,), (1,)), "dw": ((0,), (0,))}
Product = tuple[str, int, int, int]
"""(key of CONTRACTIONS, m, k, n): `m` rows through a matrix [k n]; 2 m k n FLOPs each."""


def copy_bandwidth(nbytes: int, seconds: float = 1.0) -> float:
    """Return bytes per second, reads and writes both counted."""
    x = jnp.ones((max(nbytes // 4, 1024),), jnp.float32)

    @jax.jit
    def loop(x: jax.Array, iterations: jax.Array) -> jax.Array:
        return lax.fori_loop(0, iterations, lambda _, x: x * 1.0000001, x)[:1]

    return 2 * x.nbytes / seconds_per_iteration(partial(loop, x), seconds)


def matmul_rate(products: list[Product], dtype: str, seconds: float = 1.0) -> float:
    """Return FLOPs per second over `products` one after another: operands of `dtype`, results in f32."""
    shapes = {"forward": lambda m, k, n: ((m, k), (k, n)), "dx": lambda m, k, n: ((m, n), (k, n))}
    shapes["dw"] = lambda m, k, n: ((m, k), (m, n))
    contractions = [CONTRACTIONS[name] for name, *_ in products]
    # From NumPy: each shape would be a program of its own to compile.
    operands = [
        [jax.device_put(np.full(s, 0.01, jnp.dtype(dtype))) for s in shapes[name](*sizes)] for name, *sizes in products
    ]

    def product(x: jax.Array, w: jax.Array, over: tuple) -> jax.Array:
        return lax.dot_general(x, w, (over, ((), ())), preferred_element_type=jnp.float32)

    @jax.jit
    def loop(operands: list, iterations: jax.Array) -> list:
        right = [w for _, w in operands]

        def iteration(_: jax.Array, carry: tuple) -> tuple:
            left, out = carry
            # One entry of the last result goes into the operand: the product cannot be hoisted out of the loop.
            seed = [jnp.clip(y[:1, :1], -1, 1).astype(x.dtype) for x, y in zip(left, out, strict=True)]
            left = [lax.dynamic_update_slice(x, s, (0, 0)) for x, s in zip(left, seed, strict=True)]
            return left, [product(x, w, over) for x, w, over in zip(left, right, contractions, strict=True)]

        like = [
            jax.eval_shape(partial(product, over=over), x, w)
            for (x, w), over in zip(operands, contractions, strict=True)
        ]
        start = [jnp.zeros(y.shape, y.dtype) for y in like]
        return lax.fori_loop(0, iterations, iteration, ([x for x, _ in operands], start))[1]

    flops = sum(2 * m * k * n for _, m, k, n in products)
    return flops / seconds_per_iteration(partial(loop, operands), seconds)


def general(backend: str) -> dict:
    """Return ceilings that do not depend on a model: large copies and large square products."""
    edge, nbytes = (8192, 2**31) if backend != "cpu" else (2048, 2**28)
    rate = {dtype: matmul_rate([("forward", edge, edge, edge)], dtype, 2.0) for dtype in ("float32", "bfloat16")}
    return {
        "copy": {"bytes_per_s": copy_bandwidth(nbytes, 2.0), "array_bytes": nbytes},
        "matmul": {d: {"flops_per_s": r, "shape": [edge] * 3} for d, r in rate.items()},
    }


def timed(call: Callable[[], object]) -> float:
    """Return the seconds that `call` takes, its result on the device included."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def seconds_per_iteration(loop: Callable[[jax.Array], object], seconds: float) -> float:
    """Return seconds per iteration of the compiled loop `loop(iterations)`, the best of several calls.

    (t(n) - t(0)) / n, the minimum of each: t(0) is the launch and the creation of the loop's carry. n grows until the iterations
    last a fifth of `seconds` and four times t(0); the measurement takes about 2 `seconds`.
    """
    time_of = lambda n: timed(lambda: loop(jnp.asarray(n, jnp.int32)))  # noqa: E731
    time_of(0)
    empty, iterations = min(time_of(0) for _ in range(3)), 1
    enough = max(seconds / 5, 4 * empty)
    while (spent := time_of(iterations)) - empty < enough and iterations < 2**20:
        growth = 1.2 * iterations * enough / max(spent - empty, enough / 50)
        iterations = min(max(2 * iterations, int(growth)), 2**20)
    best, end = spent, time.monotonic() + seconds
    while time.monotonic() < end:
        best = min(best, time_of(iterations))
    return max(best - empty, 1e-9) / iterations
