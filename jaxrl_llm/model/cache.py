"""What decode remembers: keys and values of prompts, and of what was decoded behind them, one array a layer.

Letters: U units, each one prompt with F rows that read its one copy; B = U * F rows; S prompt slots; W window, the slots of the
rows' own keys. Arrays are `[units or rows, K, slots, H]`; keys of a form that is `across`, `[rows, K, H, slots]`.

The rows' own cache is a ring with one write index for all of them: key number `count` lies at slot `count` modulo the ring's
size, and a row of age a sees the last a + 1 keys written. So a row that joins late needs nothing but an age of its own.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

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


class Form(NamedTuple):
    """How keys and values are held and written: speed, and in int8 rounding, alone. Chosen once, when programs are built."""

    int8: bool = False
    """As `Scaled`; else in the compute dtype."""
    across: bool = False
    """The rows' own keys lie `[B K H W]`: XLA:CPU sums over H twice as fast with the slots side by side."""
    in_place: bool = True
    """A write touches its slot alone. XLA:CPU has no such write of bfloat16: it casts the ring to f32 and back. There the ring is
    written anew, in a third of the time."""

    def number_bytes(self, cfg: ModelConfig) -> float:
        """Of one cached number, with its share of a scale."""
        return 1 + 4 / cfg.head_dim if self.int8 else jnp.dtype(cfg.compute).itemsize


PLAIN = Form()


class Caching(NamedTuple):
    """How prompts are read, and how prompts and rows are remembered."""

    prompt_slots: int
    """S: of a layer that does not slide."""
    chunk: int = WHOLE
    """Prompt tokens read at a time: that bounds activations, and scores to chunk * S per head."""
    form: Form = PLAIN


def choose_form(
    attention: Literal["auto", "dot", "across"], cache: Literal["compute", "int8"], cfg: ModelConfig, layout: Layout
) -> Form:
    """What was measured fastest where `layout` lies, or the form asked for."""
    cpu = layout.on_cpu
    int8 = cache == "int8"
    return Form(
        int8=int8,
        across=cpu if attention == "auto" else attention == "across",
        in_place=int8 or not cpu or cfg.compute != "bfloat16",
    )


class Scaled(flax.struct.PyTreeNode):
    """Keys or values as q scale, with one scale a head and slot: each entry is off by at most half a scale."""

    q: Int[Array, "*dims"]
    """int8, in the order of the array it stands for."""
    scale: Float[Array, "B K W"]
    """f32: the largest magnitude over H, through 127."""


Entries = Array | Scaled


class PromptCache(flax.struct.PyTreeNode):
    """Keys and values of prompts, once a unit.

    A sliding layer keeps min(window, S) slots: the last keys that count, from position max(length - size, 0) on.
    """

    k: tuple[Float[Array, "U K S H"] | Scaled, ...]
    v: tuple[Float[Array, "U K S H"] | Scaled, ...]


class SuffixCache(flax.struct.PyTreeNode):
    """Keys and values of what each row decoded, all rows written at the same slot.

    A sliding layer's ring has min(window, W) slots.
    """

    k: tuple[Float[Array, "B K W H"] | Float[Array, "B K H W"] | Scaled, ...]
    v: tuple[Float[Array, "B K W H"] | Scaled, ...]
    form: Form = flax.struct.field(pytree_node=False, default=PLAIN)


def reaches(cfg: ModelConfig) -> tuple[int, ...]:
    """Keys that a query sees, one entry a layer."""
    return tuple(cfg.window if cfg.slides(i) else WHOLE for i in range(cfg.layers))


def empty_suffix(cfg: ModelConfig, rows: int, slots: int, layout: Layout, form: Form = PLAIN) -> SuffixCache:
    keys, values = (_zeros(cfg, rows, slots, layout, form._replace(across=a)) for a in (form.across, False))
    return SuffixCache(keys, values, form)


def empty_prompt(cfg: ModelConfig, units: int, slots: int, layout: Layout, form: Form = PLAIN) -> PromptCache:
    return PromptCache(*(_zeros(cfg, units, slots, layout, form._replace(across=False)) for _ in "kv"))


def _zeros(cfg: ModelConfig, num: int, slots: int, layout: Layout, form: Form) -> tuple[Entries, ...]:
    def make(size: int) -> Entries:
        last = (cfg.head_dim, size) if form.across else (size, cfg.head_dim)
        x = jnp.zeros((num, cfg.kv_heads, *last), jnp.int8 if form.int8 else cfg.compute)
        return Scaled(x, jnp.zeros((num, cfg.kv_heads, size), jnp.float32)) if form.int8 else x

    return tuple(constrain(make(min(slots, reach)), layout) for reach in reaches(cfg))


def constrain(x: PyTree, layout: Layout) -> PyTree:
    """Hold arrays of caches to their places inside a jit."""
    return jax.tree.map(lambda x: layout.constrain(x, *AXES[: x.ndim]), x)


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


class Past(flax.struct.PyTreeNode):
    """Keys and values of one layer, of the chunks of prompts read so far."""

    k: Float[Array, "U W K H"]
    """Of a layer that sees all, all slots from position 0 on; of one that slides, the last W before the next chunk."""
    v: Float[Array, "U W K H"]
    kept: tuple[Float[Array, "U W K H"], Float[Array, "U W K H"]] | None = None
    """Of a layer that slides: those that decode sees, each prompt's own last W, once they are read."""

    def joined(self, k: Array, v: Array, start: Array) -> tuple[Array, Array, Array]:
        """The position of the first key, keys and values: those before and a chunk's, which begins at `start`."""
        if self.kept is None:
            write = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, start, 1)  # noqa: E731
            return jnp.zeros((), jnp.int32), write(self.k, k), write(self.v, v)
        join = lambda *parts: jnp.concatenate(parts, axis=1)  # noqa: E731
        return start - self.k.shape[1], join(self.k, k), join(self.v, v)

    def with_chunk(self, k: Array, v: Array, start: Array, length: Int[Array, " U"]) -> "Past":
        first, keys, values = self.joined(k, v, start)
        if self.kept is None:
            return Past(keys, values)
        size, chunk = self.k.shape[1], k.shape[1]
        # A prompt's last W are whole once the chunk with the last of them is read.
        begin = first_slot(length, size)
        whole = ((begin + size > start) & (begin + size <= start + chunk))[:, None, None, None]
        take = jax.vmap(lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, size))
        kept = (jnp.where(whole, take(x, begin - first), old) for x, old in zip((keys, values), self.kept, strict=True))
        return Past(keys[:, -size:], values[:, -size:], tuple(kept))

    def held(self, length: Int[Array, " U"], size: int, slots: int, form: Form, layout: Layout) -> tuple[Entries, ...]:
        """Keys and values as a `PromptCache` has them: the `size` slots that count, in an array of `slots`."""

        def one(x: Array) -> Entries:
            x = (x if self.kept else latest(x, length, size)).swapaxes(1, 2)
            x = jnp.pad(x, ((0, 0), (0, 0), (0, slots - size), (0, 0)))
            return constrain(rounded(x) if form.int8 else x, layout)

        return tuple(one(x) for x in self.kept or (self.k, self.v))


def nothing_read(cfg: ModelConfig, num: int, total: int, chunk: int, layout: Layout) -> tuple[Past, ...]:
    """Before the first chunk of `num` prompts of `total` tokens; one entry a layer."""

    def layer(reach: int) -> Past:
        size = reach if reach < total else total + -total % chunk
        blank = jnp.zeros((num, size, cfg.kv_heads, cfg.head_dim), cfg.compute)
        blank = layout.constrain(blank, "rows", None, "heads", None)
        return Past(blank, blank, (blank, blank) if reach < total else None)

    return tuple(layer(reach) for reach in reaches(cfg))


def rounded(x: Float[Array, "*slots H"]) -> Scaled:
    """In int8. Zeros have scale 0."""
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1) / 127
    return Scaled(jnp.round(wide / jnp.where(scale > 0, scale, 1.0)[..., None]).astype(jnp.int8), scale)


def over_slots(f: Callable[..., Array], x: Entries, *others: Entries, across: bool = False) -> Entries:
    """`f(array, *arrays, axis)` of an entry's arrays, `axis` the one along which slots lie."""
    axis = 3 if across else 2
    if isinstance(x, Scaled):
        return Scaled(f(x.q, *(o.q for o in others), axis), f(x.scale, *(o.scale for o in others), 2))
    return f(x, *others, axis)


def num_slots(x: Entries, across: bool = False) -> int:
    return x.scale.shape[2] if isinstance(x, Scaled) else x.shape[3 if across else 2]


def write(x: Entries, new: Float[Array, "B 1 K H"], count: Int[Array, ""], form: Form, across: bool = False) -> Entries:
    """Key (`across` as the form has it) or value number `count` of every row."""
    slot = jax.lax.rem(count, num_slots(x, across))

    def put(x: Array, new: Array, axis: int) -> Array:
        if form.in_place:
            return jax.lax.dynamic_update_slice_in_dim(x, new, slot, axis)
        return jnp.where(jax.lax.broadcasted_iota(jnp.int32, (1,) * axis + x.shape[axis:], axis) == slot, new, x)

    new = new.swapaxes(1, 2)
    one = rounded(new) if form.int8 else new
    if across:
        one = one.replace(q=one.q.swapaxes(2, 3)) if form.int8 else one.swapaxes(2, 3)
    return over_slots(put, x, one, across=across)


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
    window = max(num_slots(x) for x in suffix.v)

    def wider(x: Entries, reach: int, across: bool) -> Entries:
        more = min(slots, reach) - num_slots(x, across)

        def one(x: Array, axis: int) -> Array:
            pad = [(0, more if i == axis else 0) for i in range(x.ndim)]
            return jnp.pad(jnp.roll(x, window - count, axis=axis), pad)

        return constrain(over_slots(one, x, across=across), layout)

    def all_wider(entries: tuple[Entries, ...], across: bool) -> tuple[Entries, ...]:
        return tuple(wider(x, reach, across) for x, reach in zip(entries, reaches(cfg), strict=True))

    return suffix.replace(k=all_wider(suffix.k, suffix.form.across), v=all_wider(suffix.v, False))


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
