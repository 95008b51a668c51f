"""Replay: groups of earlier steps come back. What was captured while sampling is stored as it is and never recomputed.

Fresh groups with a kept row go into the batch. A dropped fresh group is replaced by one of the buffer, which the config's rule
draws; then the kept fresh groups join the buffer. Capacity 0 means no replay: fresh groups pass through, and dropped ones are left
out.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.buffer import Buffer, added, empty_buffer, used, without
from jaxrl_llm.experience.config import OwnReplay, ReplayConfig
from jaxrl_llm.experience.draws import Candidates
from jaxrl_llm.experience.packed_groups import Packing
from jaxrl_llm.experience.stage_checks import (
    checked_groups,
    checked_init,
    checked_metrics,
    checked_state,
    checked_tuple,
)
from jaxrl_llm.types import COLUMNS, Groups, Prompts, Rollouts, join_groups, number_rows, select_groups

Metrics = dict[str, float]
MIB = 2**20


class Replay(NamedTuple):
    """Pure functions over a state: a tree of NumPy arrays that is saved in checkpoints."""

    init: Callable[[Groups], Any]
    """init(blank): the state before the first step. `blank`: groups of zeros in the run's shapes."""
    exchange: Callable[[Any, Groups, np.random.Generator], tuple[Any, Groups, Metrics]]
    """exchange(state, groups, rng): the next state, the groups to train on, of the same shapes, and metrics."""


def make_replay(cfg: ReplayConfig | OwnReplay, pad: int = 0) -> Replay:
    """Return the replay of a config. `pad`: the pad token."""
    if isinstance(cfg, OwnReplay):
        return _own_replay(cfg)
    if not cfg.capacity:
        return Replay(lambda blank: (), lambda state, groups, rng: (state, groups, {"groups/replayed": 0.0}))
    return Replay(lambda blank: empty_buffer(cfg.capacity), partial(exchange, cfg=cfg, pad=pad))


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


def exchange(
    buffer: Buffer, fresh: Groups, rng: np.random.Generator, cfg: ReplayConfig, pad: int = 0
) -> tuple[Buffer, Groups, Metrics]:
    """Return the buffer with the kept fresh groups added, the groups to train on, and metrics.

    The result has as many rows as `fresh`: an old group for which there is no room is left in the buffer.

    Args:
        buffer: the replay's state.
        fresh: this step's groups.
        rng: draws groups.
        cfg: what may be drawn, how, and how much is stored.
        pad: the pad token.
    """
    version, packing = int(fresh.rollouts.version.max()), Packing(fresh, pad)
    buffer = _without_retired(buffer, version, cfg)
    known, size = buffer.candidates(version), fresh.rollouts.size
    dropped = np.flatnonzero(~fresh.kept)
    drawn = draw(known, cfg.draw(known), rng, len(dropped)) if len(known.age) else np.zeros(0, int)
    room = len(fresh.keep) - size.sum()
    order = np.arange(len(size))
    chosen: list[int] = []
    for place, entry in zip(dropped, drawn.tolist(), strict=False):
        more = known.size[entry] - size[place]
        if more <= room:
            room, order[place] = room - more, len(size) + len(chosen)
            chosen.append(entry)
    mixed = fresh
    if chosen:
        mixed = select_groups(join_groups(fresh, buffer.groups(chosen, packing)), order, len(fresh.keep))
    buffer, metrics = used(buffer, np.array(chosen, int)), _metrics(known, chosen)
    if fresh.kept.any():
        new = select_groups(fresh, np.flatnonzero(fresh.kept))
        buffer = added(buffer, new, packing.pack(new), cfg.memory_mib * MIB)
    return buffer, mixed, metrics | {"replay/groups": float(len(buffer.stored)), "replay/mib": buffer.num_bytes / MIB}


def _without_retired(buffer: Buffer, version: int, cfg: ReplayConfig) -> Buffer:
    """Return the buffer without the groups that may not come back."""
    known = buffer.candidates(version)
    return without(buffer, (known.age > cfg.max_age) | (known.uses >= (cfg.max_uses or np.inf)))


def draw(known: Candidates, weight: np.ndarray, rng: np.random.Generator, n: int) -> np.ndarray:
    """Return the places of up to n groups, each at most once: one by one, with probabilities in proportion to the weights of those
    that are left. A weight of 0 is never drawn.

    Raises:
        UserError: the weights are not one finite number per group, 0 or more.
    """
    weight = np.asarray(weight)
    if (
        weight.shape != known.age.shape
        or weight.dtype.kind not in "biuf"
        or not (np.isfinite(weight) & (weight >= 0)).all()
    ):
        raise UserError(
            f"experience.replay.draw: got {weight.dtype}{list(weight.shape)} {weight.tolist()[:5]}, want a finite weight, 0 or "
            f"more, for each of {len(known.age)} groups"
        )
    n = min(n, np.count_nonzero(weight))
    return rng.choice(len(weight), size=n, replace=False, p=weight / weight.sum()) if n else np.zeros(0, int)


def _metrics(known: Candidates, chosen: Sequence[int]) -> Metrics:
    found = {"groups/replayed": float(len(chosen))}
    if chosen:
        found |= {"replay/age": float(known.age[chosen].mean()), "replay/uses": float(known.uses[chosen].mean() + 1)}
    return found
