"""Top-k tokens of a large vocabulary, without sorting it and without moving its logits over the mesh.

The vocabulary is cut into parts, and a part is a matrix with PART_COLUMNS columns: column l holds tokens l, l + PART_COLUMNS, ...
Neighboring columns are adjacent in memory, so their maxima are found together. Each of the n largest logits is in one of the n
columns with the largest maxima, so only those columns are searched.
"""

from collections.abc import Iterator
from functools import reduce
from types import ModuleType

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.distribution.logits import is_allowed
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.types import ArrayLike

# The same for every mesh, and powers of two: a `tensor` shard holds whole parts, and the result does not depend on the split.
PARTS, PART_COLUMNS = 64, 64


class AllowedTokens(flax.struct.PyTreeNode):
    """Tokens that each row may sample."""

    eos_masked: Bool[Array, " B"]
    """The row may sample no end token."""
    size: int = flax.struct.field(pytree_node=False)
    ends: tuple[int, ...] = flax.struct.field(pytree_node=False)

    def __call__(self, token: Int[Array, "B ..."]) -> Bool[Array, "B ..."]:
        """True for allowed ids, per row or the same for all rows (B = 1). The id -1 is never allowed."""
        return (token >= 0) & is_allowed(
            token, self.size, self.ends, self.eos_masked[(..., *(None,) * (token.ndim - 1))]
        )

    def keep(self, x: Float[Array, "B ..."], token: Int[np.ndarray, "..."], other: float) -> Float[Array, "B ..."]:
        """`x` with `other` at tokens that are not allowed. Costs nothing if all are always allowed."""
        always = (token >= 0) & (token < self.size) & ~np.isin(token, self.ends)
        return x if always.all() else jnp.where(self(jnp.asarray(token)[None]), x, other)


def top_k_tokens(
    x: Float[Array, "B V"], allowed: AllowedTokens, count: int, layout: Layout
) -> tuple[Float[Array, "B count"], Int[Array, "B count"]]:
    """The `count` largest allowed logits, largest first, and their ids; -inf and -1 after the last one. Exact.

    Equal logits are ordered by (part, column, row of the column), or by id in a small vocabulary. Each shard of the vocabulary
    finds its own, and only those cross the mesh.

    Args:
        x: logits.
        allowed: tokens that may be found.
        count: number of logits.
        layout: of the logits.
    """
    vocab, shards = x.shape[1], layout.size("vocab")
    maxima = None
    if _is_large(vocab) and count < PARTS * PART_COLUMNS:
        maxima = reduce(jnp.maximum, (allowed.keep(piece, token, -jnp.inf) for piece, token in _columns(x)))
    if shards == 1 or vocab % shards or (maxima is not None and (vocab % PARTS or PARTS % shards)):
        return _search(x, maxima, allowed, count, 0)

    def own(x: Array, maxima: Array | None, allowed: AllowedTokens) -> tuple[Array, Array]:
        return _search(x, maxima, allowed, count, jax.lax.axis_index(layout.rules["vocab"]) * x.shape[1])

    split, rows = (layout.sharding(axes).spec for axes in (("rows", "vocab"), ("rows",)))
    found = jax.shard_map(own, mesh=layout.mesh, in_specs=(split, split, rows), out_specs=split)(x, maxima, allowed)
    values, ids = (layout.constrain(part, "rows", None) for part in found)
    values, place = jax.lax.top_k(values, count)
    return values, jnp.take_along_axis(ids, place, axis=-1)


def mass(
    x: Float[Array, "B V"], allowed: AllowedTokens, largest: Float[Array, "B 1"], temperature: Float[Array, " B"]
) -> Float[Array, "B 1"]:
    """Sum of exp((x - largest) / temperature) over the allowed tokens; at temperature 0 the number of largest ones."""
    # A factor, which is the largest float at temperature 0: `tempered` up to rounding, in two operations per entry.
    factor = jnp.where(temperature == 0, jnp.finfo(jnp.float32).max, 1 / temperature)[:, None]
    pieces = _columns(x) if _is_large(x.shape[1]) else [(x, np.arange(x.shape[1]))]
    flat = ((piece.reshape(len(x), -1), token.reshape(-1)) for piece, token in pieces)
    sums = (allowed.keep(jnp.exp((piece - largest) * factor), token, 0.0) for piece, token in flat)
    return jnp.sum(reduce(jnp.add, sums), axis=-1, keepdims=True)


def _is_large(vocab: int) -> bool:
    return vocab > 2 * PARTS * PART_COLUMNS


def _search(
    x: Float[Array, "B V"],
    maxima: Float[Array, "B parts columns"] | None,
    allowed: AllowedTokens,
    count: int,
    first: Int[Array, ""] | int,
) -> tuple[Float[Array, "B count"], Int[Array, "B count"]]:
    """`top_k_tokens` of logits whose ids start at `first`, by the maxima of their columns, or among all if None."""
    rows, vocab = x.shape
    if maxima is None:
        token = jnp.broadcast_to(jnp.arange(vocab), x.shape)
    else:
        parts = maxima.shape[1]
        maxima, size = maxima.reshape(rows, -1), -(-vocab // parts)
        # In the order of columns, so that equal logits keep it.
        column = jnp.sort(jax.lax.top_k(maxima, min(count, parts * PART_COLUMNS))[1], axis=-1)[..., None]
        token = _token(
            column // PART_COLUMNS, column % PART_COLUMNS, np.arange(-(-size // PART_COLUMNS)), size, vocab, jnp
        ).reshape(rows, -1)
        x = jnp.take_along_axis(x, jnp.maximum(token, 0), axis=-1)
    ids = jnp.where(token >= 0, token + first, -1)
    values, place = jax.lax.top_k(jnp.where(allowed(ids), x, -jnp.inf), min(count, x.shape[1]))
    ids = jnp.where(values > -jnp.inf, jnp.take_along_axis(ids, place, axis=-1), -1)
    fill = ((0, 0), (0, count - ids.shape[1]))
    return jnp.pad(values, fill, constant_values=-jnp.inf), jnp.pad(ids, fill, constant_values=-1)


def _columns(
    x: Float[Array, "B V"],
) -> Iterator[tuple[Float[Array, "B parts columns"], Int[np.ndarray, "parts columns"]]]:
    """Logits of each row of the parts' matrices, and their ids, -1 after the last one.

    They are slices: XLA:CPU reduces them together in one vectorized pass over memory; a reduction over a strided axis takes five
    times as long.
    """
    parts = jnp.pad(x, ((0, 0), (0, -x.shape[1] % PARTS))).reshape(len(x), PARTS, -1)
    size = parts.shape[2]
    for place in range(-(-size // PART_COLUMNS)):
        start = min(place * PART_COLUMNS, size - PART_COLUMNS)
        token = _token(np.arange(PARTS)[:, None], np.arange(PART_COLUMNS), np.asarray(place), size, x.shape[1], np)
        yield parts[..., start : start + PART_COLUMNS], token


def _token(part: ArrayLike, column: ArrayLike, place: ArrayLike, size: int, vocab: int, xp: ModuleType) -> ArrayLike:
    """Token at a row of a column; -1: none. A part's last slice overlaps the one before it if it would be short."""
    at = xp.minimum(place * PART_COLUMNS, size - PART_COLUMNS) + column
    token = part * size + at
    return xp.where((at >= place * PART_COLUMNS) & (token < vocab), token, -1)
