"""Moves of KV cache entries: into larger rings, between batches, and into the rings of rows that join. Dimensions as in `cache`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxrl_llm.model.cache import (
    KVArray,
    PromptCache,
    SuffixCache,
    attention_windows,
    constrain,
    first_position,
    map_arrays,
    num_slots,
    shardings,
)
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.types import PyTree


def extend_suffix(
    suffix: SuffixCache, slots: int, count: Int[Array, ""], cfg: ModelConfig, layout: Layout
) -> SuffixCache:
    """Copy the rings into larger ones.

    Args:
        suffix: the rings, W slots each (fewer in layers with a shorter attention window).
        slots: slots of the new rings.
        count: keys written so far. In the new rings the next key is number W.
        cfg: the model.
        layout: decode layout.
    """
    old_slots = max(num_slots(x) for x in suffix.v)

    def extend(x: KVArray, window: int, transposed: bool) -> KVArray:
        more = min(slots, window) - num_slots(x, transposed)

        def one(x: Array, axis: int) -> Array:
            pad = [(0, more if i == axis else 0) for i in range(x.ndim)]
            return jnp.pad(jnp.roll(x, old_slots - count, axis=axis), pad)

        return constrain(map_arrays(one, x, transposed=transposed), layout)

    def extend_all(entries: tuple[KVArray, ...], transposed: bool) -> tuple[KVArray, ...]:
        return tuple(extend(x, window, transposed) for x, window in zip(entries, attention_windows(cfg), strict=True))

    return suffix.replace(k=extend_all(suffix.k, suffix.format.transposed), v=extend_all(suffix.v, False))


def join_suffix(
    suffix: SuffixCache,
    new: PromptCache,
    where: tuple[Int[Array, " n"], Int[Array, " n"], Int[Array, " n"]],
    count: Int[Array, ""],
    layout: Layout,
) -> SuffixCache:
    """Write the last keys and values of whole sequences into rows' rings, as if the rows had decoded them just now.

    Args:
        suffix: the rings.
        new: keys and values of n sequences: a prompt and the tokens after it.
        where: for each sequence its row in `suffix`, local to each row shard and ignored if out of range, the position of the
            row's first own key, and the number of its own keys.
        count: keys written so far. Own key i of a row of n keys takes the place of key number count - n + i.
        layout: decode layout.
    """

    def join(suffix: SuffixCache, new: PromptCache, where: tuple[Array, Array, Array], count: Array) -> SuffixCache:
        row, first, number = where

        def one(x: KVArray, y: KVArray, transposed: bool) -> KVArray:
            size, known = num_slots(x, transposed), num_slots(y)
            own = number[:, None] - 1 - jnp.mod(count - 1 - jnp.arange(size), size)
            source = first[:, None] + own - first_position(first + number, known)[:, None]
            # Slots older than the row are masked, whatever they hold.
            source = jnp.clip(source, 0, known - 1)

            def put(x: Array, y: Array, axis: int) -> Array:
                y = jnp.take_along_axis(y, source.reshape(len(source), 1, size, *(1,) * (y.ndim - 3)), axis=2)
                return x.at[row].set(y.swapaxes(2, 3) if axis == 3 else y, mode="drop")

            return map_arrays(put, x, y, transposed=transposed)

        def all_layers(rings: tuple, sequences: tuple, transposed: bool) -> tuple[KVArray, ...]:
            return tuple(one(x, y, transposed) for x, y in zip(rings, sequences, strict=True))

        return suffix.replace(
            k=all_layers(suffix.k, new.k, suffix.format.transposed), v=all_layers(suffix.v, new.v, False)
        )

    return _by_shard(join, layout)(suffix, new, where, count)


def take(cache: PyTree, index: Int[Array, " n"], layout: Layout) -> PyTree:
    """Entries `index` along the first axis. Indices are local to each row shard, so nothing moves between devices."""
    return _by_shard(lambda cache, index: jax.tree.map(lambda x: x[index], cache), layout)(cache, index)


def insert(cache: PyTree, new: PyTree, where: Int[Array, " n"], source: Int[Array, " n"], layout: Layout) -> PyTree:
    """Replace entry where[i] of `cache` by new[source[i]].

    Args:
        cache: entries along the first axis.
        new: entries of the same shape.
        where: indices into `cache`, local to each row shard; indices out of range are ignored.
        source: indices into `new`, local to each row shard.
        layout: decode layout.
    """

    def put(cache: PyTree, new: PyTree, where: Array, source: Array) -> PyTree:
        return jax.tree.map(lambda x, n: x.at[where].set(n[source], mode="drop"), cache, new)

    return _by_shard(put, layout)(cache, new, where, source)


def _by_shard(f: Callable[..., PyTree], layout: Layout) -> Callable[..., PyTree]:
    """Run `f` on each device's shard of its arguments; the result is sharded like the first."""

    def call(*args: PyTree) -> PyTree:
        spec = jax.tree.map(lambda where: where.spec, shardings(args, layout))
        return jax.shard_map(f, mesh=layout.mesh, in_specs=spec, out_specs=spec[0])(*args)

    return call
