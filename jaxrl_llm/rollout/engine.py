"""The rollout engine: the host's side of generation. It decides between segments, from a few integers, what the device does next.

    admit waiting prompts -> drop finished rows -> widen the cache -> one segment on the device -> harvest -> ...

Units are the pieces that it moves: a prompt with `shared_by` of its samples. Everything on the device has one of a few fixed sizes
(units halved, windows doubled), so a handful of programs serves every call. Hosts decide alike, from equal numbers.
"""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int, Key

from jaxrl_llm.model.cache import Caching, PromptCache, choose_form, reaches
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.parallel import hosts
from jaxrl_llm.parallel.config import divisors
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.perf.work import Work, decode_step, weight_bytes
from jaxrl_llm.rollout.config import RolloutConfig
from jaxrl_llm.rollout.decode import Record, Segment, Units
from jaxrl_llm.rollout.output import Harvest, Spell
from jaxrl_llm.rollout.programs import Name, Programs
from jaxrl_llm.rollout.sample import Controls, Decoding, Vocabulary
from jaxrl_llm.types import Policy, Prompts, PyTree, Rollouts

# Rows of a device below which compaction does not go: with fewer, products round otherwise and weights are all that is read.
LEAST_ROWS = 8
# How often a flight is halved at most: each size is a program more for every window.
HALVINGS = 2
# Bytes of a layer's keys and values that a CPU's caches hold: attention over 4 times as many took 8 times as long.
CPU_CACHE = 2**22
# The shortest bucket of prompt lengths; the others are this times 4, 16, ...
LEAST_PROMPT = 128


class Stats(NamedTuple):
    """What a generation did so far."""

    seconds: float = 0.0
    steps: int = 0
    """Of the device loop."""
    row_steps: int = 0
    """Rows decoded, over all steps."""
    tokens: int = 0
    """Tokens sampled: row steps that were not wasted on rows that had ended."""
    overflow: int = 0
    """Tokens drawn from K likeliest ones where more would have qualified."""
    segments: tuple[tuple[int, Work], ...] = ()
    """Steps, and what each of them must move and compute on one device, with all rows in flight."""

    def least_seconds(self, bytes_per_s: float, flops_per_s: float) -> float:
        """What the steps take at these rates of one device."""
        return sum(n * max(work.bytes / bytes_per_s, work.flops / flops_per_s) for n, work in self.segments)


@dataclass(frozen=True)
class Sizes:
    """The few sizes that programs are compiled for, over all shards."""

    shards: int
    prompts: tuple[int, ...]
    """Of a flight or an admission, largest first."""
    each: int
    """F, rows a unit."""
    units_of_prompt: int
    windows: tuple[int, ...]
    prompt_slots: tuple[int, ...]

    def units(self, prompts: int) -> int:
        return prompts * self.units_of_prompt

    @staticmethod
    def of(cfg: RolloutConfig, window: int, prompt_slots: int, reach: int, shards: int) -> "Sizes":
        engine, each = cfg.engine, cfg.engine.shared_by or cfg.samples
        flight = -(-min(engine.in_flight or cfg.prompts, cfg.prompts) // shards)
        halves = [flight]
        while len(halves) <= HALVINGS and halves[-1] > 1 and -(-halves[-1] // 2) * cfg.samples >= LEAST_ROWS:
            halves.append(-(-halves[-1] // 2))
        most = min(cfg.max_new_tokens, reach)
        windows = doubled(min(window, most), most, 2)
        slots = doubled(min(LEAST_PROMPT, prompt_slots), prompt_slots, 4)
        return Sizes(shards, tuple(n * shards for n in halves), each, cfg.samples // each, windows, slots)


def doubled(least: int, most: int, factor: int) -> tuple[int, ...]:
    """least, least * factor, ... and `most` as the last."""
    found = [least]
    while found[-1] < most:
        found.append(min(found[-1] * factor, most))
    return tuple(found)


def smallest(sizes: tuple[int, ...], want: int) -> int:
    return min(size for size in sizes if size >= want)


def first_window(cfg: RolloutConfig, model: ModelConfig, layout: Layout) -> int:
    """128 slots; on a CPU as many, from 32 on, as keep a layer's keys and values of all rows within its caches."""
    if not layout.on_cpu:
        return 128
    rows = min(cfg.engine.in_flight or cfg.prompts, cfg.prompts) * cfg.samples
    slot = 2 * rows * model.kv_heads * model.head_dim * np.dtype(np.float32).itemsize
    return 1 << max(CPU_CACHE // slot, 32).bit_length() - 1


class Engine:
    """G samples for each prompt, under one config; `spell` turns token ids into text, for stop texts alone."""

    def __init__(
        self, cfg: RolloutConfig, prompt_slots: int, vocab: Vocabulary, model: ModelConfig, layout: Layout,
        spell: Spell | None = None,
    ):  # fmt: skip
        self.cfg, self.spell = cfg, spell
        steps = min(cfg.engine.segment, cfg.max_new_tokens)
        window = cfg.engine.window or first_window(cfg, model, layout)
        self.sizes = Sizes.of(cfg, window, prompt_slots, max(reaches(model)), layout.size("rows"))
        most = min(cfg.engine.eos_interval, steps, self.sizes.windows[0])
        interval = max(n for n in divisors(steps) if n <= most)
        max_kept_tokens = cfg.max_kept_of(vocab.size)
        self.decoding = Decoding(model, layout, vocab, steps, interval, max_kept_tokens, cfg.raw_logprobs)
        form = choose_form(cfg.engine.attention, cfg.engine.cache, model, layout)
        caching = Caching(prompt_slots, cfg.engine.prefill_chunk, form)
        self.programs = Programs(self.decoding, caching, self.sizes.each)

    def controls(self, prompts: int, temperature: float | None = None) -> Controls:
        """The configured ones, for so many prompts."""
        full = lambda value, dtype: np.full(prompts, value, dtype)  # noqa: E731
        cfg = self.cfg
        return Controls(
            temperature=full(cfg.temperature if temperature is None else temperature, np.float32),
            top_p=full(cfg.top_p, np.float32),
            top_k=full(cfg.top_k, np.int32),
            min_p=full(cfg.min_p, np.float32),
            min_new_tokens=full(cfg.min_new_tokens, np.int32),
        )

    def start(
        self, policy: Policy, prompts: Prompts, key: Key[Array, ""], controls: Controls | None = None,
        limit: Int[np.ndarray, " P"] | None = None,
    ) -> "Generation":  # fmt: skip
        """Begin to sample for `prompts` (NumPy, equal on every host). `limit`: completion tokens of each at most.

        Raises ValueError for what would give no rows, or rows that are not those asked for.
        """
        num = len(prompts.length)
        limit = np.full(num, self.cfg.max_new_tokens, np.int32) if limit is None else np.asarray(limit, np.int32)
        self._check(prompts, limit)
        return Generation(self, policy, prompts, key, self.controls(num) if controls is None else controls, limit)

    def _check(self, prompts: Prompts, limit: np.ndarray) -> None:
        num, slots = len(prompts.length), self.sizes.prompt_slots[-1]
        if not num:
            raise ValueError("prompts: got none, want one or more")
        for name, got, most in (("prompts.length", prompts.length, slots), ("limit", limit, self.cfg.max_new_tokens)):
            if got.shape != (num,) or not ((got >= 1) & (got <= most)).all():
                raise ValueError(f"{name}: got {got.tolist()}, want {num} numbers from 1 to {most}")

    def generate(
        self, policy: Policy, prompts: Prompts, key: Key[Array, ""], controls: Controls | None = None,
        limit: Int[np.ndarray, " P"] | None = None,
    ) -> Rollouts:  # fmt: skip
        """`start`, to its end. A row's tokens depend on the weights, its prompt, `key`, its uid and its sample number alone."""
        generation = self.start(policy, prompts, key, controls, limit)
        for _ in generation:
            pass
        return generation.rollouts()

    def names(self, prompts: int) -> list[Name]:
        """All programs that calls of so many prompts can come to need."""
        sizes = self.sizes
        several = self.cfg.max_new_tokens > min(self.decoding.steps, sizes.windows[0])
        flight = smallest(sizes.prompts, min(prompts, sizes.prompts[0]))
        fewer = [n for n in sizes.prompts if n <= flight]
        # In one segment all rows end together: places come free all at once.
        admitted = (
            fewer if several and prompts > flight else {flight, smallest(sizes.prompts, prompts % flight or flight)}
        )
        units = [sizes.units(n) for n in (fewer if several and self.cfg.engine.compact else [flight])]
        found: list[Name] = [("prefill", n, s) for n in admitted for s in sizes.prompt_slots]
        found += [("spread", n, units[0]) for n in admitted if sizes.units(n) != units[0] or sizes.units_of_prompt > 1]
        if several and prompts > flight:
            found += [("insert", units[0], n) for n in admitted]
        found.append(("blank", units[0], sizes.windows[0]))
        found += [("segment", u, w) for u in units for w in sizes.windows]
        found += [("grow", u, w, wider) for u in units for w, wider in pairwise(sizes.windows)]
        found += [("take", u, v, w) for u in units for v in units if v < u for w in sizes.windows]
        return found

    def warm(self, policy: Policy, prompts: int | None = None) -> None:
        """Compile what calls of `prompts` prompts can need; of any number by default."""
        counts = self.sizes.prompts if prompts is None else (prompts,)
        if prompts is None and self.cfg.prompts > self.sizes.prompts[0]:
            counts = (self.cfg.prompts, *counts)
        self.programs.warm(policy.params, list(dict.fromkeys(name for n in counts for name in self.names(n))))


class Generation:
    """One call of the engine. Iterate over it: after each segment it yields the prompts that are finished, perhaps none."""

    def __init__(
        self, engine: Engine, policy: Policy, prompts: Prompts, key: Key[Array, ""], controls: Controls, limit: np.ndarray
    ):  # fmt: skip
        self.engine, self.params, self.prompts, self.limit = engine, policy.params, prompts, limit
        self.controls, self.version = controls, int(policy.version)
        self.key = hosts.put(np.asarray(jax.random.key_data(key)), engine.decoding.layout.replicated)
        samples, sizes = engine.cfg.samples, engine.sizes
        num = len(prompts.length)
        self.harvest = Harvest(prompts, samples, engine.cfg.max_new_tokens, engine.decoding)
        # Units by the first of their rows, in order.
        self.waiting = deque(range(0, num * samples, sizes.each))
        self.missing = np.full(num, sizes.units_of_prompt)
        self.flight = sizes.units(smallest(sizes.prompts, min(num, sizes.prompts[0])))
        self.row = np.full(self.flight, -1)
        """First row of the unit in each place of the flight; -1 where there is none."""
        self.age = np.zeros(self.flight, np.int32)
        self.last = np.zeros((self.flight, sizes.each), np.int32)
        self.done = np.ones((self.flight, sizes.each), bool)
        self.window, self.count = sizes.windows[0], 0
        self.prompt = self.suffix = None
        self.stats, self.weights = Stats(), weight_bytes(policy.params, engine.decoding.model)

    def __iter__(self) -> Iterator[Int[np.ndarray, " n"]]:
        while self.waiting or (self.row >= 0).any():
            start = time.perf_counter()
            self._admit()
            self._compact()
            finished = self._advance(self._room())
            self.stats = self.stats._replace(seconds=self.stats.seconds + time.perf_counter() - start)
            yield finished

    def rollouts(self, index: Int[np.ndarray, " n"] | None = None) -> Rollouts:
        """Of these prompts; of all by default."""
        index = np.arange(len(self.prompts.length)) if index is None else index
        return self.harvest.rollouts(index, self.controls, self.version)

    def _program(self, *name: str | int) -> jax.stages.Compiled:
        return self.engine.programs(self.params, *name)

    def _put(self, tree: PyTree) -> PyTree:
        return hosts.put(tree, self.engine.decoding.layout.sharding(("rows",)))

    def _admit(self) -> None:
        """Waiting units into free places; each shard reads its own new prompts, once."""
        samples, sizes = self.engine.cfg.samples, self.engine.sizes
        read: list[list[int]] = [[] for _ in range(sizes.shards)]
        source = np.zeros(self.flight, np.int32)
        places = []
        for place in np.flatnonzero(self.row < 0)[: len(self.waiting)]:
            own, prompt = read[place * sizes.shards // self.flight], self.waiting[0] // samples
            if prompt not in own:
                if len(own) == sizes.prompts[0] // sizes.shards:
                    break
                own.append(prompt)
            source[place] = own.index(prompt)
            self.row[place] = self.waiting.popleft()
            places.append(place)
        if not places:
            return
        prompt = self.row[places] // samples
        self.age[places], self.done[places] = 0, False
        self.last[places] = self.prompts.tokens[prompt, self.prompts.length[prompt] - 1][:, None]
        self._place(self._read(read), max(map(len, read)), np.array(places), source)

    def _read(self, read: list[list[int]]) -> PromptCache:
        """The prompt cache of some prompts of each shard, filled up with empty ones."""
        sizes, prompts = self.engine.sizes, self.prompts
        num = smallest(sizes.prompts, max(map(len, read)) * sizes.shards)
        index = np.zeros((sizes.shards, num // sizes.shards), np.int64)
        length = np.zeros(index.shape, np.int32)
        for s, some in enumerate(read):
            index[s, : len(some)] = some
            length[s, : len(some)] = prompts.length[some] - 1
        slots = smallest(sizes.prompt_slots, max(int(length.max()), 1))
        tokens = _slots(prompts.tokens, slots, self.engine.decoding.vocab.pad)[index.reshape(-1)]
        return self._program("prefill", num, slots)(self.params, *self._put((tokens, length.reshape(-1))))

    def _place(self, new: PromptCache, read: int, places: np.ndarray, source: np.ndarray) -> None:
        """Each unit's prompt cache: of a new flight, or in the places of units that are gone."""
        sizes = self.engine.sizes
        num = smallest(sizes.prompts, read * sizes.shards)
        if self.suffix is None:
            self.suffix = self._program("blank", self.flight, self.window)()
        if len(places) == (self.row >= 0).sum():
            # Nobody else is in flight.
            whole = self.flight == num and (source == np.arange(self.flight) % (num // sizes.shards))[places].all()
            self.prompt = new if whole else self._program("spread", num, self.flight)(new, self._put(source))
            return
        local = self.flight // sizes.shards
        where = np.full(self.flight, local, np.int32)
        where[places] = places % local
        self.prompt = self._program("insert", self.flight, num)(self.prompt, new, *self._put((where, source)))

    def _compact(self) -> None:
        """Keep the living units, in the smallest flight that holds them, once nobody waits."""
        sizes = self.engine.sizes
        live = self.row >= 0
        most = live.reshape(sizes.shards, -1).sum(axis=1).max()
        fewer = smallest(tuple(sizes.units(n) for n in sizes.prompts), most * sizes.shards)
        if not self.engine.cfg.engine.compact or self.waiting or fewer >= self.flight:
            return
        # Of each shard: the living ones first.
        order = np.argsort(~live.reshape(sizes.shards, -1), axis=1, kind="stable")[:, : fewer // sizes.shards]
        local = order.astype(np.int32)
        rows = (local[..., None] * sizes.each + np.arange(sizes.each, dtype=np.int32)).reshape(-1)
        take = self._program("take", self.flight, fewer, self.window)
        self.prompt, self.suffix = take(self.prompt, self.suffix, *self._put((local.reshape(-1), rows)))
        kept = (local + np.arange(sizes.shards)[:, None] * (self.flight // sizes.shards)).reshape(-1)
        self.row, self.age, self.last, self.done = (x[kept] for x in (self.row, self.age, self.last, self.done))
        self.flight = fewer

    def _room(self) -> int:
        """Widen the cache if it is full of keys that living rows see. Returns the steps of the next segment, in whole intervals:
        as many as fit into the window, and as some row may need."""
        live, samples, windows = self.row >= 0, self.engine.cfg.samples, self.engine.sizes.windows
        most, interval = windows[-1], self.engine.decoding.interval
        age = int(self.age[live].max())
        need = int((self.limit[self.row[live] // samples] - self.age[live]).max())
        steps = min(self.engine.decoding.steps, -(-need // interval) * interval)
        if min(age + interval, most) > self.window:
            wider = smallest(windows, min(age + interval, most))
            grow = self._program("grow", self.flight, self.window, wider)
            self.suffix = grow(self.suffix, self._scalar(self.count))
            self.window, self.count = wider, self.window
        return steps if self.window == most else min(steps, (self.window - age) // interval * interval)

    def _scalar(self, value: int) -> jax.Array:
        return hosts.put(np.int32(value), self.engine.decoding.layout.replicated)

    def _advance(self, steps: int) -> Int[np.ndarray, " n"]:
        """One segment. Returns the prompts that it finished."""
        samples, each = self.engine.cfg.samples, self.engine.sizes.each
        prompt = np.maximum(self.row, 0) // samples
        units = Units(
            uid=self.prompts.uid[prompt],
            first=(np.maximum(self.row, 0) % samples).astype(np.int32),
            length=self.prompts.length[prompt] - 1,
            age=self.age,
            limit=self.limit[prompt],
            controls=jax.tree.map(lambda x: x[prompt], self.controls),
            last=self.last,
            done=self.done,
        )
        segment = self._program("segment", self.flight, self.window)
        self.suffix, came = segment(
            self.params, self.suffix, self.prompt, self._put(units), self.key, self._scalar(self.count),
            self._scalar(steps),
        )  # fmt: skip
        came: Segment = jax.tree.map(np.array, came)
        ran = int(came.steps)
        # What had ended before brought in nothing new.
        lived = (self.row[:, None] >= 0) & ~self.done
        rows = np.where(lived, self.row[:, None] + np.arange(each), -1).reshape(-1)
        age = np.repeat(self.age, each)
        self.harvest.add(rows, age, came.record, ran)
        self.last, self.done = came.last, came.done
        if self.engine.cfg.stop:
            stopped = self.harvest.stop(rows, age, self.engine.cfg.stop, self.engine.spell)
            self.done |= stopped.reshape(self.done.shape)
        self._count(ran, came.record)
        self.age = self.age + np.int32(ran)
        self.count += ran
        return self._leave()

    def _count(self, ran: int, record: Record) -> None:
        """Before the ages move on."""
        decoding, s, each = self.engine.decoding, self.stats, self.engine.sizes.each
        there = self.row >= 0
        length = np.where(there, self.prompts.length[np.maximum(self.row, 0) // self.engine.cfg.samples] - 1, 0)
        entry = self.engine.programs.caching.form.number_bytes(decoding.model)
        work = decode_step(decoding.model, length, np.where(there, self.age + ran // 2, 0), each, entry)
        shards = decoding.layout.size("rows") * decoding.layout.size("heads")
        work = Work(self.weights + work.bytes / shards, work.flops / shards)
        rows, sampled = self.flight * each, record.sampled[:ran]
        over = 0 if record.overflow is None else int((record.overflow[:ran] & sampled).sum())
        self.stats = Stats(
            s.seconds, s.steps + ran, s.row_steps + ran * rows, s.tokens + int(sampled.sum()), s.overflow + over,
            (*s.segments, (ran, work)),
        )  # fmt: skip

    def _leave(self) -> Int[np.ndarray, " n"]:
        """Units all of whose rows ended give up their places. Returns prompts that have no unit left."""
        gone = np.flatnonzero((self.row >= 0) & self.done.all(axis=1))
        prompt = self.row[gone] // self.engine.cfg.samples
        np.subtract.at(self.missing, prompt, 1)
        self.row[gone] = -1
        return np.unique(prompt[self.missing[prompt] == 0])


def _slots(tokens: np.ndarray, slots: int, pad: int) -> np.ndarray:
    """`tokens` cut or filled up to so many slots."""
    tokens = tokens[:, :slots]
    return np.pad(tokens, ((0, 0), (0, slots - tokens.shape[1])), constant_values=pad)
