"""KV caches for decoding: keys and values of prompts and of the tokens decoded after them, one array per layer.

Dimensions: U sequence groups, each one prompt with F rows that share its one cached copy; B = U * F rows; S prompt slots;
W slots of the rows' own keys. Arrays are `[groups or rows, K, slots, H]`; transposed keys are `[rows, K, H, slots]`.

The rows' own cache is a ring buffer with one write index for all rows: key number `count` is stored in slot `count` modulo the
ring's size, and a row of age a attends to the last a + 1 keys written. So a row that joins late needs only its own age.
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

# Attention window of a layer without a sliding window: more keys than there are.
UNLIMITED = 2**31 - 1
AXES = ("rows", "heads", None, None)


class CacheFormat(NamedTuple):
    """Storage format of keys and values, chosen once when programs are built. Affects speed and, with int8, rounding."""

    int8: bool = False
    """Store `QuantizedKV`; otherwise arrays in the compute dtype."""
    transposed: bool = False
    """Store the rows' own keys as `[B K H W]`: XLA:CPU sums over H twice as fast when slots are contiguous."""
    in_place: bool = True
    """Write only the new slot. XLA:CPU cannot do this in bfloat16: it casts the ring to f32 and back. There the whole ring is
    rewritten, in a third of the time."""

    def number_bytes(self, cfg: ModelConfig) -> float:
        """Bytes per cached number, including its share of a scale."""
        return 1 + 4 / cfg.head_dim if self.int8 else jnp.dtype(cfg.compute).itemsize


DEFAULT_FORMAT = CacheFormat()


class Caching(NamedTuple):
    """Options of prefill and of the caches."""

    prompt_slots: int
    """S, for a layer without a sliding window."""
    chunk: int = UNLIMITED
    """Prompt tokens per prefill chunk: bounds activations, and attention scores to chunk * S per head."""
    format: CacheFormat = DEFAULT_FORMAT


def choose_cache_format(
    attention: Literal["auto", "dot", "across"], cache: Literal["compute", "int8"], cfg: ModelConfig, layout: Layout
) -> CacheFormat:
    """Return the cache format of `rollout.engine`.

    Args:
        attention: key layout: `dot` is `[B K W H]`, `across` is `[B K H W]`, `auto` the one measured faster on this backend.
        cache: dtype of cached keys and values.
        cfg: the model.
        layout: decode layout; its devices determine the backend.
    """
    cpu = layout.on_cpu
    int8 = cache == "int8"
    return CacheFormat(
        int8=int8,
        transposed=cpu if attention == "auto" else attention == "across",
        in_place=int8 or not cpu or cfg.compute != "bfloat16",
    )


class QuantizedKV(flax.struct.PyTreeNode):
    """Keys or values as q * scale, with one scale per head and slot: each entry is off by at most half a scale."""

    q: Int[Array, "*dims"]
    """int8, in the dimension order of the array it replaces."""
    scale: Float[Array, "B K W"]
    """f32: the largest magnitude over H, divided by 127."""


KVArray = Array | QuantizedKV


class PromptCache(flax.struct.PyTreeNode):
    """Keys and values of prompts, once per sequence group.

    A layer with a sliding window has min(window, S) slots: the prompt's last keys, from position max(length - size, 0) on.
    """

    k: tuple[Float[Array, "U K S H"] | QuantizedKV, ...]
    v: tuple[Float[Array, "U K S H"] | QuantizedKV, ...]


class SuffixCache(flax.struct.PyTreeNode):
    """Keys and values of the tokens each row decoded; all rows are written at the same slot.

    The ring of a layer with a sliding window has min(window, W) slots.
    """

    k: tuple[Float[Array, "B K W H"] | Float[Array, "B K H W"] | QuantizedKV, ...]
    v: tuple[Float[Array, "B K W H"] | QuantizedKV, ...]
    format: CacheFormat = flax.struct.field(pytree_node=False, default=DEFAULT_FORMAT)


def attention_windows(cfg: ModelConfig) -> tuple[int, ...]:
    """Number of keys each query attends to, its own included; one entry per layer."""
    return tuple(cfg.window if cfg.slides(i) else UNLIMITED for i in range(cfg.layers))


def empty_suffix(
    cfg: ModelConfig, rows: int, slots: int, layout: Layout, format: CacheFormat = DEFAULT_FORMAT
) -> SuffixCache:
    """Return a suffix cache of zeros.

    Args:
        cfg: the model.
        rows: B.
        slots: W.
        layout: decode layout.
        format: how entries are stored.
    """
    keys, values = (_zeros(cfg, rows, slots, layout, format._replace(transposed=a)) for a in (format.transposed, False))
    return SuffixCache(keys, values, format)


def empty_prompt(
    cfg: ModelConfig, num_prompts: int, slots: int, layout: Layout, format: CacheFormat = DEFAULT_FORMAT
) -> PromptCache:
    """Return a prompt cache of zeros.

    Args:
        cfg: the model.
        num_prompts: U.
        slots: S.
        layout: decode layout.
        format: how entries are stored; prompt keys are never transposed.
    """
    return PromptCache(*(_zeros(cfg, num_prompts, slots, layout, format._replace(transposed=False)) for _ in "kv"))


def _zeros(cfg: ModelConfig, num: int, slots: int, layout: Layout, format: CacheFormat) -> tuple[KVArray, ...]:
    def make(size: int) -> KVArray:
        last = (cfg.head_dim, size) if format.transposed else (size, cfg.head_dim)
        x = jnp.zeros((num, cfg.kv_heads, *last), jnp.int8 if format.int8 else cfg.compute)
        return QuantizedKV(x, jnp.zeros((num, cfg.kv_heads, size), jnp.float32)) if format.int8 else x

    return tuple(constrain(make(min(slots, window)), layout) for window in attention_windows(cfg))


def constrain(x: PyTree, layout: Layout) -> PyTree:
    """Constrain the shardings of cache arrays inside a jit."""
    return jax.tree.map(lambda x: layout.constrain(x, *AXES[: x.ndim]), x)


def shardings(tree: PyTree, layout: Layout) -> PyTree:
    """Shardings of caches, and of integer arrays with one entry per sequence group or row."""
    return jax.tree.map(lambda x: layout.sharding(AXES[: x.ndim]), tree)


def first_position(length: Int[Array, "..."], size: int) -> Int[Array, "..."]:
    """Position of the key in slot 0 when `size` slots hold the last `size` of `length` keys (all of them if they fit)."""
    return jnp.maximum(length - size, 0)


def last_slots(x: Float[Array, "U S K H"], length: Int[Array, " U"], size: int) -> Float[Array, "U W K H"]:
    """W = `size` slots of each prompt, from `first_position` on."""
    if size == x.shape[1]:
        return x
    return jax.vmap(lambda x, first: jax.lax.dynamic_slice_in_dim(x, first, size))(x, first_position(length, size))


class PrefillState(flax.struct.PyTreeNode):
    """Keys and values of one layer, for the prompt chunks prefilled so far."""

    k: Float[Array, "U W K H"]
    """Without a sliding window: all slots from position 0 on. With one: the last W slots before the next chunk."""
    v: Float[Array, "U W K H"]
    last_window: tuple[Float[Array, "U W K H"], Float[Array, "U W K H"]] | None = None
    """With a sliding window: the keys and values for decoding, each prompt's own last W, once they have been read."""

    def join(self, k: Array, v: Array, start: Array) -> tuple[Array, Array, Array]:
        """Earlier keys and values joined with a chunk's, which begins at `start`: (position of the first key, keys, values)."""
        if self.last_window is None:
            write = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, start, 1)  # noqa: E731
            return jnp.zeros((), jnp.int32), write(self.k, k), write(self.v, v)
        concat = lambda *parts: jnp.concatenate(parts, axis=1)  # noqa: E731
        return start - self.k.shape[1], concat(self.k, k), concat(self.v, v)

    def with_chunk(self, k: Array, v: Array, start: Array, length: Int[Array, " U"]) -> "PrefillState":
        """The state after one more chunk.

        Args:
            k: the chunk's keys [U T K H].
            v: its values.
            start: position of its first token.
            length: tokens per prompt.
        """
        first, keys, values = self.join(k, v, start)
        if self.last_window is None:
            return PrefillState(keys, values)
        size, chunk = self.k.shape[1], k.shape[1]
        # A prompt's last W keys are complete once the chunk with the last of them has been read.
        begin = first_position(length, size)
        complete = ((begin + size > start) & (begin + size <= start + chunk))[:, None, None, None]
        take = jax.vmap(lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, size))
        last_window = (
            jnp.where(complete, take(x, begin - first), old)
            for x, old in zip((keys, values), self.last_window, strict=True)
        )
        return PrefillState(keys[:, -size:], values[:, -size:], tuple(last_window))

    def to_cache(
        self, length: Int[Array, " U"], size: int, slots: int, format: CacheFormat, layout: Layout
    ) -> tuple[KVArray, ...]:
        """Keys and values in the layout of `PromptCache`.

        Args:
            length: tokens per prompt.
            size: slots in use.
            slots: slots of the returned arrays.
            format: how they are stored.
            layout: decode layout.
        """

        def one(x: Array) -> KVArray:
            x = (x if self.last_window else last_slots(x, length, size)).swapaxes(1, 2)
            x = jnp.pad(x, ((0, 0), (0, 0), (0, slots - size), (0, 0)))
            return constrain(quantize_kv(x) if format.int8 else x, layout)

        return tuple(one(x) for x in self.last_window or (self.k, self.v))


def empty_prefill_state(cfg: ModelConfig, num: int, total: int, chunk: int, layout: Layout) -> tuple[PrefillState, ...]:
    """State before the first chunk, one entry per layer.

    Args:
        cfg: the model.
        num: number of prompts (U).
        total: prompt slots to read.
        chunk: prompt tokens per chunk.
        layout: decode layout.
    """

    def layer(window: int) -> PrefillState:
        size = window if window < total else total + -total % chunk
        zeros = jnp.zeros((num, size, cfg.kv_heads, cfg.head_dim), cfg.compute)
        zeros = layout.constrain(zeros, "rows", None, "heads", None)
        return PrefillState(zeros, zeros, (zeros, zeros) if window < total else None)

    return tuple(layer(window) for window in attention_windows(cfg))


def quantize_kv(x: Float[Array, "*slots H"]) -> QuantizedKV:
    """Quantize to int8 over the last dimension. Vectors of zeros have scale 0."""
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1) / 127
    return QuantizedKV(jnp.round(wide / jnp.where(scale > 0, scale, 1.0)[..., None]).astype(jnp.int8), scale)


def map_arrays(f: Callable[..., Array], x: KVArray, *others: KVArray, transposed: bool = False) -> KVArray:
    """Apply `f(array, *arrays, axis)` to each array of a cache entry; `axis` is its slot axis."""
    axis = 3 if transposed else 2
    if isinstance(x, QuantizedKV):
        return QuantizedKV(f(x.q, *(o.q for o in others), axis), f(x.scale, *(o.scale for o in others), 2))
    return f(x, *others, axis)


def num_slots(x: KVArray, transposed: bool = False) -> int:
    """Number of slots of a cache entry."""
    return x.scale.shape[2] if isinstance(x, QuantizedKV) else x.shape[3 if transposed else 2]


def write(
    x: KVArray, new: Float[Array, "B 1 K H"], count: Int[Array, ""], format: CacheFormat, transposed: bool = False
) -> KVArray:
    """Write key or value number `count` of every row.

    Args:
        x: the ring of one layer.
        new: one key or value per row.
        count: keys written before.
        format: how entries are stored.
        transposed: `x` holds transposed keys.
    """
    slot = jax.lax.rem(count, num_slots(x, transposed))

    def put(x: Array, new: Array, axis: int) -> Array:
        if format.in_place:
            return jax.lax.dynamic_update_slice_in_dim(x, new, slot, axis)
        return jnp.where(jax.lax.broadcasted_iota(jnp.int32, (1,) * axis + x.shape[axis:], axis) == slot, new, x)

    new = new.swapaxes(1, 2)
    one = quantize_kv(new) if format.int8 else new
    if transposed:
        one = one.replace(q=one.q.swapaxes(2, 3)) if format.int8 else one.swapaxes(2, 3)
    return map_arrays(put, x, one, transposed=transposed)


def suffix_mask(size: int, count: Int[Array, ""], age: Int[Array, " B"]) -> Bool[Array, "B size"]:
    """Ring slots that rows of this age attend to once key number `count` is written: the newest age + 1."""
    return jnp.mod(count - jnp.arange(size), size) <= age[:, None]


def prompt_mask(size: int, length: Int[Array, "U F"], age: Int[Array, "U F"], window: int) -> Bool[Array, "U F size"]:
    """Prompt slots that rows attend to in one layer.

    Args:
        size: slots of the layer's prompt cache.
        length: cached keys that each row attends to, the first ones. With a sliding window, all that were cached.
        age: keys in each row's ring.
        window: attention window of the layer.
    """
    length = length[..., None]
    if window == UNLIMITED:
        return jnp.arange(size) < length
    key = first_position(length, size) + jnp.arange(size)
    return (key < length) & (length + age[..., None] - key < window)
