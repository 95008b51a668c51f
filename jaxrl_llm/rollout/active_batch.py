"""The active batch: the sequence groups being decoded, with their KV caches. Between chunks, the host decides from a few integers
what runs next.

A sequence group is what the engine schedules: one prompt and F of its samples, which share one prompt KV cache. Arrays on the
device take a few fixed sizes (groups halved, windows doubled), so a small set of programs serves every call. All hosts make the
same decisions, because they see equal numbers.
"""

import math
from collections import deque

import jax
import numpy as np
from jaxtyping import Bool, Int

from jaxrl_llm.control.config import UNLIMITED
from jaxrl_llm.distribution.control_tables import ControlTables
from jaxrl_llm.model.cache import PromptCache, num_slots
from jaxrl_llm.parallel import hosts
from jaxrl_llm.rollout.batch_sizes import BatchSizes, smallest
from jaxrl_llm.rollout.decode import ChunkInputs, ChunkResult, SequenceGroups
from jaxrl_llm.rollout.output import OutputBuffer
from jaxrl_llm.rollout.programs import Programs
from jaxrl_llm.rollout.requests import QueuedGroup, Request
from jaxrl_llm.rollout.sample import Controls
from jaxrl_llm.types import Prompts, PyTree

# Keys written to the rings, beyond which their number is reduced: it is an int32 on the device.
MANY_KEYS = 2**30


class ActiveBatch:
    """A slot holds one sequence group or none. Empty until the first `admit`."""

    def __init__(self, sizes: BatchSizes, programs: Programs, output: OutputBuffer):
        """`output`: has the tokens and limits of the rows."""
        self.sizes, self.programs, self.output = sizes, programs, output
        self.decoding, self.layout = programs.decoding, programs.decoding.layout
        self.window, self.count = sizes.windows[0], 0
        """Slots of the rings, and keys written to them."""
        self.prompt = self.suffix = None
        self.groups, self.rows = _empty(0, sizes.rows_per_group), np.zeros((0, sizes.rows_per_group), int)
        self.placed: list[QueuedGroup | None] = []
        """What each slot was filled with."""

    @property
    def num_slots(self) -> int:
        return len(self.rows)

    @property
    def active(self) -> Bool[np.ndarray, " U"]:
        """True for slots with a sequence group."""
        return (self.rows >= 0).any(axis=1)

    def admit(self, params: PyTree, queue: deque[QueuedGroup]) -> None:
        """Move queued sequence groups into free slots, of which there are more if they do not suffice."""
        if not queue:
            return
        want = int(self.active.sum()) + len(queue)
        size = smallest(self.sizes.group_counts, min(want, self.sizes.group_counts[0]))
        if not self.num_slots:
            self._resize_arrays(size)
        elif size > self.num_slots:
            self._resize("expand", size)
        while self._admit_some(params, queue):
            pass

    def _admit_some(self, params: PyTree, queue: deque[QueuedGroup]) -> bool:
        """Admit as many as one prefill holds. Each shard prefills its own new prompts, each once."""
        sizes = self.sizes
        admitted: list[list[Request]] = [[] for _ in range(sizes.shards)]
        source = np.zeros(self.num_slots, np.int32)
        slots = []
        for slot in np.flatnonzero(~self.active)[: len(queue)].tolist():
            own, request = admitted[slot * sizes.shards // self.num_slots], queue[0].request
            if request not in own:
                if len(own) == sizes.prompts[0] // sizes.shards:
                    break
                own.append(request)
            source[slot] = own.index(request)
            self._place(slot, queue.popleft())
            slots.append(slot)
        if slots:
            self._insert(self._prefill(params, admitted), max(map(len, admitted)), np.array(slots), source)
            self._rejoin(params, slots)
        return bool(slots)

    def _place(self, slot: int, group: QueuedGroup) -> None:
        """Write the arrays of a slot. The last known token is what the first step reads."""
        groups, request, prompt = self.groups, group.request, group.request.prompt
        self.placed[slot], self.rows[slot] = group, group.rows
        groups.uid[slot], groups.age[slot], groups.done[slot] = prompt.uid, group.age, group.rows < 0
        own = slice(group.first, group.first + self.sizes.rows_per_group)
        columns = {"sample": request.sample, "begin": request.begin, **vars(request.controls)}
        for name, values in columns.items():
            column = getattr(groups if name in ("sample", "begin") else groups.controls, name)
            column[slot, : len(values[own])] = values[own]
        groups.length[slot] = prompt.length - 1 + groups.begin[slot]
        known = groups.begin[slot] + group.age
        tokens = self.output.columns["tokens"][group.rows, np.maximum(known - 1, 0)]
        groups.last[slot] = np.where(known > 0, tokens, prompt.tokens[prompt.length - 1])
        groups.state[slot] = np.where(group.rows >= 0, self.output.state[group.rows], 0)
        if self.output.turn[request.rows].any():
            # A budget counts from the beginning of the policy's own turn.
            turn = np.where(group.rows >= 0, self.output.turn[group.rows], 0)
            groups.controls.budget[slot] = np.minimum(groups.controls.budget[slot], UNLIMITED - turn) + turn

    def _prefill(self, params: PyTree, admitted: list[list[Request]]) -> PromptCache:
        """Return the prompt KV cache of the admitted requests' prompts and trunks of each shard, padded with empty prompts."""
        sequences = [[_tokens(request.prompt, request.trunk)[:-1] for request in own] for own in admitted]
        num = smallest(self.sizes.prompts, max(map(len, admitted)) * self.sizes.shards)
        return self._read("prefill", params, num, sequences, self.sizes.prompt_slots)

    def _read(
        self, name: str, params: PyTree, num: int, sequences: list[list[np.ndarray]], buckets: tuple[int, ...]
    ) -> PromptCache:
        """Return the keys and values of token sequences.

        Args:
            name: of the program.
            params: of the policy.
            num: sequences that the program reads, over all shards.
            sequences: token ids of each sequence, by shard.
            buckets: lengths for which there is a program.
        """
        flat = [
            s for own in sequences for s in (*own, *[np.zeros(0, np.int32)] * (num // self.sizes.shards - len(own)))
        ]
        slots = smallest(buckets, max(1, *map(len, flat)))
        tokens = np.full((num, slots), self.decoding.vocab.pad, np.int32)
        for i, sequence in enumerate(flat):
            tokens[i, : len(sequence)] = sequence
        length = np.array([len(s) for s in flat], np.int32)
        return self.programs(params, name, num, slots)(params, *self._put((tokens, length)))

    def _insert(self, new: PromptCache, admitted: int, slots: np.ndarray, source: np.ndarray) -> None:
        """Set the prompt KV cache of a new active batch, or of `slots` in the current one.

        Args:
            new: prompt cache of the admitted prompts.
            admitted: maximum admitted prompts per shard.
            slots: slots of the admitted sequence groups.
            source: index into `new` of each slot's prompt, within its shard.
        """
        sizes, size = self.sizes, self.num_slots
        num = smallest(sizes.prompts, admitted * sizes.shards)
        if self.suffix is None:
            self.suffix = self.programs(None, "empty_suffix", size, self.window)()
        if len(slots) == self.active.sum():
            # No other sequence group is active.
            in_order = size == num and (source == np.arange(size) % (num // sizes.shards))[slots].all()
            self.prompt = (
                new if in_order else self.programs(None, "broadcast_prefix", num, size)(new, self._put(source))
            )
            return
        local = size // sizes.shards
        destination = np.full(size, local, np.int32)
        destination[slots] = slots % local
        insert = self.programs(None, "insert_prefix", size, num)
        self.prompt = insert(self.prompt, new, *self._put((destination, source)))

    def _rejoin(self, params: PyTree, slots: list[int]) -> None:
        """Read the known tokens of the rows in `slots` again, and write their keys into the rows' rings."""
        sizes, lanes = self.sizes, self.sizes.rows_per_group
        self._widen(int(self.groups.age[slots].max()))
        per_shard = self.num_slots // sizes.shards
        waiting: list[list[tuple[int, int]]] = [[] for _ in range(sizes.shards)]
        for slot in slots:
            waiting[slot // per_shard] += [(slot, lane) for lane in np.flatnonzero(self.groups.age[slot])]
        at_once = sizes.prompts[0] // sizes.shards
        for start in range(0, max(map(len, waiting), default=0), at_once):
            part = [own[start : start + at_once] for own in waiting]
            num = smallest(sizes.prompts, max(map(len, part)) * sizes.shards)
            sequences = [[self._known(slot, lane) for slot, lane in own] for own in part]
            # Indices out of range are ignored.
            place = np.full((3, sizes.shards, num // sizes.shards), per_shard * lanes, np.int32)
            for shard, own in enumerate(part):
                for i, (slot, lane) in enumerate(own):
                    place[:, shard, i] = (
                        slot % per_shard * lanes + lane,
                        self.groups.length[slot, lane],
                        self.groups.age[slot, lane],
                    )
            new = self._read("read_rows", params, num, sequences, sizes.row_slots)
            join = self.programs(None, "join_suffix", self.num_slots, self.window, num)
            self.suffix = join(self.suffix, new, *self._put(tuple(place.reshape(3, -1))), self._scalar(self.count))

    def _known(self, slot: int, lane: int) -> Int[np.ndarray, " n"]:
        """Tokens of a row whose keys are known: all but the last, which the first step reads."""
        known = self.groups.begin[slot, lane] + self.groups.age[slot, lane]
        tokens = self.output.columns["tokens"][self.rows[slot, lane], : known - 1]
        return _tokens(self.placed[slot].request.prompt, tokens)

    def compact(self) -> None:
        """Shrink to the smallest size that holds the active groups."""
        sizes = self.sizes
        most = self.active.reshape(sizes.shards, -1).sum(axis=1).max()
        if (fewer := smallest(sizes.group_counts, most * sizes.shards)) < self.num_slots:
            self._resize("compact", fewer)

    def _resize(self, program: str, size: int) -> None:
        """Move the active groups, in their order, to the first slots of their shard in arrays of another size."""
        sizes, old = self.sizes, self.num_slots // self.sizes.shards
        order = np.argsort(~self.active.reshape(sizes.shards, -1), axis=1, kind="stable")
        new = size // sizes.shards
        # Further slots are copies that nothing reads.
        local = np.pad(order, ((0, 0), (0, max(new - old, 0))))[:, :new].astype(np.int32)
        lanes = np.arange(sizes.rows_per_group, dtype=np.int32)
        rows = (local[..., None] * sizes.rows_per_group + lanes).reshape(-1)
        resize = self.programs(None, program, self.num_slots, size, self.window)
        self.prompt, self.suffix = resize(self.prompt, self.suffix, *self._put((local.reshape(-1), rows)))
        kept = local + np.arange(sizes.shards)[:, None] * old
        kept[:, old:] = self.num_slots
        self._resize_arrays(size, kept.reshape(-1))

    def _resize_arrays(self, size: int, kept: Int[np.ndarray, " U"] | None = None) -> None:
        """Take the slots `kept` of the host's arrays; indices beyond them are empty slots."""
        kept = np.zeros(size, int) if kept is None else kept
        blank = _empty(1, self.sizes.rows_per_group)
        self.groups = jax.tree.map(lambda x, more: np.concatenate([x, more])[kept], self.groups, blank)
        self.rows = np.concatenate([self.rows, np.full((1, self.sizes.rows_per_group), -1)])[kept]
        placed = [*self.placed, None]
        self.placed = [placed[i] for i in kept]

    def decode(self, params: PyTree, key: jax.Array, tables: ControlTables | None) -> ChunkResult:
        """Decode one chunk.

        Args:
            params: of the policy.
            key: random key of the session, its data on the device.
            tables: of the rows' controls, on the device; None: no row has any.
        """
        limit = np.where(self.groups.done, 0, self.output.limit[self.rows])
        self.groups = self.groups.replace(limit=limit.astype(np.int32))
        steps, sizes = self._steps(), () if tables is None else tables.sizes
        decode_chunk = self.programs(params, "decode_chunk", self.num_slots, self.window, *sizes)
        inputs = ChunkInputs(key, self._scalar(self.count), self._scalar(steps), tables)
        self.suffix, result = decode_chunk(params, self.suffix, self.prompt, self._put(self.groups), inputs)
        result = jax.tree.map(np.array, result)
        ran = int(result.steps)
        self.groups = self.groups.replace(last=result.last, state=result.state, age=self.groups.age + np.int32(ran))
        self.count += ran
        if self.count > MANY_KEYS:
            self.count %= math.lcm(*map(num_slots, self.suffix.v))
        return result

    def _steps(self) -> int:
        """Return the steps of the next chunk: a multiple of the interval, limited by the rows' remaining tokens and by the rings,
        which grow if they are full of keys that active rows attend to."""
        active, interval = ~self.groups.done, self.decoding.interval
        age = int(self.groups.age[active].max())
        need = int((self.groups.limit - self.groups.begin - self.groups.age)[active].max())
        steps = min(self.decoding.steps, -(-need // interval) * interval)
        self._widen(age)
        return (
            steps if self.window == self.sizes.windows[-1] else min(steps, (self.window - age) // interval * interval)
        )

    def _widen(self, age: int) -> None:
        """Enlarge the rings until rows of this age can decode."""
        windows = self.sizes.windows
        while self.window < min(age + self.decoding.interval, windows[-1]):
            wider = windows[windows.index(self.window) + 1]
            widen = self.programs(None, "extend_suffix", self.num_slots, self.window, wider)
            self.suffix = widen(self.suffix, self._scalar(self.count))
            self.window, self.count = wider, self.window

    def release(self) -> list[Request]:
        """Free the slots of groups whose rows have all ended. Returns their requests, one per group."""
        done = (self.rows < 0) | self.output.ended[self.rows]
        self.groups = self.groups.replace(done=done)
        gone = np.flatnonzero(self.active & done.all(axis=1))
        left = [self.placed[slot].request for slot in gone]
        for slot in gone:
            self._free(slot)
        return left

    def remove(self, requests: set[Request] | None = None) -> list[QueuedGroup]:
        """Free the slots of these requests, or all slots. Returns their groups as they would be queued again."""
        found = []
        for slot in np.flatnonzero(self.active):
            placed, groups = self.placed[slot], self.groups
            if requests is None or placed.request in requests:
                rows = np.where(groups.done[slot], -1, self.rows[slot])
                found.append(placed._replace(rows=rows, age=np.where(groups.done[slot], 0, groups.age[slot])))
                self._free(slot)
        return found

    def _free(self, slot: int) -> None:
        self.rows[slot], self.groups.done[slot], self.placed[slot] = -1, True, None

    def _put(self, tree: PyTree) -> PyTree:
        return hosts.put(tree, self.layout.sharding(("rows",)))

    def _scalar(self, value: int) -> jax.Array:
        return hosts.put(np.int32(value), self.layout.replicated)


def _empty(slots: int, lanes: int) -> SequenceGroups:
    """Return slots without a sequence group."""
    i32 = lambda *shape: np.zeros(shape, np.int32)  # noqa: E731
    f32, rows = np.ones((slots, lanes), np.float32), (slots, lanes)
    controls = Controls(f32, f32.copy(), i32(*rows), 0 * f32, i32(*rows), i32(*rows), i32(*rows))
    each = [i32(*rows) for _ in range(6)]
    return SequenceGroups(i32(slots), *each, controls, i32(*rows), np.ones(rows, bool))


def _tokens(prompt: Prompts, completion: Int[np.ndarray, " n"]) -> Int[np.ndarray, " m"]:
    """Tokens of one prompt and behind it."""
    return np.concatenate([prompt.tokens[: prompt.length], completion])
