"""What decode remembers: keys and values of prompts, and of what was decoded behind them, one array a layer.

Letters: U units, each one prompt with F rows that read its one copy; B = U * F rows; S prompt slots; W window, the slots of the
rows' own keys. Arrays are `[units or rows, K, slots, H]`.

The rows' own cache is a ring with one write index for all of them: key number `count` lies at slot `count` modulo the ring's
size, and a row of age a sees the last a + 1 keys written. So a row that joins late needs nothing but an age of its own.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.types import PyTree

# The reach of a layer that does not slide: more keys than there are.
WHOLE = 2**31 - 1
AXES = ("rows", "heads", None, None)


class PromptCache(flax.struct.PyTreeNode):
    """Keys and values of prompts, once a unit.

    A sliding layer keeps min(window, S) slots: the last keys that count, from position max(length - size, 0) on.
    """

    k: tuple[Float[Array, "U K S H"], ...]
    v: tuple[Float[Array, "U K S H"], ...]


class SuffixCache(flax.struct.PyTreeNode):
    """Keys and values of what each row decoded, all rows written at the same slot.

    A sliding layer's ring has min(window, W) slots.
    """

    k: tuple[Float[Array, "B K W H"], ...]
    v: tuple[Float[Array, "B K W H"], ...]


def reaches(cfg: ModelConfig) -> tuple[int, ...]:
    """Keys that a query sees, one entry a layer."""
    return tuple(cfg.window if cfg.slides(i) else WHOLE for i in range(cfg.layers))


def empty_suffix(cfg: ModelConfig, rows: int, slots: int, layout: Layout) -> SuffixCache:
    return SuffixCache(*(_zeros(cfg, rows, slots, layout) for _ in "kv"))


def empty_prompt(cfg: ModelConfig, units: int, slots: int, layout: Layout) -> PromptCache:
    return PromptCache(*(_zeros(cfg, units, slots, layout) for _ in "kv"))


def _zeros(cfg: ModelConfig, num: int, slots: int, layout: Layout) -> tuple[Array, ...]:
    shapes = [(num, cfg.kv_heads, min(slots, reach), cfg.head_dim) for reach in reaches(cfg)]
    return tuple(layout.constrain(jnp.zeros(shape, cfg.compute), *AXES) for shape in shapes)


def shardings(tree: PyTree, layout: Layout) -> PyTree:
    """Where caches, and integers with an entry a unit or row, lie."""
    return jax.tree.map(lambda x: layout.sharding(AXES[: x.ndim]), tree)


def first_slot(length: Int[Array, "..."], size: int) -> Int[Array, "..."]:
    """Position of the first of `size` slots that hold the last of `length` keys, or all of them."""
    return jnp.maximum(length - size, 0)


def latest(x: Float[Array, "U S K H"], length: Int[Array, " U"], size: int) -> Float[Array, "U W K H"]:
    """W = `size` slots of each prompt, from `first_slot` on."""
    if size == x.shape[1]:
        return x
    return jax.vmap(lambda x, first: jax.lax.dynamic_slice_in_dim(x, first, size))(x, first_slot(length, size))


def write(x: Float[Array, "B K W H"], new: Float[Array, "B 1 K H"], count: Int[Array, ""]) -> Float[Array, "B K W H"]:
    """Key or value number `count` of every row."""
    return jax.lax.dynamic_update_slice(x, new.swapaxes(1, 2), (0, 0, jax.lax.rem(count, x.shape[2]), 0))


def seen(size: int, count: Int[Array, ""], age: Int[Array, " U"]) -> Bool[Array, "U size"]:
    """Slots of a ring that rows of this age see once number `count` is written: the newest age + 1."""
    return jnp.mod(count - jnp.arange(size), size) <= age[:, None]


def seen_of_prompt(size: int, length: Int[Array, " U"], age: Int[Array, " U"], reach: int) -> Bool[Array, "U size"]:
    """Slots of the prompts that a layer keeps and that rows of this age see."""
    if reach == WHOLE:
        return jnp.arange(size) < length[:, None]
    key = first_slot(length[:, None], size) + jnp.arange(size)
    return (key < length[:, None]) & (length[:, None] + age[:, None] - key < reach)


def grow(suffix: SuffixCache, slots: int, count: Int[Array, ""], cfg: ModelConfig, layout: Layout) -> SuffixCache:
    """Rings of a window of `slots`, after `count` keys were written; the next key is number W, the old window."""
    window = max(x.shape[2] for x in suffix.k)

    def wider(x: Array, reach: int) -> Array:
        size = x.shape[2]
        x = jnp.roll(x, window - count, axis=2)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, min(slots, reach) - size), (0, 0)))
        return layout.constrain(x, *AXES)

    return jax.tree.map(wider, suffix, SuffixCache(k=reaches(cfg), v=reaches(cfg)))


def take(cache: PyTree, index: Int[Array, " n"], layout: Layout) -> PyTree:
    """Entries `index` along the first axis; indices count within each shard of the rows, so nothing moves between devices."""
    return _by_shard(lambda cache, index: jax.tree.map(lambda x: x[index], cache), layout)(cache, index)


def insert(cache: PyTree, new: PyTree, where: Int[Array, " n"], source: Int[Array, " n"], layout: Layout) -> PyTree:
    """`cache` with entry where[i] replaced by new[source[i]], counted within each shard of the rows; out of range: left out."""

    def put(cache: PyTree, new: PyTree, where: Array, source: Array) -> PyTree:
        return jax.tree.map(lambda x, n: x.at[where].set(n[source], mode="drop"), cache, new)

    return _by_shard(put, layout)(cache, new, where, source)


def _by_shard(f: Callable[..., PyTree], layout: Layout) -> Callable[..., PyTree]:
    """`f` on each device's own part of its arguments; it returns something like the first."""

    def call(*args: PyTree) -> PyTree:
        spec = jax.tree.map(lambda where: where.spec, shardings(args, layout))
        return jax.shard_map(f, mesh=layout.mesh, in_specs=spec, out_specs=spec[0])(*args)

    return call
