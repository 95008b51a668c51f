"""Products and sums of products in f32, in the forms that compilers compute fast."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax


def dot(a: jax.Array, b: jax.Array, over_a: tuple[int, ...], over_b: tuple[int, ...]) -> jax.Array:
    """Sum over these dimensions of `a` and `b`: the others of `a`, then those of `b`."""
    return lax.dot_general(a, b, ((over_a, over_b), ((), ())), preferred_element_type=jnp.float32)


def rounded_dot(
    a: jax.Array, b: jax.Array, over_a: tuple[int, ...], over_b: tuple[int, ...], dtype: jnp.dtype
) -> jax.Array:
    """`dot`, rounded to `dtype`.

    If the mesh splits the summed dimensions, devices add their parts. XLA:TPU rounds the parts before; on GPUs the product itself
    is in `dtype` (its sums are f32 still), since XLA:GPU would send f32: twice the bytes.
    """
    rounded = partial(lax.dot_general, dimension_numbers=((over_a, over_b), ((), ())), preferred_element_type=dtype)
    return lax.platform_dependent(a, b, cuda=rounded, default=lambda a, b: dot(a, b, over_a, over_b).astype(dtype))


def sum_of_outer_products(x: jax.Array, g: jax.Array, rows: int) -> jax.Array:
    """Sum over the first `rows` dimensions, which are equal: `[*R, *I] x [*R, *O] -> [*I, *O]`, in f32.

    XLA:CPU is slow where the rows come first in both operands, in bfloat16 by three times: the narrower one is transposed before.
    """

    def from_transposed(x: jax.Array, g: jax.Array) -> jax.Array:
        flat_x, flat_g = (a.reshape(math.prod(a.shape[:rows]), -1) for a in (x, g))
        if flat_x.shape[1] <= flat_g.shape[1]:
            out = dot(_transposed(flat_x), flat_g, (1,), (0,))
        else:
            out = _transposed(dot(_transposed(flat_g), flat_x, (1,), (0,)))
        return out.reshape(*x.shape[rows:], *g.shape[rows:])

    over = tuple(range(rows))
    return lax.platform_dependent(x, g, cpu=from_transposed, default=lambda x, g: dot(x, g, over, over))


def _transposed(x: jax.Array) -> jax.Array:
    """The transpose, in memory. Outside a conditional XLA:CPU makes it a part of what reads it, with strided reads."""
    always = lax.optimization_barrier(jnp.array(True))
    return lax.cond(always, jnp.transpose, lambda x: jnp.zeros(x.shape[::-1], x.dtype), x)


def inner_products(a: jax.Array, b: jax.Array) -> jax.Array:
    """Sum of `a * b` over the last dimension, in f32. As a sum, XLA:CPU of jax 0.10 takes ten times as long."""
    as_sum = lambda a, b: jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), axis=-1)  # noqa: E731
    as_product = partial(jnp.einsum, "...i,...i->...", preferred_element_type=jnp.float32)
    return lax.platform_dependent(a, b, cpu=as_product, default=as_sum)
