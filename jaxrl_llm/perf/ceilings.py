"""What the machine can do at most, measured with JAX: copying, and matrix products in f32 and in bf16 with f32 sums.

    copy bandwidth   bytes read + bytes written a second by `a * 1.0000001` in place, over an array of the given bytes:
                     2 * nbytes / t. A small array stays in the caches, as the weights of a small model do.
    matmul           2 m k n / t of a product [m k] x [k n], f32 out, of operands f32 or bf16: at [2048]^3 (GPU: [8192]^3)
                     for the general ceiling, or over a list of shapes one after another, at their own rate.

Loops run inside one jit with a number of turns unknown to the compiler, and each turn reads from the one before, so nothing is
hoisted or merged. Ceilings are the best of several calls.
"""

import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

# How the two operands of a product lie: which dims are summed over. "dx" and "dw" are the two products of the backward pass.
FORMS = {"forward": ((1,), (0,)), "dx": ((1,), (1,)), "dw": ((0,), (0,))}
Product = tuple[str, int, int, int]
"""(form, m, k, n): `m` rows through a matrix [k n]; 2 m k n FLOPs in every form."""


def copy_bandwidth(nbytes: int, seconds: float = 1.0) -> float:
    """Bytes a second, reading and writing counted."""
    x = jnp.ones((max(nbytes // 4, 1024),), jnp.float32)

    @jax.jit
    def loop(x: jax.Array, turns: jax.Array) -> jax.Array:
        return lax.fori_loop(0, turns, lambda _, x: x * 1.0000001, x)[:1]

    return 2 * x.nbytes / seconds_a_turn(partial(loop, x), seconds)


def matmul_rate(products: list[Product], dtype: str, seconds: float = 1.0) -> float:
    """FLOPs a second over `products` one after another, operands of `dtype`, results f32."""
    shapes = {"forward": lambda m, k, n: ((m, k), (k, n)), "dx": lambda m, k, n: ((m, n), (k, n))}
    shapes["dw"] = lambda m, k, n: ((m, k), (m, n))
    forms = [FORMS[form] for form, *_ in products]
    operands = [[jnp.full(s, 0.01, dtype) for s in shapes[form](*sizes)] for form, *sizes in products]

    def product(x: jax.Array, w: jax.Array, over: tuple) -> jax.Array:
        return lax.dot_general(x, w, (over, ((), ())), preferred_element_type=jnp.float32)

    @jax.jit
    def loop(operands: list, turns: jax.Array) -> list:
        right = [w for _, w in operands]

        def turn(_: jax.Array, carry: tuple) -> tuple:
            left, out = carry
            # One entry of the last result goes into the operand: the product cannot leave the loop.
            seed = [jnp.clip(y[:1, :1], -1, 1).astype(x.dtype) for x, y in zip(left, out, strict=True)]
            left = [lax.dynamic_update_slice(x, s, (0, 0)) for x, s in zip(left, seed, strict=True)]
            return left, [product(x, w, over) for x, w, over in zip(left, right, forms, strict=True)]

        like = [jax.eval_shape(partial(product, over=over), x, w) for (x, w), over in zip(operands, forms, strict=True)]
        start = [jnp.zeros(y.shape, y.dtype) for y in like]
        return lax.fori_loop(0, turns, turn, ([x for x, _ in operands], start))[1]

    flops = sum(2 * m * k * n for _, m, k, n in products)
    return flops / seconds_a_turn(partial(loop, operands), seconds)


def general(backend: str) -> dict:
    """Ceilings that belong to no model: large copies and large squares."""
    edge, nbytes = (8192, 2**31) if backend != "cpu" else (2048, 2**28)
    rate = {dtype: matmul_rate([("forward", edge, edge, edge)], dtype, 2.0) for dtype in ("float32", "bfloat16")}
    return {
        "copy": {"bytes_per_s": copy_bandwidth(nbytes, 2.0), "array_bytes": nbytes},
        "matmul": {d: {"flops_per_s": r, "shape": [edge] * 3} for d, r in rate.items()},
    }


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def seconds_a_turn(loop: Callable[[jax.Array], object], seconds: float) -> float:
    """Seconds of one turn of the compiled loop `loop(turns)`, the best of several calls: a ceiling is what was ever reached.

    (t(n) - t(0)) / n, the least of each: a call without a turn holds the launch and the making of what the loop carries. n grows
    until the turns last a fifth of `seconds` and four times that call; so about 2 `seconds` go by.
    """
    time_of = lambda n: timed(lambda: loop(jnp.asarray(n, jnp.int32)))  # noqa: E731
    time_of(0)
    empty, turns = min(time_of(0) for _ in range(3)), 1
    enough = max(seconds / 5, 4 * empty)
    while (spent := time_of(turns)) - empty < enough and turns < 2**20:
        turns = min(max(2 * turns, int(1.2 * turns * enough / max(spent - empty, enough / 50))), 2**20)
    best, end = spent, time.monotonic() + seconds
    while time.monotonic() < end:
        best = min(best, time_of(turns))
    return max(best - empty, 1e-9) / turns
