"""Replay: groups of earlier steps come back. What was captured while sampling is stored as it is and never recomputed.

Fresh groups with a kept row go into the batch, and of the buffer what the config's rules choose: groups in the places of dropped
ones, groups in places of their own, rows among the fresh ones of their prompt. Then the kept fresh groups enter the buffer.
Capacity 0 means no replay: fresh groups pass through, and dropped ones are left out.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from jaxrl_llm.errors import UserError
from jaxrl_llm.experience import by_prompt
from jaxrl_llm.experience.buffer import Buffer, added, empty_buffer, used, without
from jaxrl_llm.experience.composition import Composition, compose, widened
from jaxrl_llm.experience.config import OwnReplay, ReplayConfig
from jaxrl_llm.experience.draws import Candidates
from jaxrl_llm.experience.independent_rows import independent_rows
from jaxrl_llm.experience.joining import JoinConfig, asking_groups, join_stored
from jaxrl_llm.experience.packed_groups import Packing
from jaxrl_llm.experience.stage_checks import (
    checked_groups,
    checked_init,
    checked_metrics,
    checked_state,
    checked_tuple,
)
from jaxrl_llm.types import COLUMNS, Groups, Prompts, Rollouts, number_rows, select_groups

Metrics = dict[str, float]
Entropy = Callable[[Groups], Float[np.ndarray, " B"]]
MIB = 2**20


class Replay(NamedTuple):
    """Pure functions over a state: a tree of NumPy arrays that is saved in checkpoints."""

    init: Callable[[Groups], Any]
    """init(blank): the state before the first step. `blank`: groups of zeros in the run's shapes."""
    exchange: Callable[[Any, Groups, np.random.Generator, Entropy], tuple[Any, Groups, Metrics]]
    """exchange(state, groups, rng, entropy): the next state, the groups to train on, of the same shapes all run long, and metrics.
    entropy(groups) returns the mean entropy of each row's sampled tokens under the policy that is trained, in nats."""


def make_replay(cfg: ReplayConfig | OwnReplay, pad: int = 0) -> Replay:
    """Return the replay of a config. `pad`: the pad token."""
    if isinstance(cfg, OwnReplay):
        return _own_replay(cfg)
    if not cfg.capacity:
        return Replay(lambda blank: (), lambda state, groups, *more: (state, groups, {"groups/replayed": 0.0}))
    return Replay(lambda blank: empty_buffer(cfg.capacity), partial(exchange, cfg=cfg, pad=pad))


def filled(buffer: Buffer, groups: Groups, cfg: ReplayConfig, pad: int) -> Buffer:
    """Return the buffer with groups that no step has trained on.

    Raises:
        UserError: they take more memory than the buffer may have.
    """
    packed = Packing(groups, pad).pack(groups)
    if (size := sum(x.nbytes for x in packed) / MIB) > cfg.memory_mib:
        raise UserError(
            f"experience.replay.memory_mib: got {cfg.memory_mib:g}, want {size:,.3f} or more, the size of {cfg.start}"
        )
    buffer = added(buffer, groups, packed, cfg.memory_mib * MIB)
    return buffer._replace(known=buffer.known._replace(uses=np.zeros_like(buffer.known.uses)))


def _own_replay(cfg: OwnReplay) -> Replay:
    own, name = cfg.made(), f"experience.replay {cfg.function}"

    def exchange(state: Any, fresh: Groups, rng: np.random.Generator, entropy: Entropy) -> tuple[Any, Groups, Metrics]:
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
        uses: features of the run that add columns, as in `COLUMNS`, "steps" if a grader has them, and "trees".
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
        **({name: np.zeros(b, i32) for name in ("trunk", "fork")} if "trees" in uses else {}),
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
    buffer: Buffer, fresh: Groups, rng: np.random.Generator, entropy: Entropy, cfg: ReplayConfig, pad: int = 0
) -> tuple[Buffer, Groups, Metrics]:
    """Return the buffer with the kept fresh groups added, the groups to train on, and metrics.

    Stored rows join fresh groups first. Then drawn groups take the places of dropped ones, and those that the config adds. A group
    for which there are too few rows left stays in the buffer.

    Args:
        buffer: the replay's state.
        fresh: this step's groups.
        rng: draws rows and groups.
        entropy: as in `Replay.exchange`.
        cfg: what may come back, how, and how much is stored.
        pad: the pad token.
    """
    version, packing, step = int(fresh.rollouts.version.max()), Packing(fresh, pad), _Step(fresh, cfg, pad)
    buffer = _without_retired(buffer, fresh, version, cfg)
    known = buffer.candidates(version)
    if len(known.age) and right_share(fresh) >= cfg.min_success:
        if cfg.join:
            _join(step, cfg.join, buffer, known, packing, entropy, rng)
        _draw_groups(step, cfg, buffer, known, packing, rng)
    mixed, back = step.groups(), np.unique(step.entries).astype(int)
    metrics = {"groups/replayed": float(step.drawn)}
    if cfg.join:
        metrics["replay/rows"] = float(step.joined)
    if len(back):
        age, uses = known.age[back], known.uses[back]
        metrics |= {
            "replay/age": float(age.mean()),
            "replay/age_max": float(age.max()),
            "replay/uses": float(uses.mean() + 1),
        }
    buffer, new = used(buffer, back), fresh.kept & ~(cfg.retire_solved & solved(fresh))
    if cfg.store_fresh and new.any():
        groups = select_groups(fresh, np.flatnonzero(new))
        buffer = added(buffer, groups, packing.pack(groups), cfg.memory_mib * MIB)
    return buffer, mixed, metrics | {"replay/groups": float(len(buffer.stored)), "replay/mib": buffer.num_bytes / MIB}


class _Step:
    """Groups of a step while they are put together."""

    def __init__(self, fresh: Groups, cfg: ReplayConfig, pad: int):
        size, (rows, prompts) = fresh.rollouts.size, (len(fresh.keep), len(fresh.failure))
        self.fresh, self.parts, self.entries, self.pad = fresh, [fresh], [], pad
        self.keep, self.kept = fresh.keep.copy(), fresh.kept
        self.rows = [*np.split(np.arange(size.sum()), np.cumsum(size)[:-1]), *[np.zeros(0, int)] * cfg.groups]
        self.prompt = np.concatenate([np.arange(prompts), np.full(cfg.groups, -1)])
        self.weight = np.ones(prompts + cfg.groups, np.float32) if cfg.correction else None
        self.num_rows = rows_of_step(cfg, prompts, rows)
        self.drawn = self.joined = 0
        """Groups that were drawn, and rows that joined."""

    @property
    def room(self) -> int:
        """Rows that are left."""
        return self.num_rows - sum(map(len, self.rows))

    def add(self, part: Groups) -> tuple[int, int]:
        """Add groups whose prompts and rows may be taken. Returns the numbers of the first ones."""
        first = sum(len(x.failure) for x in self.parts), sum(len(x.keep) for x in self.parts)
        self.parts.append(part)
        return first

    def groups(self) -> Groups:
        if len(self.parts) == 1 and len(self.prompt) == len(self.kept) and self.num_rows == len(self.keep):
            return self.fresh
        parts = [self.fresh.replace(keep=self.keep), *self.parts[1:]]
        mixed = compose(parts, Composition(self.prompt, self.rows, self.num_rows), self.pad)
        if len(parts) == 1:
            return mixed
        source = np.concatenate([*self.rows, np.full(self.room, -1)])
        prompt, weight = mixed.rollouts.prompt, self.weight
        return mixed.replace(
            reused=source >= len(self.keep),
            loss_weight=None if weight is None else np.where(prompt < 0, 0, weight[prompt]),
        )


def rows_of_step(cfg: ReplayConfig, prompts: int, rows: int) -> int:
    """Return B of the groups that a step trains on, for B = `rows` of P = `prompts` fresh ones."""
    more = cfg.join.most * prompts if cfg.join and not cfg.join.swap else 0
    return rows + cfg.groups * (rows // prompts) + more


def _join(
    step: _Step,
    cfg: JoinConfig,
    buffer: Buffer,
    known: Candidates,
    packing: Packing,
    entropy: Entropy,
    rng: np.random.Generator,
) -> None:
    """Let stored rows join. A dropped group of which the rewards then differ is kept."""
    fresh = step.fresh
    asking = fresh.rollouts.prompts.row[asking_groups(cfg, fresh)]
    places = np.flatnonzero(np.isin(known.row, asking) & (known.age <= (cfg.max_age or np.inf)))[::-1]
    if not len(places):
        return
    stored = buffer.groups(places.tolist(), packing)
    found = join_stored(cfg, fresh, stored, lambda: entropy(widened(stored, fresh, step.pad)), rng)
    _, first = step.add(stored)
    for p, rows in found.items():
        own = step.rows[p][: len(step.rows[p]) - len(rows) * cfg.swap]
        if not step.kept[p]:
            reward = np.concatenate([fresh.reward[own], stored.reward[rows]])
            if (reward == reward[0]).all():
                continue
            step.keep[own], step.kept[p] = True, True
        step.rows[p] = np.concatenate([own, first + rows])
        step.joined += len(rows)
        step.entries += places[stored.rollouts.prompt[rows]].tolist()


def _draw_groups(
    step: _Step, cfg: ReplayConfig, buffer: Buffer, known: Candidates, packing: Packing, rng: np.random.Generator
) -> None:
    """Put drawn groups in the places of dropped ones, and in empty ones. No group whose rows have joined is drawn."""
    weight = np.asarray(cfg.draw(known))
    places = np.flatnonzero(~step.kept) if cfg.replace_dropped else np.zeros(0, int)
    places = np.concatenate([places, len(step.kept) + np.arange(cfg.groups)])
    drawn = draw(known, weight, rng, len(places), without=step.entries)
    room, chosen = step.room, {}
    for place, entry in zip(places.tolist(), drawn.tolist(), strict=False):
        more = known.size[entry] - len(step.rows[place])
        if more <= room:
            room, chosen[place] = room - more, entry
    if not chosen:
        return
    entries = list(chosen.values())
    stored = buffer.groups(entries, packing)
    first_prompt, first_row = step.add(stored)
    rows = np.split(first_row + np.arange(len(stored.keep)), np.cumsum(known.size[entries])[:-1])
    for i, place in enumerate(chosen):
        step.rows[place], step.prompt[place] = rows[i], first_prompt + i
    if step.weight is not None:
        step.weight[list(chosen)] = (weight[weight > 0].min() / weight[entries]) ** cfg.correction
    step.entries += entries
    step.drawn = len(entries)


def right_share(groups: Groups) -> float:
    """Return the share of right responses of those without a hint; 0 if none could be graded."""
    success = independent_rows(groups).measure("success")
    return float(np.nanmean(success)) if not np.isnan(success).all() else 0.0


def solved(groups: Groups) -> Bool[np.ndarray, " P"]:
    """Return True for groups of which all rows without a hint are right, one at least."""
    groups = independent_rows(groups)
    return (groups.rollouts.size > 0) & (by_prompt.means(groups.measure("success"), groups) == 1)


def _without_retired(buffer: Buffer, fresh: Groups, version: int, cfg: ReplayConfig) -> Buffer:
    """Return the buffer without the groups that may not come back."""
    known = buffer.candidates(version)
    gone = (known.age > (cfg.max_age or np.inf)) | (known.uses >= (cfg.max_uses or np.inf))
    if cfg.retire_solved:
        gone |= np.isin(known.row, fresh.rollouts.prompts.row[solved(fresh)])
    return without(buffer, gone)


def draw(
    known: Candidates, weight: np.ndarray, rng: np.random.Generator, n: int, without: Sequence[int] = ()
) -> np.ndarray:
    """Return the places of up to n groups, each at most once: one by one, with probabilities in proportion to the weights of those
    that are left. A weight of 0 is never drawn, nor those in `without`.

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
    weight = weight.astype(np.float64)
    weight[list(without)] = 0
    if not weight.any():
        return np.zeros(0, int)
    # Relative to the largest, so that the sum is finite; of the smallest ones the share may round to 0.
    share = weight / weight.max()
    share /= share.sum()
    return rng.choice(len(weight), size=min(n, np.count_nonzero(share)), replace=False, p=share)
