"""Estimators with one advantage per sequence, the same at all its tokens. Each is a dataclass of its constants with `estimate` and
`bound`, the largest advantage its formula allows. In float64.

A sequence's reward is the graders' plus the sum of its token rewards. With a baseline, equal rewards give exactly 0, and so does a
group of one row (verl keeps its reward as it is, as if the baseline were 0). Row order changes no bit.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal

import numpy as np
from annotated_types import Ge
from jaxtyping import Bool
from pydantic import ConfigDict

from jaxrl_llm.objective.estimator import (
    AdvantageEstimate,
    Estimator,
    EstimatorInputs,
    sequence_rewards,
    token_reward_sums,
)
from jaxrl_llm.objective.statistics import (
    Grouping,
    Rows,
    batch_centered,
    batch_deviation,
    centered,
    deviation,
    first_with,
    least,
    most,
    of_others,
    ratio,
    total,
    value_range,
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
    """sample: divides by n - 1 (torch's default)."""
    eps: NonNegative = 1e-4
    """TRL 1e-4, verl 1e-6, OpenRLHF 1e-9."""
    mean_over: Over = "group"
    std_over: Over = "group"

    def estimate(self, inputs: EstimatorInputs) -> AdvantageEstimate:
        score, several = sequence_rewards(inputs), len(inputs.reward) > 1
        away, std = centered(score, inputs.groups), deviation(score, inputs.groups, self._ddof)
        if self.mean_over == "batch" and several:
            away = batch_centered(score, every(score))
        if self.std_over == "batch" and several:
            std = batch_deviation(score, every(score), self._ddof)
        return AdvantageEstimate(ratio(away, std + self.eps))

    def bound(self, score: Rows, inputs: EstimatorInputs) -> float:
        n = inputs.groups.largest
        if self.std_over == "batch":
            return largest_z_score(n if self.mean_over == "group" else score.size, self._ddof, score.size)
        if self.mean_over == "group":
            return largest_z_score(n, self._ddof)
        return np.ptp(score) / self.eps if self.eps else math.inf

    def why_equal_rewards_teach(self, graders: int) -> str:
        if self.mean_over == "group":
            return ""
        return "with mean_over batch compares groups with each other: equal rewards teach too"

    @property
    def compares_within_group(self) -> bool:
        return "group" in (self.mean_over, self.std_over)

    @property
    def uses_batch_statistics(self) -> bool:
        return self.std_over == "batch"

    @property
    def _ddof(self) -> int:
        return int(self.std == "sample")


@dataclass(frozen=True)
class MeanOnly(Estimator):
    """r - mean of the group (Liu et al. 2025, Dr. GRPO, 3.2)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["mean_only"] = "mean_only"

    def estimate(self, inputs: EstimatorInputs) -> AdvantageEstimate:
        """E[gradient] is (1 - 1/G) of the true one, since the mean includes the sample itself."""
        return AdvantageEstimate(centered(sequence_rewards(inputs), inputs.groups))

    def bound(self, score: Rows, inputs: EstimatorInputs) -> float:
        return largest_distance_from_mean(score, inputs.groups)


@dataclass(frozen=True)
class Rloo(Estimator):
    """r - mean of the G - 1 others (Ahmadian et al. 2024, eq. 9)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["rloo"] = "rloo"
    whiten: bool = False
    """Also normalize, (A - mean) / (std + 1e-4), over the batch (TRL's normalize_advantages)."""

    @property
    def uses_batch_statistics(self) -> bool:
        return self.whiten

    def estimate(self, inputs: EstimatorInputs) -> AdvantageEstimate:
        """Unbiased."""
        advantage = minus_mean_of_others(sequence_rewards(inputs), inputs.groups)
        if self.whiten:
            advantage = whiten(advantage, every(advantage), 1, 0.0, 1e-4)
        return AdvantageEstimate(advantage)

    def bound(self, score: Rows, inputs: EstimatorInputs) -> float:
        return largest_z_score(score.size, 1) if self.whiten else largest_range(score, inputs.groups)


@dataclass(frozen=True)
class LeaveOneOut(Estimator):
    """(r - mean) / (std + eps), both of the G - 1 others; r - mean where their std is 0 (NeMo-RL)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["leave_one_out"] = "leave_one_out"
    eps: NonNegative = 1e-6

    def estimate(self, inputs: EstimatorInputs) -> AdvantageEstimate:
        """The std of the others divides by G - 2; with G = 2 nothing is scaled."""
        score = sequence_rewards(inputs)
        std = of_others(score, inputs.groups, partial(deviation, ddof=1))
        return AdvantageEstimate(minus_mean_of_others(score, inputs.groups) / np.where(std > 0, std + self.eps, 1.0))

    def bound(self, score: Rows, inputs: EstimatorInputs) -> float:
        apart = of_others(score, inputs.groups, value_range)
        std = apart / np.sqrt(2 * np.maximum(inputs.groups.rows - 2, 1))
        return (value_range(score, inputs.groups) / np.where(apart > 0, std + self.eps, 1.0)).max()


@dataclass(frozen=True)
class MaxRl(Estimator):
    """(r - mean) / (mean + eps); 0 where the mean is not above 0 (MaxRL)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["max_rl"] = "max_rl"
    needs_independent_rows: ClassVar[bool] = True
    eps: NonNegative = 0.0
    """prime-rl 0, SkyRL 1e-6."""

    def estimate(self, inputs: EstimatorInputs) -> AdvantageEstimate:
        score = sequence_rewards(inputs)
        mean = total(score, inputs.groups) / inputs.groups.rows
        return AdvantageEstimate(np.where(mean > 0, ratio(centered(score, inputs.groups), mean + self.eps), 0.0))

    def bound(self, score: Rows, inputs: EstimatorInputs) -> float:
        """n - 1 if no reward is negative: the range is then at most n means."""
        n = inputs.groups.rows
        mean = total(score, inputs.groups) / n
        return (value_range(score, inputs.groups) / np.where(mean > 0, mean + self.eps, np.inf) * (n - 1) / n).max()


@dataclass(frozen=True)
class PassAtK(Estimator):
    """The best of a group gets its lead over the second, the others 0 (Walder & Karkhanis 2025; verl's best-only form)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["pass_at_k"] = "pass_at_k"
    needs_independent_rows: ClassVar[bool] = True
    scale: bool = True
    """Divide by the group's std + eps."""
    eps: NonNegative = 1e-6

    def estimate(self, inputs: EstimatorInputs) -> AdvantageEstimate:
        score, groups = sequence_rewards(inputs), inputs.groups
        best = first_with(score == most(score, groups), groups)
        # The best of a group of one is its own second.
        best = best[groups.size > 1]
        others, advantage = score.copy(), np.zeros_like(score)
        others[best] = -np.inf
        advantage[best] = score[best] - most(others, groups)[best]
        if self.scale:
            advantage = ratio(advantage, deviation(score, groups, 1) + self.eps)
        return AdvantageEstimate(advantage)

    def bound(self, score: Rows, inputs: EstimatorInputs) -> float:
        return math.sqrt(inputs.groups.largest) if self.scale else largest_range(score, inputs.groups)


@dataclass(frozen=True)
class Opo(Estimator):
    """r - sum(length * r) / sum(length) (Hao et al. 2025, OPO)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["opo"] = "opo"
    needs_independent_rows: ClassVar[bool] = True

    def estimate(self, inputs: EstimatorInputs) -> AdvantageEstimate:
        score, groups, length = sequence_rewards(inputs), inputs.groups, inputs.mask.sum(axis=1)
        above = score - least(score, groups)
        return AdvantageEstimate(above - ratio(total(length * above, groups), total(length, groups)))

    def bound(self, score: Rows, inputs: EstimatorInputs) -> float:
        return largest_range(score, inputs.groups)


@dataclass(frozen=True)
class Gpg(Estimator):
    """alpha (r - mean), alpha = rows / rows whose reward is not 0 (Chu et al. 2025, GPG)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["gpg"] = "gpg"

    def estimate(self, inputs: EstimatorInputs) -> AdvantageEstimate:
        score = sequence_rewards(inputs)
        return AdvantageEstimate(centered(score, inputs.groups) * self._alpha(score))

    def bound(self, score: Rows, inputs: EstimatorInputs) -> float:
        return largest_distance_from_mean(score, inputs.groups) * self._alpha(score)

    def _alpha(self, score: Rows) -> float:
        return score.size / max(np.count_nonzero(score), 1)


@dataclass(frozen=True)
class Gdpo(Estimator):
    """Each grader's rewards normalized per group as in `grpo`, their weighted sum whitened over the batch (GDPO). A grader that
    does not grade a group's task adds nothing."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["gdpo"] = "gdpo"
    eps: NonNegative = 1e-4
    uses_batch_statistics: ClassVar[bool] = True

    def estimate(self, inputs: EstimatorInputs) -> AdvantageEstimate:
        """Whitened with (A - mean) / (std + eps), std with n - 1."""
        groups = inputs.groups
        summed = centered(token_reward_sums(inputs), groups)
        rewards = np.where(np.isnan(inputs.reward_components), 0.0, inputs.reward_components)
        for weight, reward in zip(inputs.component_weights, rewards.T, strict=True):
            summed += weight * ratio(centered(reward, groups), deviation(reward, groups, 1) + self.eps)
        return AdvantageEstimate(whiten(summed, every(summed), 1, 0.0, self.eps))

    def bound(self, score: Rows, inputs: EstimatorInputs) -> float:
        return largest_z_score(score.size, 1)

    def why_equal_rewards_teach(self, graders: int) -> str:
        return "normalizes each grader by itself: components may differ where their sum is equal" if graders > 1 else ""


@dataclass(frozen=True)
class Raw(Estimator):
    """The reward itself."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["raw"] = "raw"
    compares_within_group: ClassVar[bool] = False

    def estimate(self, inputs: EstimatorInputs) -> AdvantageEstimate:
        return AdvantageEstimate(sequence_rewards(inputs))

    def bound(self, score: Rows, inputs: EstimatorInputs) -> float:
        return np.abs(score).max()

    def why_equal_rewards_teach(self, graders: int) -> str:
        return "has no baseline: equal rewards teach too"


@dataclass(frozen=True)
class BestWorst(Estimator):
    """1 for the best of a group, -1 for the worst, 0 for the others: the pairs of `dpo`."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["best_worst"] = "best_worst"
    needs_independent_rows: ClassVar[bool] = True
    drops_zero_advantages: ClassVar[bool] = True

    def estimate(self, inputs: EstimatorInputs) -> AdvantageEstimate:
        """A group of equal rewards gets 0 throughout."""
        score, groups = sequence_rewards(inputs), inputs.groups
        high, low, advantage = most(score, groups), least(score, groups), np.zeros_like(score)
        advantage[first_with(score == high, groups)] = 1
        advantage[first_with(score == low, groups)] = -1
        return AdvantageEstimate(np.where(high > low, advantage, 0.0))

    def bound(self, score: Rows, inputs: EstimatorInputs) -> float:
        return 1.0


def every(x: Rows) -> Bool[np.ndarray, " B"]:
    """Return the mask of all rows: batch statistics are over each."""
    return np.ones(len(x), bool)


def minus_mean_of_others(score: Rows, groups: Grouping) -> Rows:
    """Return r - mean of the n - 1 others, which is n / (n - 1) times r - mean of all; 0 in a group of one."""
    return centered(score, groups) * (groups.rows / np.maximum(groups.rows - 1, 1))


def largest_z_score(n: int, ddof: int, batch: int | None = None) -> float:
    """Return the largest distance of one of n numbers from their mean, in their stds, or in those of a batch that contains them. It
    grows with n, so that of several groups is the largest group's."""
    return math.sqrt(max(((batch or n) - ddof) * (n - 1) / n, 0.0))


def largest_range(score: Rows, groups: Grouping) -> float:
    return value_range(score, groups).max()


def largest_distance_from_mean(score: Rows, groups: Grouping) -> float:
    """Return the largest possible distance of a reward from its group's mean."""
    return (value_range(score, groups) * (groups.rows - 1) / groups.rows).max()
