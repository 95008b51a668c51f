"""Accuracy of a policy on a set of prompts, from k samples per prompt: avg@k, pass@k, maj@k, with 95 % confidence intervals.

Arrays are [n, k], prompts by samples; a prompt whose row holds a NaN could not be graded, and is left out and counted. The prompts
are a random sample of all prompts of their kind, and the k samples per prompt a cluster, so an interval covers new prompts and new
samples (Miller 2024, "Adding Error Bars to Evals", arXiv 2411.00640). Its width comes from the variance of the prompts' values, not
from n * k samples as if they were independent.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from math import comb, inf, nan, sqrt
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri, stdtrit

# Quantile of the two-sided 95 % intervals.
QUANTILE = 0.975
Z = float(ndtri(QUANTILE))


class Estimate(NamedTuple):
    """A mean over prompts."""

    value: float
    """NaN if no prompt could be graded."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    n: int
    """Graded prompts."""
    left_out: int
    """Prompts that could not be graded."""


def correct(reward: np.ndarray, at_least: float = 1.0) -> np.ndarray:
    """f64[n k]: 1 for a reward of `at_least` or more, 0 for less, NaN for NaN."""
    return np.where(np.isnan(reward), nan, reward >= at_least)


def avg_at_k(reward: np.ndarray) -> Estimate:
    """Mean reward of a sample: for rewards of 0 and 1 the accuracy, which is the unbiased estimate of pass@1.

    The interval is the score interval if all rewards lie in [0, 1], else Student's t over the prompts' means.
    """
    kept, left_out = _graded(reward)
    in_unit = bool(((kept >= 0) & (kept <= 1)).all())
    return _estimate(kept.mean(axis=1), kept.shape[1], left_out, in_unit)


def pass_at_k(correct: np.ndarray, k: int) -> Estimate:
    """Chance that at least one of k samples is right, without bias from n_samples >= k per prompt.

    1 - C(n_samples - c, k) / C(n_samples, k) with c right ones: Chen et al. 2021, arXiv 2107.03374, eq. 1.

    Raises:
      ValueError: k beyond the number of samples, or a value other than 0, 1 and NaN.
    """
    kept, left_out = _graded(correct, only_0_and_1=True)
    samples = kept.shape[1]
    if not 1 <= k <= samples:
        raise ValueError(f"k: got {k}, want 1 to {samples}, the samples of each prompt")
    counts, of_prompt = np.unique(kept.sum(axis=1).astype(int), return_inverse=True)
    some = np.array([1 - comb(samples - int(c), k) / comb(samples, k) for c in counts])
    return _estimate(some[of_prompt], samples, left_out, True)


def maj_at_k(correct: np.ndarray, votes: Sequence[Sequence[Hashable]]) -> Estimate:
    """Chance that the most frequent answer among the k samples is right, ties broken at random.

    Self-consistency (Wang et al. 2023, arXiv 2203.11171).
    `votes` is [n][k], equal for equal answers; "" and 0 are no vote, and a prompt without votes is wrong. If samples with one
    answer were graded differently, their mean counts.
    """
    kept, left_out = _graded(correct, only_0_and_1=True)
    if [len(row) for row in votes] != [kept.shape[1]] * len(correct):
        raise ValueError(f"votes: want {len(correct)} rows of {kept.shape[1]}, one per grade")
    graded = [row for row, grades in zip(votes, correct, strict=True) if not np.isnan(grades).any()]
    values = [_majority(row, grades) for row, grades in zip(graded, kept, strict=True)]
    return _estimate(np.array(values), kept.shape[1], left_out, True)


def _majority(votes: Sequence[Hashable], correct: np.ndarray) -> float:
    """Expected correctness of the answer with most votes."""
    counts = Counter(vote for vote in votes if vote)
    most = max(counts.values(), default=0)
    winners = [answer for answer, count in counts.items() if count == most]
    right = sum(float(grade) for vote, grade in zip(votes, correct, strict=True) if vote in winners)
    return right / (most * len(winners)) if winners else 0.0


def _graded(values: np.ndarray, only_0_and_1: bool = False) -> tuple[np.ndarray, int]:
    """Rows without NaN, f64[kept, k], and the number of the others."""
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not values.shape[1]:
        raise ValueError(f"got an array of shape {values.shape}, want [prompts, samples]")
    kept = values[~np.isnan(values).any(axis=1)]
    if only_0_and_1 and not np.isin(kept, (0, 1)).all():
        raise ValueError(f"correct: got values such as {kept[~np.isin(kept, (0, 1))][0]:g}, want 0 and 1")
    return kept, len(values) - len(kept)


def _estimate(values: np.ndarray, samples: int, left_out: int, in_unit: bool) -> Estimate:
    """Mean of the prompts' values, with its interval."""
    n = len(values)
    if not n:
        return Estimate(nan, nan, nan, 0, left_out)
    mean = float(values.mean())
    variance = float(values.var(ddof=1)) / n if n > 1 else inf
    low, high = _score_interval(mean, variance, n, samples) if in_unit else _t_interval(mean, variance, n)
    return Estimate(mean, low, high, n, left_out)


def _score_interval(mean: float, variance: float, n: int, samples: int) -> tuple[float, float]:
    """Wilson's score interval at the effective number of prompts, for values in [0, 1]; never empty, never outside.

    The effective number is what independent trials would need for the same variance of the mean (Korn and Graubard 1998, Survey
    Methodology 24:193), with their factor for few degrees of freedom: n if all prompts are right or all wrong, n * k at most.
    """
    if n == 1:
        return 0.0, 1.0
    trial = mean * (1 - mean)
    if trial <= 0:
        effective = float(n)
    else:
        effective = min(trial / variance, n * samples) if variance > 0 else float(n * samples)
    effective *= (Z / _t_quantile(n - 1)) ** 2
    center = mean + Z**2 / (2 * effective)
    half = Z * sqrt(max(trial, 0.0) / effective + Z**2 / (4 * effective**2))
    scale = 1 + Z**2 / effective
    # If all prompts are wrong or right, the ends are 0 and 1 only up to rounding.
    return max(0.0, min(mean, (center - half) / scale)), min(1.0, max(mean, (center + half) / scale))


def _t_interval(mean: float, variance: float, n: int) -> tuple[float, float]:
    """Student's t interval; infinite for a single prompt."""
    half = _t_quantile(n - 1) * sqrt(variance) if n > 1 else inf
    return mean - half, mean + half


def _t_quantile(df: int) -> float:
    """Quantile of Student's t distribution."""
    return float(stdtrit(df, QUANTILE))
