"""Top-k over a large vocabulary, without sorting it and without moving its logits over the mesh.

The vocabulary is split into blocks, and each block into columns: column c holds the block's tokens c, c + COLUMNS, ... Neighboring
columns are adjacent in memory, so that their maxima are computed together. Each of the n largest logits lies in one of the n
columns with the largest maxima, so only those columns are searched.
"""

from collections.abc import Iterator
from functools import reduce
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.types import ArrayLike

# Fixed numbers, independent of the mesh, so that the result does not depend on the sharding. Powers of two: a `tensor` shard holds
# whole blocks.
BLOCKS, COLUMNS = 64, 64


def most_likely(
    x: Float[Array, "B V"], num_tokens: int, count: int, layout: Layout
) -> tuple[Float[Array, "B count"], Int[Array, "B count"]]:
    """Return the `count` largest logits above -inf of tokens, largest first, and their ids, padded with -inf and -1. Exact.

    Equal logits are ordered by (block, column, index in the column), or by id in a vocabulary too small for columns. Each shard of
    the vocabulary searches its own logits; only the results cross the mesh.

    Args:
        x: logits; -inf where not allowed.
        num_tokens: tokens of the tokenizer; larger ids are padding of the vocabulary.
        count: number of tokens to return.
        layout: sharding of rows and vocabulary.
    """
    vocab, shards = x.shape[1], layout.size("vocab")
    maxima = None
    if _is_large(vocab) and count < BLOCKS * COLUMNS:
        maxima = reduce(jnp.maximum, (_keep(piece, token, num_tokens, -jnp.inf) for piece, token in _columns(x)))
    if shards == 1 or vocab % shards or (maxima is not None and (vocab % BLOCKS or BLOCKS % shards)):
        return _search(x, maxima, num_tokens, count, 0)

    axis = layout.rules["vocab"]

    def own(x: Array, maxima: Array | None) -> tuple[Array, Array]:
        found = _search(x, maxima, num_tokens, count, jax.lax.axis_index(axis) * x.shape[1])
        values, ids = (jax.lax.all_gather(part, axis, axis=1, tiled=True) for part in found)
        # Here too each device has its own rows: outside, XLA:GPU would gather the values of all rows, and sort them everywhere.
        values, index = jax.lax.top_k(values, count)
        return values, jnp.take_along_axis(ids, index, axis=-1)

    split, rows = layout.sharding(("rows", "vocab")).spec, layout.sharding(("rows",)).spec
    # All devices of a row compute the same, which JAX cannot see.
    whole = jax.shard_map(own, mesh=layout.mesh, in_specs=(split, split), out_specs=(rows, rows), check_vma=False)
    return whole(x, maxima)


def total_weight(
    x: Float[Array, "B V"], num_tokens: int, largest: Float[Array, "B 1"], temperature: Float[Array, " B"]
) -> Float[Array, "B 1"]:
    """Return the sum of exp((x - largest) / temperature) over tokens; at temperature 0, the number of largest ones.

    Args:
        x: logits; -inf where not allowed.
        num_tokens: tokens of the tokenizer; larger ids are padding of the vocabulary.
        largest: largest allowed logit per row.
        temperature: per row.
    """
    # As a factor, the largest float at temperature 0: equal to `scale_by_temperature` up to rounding, in two operations per entry.
    factor = jnp.where(temperature == 0, jnp.finfo(jnp.float32).max, 1 / temperature)[:, None]
    pieces = _columns(x) if _is_large(x.shape[1]) else [(x, np.arange(x.shape[1]))]
    flat = ((piece.reshape(len(x), -1), token.reshape(-1)) for piece, token in pieces)
    sums = (_keep(jnp.exp((piece - largest) * factor), token, num_tokens, 0.0) for piece, token in flat)
    return jnp.sum(reduce(jnp.add, sums), axis=-1, keepdims=True)


def _keep(
    x: Float[Array, "B ..."], token: Int[np.ndarray, "..."], num_tokens: int, other: float
) -> Float[Array, "B ..."]:
    """Return `x`, whose entries belong to `token`, with `other` where that is no token. Free if all are tokens."""
    is_token = (token >= 0) & (token < num_tokens)
    return x if is_token.all() else jnp.where(is_token, x, other)


def _is_large(vocab: int) -> bool:
    return vocab > 2 * BLOCKS * COLUMNS


def _search(
    x: Float[Array, "B V"],
    maxima: Float[Array, "B blocks columns"] | None,
    num_tokens: int,
    count: int,
    first: Int[Array, ""] | int,
) -> tuple[Float[Array, "B count"], Int[Array, "B count"]]:
    """Return `most_likely` of logits whose ids start at `first`, using the maxima of their columns; None: searches all logits."""
    rows, vocab = x.shape
    if maxima is None:
        token = jnp.broadcast_to(jnp.arange(vocab), x.shape)
    else:
        blocks = maxima.shape[1]
        maxima, size = maxima.reshape(rows, -1), -(-vocab // blocks)
        # Sorted by column, so that ties are ordered by column as well.
        column = jnp.sort(jax.lax.top_k(maxima, min(count, blocks * COLUMNS))[1], axis=-1)[..., None]
        token = _token(column // COLUMNS, column % COLUMNS, np.arange(-(-size // COLUMNS)), size, vocab, jnp).reshape(
            rows, -1
        )
        x = jnp.take_along_axis(x, jnp.maximum(token, 0), axis=-1)
    ids = jnp.where(token >= 0, token + first, -1)
    values, index = jax.lax.top_k(jnp.where((ids >= 0) & (ids < num_tokens), x, -jnp.inf), min(count, x.shape[1]))
    ids = jnp.where(values > -jnp.inf, jnp.take_along_axis(ids, index, axis=-1), -1)
    fill = ((0, 0), (0, count - ids.shape[1]))
    return jnp.pad(values, fill, constant_values=-jnp.inf), jnp.pad(ids, fill, constant_values=-1)


def _columns(
    x: Float[Array, "B V"],
) -> Iterator[tuple[Float[Array, "B blocks columns"], Int[np.ndarray, "blocks columns"]]]:
    """Yield, for each index, the logits at that index of every column, and their ids, padded with -1.

    As slices, which XLA:CPU reduces in one vectorized pass over memory; a reduction over a strided axis takes five times as long.
    """
    blocks = jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCKS))).reshape(len(x), BLOCKS, -1)
    size = blocks.shape[2]
    for index in range(-(-size // COLUMNS)):
        start = min(index * COLUMNS, size - COLUMNS)
        token = _token(np.arange(BLOCKS)[:, None], np.arange(COLUMNS), np.asarray(index), size, x.shape[1], np)
        yield blocks[..., start : start + COLUMNS], token


def _token(block: ArrayLike, column: ArrayLike, index: ArrayLike, size: int, vocab: int, xp: ModuleType) -> ArrayLike:
    """Return the token at an index of a column; -1: none. A block's last slice overlaps the one before if it would be short."""
    at = xp.minimum(index * COLUMNS, size - COLUMNS) + column
    token = block * size + at
    return xp.where((at >= index * COLUMNS) & (token < vocab), token, -1)
