"""Replay: a ring buffer of whole groups. Values captured while sampling are stored as they are and never recomputed.

Fresh groups with a kept row go into the batch. A dropped fresh group is replaced by an older one from the ring, sampled uniformly
among those within `max_age`; then the kept fresh groups overwrite the oldest entries of the ring.
Capacity 0 means no replay: fresh groups pass through, and dropped ones are left out.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from jaxrl_llm.experience.config import OwnReplay, ReplayConfig
from jaxrl_llm.experience.stage_checks import (
    checked_groups,
    checked_init,
    checked_metrics,
    checked_state,
    checked_tuple,
)
from jaxrl_llm.types import COLUMNS, Groups, Prompts, Rollouts, join_groups, map_groups, number_rows, select_groups

Metrics = dict[str, float]


class Replay(NamedTuple):
    """Pure functions over a state: a tree of NumPy arrays that is saved in checkpoints."""

    init: Callable[[Groups], Any]
    """init(blank): the state before the first step. `blank`: groups of zeros in the run's shapes."""
    exchange: Callable[[Any, Groups, np.random.Generator], tuple[Any, Groups, Metrics]]
    """exchange(state, groups, rng): the next state, the groups to train on, of the same shapes, and metrics."""


class Ring(NamedTuple):
    """State of the replay; fixed shapes, as checkpoints need."""

    groups: Groups
    """As many groups as the capacity, each with room for the rows of the largest one: filler rows make up the rest."""
    version: Int[np.ndarray, " capacity"]
    """Version of the newest policy that sampled a token of the group; -1 for an empty entry."""
    next: Int[np.ndarray, ""]
    """Index of the entry to be written next."""


def make_replay(cfg: ReplayConfig | OwnReplay) -> Replay:
    """Return the replay of a config."""
    if isinstance(cfg, OwnReplay):
        return _own_replay(cfg)
    if not cfg.capacity:
        return Replay(lambda blank: (), lambda state, groups, rng: (state, groups, {"groups/replayed": 0.0}))
    return Replay(partial(empty_ring, capacity=cfg.capacity), partial(exchange, max_age=cfg.max_age))


def _own_replay(cfg: OwnReplay) -> Replay:
    own, name = cfg.made(), f"experience.replay {cfg.function}"

    def exchange(state: Any, fresh: Groups, rng: np.random.Generator) -> tuple[Any, Groups, Metrics]:
        after, groups, metrics = checked_tuple(name, own.exchange(state, fresh, rng), ("state", "groups", "metrics"))
        return checked_state(name, state, after), checked_groups(name, groups, fresh), checked_metrics(name, metrics)

    return Replay(checked_init(name, own.init), exchange)


def blank_groups(
    prompts: int,
    samples: int,
    slots: tuple[int, int],
    graders: int,
    uses: Sequence[str],
    max_kept_tokens: int,
    most: int = 0,
) -> Groups:
    """Return groups of zeros in the shapes of a run.

    Args:
        prompts: number of groups.
        samples: rows per group, on average.
        slots: (prompt, completion) tokens.
        graders: number of reward components.
        uses: features of the run that add columns, as in `COLUMNS`, and "steps" if a grader has them.
        max_kept_tokens: K, the largest number of tokens kept by truncation.
        most: rows of the largest group; 0: all have equally many.
    """
    (s, c), b = slots, prompts * samples
    most = most or samples
    prompt, sample = number_rows(np.clip(b - most * np.arange(prompts), 0, most))
    i32, f32 = np.int32, np.float32
    there = [column for column in COLUMNS if column.rollouts and (not column.when or column.when in uses)]
    rollouts = Rollouts(
        prompts=Prompts(np.zeros((prompts, s), i32), *(np.zeros(prompts, i32) for _ in range(3))),
        prompt=prompt,
        sample=sample,
        length=np.zeros(b, i32),
        temperature=np.zeros(b, f32),
        finish=np.zeros(b, i32),
        **{column.name: np.zeros((b, c, *(max_kept_tokens for _ in column.dims)), column.dtype) for column in there},
    )
    return Groups(
        rollouts=rollouts,
        reward=np.zeros(b, f32),
        components=np.zeros((b, graders), f32),
        failure=np.zeros(prompts, i32),
        failed_by=np.zeros(prompts, i32),
        vote=np.zeros(b, i32),
        keep=np.zeros(b, bool),
        step_reward=np.zeros((b, c), f32) if "steps" in uses else None,
    )


def by_group(groups: Groups, most: int) -> Groups:
    """Return leaves [P ...] and [P G ...], with filler rows behind those of a group that has less than G, `most`."""
    size, place = groups.rollouts.size, np.arange(most)
    inside = place < size[:, None]
    source = np.where(inside, (np.cumsum(size) - size)[:, None] + place, 0)

    def of_rows(x: np.ndarray, fill: float) -> np.ndarray:
        found = np.full((*source.shape, *x.shape[1:]), fill, x.dtype)
        found[inside] = x[source[inside]]
        return found

    return map_groups(groups, np.asarray, of_rows)


def by_row(groups: Groups) -> Groups:
    """Return the groups without filler rows; the inverse of `by_group`."""
    inside = groups.rollouts.prompt >= 0
    found = map_groups(groups, np.asarray, lambda x, fill: x[inside])
    return found.replace(rollouts=found.rollouts.replace(prompt=np.nonzero(inside)[0].astype(np.int32)))


def empty_ring(blank: Groups, capacity: int) -> Ring:
    """Return an empty ring for groups of these shapes, of up to as many rows as the largest of them."""
    groups = jax.tree.map(
        lambda x: np.zeros((capacity, *x.shape[1:]), x.dtype), by_group(blank, blank.rollouts.size.max())
    )
    return Ring(groups, np.full(capacity, -1, np.int32), np.zeros((), np.int32))


def exchange(ring: Ring, fresh: Groups, rng: np.random.Generator, max_age: int) -> tuple[Ring, Groups, Metrics]:
    """Return the ring with the kept fresh groups added, the groups to train on, and metrics.

    The result has as many rows as `fresh`: an old group for which there is no room is left in the ring.

    Args:
        ring: the replay's state.
        fresh: this step's groups.
        rng: selects the replayed groups.
        max_age: largest age in updates: the newest policy version in `fresh` minus the group's.
    """
    keep, size, version = fresh.kept, fresh.rollouts.size, fresh.rollouts.version.max()
    young = np.flatnonzero((ring.version >= 0) & (version - ring.version <= max_age))
    dropped = np.flatnonzero(~keep)[: len(young)]
    old = rng.choice(young, size=len(dropped), replace=False)
    room = len(fresh.keep) - size.sum()
    order = np.arange(len(size))
    chosen: list[int] = []
    for place, entry in zip(dropped, old, strict=True):
        more = np.count_nonzero(ring.groups.rollouts.prompt[entry] >= 0) - size[place]
        if more <= room:
            room, order[place] = room - more, len(size) + len(chosen)
            chosen.append(entry)
    stored = by_row(jax.tree.map(lambda x: x[chosen], ring.groups))
    mixed = select_groups(join_groups(fresh, stored), order, len(fresh.keep)) if chosen else fresh
    capacity = len(ring.version)
    ring = _push(ring, fresh, np.flatnonzero(keep)[-capacity:])
    return ring, mixed, {"groups/replayed": float(len(chosen))}


def _push(ring: Ring, fresh: Groups, kept: Int[np.ndarray, " n"]) -> Ring:
    capacity, most = ring.groups.rollouts.prompt.shape
    entries = (ring.next + np.arange(len(kept))) % capacity
    groups = by_group(select_groups(fresh, kept), most)

    def write(stored: np.ndarray, new: np.ndarray) -> np.ndarray:
        stored = stored.copy()
        stored[entries] = new
        return stored

    return Ring(
        groups=jax.tree.map(write, ring.groups, groups),
        version=write(ring.version, groups.rollouts.version.max(axis=(1, 2)).astype(np.int32)),
        next=np.asarray((ring.next + len(kept)) % capacity, np.int32),
    )
