"""The likeliest tokens of a large vocabulary, without a sort of it and without moving its logits over the mesh.

The vocabulary is cut into parts, a part into lanes: lane l of it holds its tokens l, l + LANES, ... Neighbouring lanes lie next to
each other in memory, so that their maxima are found together. Each of the n largest logits lies in one of the n lanes with the
largest maxima, so only those lanes are searched.
"""

from collections.abc import Iterator
from functools import reduce

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.model.distribution import drawable, tempered
from jaxrl_llm.parallel.layout import Layout

# Numbers, whatever the mesh, and powers of two: a `tensor` shard holds whole parts, and what is found does not depend on the split.
PARTS, LANES = 64, 64


class Allowed(flax.struct.PyTreeNode):
    """Which ids a row may draw."""

    barred: Bool[Array, " B"]
    """None of the end tokens."""
    size: int = flax.struct.field(pytree_node=False)
    ends: tuple[int, ...] = flax.struct.field(pytree_node=False)

    def __call__(self, token: Int[Array, "B ..."]) -> Bool[Array, "B ..."]:
        """Of ids a row, or of the same for all (B = 1). The id -1, which is none, never."""
        return (token >= 0) & drawable(token, self.size, self.ends, self.barred[(..., *(None,) * (token.ndim - 1))])


def likeliest(
    x: Float[Array, "B V"], allowed: Allowed, count: int, layout: Layout
) -> tuple[Float[Array, "B count"], Int[Array, "B count"]]:
    """The `count` largest logits that are allowed, largest first, and their ids; -inf, -1 where there are fewer. Exact.

    Equal logits stand in the order of (part, lane, place in the lane), in a vocabulary too small for lanes in that of ids.
    Each shard of the vocabulary finds its own; those alone cross the mesh.
    """
    vocab, shards = x.shape[1], layout.size("vocab")
    parts = PARTS if vocab > 2 * PARTS * LANES and count < PARTS * LANES else 0
    if shards == 1 or vocab % shards or (parts and (vocab % parts or parts % shards)):
        return _search(x, allowed, count, parts, 0)

    def own(x: Array, allowed: Allowed) -> tuple[Array, Array]:
        first = jax.lax.axis_index(layout.rules["vocab"]) * x.shape[1]
        return _search(x, allowed, count, parts // shards, first)

    split, rows = (layout.sharding(axes).spec for axes in (("rows", "vocab"), ("rows",)))
    found = jax.shard_map(own, mesh=layout.mesh, in_specs=(split, rows), out_specs=split)(x, allowed)
    values, ids = (layout.constrain(part, "rows", None) for part in found)
    values, place = jax.lax.top_k(values, count)
    return values, jnp.take_along_axis(ids, place, axis=-1)


def mass(
    x: Float[Array, "B V"], allowed: Allowed, largest: Float[Array, "B 1"], temperature: Float[Array, " B"]
) -> Float[Array, "B 1"]:
    """Sum of exp((x - largest) / temperature) over the tokens that are allowed."""
    vocab = x.shape[1]
    pieces = _lanes(x, PARTS) if vocab > 2 * PARTS * LANES else [(x[:, None], jnp.arange(vocab)[None])]
    flat = ((piece.reshape(len(x), -1), token.reshape(1, -1)) for piece, token in pieces)
    sums = (jnp.where(allowed(token), jnp.exp(tempered(piece, largest, temperature)), 0.0) for piece, token in flat)
    return jnp.sum(reduce(jnp.add, sums), axis=-1, keepdims=True)


def _search(
    x: Float[Array, "B V"], allowed: Allowed, count: int, parts: int, first: Int[Array, ""] | int
) -> tuple[Float[Array, "B count"], Int[Array, "B count"]]:
    """`likeliest` of logits whose ids start at `first`, in so many parts; 0: without lanes."""
    rows, vocab = x.shape
    if parts:
        maxima = (jnp.where(allowed(_shift(token, first)[None]), piece, -jnp.inf) for piece, token in _lanes(x, parts))
        maxima = reduce(jnp.maximum, maxima).reshape(rows, -1)
        # In the order of lanes, so that equal logits stand in it too.
        lane = jnp.sort(jax.lax.top_k(maxima, min(count, parts * LANES))[1], axis=-1)[..., None]
        size = -(-vocab // parts)
        token = _token(lane // LANES, lane % LANES, jnp.arange(-(-size // LANES)), size, vocab).reshape(rows, -1)
        x = jnp.take_along_axis(x, jnp.maximum(token, 0), axis=-1)
    else:
        token = jnp.broadcast_to(jnp.arange(vocab), x.shape)
    ids = _shift(token, first)
    values, place = jax.lax.top_k(jnp.where(allowed(ids), x, -jnp.inf), min(count, x.shape[1]))
    ids = jnp.where(values > -jnp.inf, jnp.take_along_axis(ids, place, axis=-1), -1)
    fill = ((0, 0), (0, count - ids.shape[1]))
    return jnp.pad(values, fill, constant_values=-jnp.inf), jnp.pad(ids, fill, constant_values=-1)


def _lanes(
    x: Float[Array, "B V"], count: int
) -> Iterator[tuple[Float[Array, "B parts lanes"], Int[Array, "parts lanes"]]]:
    """The logits at each place of every lane of so many parts, with their places in `x`, -1 where there is none.

    Slices: XLA:CPU reduces them together in one vectorised pass over memory; a reduction over a strided axis takes five times as
    long.
    """
    parts = jnp.pad(x, ((0, 0), (0, -x.shape[1] % count))).reshape(len(x), count, -1)
    size = parts.shape[2]
    for place in range(-(-size // LANES)):
        start = min(place * LANES, size - LANES)
        yield (
            parts[..., start : start + LANES],
            _token(jnp.arange(count)[:, None], jnp.arange(LANES), place, size, x.shape[1]),
        )


def _token(part: Array, lane: Array, place: Array | int, size: int, vocab: int) -> Array:
    """What stands at a place of a lane; -1: nothing. A part's last slice lies over the one before where it would be short."""
    at = jnp.minimum(place * LANES, size - LANES) + lane
    token = part * size + at
    return jnp.where((at >= place * LANES) & (token < vocab), token, -1)


def _shift(token: Array, first: Array | int) -> Array:
    return jnp.where(token >= 0, token + first, -1)
