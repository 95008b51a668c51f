"""Replay: a ring of whole groups. What was captured while sampling stays as it was captured: nothing in here is ever recomputed.

Fresh groups of which a row was kept go into the batch. A place whose fresh group was dropped takes an older one from the ring,
drawn at random among those young enough; then the fresh ones enter the ring over the oldest.
Capacity 0 is the identity: fresh groups pass through, and dropped ones are left out.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from jaxrl_llm.experience.config import OwnReplay, ReplayConfig
from jaxrl_llm.experience.stage_checks import first_state, groups_of, metrics_of, next_state, parts_of
from jaxrl_llm.types import COLUMNS, Groups, Prompts, Rollouts

Metrics = dict[str, float]


class Replay(NamedTuple):
    """Pure functions over a state, which is a tree of NumPy arrays and belongs into checkpoints."""

    init: Callable[[Groups], Any]
    """The state before any group was seen, from groups of the run's shapes, whose numbers do not matter."""
    exchange: Callable[[Any, Groups, np.random.Generator], tuple[Any, Groups, Metrics]]
    """The next state, and the groups to train on, of the same shapes."""


class Ring(NamedTuple):
    """Fixed shapes, so that a checkpoint can hold it."""

    groups: Groups
    """Leaves [capacity, ...]: the leading axis counts groups, rows of a group lie in the next."""
    version: Int[np.ndarray, " capacity"]
    """Optimizer steps behind the policy that sampled the group; -1 where the place is empty."""
    next: Int[np.ndarray, ""]
    """Place that the next group takes."""


def make_replay(cfg: ReplayConfig | OwnReplay) -> Replay:
    if isinstance(cfg, OwnReplay):
        return _own_replay(cfg)
    if not cfg.capacity:
        return Replay(lambda blank: (), lambda state, groups, rng: (state, groups, {"groups/replayed": 0.0}))
    return Replay(partial(empty, capacity=cfg.capacity), partial(exchange, max_age=cfg.max_age))


def _own_replay(cfg: OwnReplay) -> Replay:
    own, name = cfg.made(), f"experience.replay {cfg.function}"

    def exchange(state: Any, fresh: Groups, rng: np.random.Generator) -> tuple[Any, Groups, Metrics]:
        after, groups, metrics = parts_of(name, own.exchange(state, fresh, rng), ("state", "groups", "metrics"))
        return next_state(name, state, after), groups_of(name, groups, fresh), metrics_of(name, metrics)

    return Replay(first_state(name, own.init), exchange)


def blank_groups(
    prompts: int, samples: int, slots: tuple[int, int], graders: int, uses: Sequence[str], max_kept_tokens: int
) -> Groups:
    """Groups of zeros in the shapes of a run.

    Args:
        slots: of a prompt and of a completion.
        uses: of the run, as in `COLUMNS`.
        max_kept_tokens: K, the tokens that a truncated draw keeps.
    """
    (s, c), b = slots, prompts * samples
    i32, f32 = np.int32, np.float32
    there = [column for column in COLUMNS if column.rollouts and (not column.when or column.when in uses)]
    rollouts = Rollouts(
        prompts=Prompts(np.zeros((prompts, s), i32), *(np.zeros(prompts, i32) for _ in range(3))),
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
    )


def by_group(groups: Groups) -> Groups:
    """Leaves [P, ...] or [P, G, ...] from prompt-major rows."""
    num_prompts = len(groups.failure)
    return jax.tree.map(lambda x: np.asarray(x).reshape(num_prompts, -1, *x.shape[1:]), groups)


def by_row(groups: Groups) -> Groups:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), groups)


def empty(blank: Groups, capacity: int) -> Ring:
    """A ring for groups of these shapes."""
    groups = jax.tree.map(lambda x: np.zeros((capacity, *x.shape[1:]), x.dtype), by_group(blank))
    return Ring(groups, np.full(capacity, -1, np.int32), np.zeros((), np.int32))


def exchange(ring: Ring, fresh: Groups, rng: np.random.Generator, max_age: int) -> tuple[Ring, Groups, Metrics]:
    """The ring with the kept groups in it, and the groups to train on.

    The age of a group is how many updates its policy was published before the newest that drew a token of `fresh`.
    """
    keep, version = fresh.kept, fresh.rollouts.version.max()
    groups = by_group(fresh)
    young = np.flatnonzero((ring.version >= 0) & (version - ring.version <= max_age))
    places = np.flatnonzero(~keep)[: len(young)]
    old = rng.choice(young, size=len(places), replace=False)
    mixed = jax.tree.map(np.copy, groups)
    jax.tree.map(lambda to, stored: to.__setitem__(places, stored[old]), mixed, ring.groups)
    capacity = len(ring.version)
    return _push(ring, groups, np.flatnonzero(keep)[-capacity:]), by_row(mixed), {"groups/replayed": float(len(places))}


def _push(ring: Ring, fresh: Groups, kept: Int[np.ndarray, " n"]) -> Ring:
    capacity = len(ring.version)
    places = (ring.next + np.arange(len(kept))) % capacity

    def write(stored: np.ndarray, new: np.ndarray) -> np.ndarray:
        stored = stored.copy()
        stored[places] = new[kept]
        return stored

    born = fresh.rollouts.version.max(axis=(1, 2))
    return Ring(
        groups=jax.tree.map(write, ring.groups, fresh),
        version=write(ring.version, born.astype(np.int32)),
        next=np.asarray((ring.next + len(kept)) % capacity, np.int32),
    )
