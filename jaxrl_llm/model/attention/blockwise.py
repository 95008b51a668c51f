"""Blockwise attention over whole rows: no [T, T] array, and fully masked pairs of blocks are skipped.

The forward pass saves the output and each query's log-sum-exp; the backward pass recomputes the weights (Dao et al. 2022,
FlashAttention). Which key blocks a query block attends to follows from `until` (Wang et al. 2024, FlashMask).

The forward pass processes C query blocks at a time, those that attend to the most key blocks first: so the blocks of a chunk have
about equal work, in causal rows, packed rows and trees alike. The backward pass loops over the pairs of blocks.

Dimensions: B rows of n blocks of S slots, Q = B n blocks in total, C of them at a time; K key/value heads, G query heads per
key/value head, M = S G query rows per block, H head dim.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.model.attention.plain import MASKED, PackedRows, scores_of
from jaxrl_llm.model.cache import UNLIMITED
from jaxrl_llm.model.products import inner_products

# Number of scores held at a time: a megabyte, which stays in a CPU core's caches.
AT_A_TIME = 2**18


class BlockOptions(NamedTuple):
    """Options of blockwise attention; static."""

    size: int = 64
    """S, slots per block."""
    scale: float | None = None
    """Factor of the scores. None: H^-0.5."""
    softcap: float | None = None
    """c: scores become c tanh(scores / c)."""
    at_a_time: int = AT_A_TIME
    """Approximate number of scores held at a time."""


class BlockSlots(NamedTuple):
    """Per block, the arrays that determine the mask."""

    slot: Int[Array, "Q S"]
    until: Int[Array, "Q S"]
    position: Int[Array, "Q S"]


class BlockSchedule(NamedTuple):
    """Query blocks in chunks of C, those with the most key blocks first; padded with blocks that have none."""

    block: Int[Array, "chunks C"]
    key_block: Int[Array, "chunks C n"]
    """Key blocks of each query block; the first `count` are visible to it."""
    count: Int[Array, "chunks C"]


def attend_blocks(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    rows: PackedRows,
    window: int | Int[Array, ""] = UNLIMITED,
    options: BlockOptions = BlockOptions(),  # noqa: B008
) -> Float[Array, "B T K G H"]:
    """`attend` under `tree_mask(rows, window)`, block by block.

    Args:
        q: queries.
        k: keys.
        v: values.
        rows: the structure that determines the mask.
        window: number of positions a query attends to, its own included.
        options: block size, scale and soft cap of the scores.

    Returns:
        Per query the weighted sum of values; zeros for a query without keys.
    """
    return _attend(q, k, v, rows, window, options._replace(size=min(options.size, q.shape[1])))


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q: Array, k: Array, v: Array, rows: PackedRows, window: Array, options: BlockOptions) -> Array:
    return _forward(q, k, v, rows, window, options)[0]


def _forward(
    q: Array, k: Array, v: Array, rows: PackedRows, window: Array, options: BlockOptions
) -> tuple[Array, tuple]:
    slots, visible = _slots(rows, window, options.size)
    qs, ks, vs = (_to_blocks(x, options.size) for x in (q, k, v))
    num, kv_heads, queries, dim = qs.shape

    def step(at: Array, to: Array, valid: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out, total, top = carry
        scores = _masked(_dot(qs[at], ks[to], 3, 3), _mask(slots, at, to, valid, window), options, dim)
        higher = jnp.maximum(top, jnp.max(scores, axis=-1))
        weights, before = jnp.exp(scores - higher[..., None]), jnp.exp(top - higher)
        out = out * before[..., None] + _dot(weights.astype(v.dtype), vs[to], 3, 2)
        return out, total * before + jnp.sum(weights, axis=-1), higher

    def finish(carry: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        out, total, top = carry
        # A query without keys (padding) gives zeros.
        total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)

    f32 = partial(jnp.full, dtype=jnp.float32)
    # The initial `top` is above MASKED, so that the weights of a query without keys are 0, not 1.
    shapes = ((kv_heads, queries, dim), 0.0), ((kv_heads, queries), 0.0), ((kv_heads, queries), MASKED / 2)
    schedule = _schedule(visible, _at_a_time(qs, options))
    start = tuple(f32((schedule.block.shape[1], *s), x) for s, x in shapes)
    out, peak = _for_each_key_block(schedule, num, step, start, finish)
    return _from_blocks(out, q), (q, k, v, rows, window, out, peak)


def _backward(options: BlockOptions, saved: tuple, g: Array) -> tuple[Array | None, ...]:
    q, k, v, rows, window, out, peak = saved
    slots, visible = _slots(rows, window, options.size)
    qs, ks, vs, gs = (_to_blocks(x, options.size) for x in (q, k, v, g))
    dim = qs.shape[-1]
    inner = inner_products(gs, out)
    scale = dim**-0.5 if options.scale is None else options.scale

    def scores_gradient(weights: Array, scores: Array, dw: Array, mean: Array) -> Array:
        """Gradient of the products q k', from the cotangents of the weights and their mean under the weights."""
        ds, cap = weights * (dw - mean) * scale, options.softcap
        return ds if cap is None else ds * (1 - jnp.square(jnp.maximum(scores, -cap) / cap))

    chunk = _at_a_time(qs, options)
    pairs = _pairs(visible, chunk)

    def body(i: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        """Scores are [keys, queries] here, so two of the products contract over contiguous rows."""
        at, to, valid = (x[i] for x in pairs)
        mask = _mask(slots, at, to, valid, window).swapaxes(1, 2)
        scores = _masked(_dot(ks[to], qs[at], 3, 3), mask, options, dim)
        weights = jnp.exp(scores - peak[at][:, :, None])
        ds = scores_gradient(weights, scores, _dot(vs[to], gs[at], 3, 3), inner[at][:, :, None]).astype(q.dtype)
        parts = _dot(ds, ks[to], 2, 2), _dot(ds, qs[at], 3, 2), _dot(weights.astype(g.dtype), gs[at], 3, 2)
        return tuple(x.at[where].add(part) for x, where, part in zip(sums, (at, to, to), parts, strict=True))

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (qs, ks, vs))
    sums = lax.fori_loop(0, -(-jnp.sum(visible) // chunk), body, zeros)
    dq, dk, dv = (x.astype(like.dtype) for x, like in zip(sums, (q, k, v), strict=True))
    return _from_blocks(dq, q), _from_blocks(dk, k), _from_blocks(dv, v), None, None


_attend.defvjp(_forward, _backward)


def _slots(rows: PackedRows, window: int | Array, size: int) -> tuple[BlockSlots, Bool[Array, "B queries keys"]]:
    """The slots of each block, and which key blocks each query block attends to (at least in part)."""
    until, position = rows
    num, length = until.shape
    pad = -length % size
    # No query attends to padding.
    until, position = jnp.pad(until, ((0, 0), (0, pad))), jnp.pad(position, ((0, 0), (0, pad)))
    split = lambda x: x.reshape(num, -1, size)  # noqa: E731
    slot = split(jnp.broadcast_to(jnp.arange(length + pad, dtype=until.dtype), until.shape))
    until, position = split(until), split(position)
    first = slot[0, :, 0]
    last = jnp.max(jnp.where(until > slot, until, 0), axis=2)
    visible = (first[:, None] >= first) & (first[:, None] < last[:, None, :])
    if not _unlimited(window):
        visible &= jnp.min(position, axis=2)[:, :, None] - jnp.max(position, axis=2)[:, None, :] < window
    return BlockSlots(*(x.reshape(-1, size) for x in (slot, until, position))), visible


def _unlimited(window: int | Array) -> bool:
    return isinstance(window, int) and window == UNLIMITED


def _mask(
    slots: BlockSlots, queries: Array, keys: Array, valid: Array, window: int | Array
) -> Bool[Array, "C queries keys"]:
    """`tree_mask` of pairs of a query and a key block of the same row; False for pairs that are not `valid` [C]."""
    t, u = slots.slot[queries][:, :, None], slots.slot[keys][:, None, :]
    seen = (u <= t) & (t < slots.until[keys][:, None, :]) & valid[:, None, None]
    if _unlimited(window):
        return seen
    return seen & (slots.position[queries][:, :, None] - slots.position[keys][:, None, :] < window)


def _masked(products: Float[Array, "C K rows columns"], mask: Array, options: BlockOptions, dim: int) -> Array:
    """Scores; MASKED outside the mask [C S S], which applies to all query heads of a slot."""
    scores = scores_of(products, dim, options.scale, options.softcap)
    heads = [n // s for n, s in zip(products.shape[2:], mask.shape[1:], strict=True)]
    num, kv_heads = products.shape[:2]
    parts = scores.reshape(num, kv_heads, mask.shape[1], heads[0], mask.shape[2], heads[1])
    return jnp.where(mask[:, None, :, None, :, None], parts, MASKED).reshape(scores.shape)


def _dot(a: Array, b: Array, over_a: int, over_b: int) -> Array:
    """Products per block and head; sums are f32."""
    return lax.dot_general(a, b, (((over_a,), (over_b,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


def _to_blocks(x: Float[Array, "B T K *G H"], size: int) -> Float[Array, "Q K M H"]:
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)))
    blocks = x.reshape(-1, size, *x.shape[2:]).swapaxes(1, 2)
    return blocks.reshape(*blocks.shape[:2], -1, x.shape[-1])


def _from_blocks(x: Float[Array, "Q K M H"], like: Float[Array, "B T K *G H"]) -> Float[Array, "B T K *G H"]:
    """Inverse of `_to_blocks`, in the shape of `like`."""
    num, length, kv_heads, *heads, dim = like.shape
    x = x.reshape(*x.shape[:2], -1, *heads, dim).swapaxes(1, 2)
    return x.reshape(num, -1, kv_heads, *heads, dim)[:, :length]


def _at_a_time(qs: Float[Array, "Q K M H"], options: BlockOptions) -> int:
    """C, the number of query blocks processed at a time."""
    return max(1, min(qs.shape[0], options.at_a_time // (qs.shape[1] * qs.shape[2] * options.size)))


def _schedule(visible: Bool[Array, "B n n"], chunk: int) -> BlockSchedule:
    """Key blocks of each query block, as indices into all Q blocks."""
    num, n, _ = visible.shape
    count = jnp.sum(visible, axis=2, dtype=jnp.int32).reshape(-1)
    key_block = (
        jnp.argsort(~visible, axis=2, stable=True).astype(jnp.int32)
        + n * jnp.arange(num, dtype=jnp.int32)[:, None, None]
    )
    block = jnp.argsort(-count, stable=True).astype(jnp.int32)
    pad = lambda x: jnp.pad(x, ((0, -len(x) % chunk), *((0, 0),) * (x.ndim - 1)))  # noqa: E731
    found = BlockSchedule(block, key_block.reshape(-1, n)[block], count[block])
    return jax.tree.map(lambda x: pad(x).reshape(-1, chunk, *x.shape[1:]), found)


class BlockPairs(NamedTuple):
    """Pairs of a query block and a key block visible to it, in chunks of C."""

    query: Int[Array, "chunks C"]
    key: Int[Array, "chunks C"]
    valid: Bool[Array, "chunks C"]
    """False for the padding after the last pair."""


def _pairs(visible: Bool[Array, "B n n"], chunk: int) -> BlockPairs:
    num, n, _ = visible.shape
    most = num * n * (n + 1) // 2
    (flat,) = jnp.nonzero(visible.reshape(-1), size=most + -most % chunk, fill_value=0)
    flat, valid = flat.astype(jnp.int32).reshape(-1, chunk), jnp.arange(flat.shape[0]) < jnp.sum(visible)
    return BlockPairs(flat // n, flat // n**2 * n + flat % n, valid.reshape(-1, chunk))


def _for_each_key_block(schedule: BlockSchedule, num: int, step: Callable, start: Any, finish: Callable) -> Any:
    """Loop over each query block's key blocks.

    Args:
        schedule: query blocks and their key blocks.
        num: Q.
        step: (block, key block, valid, carry) -> carry; `valid` [C] is False for query blocks without a further key block.
        start: initial carry.
        finish: carry -> result.

    Returns:
        Results in the order of the blocks.
    """

    def chunk(part: BlockSchedule) -> Any:
        def body(i: Array, carry: Any) -> Any:
            return step(part.block, part.key_block[:, i], i < part.count, carry)

        return finish(lax.fori_loop(0, part.count[0], body, start))

    done = lax.map(chunk, schedule)
    order = jnp.argsort(schedule.block.reshape(-1)[:num])
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[order], done)
