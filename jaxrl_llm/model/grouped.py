"""The matrix product of rows sorted into groups, a matrix for each group, with the gradient that keeps it fast in bfloat16."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

_DIMS = lax.RaggedDotDimensionNumbers
# [M I] x [E I O] -> [M O]; for the gradients [M O] x [E I O] -> [M I] and [M I] x [M O] -> [E I O].
_FORWARD = _DIMS((((1,), (1,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0])
_TO_ROWS = _DIMS((((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0])
_TO_WEIGHTS = _DIMS((((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[])


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def contract_groups(
    x: Float[Array, "M I"], w: Float[Array, "parts E I O"], counts: Int[Array, " E"], axis: str | None, dim: int
) -> tuple[Float[Array, "M O"], ...]:
    """For each part of `w`: the first counts[0] rows times its matrix 0, the next counts[1] times its matrix 1, and so on.

    Products are in the dtype of `x`, sums and results f32; rows behind the last group give 0. As in `linear.contract` the
    cotangent is cast to the dtype of `x`. Inside `shard_map`, with `w` split along its dimension `dim` over the mesh axis `axis`:
    what is gathered has the dtype of `x`, and the gradient is reduced in f32.
    """
    whole = _whole(w, x, axis, dim)
    return tuple(_seen(_dot(x, whole, _of_part(counts, w, p), _FORWARD), counts) for p in range(len(w)))


def _forward(x: Array, w: Array, counts: Array, axis: str | None, dim: int) -> tuple[tuple[Array, ...], tuple]:
    return contract_groups(x, w, counts, axis, dim), (x, w, counts)


def _backward(axis: str | None, dim: int, saved: tuple[Array, ...], gs: tuple[Array, ...]) -> tuple:
    x, w, counts = saved
    gs, whole = [g.astype(x.dtype) for g in gs], _whole(w, x, axis, dim)
    dx = sum(_dot(g, whole, _of_part(counts, w, p), _TO_ROWS) for p, g in enumerate(gs))
    dw = jnp.stack([_dot(x, g, counts, _TO_WEIGHTS) for g in gs])
    if axis is not None:
        dw = lax.psum_scatter(dw, axis, scatter_dimension=dim, tiled=True)
    return _seen(dx, counts).astype(x.dtype), dw.astype(w.dtype), None


contract_groups.defvjp(_forward, _backward)


def _whole(w: Array, x: Array, axis: str | None, dim: int) -> Float[Array, "groups I O"]:
    """The matrices of all parts, one after another."""
    w = w.astype(x.dtype)
    if axis is not None:
        w = lax.all_gather(w, axis, axis=dim, tiled=True)
    return w.reshape(-1, *w.shape[2:])


def _of_part(counts: Array, w: Array, part: int) -> Int[Array, " groups"]:
    """Sizes of all parts' groups, of which one part's have rows. A slice of the weights instead would be copied on a TPU."""
    empty = jnp.zeros_like(counts)
    return jnp.concatenate([counts if p == part else empty for p in range(len(w))])


def _seen(x: Array, counts: Array) -> Array:
    """0 behind the last group, where a TPU leaves what was in memory."""
    return jnp.where(jnp.arange(len(x))[:, None] < jnp.sum(counts), x, 0.0)


def _dot(a: Array, b: Array, sizes: Array, dims: lax.RaggedDotDimensionNumbers) -> Array:
    return lax.ragged_dot_general(a, b, sizes, dims, preferred_element_type=jnp.float32)
