"""How large an advantage can be: what each estimator's formula allows. What is larger is a bug."""

import math
from collections.abc import Callable

import numpy as np

from jaxrl_llm.objective.advantage_config import (
    AdvantageConfig,
    BestWorst,
    Gae,
    Gdpo,
    Gpg,
    Grpo,
    LeaveOneOut,
    MaxRl,
    MeanOnly,
    Opo,
    PassAtK,
    Raw,
    ReinforcePlusPlus,
    Rloo,
)
from jaxrl_llm.objective.outcome import Group, Outcome, of_groups_that_count, scores
from jaxrl_llm.objective.statistics import others, total


def bound(cfg: AdvantageConfig, outcome: Outcome) -> float:
    """The largest |advantage| that the formula allows for these rewards, of the groups that count; inf where there is none.

    n rows per group, or N in the batch (tokens, where these are whitened); range is max - min of a group, each at its largest.

    - Of n numbers, d from their mean: the others sum to -d, their squares to d^2 / (n - 1) or more, all squares to
      d^2 n / (n - 1) or more. So |d| <= std * sqrt((n - ddof)(n - 1) / n): (n - 1) / sqrt(n) sample stds, sqrt(n - 1) population
      stds. The same for a group's mean with the batch's std, whose squares sum to no less than the group's: N - ddof for n - ddof.
    - From the mean of n: (n - 1) / n of the range at most, where all others are at the other end. From any weighted mean, that of
      the others among them: the range.
    - Two numbers a range apart have squares of range^2 / 2 or more about any mean: std >= range / sqrt(2 (n - ddof)).
    - The best, a gap ahead of all others: squares of gap^2 (n - 1) / n or more, so gap <= sqrt(n) sample stds.
    - An eps only takes away; where there is none to divide by, the quotient is 0.
    """
    outcome = of_groups_that_count(outcome)
    score = scores(outcome)[outcome.counts]
    return float(BOUNDS[type(cfg)](score, outcome, cfg)) if score.size else 0.0


def _in_stds(n: int, ddof: int, batch: int | None = None) -> float:
    return math.sqrt(max(((batch or n) - ddof) * (n - 1) / n, 0.0))


def _range(score: np.ndarray) -> float:
    return np.ptp(score, axis=-1).max()


def _about_mean(score: Group) -> float:
    return _range(score) * (score.shape[1] - 1) / score.shape[1]


def _of_grpo(score: Group, outcome: Outcome, cfg: Grpo) -> float:
    n, ddof = score.shape[1], int(cfg.std == "sample")
    if cfg.std_over == "batch":
        return _in_stds(n if cfg.mean_over == "group" else score.size, ddof, score.size)
    if cfg.mean_over == "group":
        return _in_stds(n, ddof)
    return np.ptp(score) / cfg.eps if cfg.eps else math.inf


def _of_leave_one_out(score: Group, outcome: Outcome, cfg: LeaveOneOut) -> float:
    apart = np.ptp(others(score), axis=-1)
    std = apart / math.sqrt(2 * max(score.shape[1] - 2, 1))
    return (np.ptp(score, axis=1, keepdims=True) / np.where(apart > 0, std + cfg.eps, 1.0)).max()


def _of_max_rl(score: Group, outcome: Outcome, cfg: MaxRl) -> float:
    """(n - 1) where no reward is below 0: then the range is n means at most."""
    n, ranges = score.shape[1], np.ptp(score, axis=1, keepdims=True)
    mean = total(score) / n
    return (ranges / np.where(mean > 0, mean + cfg.eps, np.inf)).max() * (n - 1) / n


def _of_reinforce_pp(score: Group, outcome: Outcome, cfg: ReinforcePlusPlus) -> float:
    tokens = np.count_nonzero(outcome.mask)
    if tokens < 2:
        return _about_mean(score) if cfg.baseline else np.abs(score).max()
    return _in_stds(tokens, int(cfg.variance == "sample"))


def _of_gae(score: Group, outcome: Outcome, cfg: Gae) -> float:
    tokens = np.count_nonzero(outcome.mask)
    return _in_stds(tokens, 1) if cfg.whiten and tokens > 1 else math.inf


BOUNDS: dict[type, Callable[[Group, Outcome, AdvantageConfig], float]] = {
    Grpo: _of_grpo,
    MeanOnly: lambda score, outcome, cfg: _about_mean(score),
    Rloo: lambda score, outcome, cfg: _in_stds(score.size, 1) if cfg.whiten else _range(score),
    LeaveOneOut: _of_leave_one_out,
    MaxRl: _of_max_rl,
    PassAtK: lambda score, outcome, cfg: math.sqrt(score.shape[1]) if cfg.scale else _range(score),
    Opo: lambda score, outcome, cfg: _range(score),
    Gpg: lambda score, outcome, cfg: _about_mean(score) * score.size / max(np.count_nonzero(score), 1),
    Gdpo: lambda score, outcome, cfg: _in_stds(score.size, 1),
    Raw: lambda score, outcome, cfg: np.abs(score).max(),
    BestWorst: lambda score, outcome, cfg: 1.0,
    ReinforcePlusPlus: _of_reinforce_pp,
    Gae: _of_gae,
}
