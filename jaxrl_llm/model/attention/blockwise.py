"""Attention over whole rows, block of queries by block of keys: no [T, T] array, and no work where no query sees a key.

The forward pass keeps the output and each query's log-sum-exp, the backward pass makes the weights again (Dao et al. 2022,
FlashAttention). Which blocks of keys a block of queries sees is known from `until` (Wang et al. 2024, FlashMask).

In the forward pass several blocks of queries are worked on at a time, those that see the most blocks of keys first: so the blocks
of a turn have about as much to do, causal rows, packed rows and trees alike. The backward pass goes over the pairs of blocks.

Letters: B rows of n blocks of S slots, Q = B n blocks in all, C of them at a time; K key/value heads, G query heads each, M = S G
query rows of a block, H head dim.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.model.attention.plain import MASKED, Rows, scores_of
from jaxrl_llm.model.cache import WHOLE

# Scores that exist at a time, entries: a megabyte, which stays in a CPU core's caches.
AT_A_TIME = 2**18


class Blocks(NamedTuple):
    """How attention in blocks is computed; static."""

    size: int = 64
    """S, slots per block."""
    scale: float | None = None
    """What scores are multiplied by. None: H^-0.5."""
    softcap: float | None = None
    """c: scores become c tanh(scores / c)."""
    at_a_time: int = AT_A_TIME
    """Scores that exist at once, about."""


class Slots(NamedTuple):
    """Of a block: what the mask is made of."""

    slot: Int[Array, "Q S"]
    until: Int[Array, "Q S"]
    position: Int[Array, "Q S"]


class Turns(NamedTuple):
    """Blocks, those with the most partners first, in chunks of C; padded with blocks that have none."""

    block: Int[Array, "chunks C"]
    partner: Int[Array, "chunks C n"]
    """The blocks that it meets come first."""
    count: Int[Array, "chunks C"]


def attend_blocks(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    rows: Rows,
    reach: int | Int[Array, ""] = WHOLE,
    blocks: Blocks = Blocks(),  # noqa: B008
) -> Float[Array, "B T K G H"]:
    """`attend` under `tree_mask(rows, reach)`, block by block.

    Args:
        q: queries.
        k: keys.
        v: values.
        rows: which keys a query sees.
        reach: positions that a query looks back, its own counted.
        blocks: their size, and how scores are made.

    Returns:
        Per query the weighted values; zeros for a query that sees no key.
    """
    return _attend(q, k, v, rows, reach, blocks._replace(size=min(blocks.size, q.shape[1])))


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q: Array, k: Array, v: Array, rows: Rows, reach: Array, blocks: Blocks) -> Array:
    return _forward(q, k, v, rows, reach, blocks)[0]


def _forward(q: Array, k: Array, v: Array, rows: Rows, reach: Array, blocks: Blocks) -> tuple[Array, tuple]:
    slots, live = _slots(rows, reach, blocks.size)
    qs, ks, vs = (_to_blocks(x, blocks.size) for x in (q, k, v))
    num, kv_heads, queries, dim = qs.shape

    def step(at: Array, to: Array, meet: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out, total, top = carry
        scores = _masked(_dot(qs[at], ks[to], 3, 3), _mask(slots, at, to, meet, reach), blocks, dim)
        higher = jnp.maximum(top, jnp.max(scores, axis=-1))
        weights, before = jnp.exp(scores - higher[..., None]), jnp.exp(top - higher)
        out = out * before[..., None] + _dot(weights.astype(v.dtype), vs[to], 3, 2)
        return out, total * before + jnp.sum(weights, axis=-1), higher

    def finish(carry: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        out, total, top = carry
        # A query without a key, as padding is, gives zeros.
        total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)

    f32 = partial(jnp.full, dtype=jnp.float32)
    # The start of `top` lies above MASKED, so that the weights of a query without a key are 0, not 1.
    shapes = ((kv_heads, queries, dim), 0.0), ((kv_heads, queries), 0.0), ((kv_heads, queries), MASKED / 2)
    turns = _turns(live, _at_a_time(qs, blocks))
    start = tuple(f32((turns.block.shape[1], *s), x) for s, x in shapes)
    out, peak = _meet(turns, num, step, start, finish)
    return _from_blocks(out, q), (q, k, v, rows, reach, out, peak)


def _backward(blocks: Blocks, saved: tuple, g: Array) -> tuple[Array | None, ...]:
    q, k, v, rows, reach, out, peak = saved
    slots, live = _slots(rows, reach, blocks.size)
    qs, ks, vs, gs = (_to_blocks(x, blocks.size) for x in (q, k, v, g))
    dim = qs.shape[-1]
    inner = jnp.sum(gs.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    scale = dim**-0.5 if blocks.scale is None else blocks.scale

    def slope(weights: Array, scores: Array, dw: Array, mean: Array) -> Array:
        """Of the products q k', from the cotangents of the weights and their mean under the weights."""
        ds, cap = weights * (dw - mean) * scale, blocks.softcap
        return ds if cap is None else ds * (1 - jnp.square(jnp.maximum(scores, -cap) / cap))

    chunk = _at_a_time(qs, blocks)
    pairs = _pairs(live, chunk)

    def turn(i: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        """Scores lie [keys, queries] here: two of the products that sum over one of them then read along their rows."""
        at, to, meet = (x[i] for x in pairs)
        mask = _mask(slots, at, to, meet, reach).swapaxes(1, 2)
        scores = _masked(_dot(ks[to], qs[at], 3, 3), mask, blocks, dim)
        weights = jnp.exp(scores - peak[at][:, :, None])
        ds = slope(weights, scores, _dot(vs[to], gs[at], 3, 3), inner[at][:, :, None]).astype(q.dtype)
        parts = _dot(ds, ks[to], 2, 2), _dot(ds, qs[at], 3, 2), _dot(weights.astype(g.dtype), gs[at], 3, 2)
        return tuple(x.at[where].add(part) for x, where, part in zip(sums, (at, to, to), parts, strict=True))

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (qs, ks, vs))
    sums = lax.fori_loop(0, -(-jnp.sum(live) // chunk), turn, zeros)
    dq, dk, dv = (x.astype(like.dtype) for x, like in zip(sums, (q, k, v), strict=True))
    return _from_blocks(dq, q), _from_blocks(dk, k), _from_blocks(dv, v), None, None


_attend.defvjp(_forward, _backward)


def _slots(rows: Rows, reach: int | Array, size: int) -> tuple[Slots, Bool[Array, "B queries keys"]]:
    """The slots block by block, and which blocks of keys each block of queries sees at all."""
    until, position = rows
    num, length = until.shape
    pad = -length % size
    # Nobody sees a slot of padding.
    until, position = jnp.pad(until, ((0, 0), (0, pad))), jnp.pad(position, ((0, 0), (0, pad)))
    split = lambda x: x.reshape(num, -1, size)  # noqa: E731
    slot = split(jnp.broadcast_to(jnp.arange(length + pad, dtype=until.dtype), until.shape))
    until, position = split(until), split(position)
    first = slot[0, :, 0]
    last = jnp.max(jnp.where(until > slot, until, 0), axis=2)
    live = (first[:, None] >= first) & (first[:, None] < last[:, None, :])
    if not _whole(reach):
        live &= jnp.min(position, axis=2)[:, :, None] - jnp.max(position, axis=2)[:, None, :] < reach
    return Slots(*(x.reshape(-1, size) for x in (slot, until, position))), live


def _whole(reach: int | Array) -> bool:
    return isinstance(reach, int) and reach == WHOLE


def _mask(slots: Slots, queries: Array, keys: Array, meet: Array, reach: int | Array) -> Bool[Array, "C queries keys"]:
    """`tree_mask` of blocks of queries and of keys of the same row, where they are to `meet` [C]."""
    t, u = slots.slot[queries][:, :, None], slots.slot[keys][:, None, :]
    seen = (u <= t) & (t < slots.until[keys][:, None, :]) & meet[:, None, None]
    if _whole(reach):
        return seen
    return seen & (slots.position[queries][:, :, None] - slots.position[keys][:, None, :] < reach)


def _masked(products: Float[Array, "C K rows columns"], mask: Array, blocks: Blocks, dim: int) -> Array:
    """Scores; MASKED outside the mask [C S S], whose entries speak for all query heads of a slot."""
    scores = scores_of(products, dim, blocks.scale, blocks.softcap)
    heads = [n // s for n, s in zip(products.shape[2:], mask.shape[1:], strict=True)]
    num, kv_heads = products.shape[:2]
    parts = scores.reshape(num, kv_heads, mask.shape[1], heads[0], mask.shape[2], heads[1])
    return jnp.where(mask[:, None, :, None, :, None], parts, MASKED).reshape(scores.shape)


def _dot(a: Array, b: Array, over_a: int, over_b: int) -> Array:
    """Products of blocks and heads; sums are f32."""
    return lax.dot_general(a, b, (((over_a,), (over_b,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


def _to_blocks(x: Float[Array, "B T K *G H"], size: int) -> Float[Array, "Q K M H"]:
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)))
    blocks = x.reshape(-1, size, *x.shape[2:]).swapaxes(1, 2)
    return blocks.reshape(*blocks.shape[:2], -1, x.shape[-1])


def _from_blocks(x: Float[Array, "Q K M H"], like: Float[Array, "B T K *G H"]) -> Float[Array, "B T K *G H"]:
    """In the shape of `like`."""
    num, length, kv_heads, *heads, dim = like.shape
    x = x.reshape(*x.shape[:2], -1, *heads, dim).swapaxes(1, 2)
    return x.reshape(num, -1, kv_heads, *heads, dim)[:, :length]


def _at_a_time(qs: Float[Array, "Q K M H"], blocks: Blocks) -> int:
    """C."""
    return max(1, min(qs.shape[0], blocks.at_a_time // (qs.shape[1] * qs.shape[2] * blocks.size)))


def _turns(live: Bool[Array, "B n n"], chunk: int) -> Turns:
    """Each block's partners, as numbers among all Q."""
    num, n, _ = live.shape
    count = jnp.sum(live, axis=2, dtype=jnp.int32).reshape(-1)
    partner = (
        jnp.argsort(~live, axis=2, stable=True).astype(jnp.int32) + n * jnp.arange(num, dtype=jnp.int32)[:, None, None]
    )
    block = jnp.argsort(-count, stable=True).astype(jnp.int32)
    pad = lambda x: jnp.pad(x, ((0, -len(x) % chunk), *((0, 0),) * (x.ndim - 1)))  # noqa: E731
    found = Turns(block, partner.reshape(-1, n)[block], count[block])
    return jax.tree.map(lambda x: pad(x).reshape(-1, chunk, *x.shape[1:]), found)


class Pairs(NamedTuple):
    """A block of queries and one of keys that it sees, in chunks of C."""

    query: Int[Array, "chunks C"]
    key: Int[Array, "chunks C"]
    meet: Bool[Array, "chunks C"]
    """False: no pair, but padding behind the last."""


def _pairs(live: Bool[Array, "B n n"], chunk: int) -> Pairs:
    num, n, _ = live.shape
    most = num * n * (n + 1) // 2
    (flat,) = jnp.nonzero(live.reshape(-1), size=most + -most % chunk, fill_value=0)
    flat, meet = flat.astype(jnp.int32).reshape(-1, chunk), jnp.arange(flat.shape[0]) < jnp.sum(live)
    return Pairs(flat // n, flat // n**2 * n + flat % n, meet.reshape(-1, chunk))


def _meet(turns: Turns, num: int, step: Callable, start: Any, finish: Callable) -> Any:
    """`step(block, partner, meet, carry)` over each block's partners, then `finish`; results in the order of the blocks.

    A step is told in `meet` [C] which blocks have such a partner at all.
    """

    def chunk(own: Turns) -> Any:
        def turn(i: Array, carry: Any) -> Any:
            return step(own.block, own.partner[:, i], i < own.count, carry)

        return finish(lax.fori_loop(0, own.count[0], turn, start))

    done = lax.map(chunk, turns)
    place = jnp.argsort(turns.block.reshape(-1)[:num])
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[place], done)
