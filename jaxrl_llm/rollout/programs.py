"""The compiled programs of the engine, each for a few fixed sizes, compiled once and cached."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
from jax.stages import Compiled, Lowered

from jaxrl_llm.distribution.control_tables import blank_tables
from jaxrl_llm.model import cache, cache_moves
from jaxrl_llm.model.cache import Caching
from jaxrl_llm.model.transformer import prefill
from jaxrl_llm.parallel.compiled_ahead import abstract, give_back_memory
from jaxrl_llm.rollout.acceptance import make_rescore
from jaxrl_llm.rollout.batch_sizes import BatchSizes
from jaxrl_llm.rollout.decode import ChunkInputs, SequenceGroups, make_decode_chunk
from jaxrl_llm.rollout.redraw import KnownRows, make_redraw
from jaxrl_llm.rollout.sample import Controls, Decoding
from jaxrl_llm.types import PyTree

ProgramName = tuple[str | int, ...]


class Programs:
    """Programs by name and sizes. Sequence groups and prompts are counted over all shards; windows in slots.

    ("prefill", prompts, slots)               tokens, lengths -> prompt cache
    ("broadcast_prefix", prompts, groups)     prompt cache, index -> prompt cache of each sequence group
    ("insert_prefix", groups, prompts)        prompt cache (donated), new, destination, source -> prompt cache
    ("empty_suffix", groups, window)          -> empty suffix cache
    ("extend_suffix", groups, window, wider)    suffix cache, count -> suffix cache
    ("compact", groups, fewer, window)        both caches, index of groups, index of rows -> both caches
    ("expand", groups, more, window)          the same
    ("read_rows", rows, slots)                tokens, lengths -> keys and values of rows: prompts and known tokens
    ("join_suffix", groups, window, rows)     suffix cache (donated), rows' keys, rows, positions, numbers, count -> suffix cache
    ("redraw", rows, slots)                   rows with known tokens, key, tables -> see `redraw.make_redraw`
    ("redraw", rows, slots, automata, states, classes)             the same, with control tables of these sizes
    ("rescore", rows, slots, ...)             the rows, control states, tables -> see `acceptance.make_rescore`
    ("decode_chunk", groups, window)          see `decode.make_decode_chunk`
    ("decode_chunk", groups, window, automata, states, classes)    the same, with control tables of these sizes
    """

    def __init__(self, decoding: Decoding, caching: Caching, sizes: BatchSizes):
        self.decoding, self.caching, self.rows_per_group = decoding, caching, sizes.rows_per_group
        self.of_rows = caching._replace(prompt_slots=sizes.row_slots[-1])
        self._compiled: dict[ProgramName, Compiled] = {}
        self._ahead: dict[ProgramName, Future] = {}

    def __call__(self, params: PyTree, *name: str | int) -> Compiled:
        """Return the program, compiled on first use. Only "prefill" and "decode_chunk" use `params`."""
        if name not in self._compiled:
            ahead = self._ahead.pop(name, None)
            has_begun = ahead is not None and not ahead.cancel()
            self._compiled[name] = ahead.result() if has_begun else self._compile(params, name)
        return self._compiled[name]

    def compile_ahead(self, params: PyTree, names: list[ProgramName]) -> None:
        """Compile the programs `names` one after another in a thread. One that is needed before its turn is compiled where it is
        needed."""
        shapes, thread = abstract(params), ThreadPoolExecutor(1, thread_name_prefix="compile")
        for name in names:
            if name not in self._compiled and name not in self._ahead:
                self._ahead[name] = thread.submit(self._compile, shapes, name)
        thread.shutdown(wait=False)

    @property
    def is_compiling(self) -> bool:
        """True while `compile_ahead` has programs to compile."""
        return not all(ahead.done() for ahead in self._ahead.values())

    def stop_compiling(self) -> None:
        """Leave out what `compile_ahead` has not begun to compile."""
        for ahead in self._ahead.values():
            ahead.cancel()
        self._ahead.clear()

    def _compile(self, params: PyTree, name: ProgramName) -> Compiled:
        compiled = self.lower(params, *name).compile()
        give_back_memory()
        return compiled

    def warm(self, params: PyTree, names: list[ProgramName]) -> None:
        """Compile the programs `names` in parallel; the compiler releases the GIL."""
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            lowered = {name: self.lower(params, *name) for name in names if name not in self._compiled}
            self._compiled |= dict(zip(lowered, threads.map(Lowered.compile, lowered.values()), strict=True))
        give_back_memory()

    def lower(self, params: PyTree, *name: str | int) -> Lowered:
        """Lower the program for parameters of the shapes and shardings of `params`."""
        return getattr(self, f"_{name[0]}")(params, *name[1:])

    def _array(self, shape: tuple[int, ...], dtype: jnp.dtype, *axes: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.decoding.layout.sharding(axes))

    def _ints(self, *shape: int) -> jax.ShapeDtypeStruct:
        return self._array(shape, jnp.int32, "rows", *(None,) * (len(shape) - 1))

    def _with_shardings(self, make: Callable[[], PyTree]) -> PyTree:
        shapes = jax.eval_shape(make)
        shardings = cache.shardings(shapes, self.decoding.layout)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

    def _prompt(self, groups: int, caching: Caching | None = None) -> PyTree:
        model, layout, caching = self.decoding.model, self.decoding.layout, caching or self.caching
        return self._with_shardings(
            lambda: cache.empty_prompt(model, groups, caching.prompt_slots, layout, caching.format)
        )

    def _suffix(self, groups: int, window: int) -> PyTree:
        return self._with_shardings(self._make_empty_suffix(groups, window))

    def _make_empty_suffix(self, groups: int, window: int) -> Callable[[], cache.SuffixCache]:
        model, layout = self.decoding.model, self.decoding.layout
        return lambda: cache.empty_suffix(model, groups * self.rows_per_group, window, layout, self.caching.format)

    def caches(self, groups: int, window: int) -> tuple[PyTree, PyTree]:
        """Return shapes, dtypes and shardings of the prompt and suffix caches."""
        return self._prompt(groups), self._suffix(groups, window)

    def _shardings(self, tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: x.sharding, tree)

    def _prefill(self, params: PyTree, prompts: int, slots: int) -> Lowered:
        return self._read(params, prompts, slots, self.caching)

    def _read_rows(self, params: PyTree, rows: int, slots: int) -> Lowered:
        return self._read(params, rows, slots, self.of_rows)

    def _read(self, params: PyTree, prompts: int, slots: int, caching: Caching) -> Lowered:
        def read(params, tokens, length):
            return prefill(params, tokens, length, caching, self.decoding.model, self.decoding.layout)[1]

        out = self._shardings(self._prompt(prompts, caching))
        return jax.jit(read, out_shardings=out).lower(abstract(params), self._ints(prompts, slots), self._ints(prompts))

    @property
    def _completion_slots(self) -> int:
        return self.of_rows.prompt_slots - self.caching.prompt_slots

    def _redraw(self, params: PyTree, rows: int, slots: int, *sizes: int) -> Lowered:
        return self._on_known_rows(make_redraw, params, (rows, slots), self._array((2,), jnp.uint32), sizes)

    def _rescore(self, params: PyTree, rows: int, slots: int, *sizes: int) -> Lowered:
        return self._on_known_rows(make_rescore, params, (rows, slots), self._ints(rows, self._completion_slots), sizes)

    def _on_known_rows(
        self, make: Callable, params: PyTree, shape: tuple[int, int], third: jax.ShapeDtypeStruct, sizes: tuple[int, ...]
    ) -> Lowered:  # fmt: skip
        """Lower a program that reads known rows of this shape. `third`: its third argument; `sizes`: of the tables."""
        (rows, slots), slots_behind, each = shape, self._completion_slots, self._ints(shape[0])
        known = KnownRows(
            self._ints(rows, slots), each, each, self._array((rows, slots_behind), bool, "rows", None), each, each, each,
            self._controls(rows),
        )  # fmt: skip
        program = make(self.decoding, self.of_rows, slots_behind)
        of = jax.jit(program, out_shardings=self.decoding.layout.replicated)
        return of.lower(abstract(params), known, third, self._tables(sizes))

    def _controls(self, *shape: int) -> Controls:
        axes = ("rows", *(None for _ in shape[1:]))
        i32, f32 = (self._array(shape, dtype, *axes) for dtype in (jnp.int32, jnp.float32))
        return Controls(f32, f32, i32, f32, i32, i32, i32)

    def _tables(self, sizes: tuple[int, ...]) -> PyTree:
        tables = blank_tables(sizes, self.decoding.model.vocab_size) if sizes else None
        return jax.tree.map(lambda x: self._array(x.shape, x.dtype), tables)

    def _broadcast_prefix(self, params: PyTree, prompts: int, groups: int) -> Lowered:
        broadcast = jax.jit(lambda new, index: cache_moves.take(new, index, self.decoding.layout))
        return broadcast.lower(self._prompt(prompts), self._ints(groups))

    def _insert_prefix(self, params: PyTree, groups: int, prompts: int) -> Lowered:
        def insert(old, new, destination, source):
            return cache_moves.insert(old, new, destination, source, self.decoding.layout)

        old, indices = self._prompt(groups), self._ints(groups)
        insert = jax.jit(insert, donate_argnums=0, out_shardings=self._shardings(old))
        return insert.lower(old, self._prompt(prompts), indices, indices)

    def _empty_suffix(self, params: PyTree, groups: int, window: int) -> Lowered:
        out = self._shardings(self._suffix(groups, window))
        return jax.jit(self._make_empty_suffix(groups, window), out_shardings=out).lower()

    def _extend_suffix(self, params: PyTree, groups: int, window: int, wider: int) -> Lowered:
        def grow(suffix, count):
            return cache_moves.extend_suffix(suffix, wider, count, self.decoding.model, self.decoding.layout)

        out = self._shardings(self._suffix(groups, wider))
        return jax.jit(grow, out_shardings=out).lower(self._suffix(groups, window), self._array((), jnp.int32))

    def _join_suffix(self, params: PyTree, groups: int, window: int, rows: int) -> Lowered:
        def join(suffix, new, row, first, number, count):
            return cache_moves.join_suffix(suffix, new, (row, first, number), count, self.decoding.layout)

        suffix = self._suffix(groups, window)
        join = jax.jit(join, donate_argnums=0, out_shardings=self._shardings(suffix))
        each = (self._ints(rows),) * 3
        return join.lower(suffix, self._prompt(rows, self.of_rows), *each, self._array((), jnp.int32))

    def _compact(self, params: PyTree, groups: int, fewer: int, window: int) -> Lowered:
        def compact(prompt, suffix, index, row_index):
            return cache_moves.take(prompt, index, self.decoding.layout), cache_moves.take(
                suffix, row_index, self.decoding.layout
            )

        out = self._shardings((self._prompt(fewer), self._suffix(fewer, window)))
        return jax.jit(compact, out_shardings=out).lower(
            self._prompt(groups),
            self._suffix(groups, window),
            self._ints(fewer),
            self._ints(fewer * self.rows_per_group),
        )

    _expand = _compact

    def _decode_chunk(self, params: PyTree, groups: int, window: int, *sizes: int) -> Lowered:
        suffix, number = self._suffix(groups, window), self._array((), jnp.int32)
        i32, rows = self._ints(groups), self._ints(groups, self.rows_per_group)
        batch = SequenceGroups(
            uid=i32, age=rows, sample=rows, length=rows, begin=rows, limit=rows, state=rows, last=rows,
            done=self._array(rows.shape, bool, "rows", None),
            controls=self._controls(*rows.shape),
        )  # fmt: skip
        decode_chunk = jax.jit(
            make_decode_chunk(self.decoding),
            donate_argnums=1,
            out_shardings=(self._shardings(suffix), self.decoding.layout.replicated),
        )
        inputs = ChunkInputs(self._array((2,), jnp.uint32), number, number, self._tables(sizes))
        return decode_chunk.lower(abstract(params), suffix, self._prompt(groups), batch, inputs)
