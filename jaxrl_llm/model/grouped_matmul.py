"""Grouped matrix product: rows sorted into groups, one matrix per group, with a gradient that is fast in bfloat16.

CPUs and TPUs compute it as `lax.ragged_dot_general`, GPUs as `grouped_blocks`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxrl_llm.model import grouped_blocks

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

    Products are in the dtype of `x`, sums and results in f32. As in `linear.contract` the cotangent is cast to the dtype of `x`.
    Inside `shard_map` weights are gathered in the dtype of `x`, and their gradient is reduced in f32.

    Args:
        x: rows, sorted by group.
        w: the matrices of each part.
        counts: rows per group; rows after the last group give 0.
        axis: mesh axis that `w` is sharded over, or None.
        dim: dimension of `w` that is sharded.

    Returns:
        One product per part, f32.
    """
    matrices = _unsharded(w, x, axis, dim)
    return lax.platform_dependent(x, matrices, counts, cuda=grouped_blocks.contract, default=_contract)


def _forward(x: Array, w: Array, counts: Array, axis: str | None, dim: int) -> tuple[tuple[Array, ...], tuple]:
    return contract_groups(x, w, counts, axis, dim), (x, w, counts)


def _backward(axis: str | None, dim: int, saved: tuple[Array, ...], gs: tuple[Array, ...]) -> tuple:
    x, w, counts = saved
    gs, matrices = tuple(g.astype(x.dtype) for g in gs), _unsharded(w, x, axis, dim)
    dx = lax.platform_dependent(gs, matrices, counts, cuda=grouped_blocks.to_rows, default=_to_rows)
    dw = lax.platform_dependent(x, gs, counts, cuda=grouped_blocks.to_weights, default=_to_weights)
    if axis is not None:
        dw = lax.psum_scatter(dw, axis, scatter_dimension=dim, tiled=True)
    return dx, dw.astype(w.dtype), None


contract_groups.defvjp(_forward, _backward)


def _unsharded(w: Array, x: Array, axis: str | None, dim: int) -> Float[Array, "groups I O"]:
    """The matrices of all parts, unsharded, concatenated."""
    w = w.astype(x.dtype)
    if axis is not None:
        w = lax.all_gather(w, axis, axis=dim, tiled=True)
    return w.reshape(-1, *w.shape[2:])


def _contract(x: Array, matrices: Array, counts: Array) -> tuple[Float[Array, "M O"], ...]:
    products = (_dot(x, matrices, sizes, _FORWARD) for sizes in _of_parts(counts, matrices))
    return tuple(_zero_rest(out, counts) for out in products)


def _to_rows(gs: tuple[Array, ...], matrices: Array, counts: Array) -> Float[Array, "M I"]:
    dx = sum(_dot(g, matrices, sizes, _TO_ROWS) for g, sizes in zip(gs, _of_parts(counts, matrices), strict=True))
    return _zero_rest(dx, counts).astype(gs[0].dtype)


def _to_weights(x: Array, gs: tuple[Array, ...], counts: Array) -> Float[Array, "parts E I O"]:
    return jnp.stack([_dot(x, g, counts, _TO_WEIGHTS) for g in gs])


def _of_parts(counts: Array, matrices: Array) -> list[Int[Array, " groups"]]:
    """Per part the group sizes over all parts, nonzero for it only. Slicing the weights instead would copy them on a TPU."""
    parts, empty = range(len(matrices) // len(counts)), jnp.zeros_like(counts)
    return [jnp.concatenate([counts if p == part else empty for p in parts]) for part in parts]


def _zero_rest(x: Array, counts: Array) -> Array:
    """Zero the rows after the last group, which a TPU leaves uninitialized."""
    return jnp.where(jnp.arange(len(x))[:, None] < jnp.sum(counts), x, 0.0)


def _dot(a: Array, b: Array, sizes: Array, dims: lax.RaggedDotDimensionNumbers) -> Array:
    return lax.ragged_dot_general(a, b, sizes, dims, preferred_element_type=jnp.float32)
