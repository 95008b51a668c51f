"""Advantages from the rewards of whole sequences, the same at all tokens of one: per published estimator a dataclass with its
numbers, `estimate` and `bound`, the most that its formula can give. In float64.

A sequence's reward is the graders' plus the sum of its tokens' own. Equal rewards give exactly 0 where there is a baseline, and the
order of rows changes nothing, not even the last bit.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from annotated_types import Ge
from pydantic import ConfigDict

from jaxrl_llm.objective.estimator import Estimator
from jaxrl_llm.objective.outcome import Completion, Estimate, Group, Outcome, Tokens, own_rewards, scores
from jaxrl_llm.objective.statistics import (
    batch_centered,
    batch_deviation,
    centered,
    deviation,
    others,
    ratio,
    total,
    whiten,
)

NonNegative = Annotated[float, Ge(0)]
Over = Literal["group", "batch"]


@dataclass(frozen=True)
class Grpo(Estimator):
    """(r - mean) / (std + eps) (Shao et al. 2024, DeepSeekMath, 4.1.2)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["grpo"] = "grpo"
    std: Literal["sample", "population"] = "sample"
    """sample: with n - 1 (torch's default)."""
    eps: NonNegative = 1e-4
    """TRL 1e-4, verl 1e-6, OpenRLHF 1e-9."""
    mean_over: Over = "group"
    std_over: Over = "group"

    def estimate(self, outcome: Outcome) -> Estimate:
        score = scores(outcome)
        rows, kept = as_tokens(score, outcome)
        several = np.count_nonzero(kept) > 1
        away, std = centered(score), deviation(score, self._ddof)
        if self.mean_over == "batch" and several:
            away = batch_centered(rows, kept).reshape(score.shape)
        if self.std_over == "batch" and several:
            std = batch_deviation(rows, kept, self._ddof)
        return at_each_token(ratio(away, std + self.eps), outcome)

    def bound(self, score: Group, outcome: Outcome) -> float:
        n = score.shape[1]
        if self.std_over == "batch":
            return in_stds(n if self.mean_over == "group" else score.size, self._ddof, score.size)
        if self.mean_over == "group":
            return in_stds(n, self._ddof)
        return np.ptp(score) / self.eps if self.eps else math.inf

    def of_equal_rewards(self, graders: int) -> str:
        if self.mean_over == "group":
            return ""
        return "with mean_over batch compares groups with each other: equal rewards teach too"

    @property
    def compares_a_group(self) -> bool:
        return "group" in (self.mean_over, self.std_over)

    @property
    def reads_the_batch(self) -> bool:
        return self.std_over == "batch"

    @property
    def _ddof(self) -> int:
        return int(self.std == "sample")


@dataclass(frozen=True)
class MeanOnly(Estimator):
    """r - mean of the group (Liu et al. 2025, Dr. GRPO, 3.2)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["mean_only"] = "mean_only"

    def estimate(self, outcome: Outcome) -> Estimate:
        """E[gradient] is (1 - 1/G) of the true one, since the mean holds the sample itself."""
        return at_each_token(centered(scores(outcome)), outcome)

    def bound(self, score: Group, outcome: Outcome) -> float:
        return about_mean(score)


@dataclass(frozen=True)
class Rloo(Estimator):
    """r - mean of the G - 1 others (Ahmadian et al. 2024, eq. 9)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["rloo"] = "rloo"
    whiten: bool = False
    """Then (A - mean) / (std + 1e-4) over the batch (TRL's normalize_advantages)."""

    def estimate(self, outcome: Outcome) -> Estimate:
        """Unbiased."""
        advantage = about_others(scores(outcome))
        if self.whiten:
            advantage = whiten(*as_tokens(advantage, outcome), 1, 0.0, 1e-4)
        return at_each_token(advantage, outcome)

    def bound(self, score: Group, outcome: Outcome) -> float:
        return in_stds(score.size, 1) if self.whiten else largest_range(score)


@dataclass(frozen=True)
class LeaveOneOut(Estimator):
    """(r - mean) / (std + eps), both of the G - 1 others; r - mean where their std is 0 (NeMo-RL)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["leave_one_out"] = "leave_one_out"
    eps: NonNegative = 1e-6

    def estimate(self, outcome: Outcome) -> Estimate:
        """The others' std has G - 2; with G = 2 nothing is scaled."""
        score = scores(outcome)
        std = deviation(others(score), 1)[..., 0]
        return at_each_token(about_others(score) / np.where(std > 0, std + self.eps, 1.0), outcome)

    def bound(self, score: Group, outcome: Outcome) -> float:
        apart = np.ptp(others(score), axis=-1)
        std = apart / math.sqrt(2 * max(score.shape[1] - 2, 1))
        return (np.ptp(score, axis=1, keepdims=True) / np.where(apart > 0, std + self.eps, 1.0)).max()


@dataclass(frozen=True)
class MaxRl(Estimator):
    """(r - mean) / (mean + eps); 0 where the mean is not above 0 (MaxRL)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["max_rl"] = "max_rl"
    eps: NonNegative = 0.0
    """prime-rl 0, SkyRL 1e-6."""

    def estimate(self, outcome: Outcome) -> Estimate:
        score = scores(outcome)
        mean = total(score) / score.shape[1]
        return at_each_token(np.where(mean > 0, ratio(centered(score), mean + self.eps), 0.0), outcome)

    def bound(self, score: Group, outcome: Outcome) -> float:
        """(n - 1) where no reward is below 0: then the range is n means at most."""
        n, ranges = score.shape[1], np.ptp(score, axis=1, keepdims=True)
        mean = total(score) / n
        return (ranges / np.where(mean > 0, mean + self.eps, np.inf)).max() * (n - 1) / n


@dataclass(frozen=True)
class PassAtK(Estimator):
    """The best of a group gets what it is ahead of the second, the others 0 (Walder & Karkhanis 2025; verl's best-only form)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["pass_at_k"] = "pass_at_k"
    scale: bool = True
    """Divided by the group's std + eps."""
    eps: NonNegative = 1e-6

    def estimate(self, outcome: Outcome) -> Estimate:
        score = scores(outcome)
        ranked = np.sort(score, axis=1)
        ahead = ranked[:, -1] - ranked[:, -2]
        advantage = np.zeros_like(score)
        advantage[np.arange(len(score)), score.argmax(axis=1)] = ahead
        if self.scale:
            advantage = ratio(advantage, deviation(score, 1) + self.eps)
        return at_each_token(advantage, outcome)

    def bound(self, score: Group, outcome: Outcome) -> float:
        return math.sqrt(score.shape[1]) if self.scale else largest_range(score)


@dataclass(frozen=True)
class Opo(Estimator):
    """r - sum(length * r) / sum(length) (Hao et al. 2025, OPO)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["opo"] = "opo"

    def estimate(self, outcome: Outcome) -> Estimate:
        score = scores(outcome)
        length = outcome.mask.sum(axis=1).reshape(score.shape)
        above = score - score.min(axis=1, keepdims=True)
        return at_each_token(above - ratio(total(length * above), total(length)), outcome)

    def bound(self, score: Group, outcome: Outcome) -> float:
        return largest_range(score)


@dataclass(frozen=True)
class Gpg(Estimator):
    """alpha (r - mean), alpha = rows / rows whose reward is not 0 (Chu et al. 2025, GPG)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["gpg"] = "gpg"

    def estimate(self, outcome: Outcome) -> Estimate:
        score = scores(outcome)
        return at_each_token(centered(score) * self._alpha(score[outcome.counts]), outcome)

    def bound(self, score: Group, outcome: Outcome) -> float:
        return about_mean(score) * self._alpha(score)

    def _alpha(self, score: Group) -> float:
        return score.size / max(np.count_nonzero(score), 1)


@dataclass(frozen=True)
class Gdpo(Estimator):
    """Each grader's part normalized in its group as `grpo` does, their weighted sum whitened over the batch (GDPO)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["gdpo"] = "gdpo"
    eps: NonNegative = 1e-4
    reads_the_batch: ClassVar[bool] = True

    def estimate(self, outcome: Outcome) -> Estimate:
        """Whitened with (A - mean) / (std + eps), std with n - 1."""
        summed = centered(own_rewards(outcome))
        for weight, part in zip(outcome.part_weights, np.moveaxis(outcome.parts, -1, 0), strict=True):
            summed += weight * ratio(centered(part), deviation(part, 1) + self.eps)
        return at_each_token(whiten(*as_tokens(summed, outcome), 1, 0.0, self.eps), outcome)

    def bound(self, score: Group, outcome: Outcome) -> float:
        return in_stds(score.size, 1)

    def of_equal_rewards(self, graders: int) -> str:
        return "compares each grader's part by itself: parts may differ where their sum is equal" if graders > 1 else ""


@dataclass(frozen=True)
class Raw(Estimator):
    """The reward itself."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["raw"] = "raw"
    compares_a_group: ClassVar[bool] = False

    def estimate(self, outcome: Outcome) -> Estimate:
        return at_each_token(scores(outcome), outcome)

    def bound(self, score: Group, outcome: Outcome) -> float:
        return np.abs(score).max()

    def of_equal_rewards(self, graders: int) -> str:
        return "has no baseline: equal rewards teach too"


@dataclass(frozen=True)
class BestWorst(Estimator):
    """1 for the best of a group, -1 for the worst, 0 for the others: the pairs of `dpo`."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["best_worst"] = "best_worst"
    leaves_zeros_out: ClassVar[bool] = True

    def estimate(self, outcome: Outcome) -> Estimate:
        """0 throughout a group of equal rewards."""
        score = scores(outcome)
        advantage, rows = np.zeros_like(score), np.flatnonzero(np.ptp(score, axis=1) > 0)
        advantage[rows, score.argmax(axis=1)[rows]] = 1
        advantage[rows, score.argmin(axis=1)[rows]] = -1
        return at_each_token(advantage, outcome)

    def bound(self, score: Group, outcome: Outcome) -> float:
        return 1.0


def as_tokens(x: Group, outcome: Outcome) -> tuple[Completion, Tokens]:
    """As one token per sequence, and which of these count."""
    return x.reshape(-1, 1), np.repeat(outcome.counts, x.shape[1])[:, None]


def at_each_token(advantage: Group, outcome: Outcome) -> Estimate:
    return Estimate(np.broadcast_to(advantage.reshape(-1, 1), outcome.mask.shape))


def about_others(score: Group) -> Group:
    """r - mean of the G - 1 others, which is G / (G - 1) times what it is about the mean of all."""
    return centered(score) * (score.shape[1] / (score.shape[1] - 1))


def in_stds(n: int, ddof: int, batch: int | None = None) -> float:
    """The most that one of n numbers is from their mean, in stds of theirs, or of a batch that holds them."""
    return math.sqrt(max(((batch or n) - ddof) * (n - 1) / n, 0.0))


def largest_range(score: Group) -> float:
    return np.ptp(score, axis=-1).max()


def about_mean(score: Group) -> float:
    """The most that a number is from its group's mean."""
    return largest_range(score) * (score.shape[1] - 1) / score.shape[1]
