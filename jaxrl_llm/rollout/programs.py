"""The compiled programs that an engine runs, each for a few fixed sizes, compiled once and kept."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
from jax.stages import Compiled, Lowered

from jaxrl_llm.model import cache
from jaxrl_llm.model.cache import Caching
from jaxrl_llm.model.transformer import prefill
from jaxrl_llm.rollout.decode import Units, make_segment
from jaxrl_llm.rollout.sample import Controls, Decoding
from jaxrl_llm.types import PyTree

Name = tuple[str | int, ...]


class Programs:
    """Programs by name and sizes. Units and prompts are counted over all shards, windows and prompts in slots.

    ("prefill", prompts, slots)            tokens, lengths -> prompt cache
    ("spread", prompts, units)             prompt cache, index -> the cache of each unit's prompt
    ("insert", units, prompts)             prompt cache (donated), new, where, source -> prompt cache
    ("blank", units, window)               -> empty suffix cache
    ("grow", units, window, wider)         suffix cache, count -> suffix cache
    ("take", units, fewer, window)         both caches, index of units, index of rows -> both caches
    ("segment", units, window)             see `decode.make_segment`
    """

    def __init__(self, decoding: Decoding, caching: Caching, each: int):
        """`each`: rows per unit."""
        self.decoding, self.caching, self.each = decoding, caching, each
        self._compiled: dict[Name, Compiled] = {}

    def __call__(self, params: PyTree, *name: str | int) -> Compiled:
        """The program, compiled if it is asked for the first time. Only "prefill" and "segment" look at `params`."""
        if name not in self._compiled:
            self._compiled[name] = self.lower(params, *name).compile()
        return self._compiled[name]

    def warm(self, params: PyTree, names: list[Name]) -> None:
        """Compile all of them, several at a time: the compiler runs beside Python."""
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            lowered = {name: self.lower(params, *name) for name in names if name not in self._compiled}
            self._compiled |= dict(zip(lowered, threads.map(Lowered.compile, lowered.values()), strict=True))

    def lower(self, params: PyTree, *name: str | int) -> Lowered:
        return getattr(self, f"_{name[0]}")(params, *name[1:])

    def _array(self, shape: tuple[int, ...], dtype: jnp.dtype, *axes: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.decoding.layout.sharding(axes))

    def _ints(self, *shape: int) -> jax.ShapeDtypeStruct:
        return self._array(shape, jnp.int32, "rows", *(None,) * (len(shape) - 1))

    def _placed(self, make: Callable[[], PyTree]) -> PyTree:
        shapes = jax.eval_shape(make)
        where = cache.shardings(shapes, self.decoding.layout)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)

    def _prompt(self, units: int) -> PyTree:
        model, layout, caching = self.decoding.model, self.decoding.layout, self.caching
        return self._placed(lambda: cache.empty_prompt(model, units, caching.prompt_slots, layout, caching.form))

    def _suffix(self, units: int, window: int) -> PyTree:
        return self._placed(self._blank_suffix(units, window))

    def _blank_suffix(self, units: int, window: int) -> Callable[[], cache.SuffixCache]:
        model, layout = self.decoding.model, self.decoding.layout
        return lambda: cache.empty_suffix(model, units * self.each, window, layout, self.caching.form)

    def caches(self, units: int, window: int) -> tuple[PyTree, PyTree]:
        """Prompt and suffix cache, as shapes, dtypes and shardings."""
        return self._prompt(units), self._suffix(units, window)

    def _where(self, tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: x.sharding, tree)

    def _prefill(self, params: PyTree, prompts: int, slots: int) -> Lowered:
        def read(params, tokens, length):
            return prefill(params, tokens, length, self.caching, self.decoding.model, self.decoding.layout)

        out = self._where(self._prompt(prompts))
        return jax.jit(read, out_shardings=out).lower(abstract(params), self._ints(prompts, slots), self._ints(prompts))

    def _spread(self, params: PyTree, prompts: int, units: int) -> Lowered:
        spread = jax.jit(lambda new, index: cache.take(new, index, self.decoding.layout))
        return spread.lower(self._prompt(prompts), self._ints(units))

    def _insert(self, params: PyTree, units: int, prompts: int) -> Lowered:
        def insert(old, new, where, source):
            return cache.insert(old, new, where, source, self.decoding.layout)

        old, indices = self._prompt(units), self._ints(units)
        insert = jax.jit(insert, donate_argnums=0, out_shardings=self._where(old))
        return insert.lower(old, self._prompt(prompts), indices, indices)

    def _blank(self, params: PyTree, units: int, window: int) -> Lowered:
        out = self._where(self._suffix(units, window))
        return jax.jit(self._blank_suffix(units, window), out_shardings=out).lower()

    def _grow(self, params: PyTree, units: int, window: int, wider: int) -> Lowered:
        def grow(suffix, count):
            return cache.grow(suffix, wider, count, self.decoding.model, self.decoding.layout)

        out = self._where(self._suffix(units, wider))
        return jax.jit(grow, out_shardings=out).lower(self._suffix(units, window), self._array((), jnp.int32))

    def _take(self, params: PyTree, units: int, fewer: int, window: int) -> Lowered:
        def take(prompt, suffix, index, row_index):
            return cache.take(prompt, index, self.decoding.layout), cache.take(suffix, row_index, self.decoding.layout)

        out = self._where((self._prompt(fewer), self._suffix(fewer, window)))
        return jax.jit(take, out_shardings=out).lower(
            self._prompt(units), self._suffix(units, window), self._ints(fewer), self._ints(fewer * self.each)
        )

    def _segment(self, params: PyTree, units: int, window: int) -> Lowered:
        suffix, number = self._suffix(units, window), self._array((), jnp.int32)
        f32 = lambda: self._array((units,), jnp.float32, "rows")  # noqa: E731
        i32, rows = self._ints(units), self._ints(units, self.each)
        where = Units(
            uid=i32, first=i32, length=i32, age=i32, limit=i32, last=rows,
            done=self._array(rows.shape, bool, "rows", None),
            controls=Controls(temperature=f32(), top_p=f32(), top_k=i32, min_p=f32(), min_new_tokens=i32),
        )  # fmt: skip
        segment = jax.jit(
            make_segment(self.decoding),
            donate_argnums=1,
            out_shardings=(self._where(suffix), self.decoding.layout.replicated),
        )
        key = self._array((2,), jnp.uint32)
        return segment.lower(abstract(params), suffix, self._prompt(units), where, key, number, number)


def abstract(tree: PyTree) -> PyTree:
    """Shapes and places of arrays, or of what describes arrays already."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
