"""A ring of whole groups. What was captured while sampling stays as it was captured: nothing in here is ever recomputed.

Life of a group: `fill` puts the fresh groups that were kept into the batch; a place whose fresh group was dropped takes an
older one from the ring, drawn at random among those young enough; then the fresh ones enter the ring over the oldest.
Capacity 0 is the identity: fresh groups pass through and dropped ones are left out.
"""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int

from jaxrl_llm.experience.config import ReplayConfig
from jaxrl_llm.types import Experience


class Replay(NamedTuple):
    """Fixed shapes, so that a checkpoint can hold it."""

    groups: Experience
    """Leaves [capacity, ...]: the leading axis counts groups, rows of a group lie in the next."""
    version: Int[np.ndarray, " capacity"]
    """Optimizer steps behind the policy that sampled the group; -1 where the place is empty."""
    next: Int[np.ndarray, ""]
    """Place that the next group takes."""


def by_group(experience: Experience) -> Experience:
    """Leaves [P, ...] or [P, G, ...] from prompt-major rows."""
    num_prompts = experience.rollouts.prompts.length.shape[0]
    return jax.tree.map(lambda x: np.asarray(x).reshape(num_prompts, -1, *x.shape[1:]), experience)


def by_row(groups: Experience) -> Experience:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), groups)


def empty(example: Experience, capacity: int) -> Replay:
    """A ring for experience of the example's shapes."""
    groups = jax.tree.map(lambda x: np.zeros((capacity, *x.shape[1:]), x.dtype), by_group(example))
    return Replay(groups, np.full(capacity, -1, np.int32), np.zeros((), np.int32))


def fill(
    replay: Replay,
    fresh: Experience,
    keep: Bool[np.ndarray, " P"],
    version: int,
    cfg: ReplayConfig,
    rng: np.random.Generator,
) -> tuple[Replay, Experience, Bool[np.ndarray, " P"]]:
    """The ring with the kept groups in it, the experience to train on, and which of its groups count.

    `version` is the trainer's step now: the age of a group is how many updates ago its policy was published.
    """
    if not cfg.capacity:
        return replay, fresh, keep
    fresh = by_group(fresh)
    young = np.flatnonzero((replay.version >= 0) & (version - replay.version <= cfg.max_age))
    places = np.flatnonzero(~keep)[: len(young)]
    old = rng.choice(young, size=len(places), replace=False)
    mixed = jax.tree.map(np.copy, fresh)
    jax.tree.map(lambda to, ring: to.__setitem__(places, ring[old]), mixed, replay.groups)
    counts = keep.copy()
    counts[places] = True
    return _push(replay, fresh, np.flatnonzero(keep)[-cfg.capacity :]), by_row(mixed), counts


def _push(replay: Replay, fresh: Experience, kept: Int[np.ndarray, " n"]) -> Replay:
    capacity = len(replay.version)
    places = (replay.next + np.arange(len(kept))) % capacity

    def write(ring: np.ndarray, new: np.ndarray) -> np.ndarray:
        ring = ring.copy()
        ring[places] = new[kept]
        return ring

    born = fresh.rollouts.version.max(axis=(1, 2))
    return Replay(
        groups=jax.tree.map(write, replay.groups, fresh),
        version=write(replay.version, born.astype(np.int32)),
        next=np.asarray((replay.next + len(kept)) % capacity, np.int32),
    )
