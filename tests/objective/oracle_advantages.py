"""Advantages of every preset in float64 NumPy, loop by loop, from the published formulas and the frameworks' code.

Shares nothing with the package. Sections (2.1, ...): see oracle.py. A sequence is a row of [B, C]; a group has any number of them.
"""

from collections.abc import Callable
from math import sqrt
from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    """All inputs of an objective."""

    reward: np.ndarray
    """[B]"""
    prompt: np.ndarray
    """[B]: which group a sequence is of, from 0."""
    reward_components: np.ndarray
    """[B, n]: what each grader gave."""
    component_weights: np.ndarray
    """[n]"""
    used: np.ndarray
    """[P]: groups that the filter kept. The others have no token in `mask` and enter no statistic."""
    mask: np.ndarray
    """[B, C]"""
    now: np.ndarray
    behavior: np.ndarray
    proximal: np.ndarray
    reference: np.ndarray
    entropy: np.ndarray
    values: np.ndarray
    old_values: np.ndarray
    length: int
    """Dr. GRPO's divisor of a sequence."""
    step_reward: np.ndarray | None = None
    """[B, C]: at the last token of each step; NaN elsewhere."""


# One number a sequence: [B].


def rows_of(case: Case, p: int) -> list[int]:
    """Sequences of a group."""
    return [b for b, own in enumerate(case.prompt) if own == p]


def rows_in_use(case: Case) -> list[int]:
    return [b for p in np.flatnonzero(case.used) for b in rows_of(case, p)]


def over_groups(
    formula: Callable[..., list[float]], case: Case, reward: np.ndarray | None = None, **more
) -> np.ndarray:
    """Values of one group's formula, for every group in use."""
    reward = case.reward if reward is None else reward
    out = np.zeros(reward.shape)
    for p in np.flatnonzero(case.used):
        if rows := rows_of(case, p):
            out[rows] = formula([float(reward[b]) for b in rows], **more)
    return out


def deviation(xs: list[float], less: int) -> float:
    """Root of the sum of squares over n - less; exactly 0 for equal numbers."""
    if all(x == xs[0] for x in xs):
        return 0.0
    mean = sum(xs) / len(xs)
    return sqrt(sum((x - mean) ** 2 for x in xs) / (len(xs) - less))


def centered(rs: list[float]) -> list[float]:
    """2.1, the mean of all."""
    if all(r == rs[0] for r in rs):
        return [0.0] * len(rs)
    mean = sum(rs) / len(rs)
    return [r - mean for r in rs]


def group_norm(rs: list[float], eps: float, less: int = 1) -> list[float]:
    """2.1. 0 where all are equal, with eps 0 too."""
    std = deviation(rs, less)
    return [c / (std + eps) if std > 0 else 0.0 for c in centered(rs)]


def leave_one_out_baseline(rs: list[float]) -> list[float]:
    """2.6."""
    return [r - (sum(rs) - r) / (len(rs) - 1) if deviation(rs, 0) > 0 else 0.0 for r in rs]


def nemo_leave_one_out(rs: list[float], eps: float = 1e-6) -> list[float]:
    """2.1, NeMo: mean and std both of the others; unscaled where these are equal (T13)."""
    out = []
    for i, r in enumerate(rs):
        others = rs[:i] + rs[i + 1 :]
        std = deviation(others, 1) if len(others) > 1 else 0.0
        above = r - sum(others) / len(others) if deviation(rs, 0) > 0 else 0.0
        out.append(above / (std + eps) if std > 0 else above)
    return out


def over_mean(rs: list[float], eps: float) -> list[float]:
    """2.8, MaxRL."""
    mean = sum(rs) / len(rs)
    return [c / (mean + eps) if mean > 0 else 0.0 for c in centered(rs)]


def best_only(rs: list[float], eps: float = 1e-6, scale: bool = True) -> list[float]:
    """2.8, Pass@k in verl."""
    if deviation(rs, 0) == 0:
        return [0.0] * len(rs)
    order = sorted(range(len(rs)), key=lambda i: -rs[i])
    out = [0.0] * len(rs)
    out[order[0]] = (rs[order[0]] - rs[order[1]]) / (deviation(rs, 1) + eps if scale else 1)
    return out


def best_and_worst(rs: list[float]) -> list[float]:
    if deviation(rs, 0) == 0:
        return [0.0] * len(rs)
    best, worst = rs.index(max(rs)), rs.index(min(rs))
    return [float(i == best) - float(i == worst) for i in range(len(rs))]


def opo(case: Case) -> np.ndarray:
    """2.8: the baseline weighs rewards by length."""
    lengths = case.mask.sum(axis=1)
    out = np.zeros(case.reward.shape)
    for p in np.flatnonzero(case.used):
        if rows := rows_of(case, p):
            baseline = sum(lengths[b] * case.reward[b] for b in rows) / sum(lengths[b] for b in rows)
            out[rows] = [case.reward[b] - baseline for b in rows]
    return out


def gpg(case: Case) -> np.ndarray:
    """2.8."""
    kept = [case.reward[b] for b in rows_in_use(case)]
    alpha = len(kept) / max(sum(r != 0 for r in kept), 1)
    return over_groups(lambda rs: [alpha * c for c in centered(rs)], case)


def gdpo(case: Case, eps: float = 1e-4) -> np.ndarray:
    """2.8 and TRL's normalize_then_sum: each part in its group, the weighted sum over the batch."""
    total = np.zeros(case.reward.shape)
    for k, weight in enumerate(case.component_weights):
        total += weight * over_groups(group_norm, case, case.reward_components[:, k], eps=eps)
    return over_batch(case, total, eps)


def over_batch(
    case: Case, x: np.ndarray, eps: float, less: int = 1, away: np.ndarray | None = None, std: np.ndarray | None = None
) -> np.ndarray:
    """Sequences less the batch's mean over the batch's std, both of all sequences in use; or `away` from another mean, another
    `std`. A lone one is 0 from the mean of its group, and is left as it is by a whitening."""
    rows, out = rows_in_use(case), np.zeros(x.shape)
    kept = [float(x[b]) for b in rows]
    for b, own in zip(rows, centered(kept) if kept else [], strict=True):
        divisor = (deviation(kept, less) if std is None else std[b]) + eps
        out[b] = (own if away is None else away[b]) / divisor if divisor > 0 else 0.0
    return out


def rloo_with_kl(case: Case, weight: float) -> np.ndarray:
    """2.6, TRL: the sequence's k1 to the reference is in the reward before the baseline."""
    reward = case.reward.copy()
    for b, row in enumerate(case.mask):
        for t in np.flatnonzero(row):
            reward[b] -= weight * (case.behavior[b, t] - case.reference[b, t])
    return over_groups(leave_one_out_baseline, case, reward)


# Token by token: [B, C].


def on_every_token(each: Callable[[Case], np.ndarray]) -> Callable[[Case], tuple[np.ndarray, None]]:
    return lambda case: (np.where(case.mask, each(case)[:, None], 0.0), None)


def group(formula: Callable[..., list[float]], **more) -> Callable[[Case], tuple[np.ndarray, None]]:
    return on_every_token(lambda case: over_groups(formula, case, **more))


def token_rewards(case: Case, kl_weight: float, reward: np.ndarray | None = None) -> np.ndarray:
    """-weight * k1 of each token, and the sequence's reward on its last; or that of its steps on theirs."""
    with_steps = case.step_reward is not None and reward is None
    reward = case.reward if reward is None else reward
    out = np.zeros(case.mask.shape)
    for b, row in enumerate(case.mask):
        tokens = np.flatnonzero(row)
        for t in tokens:
            out[b, t] = -kl_weight * (case.behavior[b, t] - case.reference[b, t])
        if with_steps:
            for t in tokens:
                out[b, t] += 0.0 if np.isnan(case.step_reward[b, t]) else case.step_reward[b, t]
        elif len(tokens):
            out[b, tokens[-1]] += reward[b]
    return out


def twice_leave_one_out(rewards: list[float]) -> list[float]:
    """TreeRL's global and local advantage of leaves that share nothing: both are r - mean of the others."""
    return [2 * x for x in leave_one_out_baseline(rewards)]


def grpo_steps(case: Case, eps: float, less: int) -> tuple[np.ndarray, None]:
    """DeepSeekMath 4.1.3: the steps of a group normalized together; a token gets those of its row that end at it or behind it."""
    out = np.zeros(case.mask.shape)
    for p in np.flatnonzero(case.used):
        steps = []
        for b in rows_of(case, p):
            tokens = np.flatnonzero(case.mask[b]).tolist()
            for t in tokens:
                if case.step_reward is None:
                    steps += [(b, t, float(case.reward[b]))] if t == tokens[-1] else []
                elif not np.isnan(case.step_reward[b, t]):
                    steps.append((b, t, float(case.step_reward[b, t])))
        for (b, end, _), a in zip(steps, group_norm([r for *_, r in steps], eps, less) if steps else [], strict=True):
            for t in range(end + 1):
                out[b, t] += a if case.mask[b, t] else 0.0
    return out, None


def returns_to_go(case: Case, rewards: np.ndarray, gamma: float = 1.0) -> np.ndarray:
    """2.7: masked tokens neither add nor discount; credit passes over them (T11)."""
    out = np.zeros(rewards.shape)
    for b, row in enumerate(case.mask):
        running = 0.0
        for t in reversed(np.flatnonzero(row)):
            running = rewards[b, t] + gamma * running
            out[b, t] = running
    return out


def whiten(case: Case, x: np.ndarray, scale: Callable[[float, int], float]) -> np.ndarray:
    """Over the batch's tokens; `scale(sum of squares, n)` is what is divided by (T16). A lone token stays as it is."""
    kept = [float(v) for v in x[case.mask]]
    if len(kept) < 2:
        return np.where(case.mask, x, 0.0)
    mean = sum(kept) / len(kept)
    by = scale(sum((v - mean) ** 2 for v in kept), len(kept))
    return np.where(case.mask, (x - mean) / by, 0.0)


def verl_scale(squares: float, n: int) -> float:
    return sqrt(squares / (n - 1) + 1e-8)


def openrlhf_scale(squares: float, n: int) -> float:
    return sqrt(max(squares / n, 1e-8))


def areal_scale(squares: float, n: int) -> float:
    return sqrt(squares / (n - 1)) + 1e-5


def whitened_returns(case: Case, scale, kl_weight: float = 0.0, gamma: float = 1.0) -> tuple[np.ndarray, None]:
    """2.7, REINFORCE++; 2.1, AReaL."""
    return whiten(case, returns_to_go(case, token_rewards(case, kl_weight), gamma), scale), None


def whitened_baseline(case: Case, scale=verl_scale) -> tuple[np.ndarray, None]:
    """2.7, verl's REINFORCE++-baseline: the group's mean first."""
    return whiten(case, np.where(case.mask, over_groups(centered, case)[:, None], 0.0), scale), None


def openrlhf_group_norm(case: Case, kl_weight: float) -> tuple[np.ndarray, None]:
    """2.6 and 2.14, OpenRLHF: the KL of the tokens still to come, beside the normalized reward."""
    return returns_to_go(case, token_rewards(case, kl_weight, over_groups(group_norm, case, eps=1e-9))), None


def gae(case: Case, lam: float, gamma: float = 1.0, whitened: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """2.13: the scan steps over masked tokens; returns are taken before A is whitened."""
    rewards = token_rewards(case, 0.0)
    advantage, returns = np.zeros(rewards.shape), np.zeros(rewards.shape)
    for b, row in enumerate(case.mask):
        later, value_after = 0.0, 0.0
        for t in reversed(np.flatnonzero(row)):
            delta = rewards[b, t] + gamma * value_after - case.old_values[b, t]
            later = delta + gamma * lam * later
            value_after = case.old_values[b, t]
            advantage[b, t], returns[b, t] = later, later + case.old_values[b, t]
    return (whiten(case, advantage, verl_scale) if whitened else advantage), returns
