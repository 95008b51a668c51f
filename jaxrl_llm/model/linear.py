"""Matrix product of activations and parameters, with a gradient that is fast in bfloat16."""

from functools import partial

import jax
import jax.numpy as jnp

from jaxrl_llm.model import lora, quantized_weights
from jaxrl_llm.model.lora import Adapted
from jaxrl_llm.model.products import dot, rounded_dot, sum_of_outer_products
from jaxrl_llm.model.quantized_weights import Quantized


def contract(
    x: jax.Array, w: jax.Array | Adapted | Quantized, inner: int = 1, dtype: jnp.dtype = jnp.float32
) -> jax.Array:
    """Sum over the last `inner` dimensions of `x` and the first `inner` of `w`: `[..., *I] x [*I, *O] -> [..., *O]`.

    Sums are f32; the result, and what devices add, is in `dtype`.

    If `w` has adapters, only they have a gradient. If `w` is quantized, the product is in 8 bits and has no gradient.
    """
    if isinstance(w, Adapted):
        return lora.product(x, w, inner, dtype)
    if isinstance(w, Quantized):
        return quantized_weights.product(x, w, inner, dtype)
    return _contract(x, w, inner, dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _contract(x: jax.Array, w: jax.Array, inner: int, dtype: jnp.dtype) -> jax.Array:
    """`w` is cast to the dtype of `x`, so f32 masters multiply in the compute dtype; sums are f32.

    The gradient casts its cotangent to the dtype of `x`: in f32 both products of the backward pass would be mixed-precision,
    off the fast path of every backend (jax issue 24047). dw is computed in f32, then cast to the dtype of `w`.
    """
    return rounded_dot(x, w.astype(x.dtype), _tail(x, inner), tuple(range(inner)), dtype)


def _forward(x: jax.Array, w: jax.Array, inner: int, dtype: jnp.dtype) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _contract(x, w, inner, dtype), (x, w)


def _backward(
    inner: int, dtype: jnp.dtype, saved: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    g = g.astype(x.dtype)
    outer = w.ndim - inner
    dx = rounded_dot(g, w.astype(x.dtype), _tail(g, outer), tuple(range(inner, w.ndim)), x.dtype)
    return dx, sum_of_outer_products(x, g, x.ndim - inner).astype(w.dtype)


_contract.defvjp(_forward, _backward)


@jax.custom_vjp
def contract_each(x: jax.Array, w: jax.Array) -> tuple[jax.Array, ...]:
    """`contract` with each matrix `[D, F]` of `w` `[n, D, F]`: n results `[..., F]`.

    A single product would first concatenate the matrices and then split the result, both copies.
    """
    return tuple(_contract(x, part, 1, jnp.float32) for part in w)


def _forward_each(x: jax.Array, w: jax.Array) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, jax.Array]]:
    return contract_each(x, w), (x, w)


def _backward_each(saved: tuple[jax.Array, jax.Array], g: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    g = [part.astype(x.dtype) for part in g]
    dx = sum(dot(part, matrix.astype(x.dtype), (x.ndim - 1,), (1,)) for part, matrix in zip(g, w, strict=True))
    return dx.astype(x.dtype), jnp.stack([sum_of_outer_products(x, part, x.ndim - 1) for part in g]).astype(w.dtype)


contract_each.defvjp(_forward_each, _backward_each)


def _tail(x: jax.Array, n: int) -> tuple[int, ...]:
    return tuple(range(x.ndim - n, x.ndim))
