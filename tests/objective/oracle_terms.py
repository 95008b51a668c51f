"""Surrogates, corrections and KL terms of every preset in float64 NumPy, loop by loop. Sections (2.3, ...): see oracle.py.

A surrogate maps one sequence's tokens to the loss of each. `now` are the policy's log-probabilities, `old` those that the ratio
is to; what a framework stops the gradient of is computed from `still`, a second copy of `now`: hold it and move `now`, and finite
differences are the gradient.
"""

from functools import partial
from math import exp, expm1, log, log1p

import numpy as np
from oracle_advantages import Case


def clipped(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def ppo(r: float, a: float, low: float, high: float, dual: float | None = None) -> float:
    """2.3."""
    loss = max(-a * r, -a * clipped(r, 1 - low, 1 + high))
    return min(loss, -a * dual) if dual is not None and a < 0 else loss


def token_clip(now, still, old, adv, low=0.2, high=0.2, dual=None) -> list[float]:
    """2.3."""
    return [ppo(exp(n - o), a, low, high, dual) for n, o, a in zip(now, old, adv, strict=True)]


def sequence_clip(now, still, old, adv, low=0.2, high=0.2) -> list[float]:
    """2.9, GSPO with one ratio a sequence (the paper, TRL)."""
    ratio = exp(sum(n - o for n, o in zip(now, old, strict=True)) / len(now))
    return [ppo(ratio, a, low, high) for a in adv]


def sequence_token_clip(now, still, old, adv, low=0.2, high=0.2) -> list[float]:
    """2.9, GSPO-token (verl)."""
    mean = sum(s - o for s, o in zip(still, old, strict=True)) / len(now)
    return [ppo(exp(min(n - s + mean, 10.0)), a, low, high) for n, s, a in zip(now, still, adv, strict=True)]


def product_clip(now, still, old, adv, low=0.2, high=0.2) -> list[float]:
    """2.6, TRL's RLOO: the ratio of whole sequences."""
    ratio = exp(sum(now) - sum(old))
    return [ppo(ratio, a, low, high) for a in adv]


def cispo(now, still, old, adv, low=0.0, high=5.0) -> list[float]:
    """2.10, by the ratio's own bounds."""
    return [-clipped(exp(s - o), low, high) * a * n for n, s, o, a in zip(now, still, old, adv, strict=True)]


def gmpo(now, still, old, adv, low=0.4, high=0.4) -> list[float]:
    """2.11."""
    bounded_logs = []
    for n, o, a in zip(now, old, adv, strict=True):
        x, sign = n - o, (a > 0) - (a < 0)
        bounded_logs.append(sign * min(sign * x, sign * clipped(x, -low, high)))
    return [-a * exp(sum(bounded_logs) / len(bounded_logs)) for a in adv]


def sapo(now, still, old, adv, positive=1.0, negative=1.05) -> list[float]:
    """2.12."""
    out = []
    for n, o, a in zip(now, old, adv, strict=True):
        tau = positive if a > 0 else negative
        out.append(-a * (4 / tau) / (1 + exp(-tau * (exp(n - o) - 1))))
    return out


def bernoulli_kl(p_old: float, p: float) -> float:
    return p_old * log(p_old / p) + (1 - p_old) * (log1p(-p_old) - log1p(-p))


def within(s: float, o: float, a: float, low: float, high: float, divergence: str = "tv") -> bool:
    """2.12, DPPO: has the policy not moved too far in the advantage's direction?"""
    moved = exp(s) - exp(o)
    if divergence == "kl":
        far = bernoulli_kl(exp(o), exp(s))
        return not (moved > 0 and far > high) if a > 0 else not (moved < 0 and far > low)
    return moved <= high if a > 0 else moved >= -low


def dppo_ratio(now, still, old, adv, low=0.2, high=0.2, divergence="tv") -> list[float]:
    """2.12, SkyRL and prime-rl until August 2026."""
    return [
        -a * exp(n - o) * within(s, o, a, low, high, divergence)
        for n, s, o, a in zip(now, still, old, adv, strict=True)
    ]


def dppo_reinforce(now, still, old, adv, low=0.2, high=0.2, cap=3.0, divergence="tv") -> list[float]:
    """2.12, verl; its yaml's clip_ratio_c is the cap (T2)."""
    return [
        -a * min(exp(s - o), cap) * n * within(s, o, a, low, high, divergence)
        for n, s, o, a in zip(now, still, old, adv, strict=True)
    ]


def ipo(now, still, old, adv, eps=0.3) -> list[float]:
    """prime-rl's `ipo_loss_fn`: its mask does not ask for the advantage's sign, and is by probability, not by the ratio."""
    return [
        -a * exp(n - o) if abs(exp(s) - exp(o)) <= eps else 0.0 for n, s, o, a in zip(now, still, old, adv, strict=True)
    ]


def reinforce(now, still, old, adv) -> list[float]:
    return [-a * n for n, a in zip(now, adv, strict=True)]


# Corrections: weights [B, C] without a gradient.


def mismatch(case: Case, level: str) -> np.ndarray:
    """2.15: p_proximal / p_behavior of the token; of its sequence, the product or its geometric mean."""
    out = np.zeros(case.mask.shape)
    for b, row in enumerate(case.mask):
        gaps = {t: case.proximal[b, t] - case.behavior[b, t] for t in np.flatnonzero(row)}
        total = sum(gaps.values())
        for t, gap in gaps.items():
            out[b, t] = exp({"token": gap, "sequence": total, "geometric": total / len(gaps)}[level])
    return out


def truncated(case: Case, level="token", cap=2.0, floor=0.0) -> np.ndarray:
    """2.15, TIS."""
    return np.where(case.mask, np.clip(mismatch(case, level), floor, cap), 0.0)


def masked(case: Case, level="token", low=0.5, high=5.0, weight="level") -> np.ndarray:
    """2.15: IcePop, MIS, TRL's sequence_mask, seq-mask-tis (weight `token`, not truncated; T9), AReaL's token_mask."""
    tested = mismatch(case, level)
    given = {"level": tested, "token": mismatch(case, "token"), "one": np.ones(tested.shape)}[weight]
    return np.where(case.mask & (tested >= low) & (tested <= high), given, 0.0)


def second_moment(case: Case, threshold=0.04) -> np.ndarray:
    """2.15, M2PO: the largest squared log-ratios go first, until the mean of the rest is below the threshold."""
    squares = sorted((float((case.proximal[b, t] - case.behavior[b, t]) ** 2), b, t) for b, t in np.argwhere(case.mask))
    while len(squares) > 1 and sum(s for s, _, _ in squares) / len(squares) >= threshold:
        squares.pop()
    out = np.zeros(case.mask.shape)
    for _, b, t in squares:
        out[b, t] = 1.0
    return out


# KL: one token.


def k1(now, still, other, old) -> float:
    """2.14."""
    return now - other


def k2(now, still, other, old) -> float:
    """2.14."""
    return (now - other) ** 2 / 2


def k3(now, still, other, old, most=None, largest=None) -> float:
    """2.14; `most` bounds the log-ratio, `largest` the estimate (verl, SkyRL, NeMo)."""
    x = other - now if most is None else clipped(other - now, -most, most)
    value = expm1(x) - x
    return value if largest is None else clipped(value, -largest, largest)


def k3_plus(now, still, other, old) -> float:
    """2.14: the value of k3, the gradient of k2."""
    return k2(now, still, other, old) - k2(still, still, other, old) + k3(still, still, other, old)


def times_ratio(kind, now, still, other, old) -> float:
    """2.14, DeepSeek-V3.2, TRL's use_bias_correction_kl."""
    return exp(now - old) * kind(now, still, other, old)


def times_score(kind, now, still, other, old) -> float:
    """2.14, NeMo: a factor of value 1 with the score's gradient."""
    return exp(now - still) * kind(now, still, other, old)


def nemo_k3(now, still, other, old) -> float:
    """2.14: the estimate is bounded after the factor."""
    return clipped(times_score(partial(k3, most=20.0), now, still, other, old), -10.0, 10.0)
