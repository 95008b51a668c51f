"""The likeliest tokens of a large vocabulary, without a sort of it and without moving its logits over the mesh.

The vocabulary is cut into parts, a part into lanes: lane l of it holds its tokens l, l + LANES, ... Neighboring lanes lie next to
each other in memory, so that their maxima are found together. Each of the n largest logits lies in one of the n lanes with the
largest maxima, so only those lanes are searched.
"""

from collections.abc import Iterator
from functools import reduce
from types import ModuleType

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.distribution.score import drawable
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.types import ArrayLike

# Numbers, whatever the mesh, and powers of two: a `tensor` shard holds whole parts, and what is found does not depend on the split.
PARTS, LANES = 64, 64


class Allowed(flax.struct.PyTreeNode):
    """Which ids a row may draw."""

    eos_masked: Bool[Array, " B"]
    """None of the end tokens."""
    size: int = flax.struct.field(pytree_node=False)
    ends: tuple[int, ...] = flax.struct.field(pytree_node=False)

    def __call__(self, token: Int[Array, "B ..."]) -> Bool[Array, "B ..."]:
        """Of ids a row, or of the same for all (B = 1). The id -1, which is none, never."""
        return (token >= 0) & drawable(token, self.size, self.ends, self.eos_masked[(..., *(None,) * (token.ndim - 1))])

    def keep(self, x: Float[Array, "B ..."], token: Int[np.ndarray, "..."], other: float) -> Float[Array, "B ..."]:
        """`x`, which belongs to the tokens, with `other` where they are not allowed. Costs nothing where all always are."""
        always = (token >= 0) & (token < self.size) & ~np.isin(token, self.ends)
        return x if always.all() else jnp.where(self(jnp.asarray(token)[None]), x, other)


def likeliest(
    x: Float[Array, "B V"], allowed: Allowed, count: int, layout: Layout
) -> tuple[Float[Array, "B count"], Int[Array, "B count"]]:
    """The `count` largest logits that are allowed, largest first, and their ids; -inf, -1 where there are fewer. Exact.

    Equal logits stand in the order of (part, lane, place in the lane), in a vocabulary too small for lanes in that of ids.
    Each shard of the vocabulary finds its own; those alone cross the mesh.
    """
    vocab, shards = x.shape[1], layout.size("vocab")
    maxima = None
    if _is_large(vocab) and count < PARTS * LANES:
        maxima = reduce(jnp.maximum, (allowed.keep(piece, token, -jnp.inf) for piece, token in _lanes(x)))
    if shards == 1 or vocab % shards or (maxima is not None and (vocab % PARTS or PARTS % shards)):
        return _search(x, maxima, allowed, count, 0)

    def own(x: Array, maxima: Array | None, allowed: Allowed) -> tuple[Array, Array]:
        return _search(x, maxima, allowed, count, jax.lax.axis_index(layout.rules["vocab"]) * x.shape[1])

    split, rows = (layout.sharding(axes).spec for axes in (("rows", "vocab"), ("rows",)))
    found = jax.shard_map(own, mesh=layout.mesh, in_specs=(split, split, rows), out_specs=split)(x, maxima, allowed)
    values, ids = (layout.constrain(part, "rows", None) for part in found)
    values, place = jax.lax.top_k(values, count)
    return values, jnp.take_along_axis(ids, place, axis=-1)


def mass(
    x: Float[Array, "B V"], allowed: Allowed, largest: Float[Array, "B 1"], temperature: Float[Array, " B"]
) -> Float[Array, "B 1"]:
    """Sum of exp((x - largest) / temperature) over the tokens that are allowed; at temperature 0 how many are as large."""
    # As a factor, the largest float at temperature 0: what `tempered` says up to rounding, in two operations an entry.
    factor = jnp.where(temperature == 0, jnp.finfo(jnp.float32).max, 1 / temperature)[:, None]
    pieces = _lanes(x) if _is_large(x.shape[1]) else [(x, np.arange(x.shape[1]))]
    flat = ((piece.reshape(len(x), -1), token.reshape(-1)) for piece, token in pieces)
    sums = (allowed.keep(jnp.exp((piece - largest) * factor), token, 0.0) for piece, token in flat)
    return jnp.sum(reduce(jnp.add, sums), axis=-1, keepdims=True)


def _is_large(vocab: int) -> bool:
    return vocab > 2 * PARTS * LANES


def _search(
    x: Float[Array, "B V"],
    maxima: Float[Array, "B parts lanes"] | None,
    allowed: Allowed,
    count: int,
    first: Int[Array, ""] | int,
) -> tuple[Float[Array, "B count"], Int[Array, "B count"]]:
    """`likeliest` of logits whose ids start at `first`, by the maxima of their lanes; or among all."""
    rows, vocab = x.shape
    if maxima is None:
        token = jnp.broadcast_to(jnp.arange(vocab), x.shape)
    else:
        parts = maxima.shape[1]
        maxima, size = maxima.reshape(rows, -1), -(-vocab // parts)
        # In the order of lanes, so that equal logits stand in it too.
        lane = jnp.sort(jax.lax.top_k(maxima, min(count, parts * LANES))[1], axis=-1)[..., None]
        token = _token(lane // LANES, lane % LANES, np.arange(-(-size // LANES)), size, vocab, jnp).reshape(rows, -1)
        x = jnp.take_along_axis(x, jnp.maximum(token, 0), axis=-1)
    ids = jnp.where(token >= 0, token + first, -1)
    values, place = jax.lax.top_k(jnp.where(allowed(ids), x, -jnp.inf), min(count, x.shape[1]))
    ids = jnp.where(values > -jnp.inf, jnp.take_along_axis(ids, place, axis=-1), -1)
    fill = ((0, 0), (0, count - ids.shape[1]))
    return jnp.pad(values, fill, constant_values=-jnp.inf), jnp.pad(ids, fill, constant_values=-1)


def _lanes(x: Float[Array, "B V"]) -> Iterator[tuple[Float[Array, "B parts lanes"], Int[np.ndarray, "parts lanes"]]]:
    """The logits at each place of every lane, and their ids, -1 where there is none.

    Slices: XLA:CPU reduces them together in one vectorized pass over memory; a reduction over a strided axis takes five times as
    long.
    """
    parts = jnp.pad(x, ((0, 0), (0, -x.shape[1] % PARTS))).reshape(len(x), PARTS, -1)
    size = parts.shape[2]
    for place in range(-(-size // LANES)):
        start = min(place * LANES, size - LANES)
        token = _token(np.arange(PARTS)[:, None], np.arange(LANES), np.asarray(place), size, x.shape[1], np)
        yield parts[..., start : start + LANES], token


def _token(part: ArrayLike, lane: ArrayLike, place: ArrayLike, size: int, vocab: int, xp: ModuleType) -> ArrayLike:
    """What stands at a place of a lane; -1: nothing. A part's last slice lies over the one before where it would be short."""
    at = xp.minimum(place * LANES, size - LANES) + lane
    token = part * size + at
    return xp.where((at >= place * LANES) & (token < vocab), token, -1)
