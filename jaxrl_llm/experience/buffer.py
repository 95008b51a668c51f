"""The buffer of sampled groups: packed, as they were captured, with what the rules of a replay look at."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxrl_llm.experience import by_prompt
from jaxrl_llm.experience.draws import Candidates
from jaxrl_llm.experience.independent_rows import independent_rows
from jaxrl_llm.experience.packed_groups import Packed, Packing
from jaxrl_llm.types import Groups


class Known(NamedTuple):
    """What is known of the groups of a buffer, oldest first; -1 or 0 in empty places behind them."""

    number: Int[np.ndarray, " capacity"]
    """Name of the group: how many were stored before it; -1 in an empty place."""
    version: Int[np.ndarray, " capacity"]
    """Version of the newest policy that sampled one of its tokens."""
    uses: Int[np.ndarray, " capacity"]
    reward: Float[np.ndarray, " capacity"]
    success: Float[np.ndarray, " capacity"]
    signal: Float[np.ndarray, " capacity"]
    entropy: Float[np.ndarray, " capacity"]
    size: Int[np.ndarray, " capacity"]
    row: Int[np.ndarray, " capacity"]
    """The others: as in `Candidates`."""


class Buffer(NamedTuple):
    """Groups that were sampled, at most as many as its capacity."""

    known: Known
    next: Int[np.ndarray, ""]
    """Number of the next group."""
    packed: dict[str, Packed]
    """By number, as text. Never changed: a checkpoint writes each once."""

    @property
    def stored(self) -> Int[np.ndarray, " n"]:
        """Numbers of the groups."""
        return self.known.number[self.known.number >= 0]

    @property
    def num_bytes(self) -> int:
        return sum(packed.nbytes for packed in self.packed.values())

    def candidates(self, version: int) -> Candidates:
        """Return what a draw may look at. `version`: of the policy that sampled last."""
        known = Known(*(x[: len(self.stored)] for x in self.known))
        return Candidates(version - known.version, *known[2:])

    def groups(self, place: Sequence[int], packing: Packing) -> Groups:
        """Return the groups at these places."""
        return packing.unpack([self.packed[str(self.known.number[i])] for i in place])


def empty_buffer(capacity: int) -> Buffer:
    i32, f32 = np.zeros(capacity, np.int32), np.zeros(capacity, np.float32)
    known = Known(np.full(capacity, -1, np.int64), i32 - 1, i32, f32, f32, f32, f32, i32, i32 - 1)
    return Buffer(Known(*(x.copy() for x in known)), np.zeros((), np.int64), {})


def without(buffer: Buffer, gone: Bool[np.ndarray, " n"]) -> Buffer:
    """Return the buffer without some of its groups."""
    if not gone.any():
        return buffer
    left = np.flatnonzero(~gone)
    blank = empty_buffer(len(buffer.known.number)).known
    known = Known(*(np.concatenate([x[left], none[len(left) :]]) for x, none in zip(buffer.known, blank, strict=True)))
    return buffer._replace(known=known, packed={str(n): buffer.packed[str(n)] for n in known.number[: len(left)]})


def used(buffer: Buffer, place: Int[np.ndarray, " n"]) -> Buffer:
    """Return the buffer after a step that trained on the groups at these places."""
    uses = buffer.known.uses.copy()
    uses[place] += 1
    return buffer._replace(known=buffer.known._replace(uses=uses))


def added(buffer: Buffer, groups: Groups, packed: Sequence[Packed], most_bytes: float) -> Buffer:
    """Return the buffer with more groups, which were used once. The oldest make room: beyond its capacity, or its bytes.

    Args:
        buffer: before.
        groups: each with a kept row.
        packed: the same groups.
        most_bytes: of all packed groups. One that is larger alone is not stored.
    """
    old, new, capacity = len(buffer.stored), describe(groups, int(buffer.next)), len(buffer.known.number)
    whole = Known(*(np.concatenate([x[:old], more]) for x, more in zip(buffer.known, new, strict=True)))
    parts = buffer.packed | {str(n): x for n, x in zip(new.number.tolist(), packed, strict=True)}
    # From the newest on, as many as there is room for.
    size = np.array([parts[str(n)].nbytes for n in whole.number.tolist()])
    fits = np.cumsum(size[::-1])[::-1] <= most_bytes
    kept = np.flatnonzero(fits)[-capacity:]
    blank = empty_buffer(capacity).known
    known = Known(
        *(np.concatenate([x[kept], none[len(kept) :]]).astype(none.dtype) for x, none in zip(whole, blank, strict=True))
    )
    numbers = {str(n) for n in known.number[: len(kept)].tolist()}
    return Buffer(known, buffer.next + len(packed), {n: x for n, x in parts.items() if n in numbers})


def describe(groups: Groups, first: int) -> Known:
    """Return what is known of groups that are used for the first time. `first`: number of the first of them."""
    rollouts = groups.rollouts
    num, prompt = len(groups.failure), rollouts.prompt
    own = prompt >= 0
    tokens = np.bincount(prompt[own], np.count_nonzero(rollouts.sampled, axis=1)[own], num)
    entropy = np.bincount(prompt[own], np.where(rollouts.sampled, rollouts.entropy, 0).sum(axis=1)[own], num)
    newest = np.zeros(num, np.int64)
    np.maximum.at(newest, prompt[own], rollouts.version.max(axis=1)[own])
    reward, alone = groups.measure("reward"), independent_rows(groups)
    mean = by_prompt.means(reward, groups)
    return Known(
        number=first + np.arange(num),
        version=newest,
        uses=np.ones(num),
        reward=mean,
        success=by_prompt.means(alone.measure("success"), alone),
        signal=by_prompt.means(np.where(own, np.abs(reward - mean[prompt]), 0), groups),
        entropy=entropy / np.maximum(tokens, 1),
        size=rollouts.size,
        row=rollouts.prompts.row,
    )
