"""Graded groups of any size with filler rows, and their credit by the oracle: row by row, in plain Python."""

from math import isnan

import numpy as np
from estimator_inputs import to_groups
from oracle_advantages import Case

from jaxrl_llm.types import Groups, Scores

SLOTS, WEIGHTS = 3, (1.0, 0.5)


def ragged_groups(
    rng: np.random.Generator, size: list[int], fillers: int, dropped: float = 0.4
) -> tuple[Groups, Scores]:
    """Groups of these sizes, of which one in four was not graded, and of whose rows a filter dropped a part. Rewards in multiples
    of 1/4, one in two times also of steps, tokens between others that the policy did not sample, garbage where nothing may look."""
    rows = sum(size) + fillers
    parts = np.float32(rng.integers(-2, 5, (rows, len(WEIGHTS))) / 4)
    flat = parts @ np.float32(WEIGHTS)
    groups = to_groups(np.split(flat[: sum(size)], np.cumsum(size)[:-1]), parts, fillers)
    prompt = groups.rollouts.prompt
    real, failed = prompt >= 0, rng.random(len(size)) < 0.25
    graded = real & ~failed[prompt]
    length = np.where(real, rng.integers(1, SLOTS + 1, rows), 0)
    sampled = (np.arange(SLOTS) < length[:, None]) & ((rng.random((rows, SLOTS)) < 0.7) | (np.arange(SLOTS) == 0))
    rollouts = groups.rollouts.replace(sampled=sampled, length=length.astype(np.int32))
    dropped_rows, values = rng.random(rows) < dropped, rng.normal(0, 1, (rows, SLOTS)).astype(np.float32)
    return groups.replace(
        rollouts=rollouts,
        step_reward=step_rewards(rng, sampled, graded) if rng.random() < 0.5 else None,
        reward=np.where(graded, flat, np.nan).astype(np.float32),
        components=np.where(graded[:, None], parts, np.nan).astype(np.float32),
        failure=failed.astype(np.int32),
        keep=graded & ~dropped_rows,
    ), Scores(values=values)


def step_rewards(rng: np.random.Generator, sampled: np.ndarray, graded: np.ndarray) -> np.ndarray:
    """One in two sampled tokens ends a step, and the last one does."""
    last = sampled & (np.cumsum(sampled, axis=1) == sampled.sum(axis=1, keepdims=True))
    ends = graded[:, None] & (last | (rng.random(sampled.shape) < 0.5))
    return np.where(ends, rng.integers(-2, 5, sampled.shape) / 4, np.nan).astype(np.float32)


def rows_by_hand(groups: Groups, baseline_over: str) -> list[int]:
    """Rows whose rewards are in the statistics."""
    prompt, keep = groups.rollouts.prompt.tolist(), groups.keep.tolist()
    with_kept = {p for p, kept in zip(prompt, keep, strict=True) if kept}
    rows = []
    for b, p in enumerate(prompt):
        whole = baseline_over == "sampled" and p in with_kept and not isnan(groups.reward[b])
        if keep[b] or whole:
            rows.append(b)
    return rows


def credit_by_oracle(
    formula, groups: Groups, scores: Scores, baseline_over: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Advantages and returns [B C]."""
    rows = rows_by_hand(groups, baseline_over)
    mask = groups.rollouts.sampled[rows]
    unread = dict.fromkeys(("now", "behavior", "proximal", "reference", "entropy", "values"), np.zeros(mask.shape))
    case = Case(
        reward=groups.reward[rows].astype(np.float64),
        prompt=groups.rollouts.prompt[rows],
        reward_components=groups.components[rows].astype(np.float64),
        component_weights=np.array(WEIGHTS),
        used=np.ones(len(groups.failure), bool),
        mask=mask,
        old_values=scores.values[rows].astype(np.float64),
        length=1,
        step_reward=None if groups.step_reward is None else groups.step_reward[rows].astype(np.float64),
        **unread,
    )
    found = []
    for x in formula(case):
        full = None if x is None else np.zeros(groups.rollouts.sampled.shape)
        if full is not None:
            full[rows] = x
        found.append(full)
    return found[0], found[1]
