"""The rollout engine: host-side scheduling of generation. Between chunks, the host decides from a few integers what to run next.

    admit queued prompts -> remove finished rows -> grow the KV cache -> decode one chunk -> store its output -> ...

A sequence group is what the engine schedules: one prompt and `rows_per_prompt_cache` of its samples, which share one prompt KV
cache. Arrays on the device take a few fixed sizes (groups halved, windows doubled), so a small set of programs serves every call.
All hosts make the same decisions, because they see equal numbers.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import Array, Int, Key

from jaxrl_llm.config.options import with_options
from jaxrl_llm.model.cache import Caching, PromptCache, attention_windows, choose_cache_format
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.parallel import hosts
from jaxrl_llm.parallel.config import divisors
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.perf.work import Work, decode_step, weight_bytes
from jaxrl_llm.rollout.batch_sizes import BatchSizes, first_window, smallest
from jaxrl_llm.rollout.config import RolloutConfig
from jaxrl_llm.rollout.decode import ChunkResult, DecodedChunk, SequenceGroups
from jaxrl_llm.rollout.output import OutputBuffer
from jaxrl_llm.rollout.programs import ProgramName, Programs
from jaxrl_llm.rollout.sample import Controls, Decoding, Vocabulary
from jaxrl_llm.types import Policy, Prompts, PyTree, Rollouts


class Stats(NamedTuple):
    """Counters of a generation so far."""

    seconds: float = 0.0
    steps: int = 0
    """Decode steps."""
    row_steps: int = 0
    """Rows decoded, summed over all steps, finished rows included."""
    tokens: int = 0
    """Tokens sampled: row steps excluding those of finished rows."""
    overflow: int = 0
    """Tokens sampled where more than K tokens qualified."""
    chunks: tuple[tuple[int, Work], ...] = ()
    """Per chunk: its steps, and the bytes and FLOPs of each step on one device."""

    def least_seconds(self, bytes_per_s: float, flops_per_s: float) -> float:
        """Return the least time of all steps in seconds, at these hardware ceilings of one device."""
        return sum(n * max(work.bytes / bytes_per_s, work.flops / flops_per_s) for n, work in self.chunks)


class PromptTokenizer(Protocol):
    """The part of a tokenizer that the engine uses."""

    def prompt_batch(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts, chat template included."""

    def spellings(self, ids: Sequence[int]) -> Sequence[str]:
        """Texts of token ids in which stop strings are searched."""


class EngineModel(NamedTuple):
    """What the engine knows about a model, apart from its parameters."""

    config: ModelConfig
    decode: Layout
    """Sharding of policy, caches and rows."""
    vocab: Vocabulary
    tokenizer: PromptTokenizer | None = None
    """Needed for stop strings only."""


class Engine:
    """Samples G completions per prompt with one config and one set of compiled programs."""

    def __init__(self, model: EngineModel, cfg: RolloutConfig | None = None, prompt_slots: int = 0, **options: Any):
        """Fix sizes and static settings; nothing compiles yet.

        Args:
            model: an `EngineModel`, or any value with its attributes.
            cfg: the rollouts; None: the defaults.
            prompt_slots: maximum prompt length.
            options: fields of `RolloutConfig` that replace those of `cfg`.

        Raises:
            UserError: an option is unknown or its value is out of range.
        """
        self.model, self.cfg = model, with_options(cfg or RolloutConfig(), options)
        cfg, config, layout = self.cfg, model.config, model.decode
        steps = min(cfg.engine.decode_chunk, cfg.max_new_tokens)
        window = cfg.engine.window or first_window(cfg, config, layout)
        self.sizes = BatchSizes.of(cfg, window, prompt_slots, max(attention_windows(config)), layout.size("rows"))
        most = min(cfg.engine.eos_interval, steps, self.sizes.windows[0])
        interval = max(n for n in divisors(steps) if n <= most)
        max_kept_tokens = cfg.max_kept_of(model.vocab.size)
        self.decoding = Decoding(config, layout, model.vocab, steps, interval, max_kept_tokens, cfg.raw_logprobs)
        form = choose_cache_format(cfg.engine.attention, cfg.engine.cache, config, layout)
        caching = Caching(prompt_slots, cfg.engine.prefill_chunk, form)
        self.programs = Programs(self.decoding, caching, self.sizes.rows_per_group)

    def controls(self, prompts: int, temperature: float | None = None) -> Controls:
        """Return the configured sampling parameters for `prompts` prompts, optionally with another temperature."""
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
        """Start sampling completions.

        Args:
            policy: the sampling policy.
            prompts: NumPy arrays, equal on every host.
            key: random key of the call.
            controls: sampling parameters per prompt; the configured ones by default.
            limit: maximum completion tokens per prompt; `max_new_tokens` by default.

        Raises:
            ValueError: no prompts, or a prompt length or limit out of range.
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
        """Sample all completions; arguments as in `start`.

        A row's tokens depend only on the weights, its prompt, `key`, its uid and its sample number.
        """
        generation = self.start(policy, prompts, key, controls, limit)
        for _ in generation:
            pass
        return generation.rollouts()

    def names(self, prompts: int) -> list[ProgramName]:
        """Return all programs that a call with `prompts` prompts may run."""
        sizes = self.sizes
        several = self.cfg.max_new_tokens > min(self.decoding.steps, sizes.windows[0])
        batch = smallest(sizes.prompts, min(prompts, sizes.prompts[0]))
        fewer = [n for n in sizes.prompts if n <= batch]
        # With a single chunk all rows end together, and all slots become free at once.
        admitted = fewer if several and prompts > batch else {batch, smallest(sizes.prompts, prompts % batch or batch)}
        groups = [sizes.groups(n) for n in (fewer if several and self.cfg.engine.compact else [batch])]
        found: list[ProgramName] = [("prefill", n, s) for n in admitted for s in sizes.prompt_slots]
        found += [
            ("broadcast_prefix", n, groups[0]) for n in admitted if sizes.groups(n) != groups[0] or sizes.groups_per_prompt > 1
        ]  # fmt: skip
        if several and prompts > batch:
            found += [("insert_prefix", groups[0], n) for n in admitted]
        found.append(("empty_suffix", groups[0], sizes.windows[0]))
        found += [("decode_chunk", u, w) for u in groups for w in sizes.windows]
        found += [("extend_suffix", u, w, wider) for u in groups for w, wider in pairwise(sizes.windows)]
        found += [("compact", u, v, w) for u in groups for v in groups if v < u for w in sizes.windows]
        return found

    def warm(self, policy: Policy, prompts: int | None = None) -> None:
        """Compile the programs of calls with `prompts` prompts; by default, with any number of prompts."""
        counts = self.sizes.prompts if prompts is None else (prompts,)
        if prompts is None and self.cfg.prompts > self.sizes.prompts[0]:
            counts = (self.cfg.prompts, *counts)
        self.programs.warm(policy.params, list(dict.fromkeys(name for n in counts for name in self.names(n))))


class Generation:
    """One call of the engine. Iteration decodes one chunk at a time and yields the prompts that it finished, possibly none."""

    def __init__(
        self, engine: Engine, policy: Policy, prompts: Prompts, key: Key[Array, ""], controls: Controls, limit: np.ndarray
    ):  # fmt: skip
        self.engine, self.params, self.prompts, self.limit = engine, policy.params, prompts, limit
        self.controls, self.version = controls, int(policy.version)
        self.key = hosts.put(np.asarray(jax.random.key_data(key)), engine.decoding.layout.replicated)
        samples, sizes = engine.cfg.samples, engine.sizes
        num = len(prompts.length)
        self.output = OutputBuffer(prompts, samples, engine.cfg.max_new_tokens, engine.decoding)
        # Queued sequence groups, each by its first row, in order.
        self.queued = deque(range(0, num * samples, sizes.rows_per_group))
        self.unfinished = np.full(num, sizes.groups_per_prompt)
        self.batch = sizes.groups(smallest(sizes.prompts, min(num, sizes.prompts[0])))
        self.row = np.full(self.batch, -1)
        """First row of the sequence group in each slot of the active batch; -1 where empty."""
        self.age = np.zeros(self.batch, np.int32)
        self.last = np.zeros((self.batch, sizes.rows_per_group), np.int32)
        self.done = np.ones((self.batch, sizes.rows_per_group), bool)
        self.window, self.count = sizes.windows[0], 0
        self.prompt = self.suffix = None
        self.stats, self.weights = Stats(), weight_bytes(policy.params, engine.decoding.model)

    def __iter__(self) -> Iterator[Int[np.ndarray, " n"]]:
        while self.queued or (self.row >= 0).any():
            start = time.perf_counter()
            self._admit()
            self._compact()
            finished = self._decode(self._grow())
            self.stats = self.stats._replace(seconds=self.stats.seconds + time.perf_counter() - start)
            yield finished

    def rollouts(self, index: Int[np.ndarray, " n"] | None = None) -> Rollouts:
        """Return the rollouts of the prompts `index`; of all prompts by default."""
        index = np.arange(len(self.prompts.length)) if index is None else index
        return self.output.rollouts(index, self.controls, self.version)

    def _program(self, *name: str | int) -> jax.stages.Compiled:
        return self.engine.programs(self.params, *name)

    def _put(self, tree: PyTree) -> PyTree:
        return hosts.put(tree, self.engine.decoding.layout.sharding(("rows",)))

    def _admit(self) -> None:
        """Move queued sequence groups into free slots. Each shard prefills its own new prompts, each once."""
        samples, sizes = self.engine.cfg.samples, self.engine.sizes
        admitted: list[list[int]] = [[] for _ in range(sizes.shards)]
        source = np.zeros(self.batch, np.int32)
        slots = []
        for slot in np.flatnonzero(self.row < 0)[: len(self.queued)]:
            own, prompt = admitted[slot * sizes.shards // self.batch], self.queued[0] // samples
            if prompt not in own:
                if len(own) == sizes.prompts[0] // sizes.shards:
                    break
                own.append(prompt)
            source[slot] = own.index(prompt)
            self.row[slot] = self.queued.popleft()
            slots.append(slot)
        if not slots:
            return
        prompt = self.row[slots] // samples
        self.age[slots], self.done[slots] = 0, False
        self.last[slots] = self.prompts.tokens[prompt, self.prompts.length[prompt] - 1][:, None]
        self._insert(self._prefill(admitted), max(map(len, admitted)), np.array(slots), source)

    def _prefill(self, admitted: list[list[int]]) -> PromptCache:
        """Return the prompt KV cache of the admitted prompts of each shard, padded with empty prompts."""
        sizes, prompts = self.engine.sizes, self.prompts
        num = smallest(sizes.prompts, max(map(len, admitted)) * sizes.shards)
        index = np.zeros((sizes.shards, num // sizes.shards), np.int64)
        length = np.zeros(index.shape, np.int32)
        for s, some in enumerate(admitted):
            index[s, : len(some)] = some
            length[s, : len(some)] = prompts.length[some] - 1
        slots = smallest(sizes.prompt_slots, max(int(length.max()), 1))
        tokens = _resize(prompts.tokens, slots, self.engine.decoding.vocab.pad)[index.reshape(-1)]
        return self._program("prefill", num, slots)(self.params, *self._put((tokens, length.reshape(-1))))

    def _insert(self, new: PromptCache, admitted: int, slots: np.ndarray, source: np.ndarray) -> None:
        """Set the prompt KV cache of a new active batch, or of `slots` in the current one.

        Args:
            new: prompt cache of the admitted prompts.
            admitted: maximum admitted prompts per shard.
            slots: slots of the admitted sequence groups.
            source: index into `new` of each slot's prompt, within its shard.
        """
        sizes = self.engine.sizes
        num = smallest(sizes.prompts, admitted * sizes.shards)
        if self.suffix is None:
            self.suffix = self._program("empty_suffix", self.batch, self.window)()
        if len(slots) == (self.row >= 0).sum():
            # No other sequence group is active.
            in_order = self.batch == num and (source == np.arange(self.batch) % (num // sizes.shards))[slots].all()
            self.prompt = (
                new if in_order else self._program("broadcast_prefix", num, self.batch)(new, self._put(source))
            )
            return
        local = self.batch // sizes.shards
        destination = np.full(self.batch, local, np.int32)
        destination[slots] = slots % local
        insert = self._program("insert_prefix", self.batch, num)
        self.prompt = insert(self.prompt, new, *self._put((destination, source)))

    def _compact(self) -> None:
        """Shrink the active batch to the smallest size that holds its active groups, once the queue is empty."""
        sizes = self.engine.sizes
        active = self.row >= 0
        most = active.reshape(sizes.shards, -1).sum(axis=1).max()
        fewer = smallest(tuple(sizes.groups(n) for n in sizes.prompts), most * sizes.shards)
        if not self.engine.cfg.engine.compact or self.queued or fewer >= self.batch:
            return
        # Active groups first, within each shard.
        order = np.argsort(~active.reshape(sizes.shards, -1), axis=1, kind="stable")[:, : fewer // sizes.shards]
        local = order.astype(np.int32)
        rows = (local[..., None] * sizes.rows_per_group + np.arange(sizes.rows_per_group, dtype=np.int32)).reshape(-1)
        compact = self._program("compact", self.batch, fewer, self.window)
        self.prompt, self.suffix = compact(self.prompt, self.suffix, *self._put((local.reshape(-1), rows)))
        kept = (local + np.arange(sizes.shards)[:, None] * (self.batch // sizes.shards)).reshape(-1)
        self.row, self.age, self.last, self.done = (x[kept] for x in (self.row, self.age, self.last, self.done))
        self.batch = fewer

    def _grow(self) -> int:
        """Grow the KV cache if it is full of keys that active rows attend to. Returns the steps of the next chunk: a multiple of
        the interval, limited by the window and by the rows' remaining tokens."""
        active, samples, windows = self.row >= 0, self.engine.cfg.samples, self.engine.sizes.windows
        most, interval = windows[-1], self.engine.decoding.interval
        age = int(self.age[active].max())
        need = int((self.limit[self.row[active] // samples] - self.age[active]).max())
        steps = min(self.engine.decoding.steps, -(-need // interval) * interval)
        if min(age + interval, most) > self.window:
            wider = smallest(windows, min(age + interval, most))
            grow = self._program("extend_suffix", self.batch, self.window, wider)
            self.suffix = grow(self.suffix, self._scalar(self.count))
            self.window, self.count = wider, self.window
        return steps if self.window == most else min(steps, (self.window - age) // interval * interval)

    def _scalar(self, value: int) -> jax.Array:
        return hosts.put(np.int32(value), self.engine.decoding.layout.replicated)

    def _decode(self, steps: int) -> Int[np.ndarray, " n"]:
        """Decode one chunk. Returns the prompts that it finished."""
        samples, rows_per_group = self.engine.cfg.samples, self.engine.sizes.rows_per_group
        prompt = np.maximum(self.row, 0) // samples
        groups = SequenceGroups(
            uid=self.prompts.uid[prompt],
            first=(np.maximum(self.row, 0) % samples).astype(np.int32),
            length=self.prompts.length[prompt] - 1,
            age=self.age,
            limit=self.limit[prompt],
            controls=jax.tree.map(lambda x: x[prompt], self.controls),
            last=self.last,
            done=self.done,
        )
        decode_chunk = self._program("decode_chunk", self.batch, self.window)
        self.suffix, result = decode_chunk(
            self.params, self.suffix, self.prompt, self._put(groups), self.key, self._scalar(self.count),
            self._scalar(steps),
        )  # fmt: skip
        result: ChunkResult = jax.tree.map(np.array, result)
        ran = int(result.steps)
        # Rows that had finished before the chunk have no new tokens.
        active = (self.row[:, None] >= 0) & ~self.done
        rows = np.where(active, self.row[:, None] + np.arange(rows_per_group), -1).reshape(-1)
        age = np.repeat(self.age, rows_per_group)
        self.output.add(rows, age, result.chunk, ran)
        self.last, self.done = result.last, result.done
        if self.engine.cfg.stop:
            stopped = self.output.stop(rows, age, self.engine.cfg.stop, self.engine.model.tokenizer.spellings)
            self.done |= stopped.reshape(self.done.shape)
        self._count(ran, result.chunk)
        self.age = self.age + np.int32(ran)
        self.count += ran
        return self._release()

    def _count(self, ran: int, chunk: DecodedChunk) -> None:
        """Add a chunk of `ran` steps to the stats; must run before `age` is updated."""
        decoding, s, rows_per_group = self.engine.decoding, self.stats, self.engine.sizes.rows_per_group
        active = self.row >= 0
        length = np.where(active, self.prompts.length[np.maximum(self.row, 0) // self.engine.cfg.samples] - 1, 0)
        entry = self.engine.programs.caching.format.number_bytes(decoding.model)
        work = decode_step(decoding.model, length, np.where(active, self.age + ran // 2, 0), rows_per_group, entry)
        shards = decoding.layout.size("rows") * decoding.layout.size("heads")
        work = Work(self.weights + work.bytes / shards, work.flops / shards)
        rows, sampled = self.batch * rows_per_group, chunk.sampled[:ran]
        over = 0 if chunk.overflow is None else int((chunk.overflow[:ran] & sampled).sum())
        self.stats = Stats(
            s.seconds, s.steps + ran, s.row_steps + ran * rows, s.tokens + int(sampled.sum()), s.overflow + over,
            (*s.chunks, (ran, work)),
        )  # fmt: skip

    def _release(self) -> Int[np.ndarray, " n"]:
        """Free the slots of sequence groups whose rows have all finished. Returns prompts without unfinished groups."""
        gone = np.flatnonzero((self.row >= 0) & self.done.all(axis=1))
        prompt = self.row[gone] // self.engine.cfg.samples
        np.subtract.at(self.unfinished, prompt, 1)
        self.row[gone] = -1
        return np.unique(prompt[self.unfinished[prompt] == 0])


def _resize(tokens: np.ndarray, slots: int, pad: int) -> np.ndarray:
    """Truncate or pad `tokens` to `slots` slots."""
    tokens = tokens[:, :slots]
    return np.pad(tokens, ((0, 0), (0, slots - tokens.shape[1])), constant_values=pad)
