"""Estimators with one advantage per sequence, the same at all its tokens. Each is a dataclass of its constants with `estimate` and
`bound`, the largest advantage its formula allows. In float64.

A sequence's reward is the graders' plus the sum of its token rewards. With a baseline, equal rewards give exactly 0, and row order
changes no bit.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from annotated_types import Ge
from pydantic import ConfigDict

from jaxrl_llm.objective.estimator import (
    AdvantageEstimate,
    Completion,
    Estimator,
    EstimatorInputs,
    Group,
    Tokens,
    sequence_rewards,
    token_reward_sums,
)
from jaxrl_llm.objective.statistics import (
    batch_centered,
    batch_deviation,
    centered,
    deviation,
    leave_one_out,
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
    """sample: divides by n - 1 (torch's default)."""
    eps: NonNegative = 1e-4
    """TRL 1e-4, verl 1e-6, OpenRLHF 1e-9."""
    mean_over: Over = "group"
    std_over: Over = "group"

    def estimate(self, inputs: EstimatorInputs) -> AdvantageEstimate:
        score = sequence_rewards(inputs)
        rows, kept = one_token_per_sequence(score, inputs)
        several = np.count_nonzero(kept) > 1
        away, std = centered(score), deviation(score, self._ddof)
        if self.mean_over == "batch" and several:
            away = batch_centered(rows, kept).reshape(score.shape)
        if self.std_over == "batch" and several:
            std = batch_deviation(rows, kept, self._ddof)
        return broadcast_to_tokens(ratio(away, std + self.eps), inputs)

    def bound(self, score: Group, inputs: EstimatorInputs) -> float:
        n = score.shape[1]
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
        return broadcast_to_tokens(centered(sequence_rewards(inputs)), inputs)

    def bound(self, score: Group, inputs: EstimatorInputs) -> float:
        return largest_distance_from_mean(score)


@dataclass(frozen=True)
class Rloo(Estimator):
    """r - mean of the G - 1 others (Ahmadian et al. 2024, eq. 9)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["rloo"] = "rloo"
    whiten: bool = False
    """Also normalize, (A - mean) / (std + 1e-4), over the batch (TRL's normalize_advantages)."""

    def estimate(self, inputs: EstimatorInputs) -> AdvantageEstimate:
        """Unbiased."""
        advantage = minus_mean_of_others(sequence_rewards(inputs))
        if self.whiten:
            advantage = whiten(*one_token_per_sequence(advantage, inputs), 1, 0.0, 1e-4)
        return broadcast_to_tokens(advantage, inputs)

    def bound(self, score: Group, inputs: EstimatorInputs) -> float:
        return largest_z_score(score.size, 1) if self.whiten else largest_range(score)


@dataclass(frozen=True)
class LeaveOneOut(Estimator):
    """(r - mean) / (std + eps), both of the G - 1 others; r - mean where their std is 0 (NeMo-RL)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["leave_one_out"] = "leave_one_out"
    eps: NonNegative = 1e-6

    def estimate(self, inputs: EstimatorInputs) -> AdvantageEstimate:
        """The std of the others divides by G - 2; with G = 2 nothing is scaled."""
        score = sequence_rewards(inputs)
        std = deviation(leave_one_out(score), 1)[..., 0]
        return broadcast_to_tokens(minus_mean_of_others(score) / np.where(std > 0, std + self.eps, 1.0), inputs)

    def bound(self, score: Group, inputs: EstimatorInputs) -> float:
        apart = np.ptp(leave_one_out(score), axis=-1)
        std = apart / math.sqrt(2 * max(score.shape[1] - 2, 1))
        return (np.ptp(score, axis=1, keepdims=True) / np.where(apart > 0, std + self.eps, 1.0)).max()


@dataclass(frozen=True)
class MaxRl(Estimator):
    """(r - mean) / (mean + eps); 0 where the mean is not above 0 (MaxRL)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["max_rl"] = "max_rl"
    eps: NonNegative = 0.0
    """prime-rl 0, SkyRL 1e-6."""

    def estimate(self, inputs: EstimatorInputs) -> AdvantageEstimate:
        score = sequence_rewards(inputs)
        mean = total(score) / score.shape[1]
        return broadcast_to_tokens(np.where(mean > 0, ratio(centered(score), mean + self.eps), 0.0), inputs)

    def bound(self, score: Group, inputs: EstimatorInputs) -> float:
        """n - 1 if no reward is negative: the range is then at most n means."""
        n, ranges = score.shape[1], np.ptp(score, axis=1, keepdims=True)
        mean = total(score) / n
        return (ranges / np.where(mean > 0, mean + self.eps, np.inf)).max() * (n - 1) / n


@dataclass(frozen=True)
class PassAtK(Estimator):
    """The best of a group gets its lead over the second, the others 0 (Walder & Karkhanis 2025; verl's best-only form)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["pass_at_k"] = "pass_at_k"
    scale: bool = True
    """Divide by the group's std + eps."""
    eps: NonNegative = 1e-6

    def estimate(self, inputs: EstimatorInputs) -> AdvantageEstimate:
        score = sequence_rewards(inputs)
        ranked = np.sort(score, axis=1)
        ahead = ranked[:, -1] - ranked[:, -2]
        advantage = np.zeros_like(score)
        advantage[np.arange(len(score)), score.argmax(axis=1)] = ahead
        if self.scale:
            advantage = ratio(advantage, deviation(score, 1) + self.eps)
        return broadcast_to_tokens(advantage, inputs)

    def bound(self, score: Group, inputs: EstimatorInputs) -> float:
        return math.sqrt(score.shape[1]) if self.scale else largest_range(score)


@dataclass(frozen=True)
class Opo(Estimator):
    """r - sum(length * r) / sum(length) (Hao et al. 2025, OPO)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["opo"] = "opo"

    def estimate(self, inputs: EstimatorInputs) -> AdvantageEstimate:
        score = sequence_rewards(inputs)
        length = inputs.mask.sum(axis=1).reshape(score.shape)
        above = score - score.min(axis=1, keepdims=True)
        return broadcast_to_tokens(above - ratio(total(length * above), total(length)), inputs)

    def bound(self, score: Group, inputs: EstimatorInputs) -> float:
        return largest_range(score)


@dataclass(frozen=True)
class Gpg(Estimator):
    """alpha (r - mean), alpha = rows / rows whose reward is not 0 (Chu et al. 2025, GPG)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["gpg"] = "gpg"

    def estimate(self, inputs: EstimatorInputs) -> AdvantageEstimate:
        score = sequence_rewards(inputs)
        return broadcast_to_tokens(centered(score) * self._alpha(score[inputs.used]), inputs)

    def bound(self, score: Group, inputs: EstimatorInputs) -> float:
        return largest_distance_from_mean(score) * self._alpha(score)

    def _alpha(self, score: Group) -> float:
        return score.size / max(np.count_nonzero(score), 1)


@dataclass(frozen=True)
class Gdpo(Estimator):
    """Each grader's rewards normalized per group as in `grpo`, their weighted sum whitened over the batch (GDPO)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["gdpo"] = "gdpo"
    eps: NonNegative = 1e-4
    uses_batch_statistics: ClassVar[bool] = True

    def estimate(self, inputs: EstimatorInputs) -> AdvantageEstimate:
        """Whitened with (A - mean) / (std + eps), std with n - 1."""
        summed = centered(token_reward_sums(inputs))
        for weight, reward in zip(inputs.component_weights, np.moveaxis(inputs.reward_components, -1, 0), strict=True):
            summed += weight * ratio(centered(reward), deviation(reward, 1) + self.eps)
        return broadcast_to_tokens(whiten(*one_token_per_sequence(summed, inputs), 1, 0.0, self.eps), inputs)

    def bound(self, score: Group, inputs: EstimatorInputs) -> float:
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
        return broadcast_to_tokens(sequence_rewards(inputs), inputs)

    def bound(self, score: Group, inputs: EstimatorInputs) -> float:
        return np.abs(score).max()

    def why_equal_rewards_teach(self, graders: int) -> str:
        return "has no baseline: equal rewards teach too"


@dataclass(frozen=True)
class BestWorst(Estimator):
    """1 for the best of a group, -1 for the worst, 0 for the others: the pairs of `dpo`."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["best_worst"] = "best_worst"
    drops_zero_advantages: ClassVar[bool] = True

    def estimate(self, inputs: EstimatorInputs) -> AdvantageEstimate:
        """A group of equal rewards gets 0 throughout."""
        score = sequence_rewards(inputs)
        advantage, rows = np.zeros_like(score), np.flatnonzero(np.ptp(score, axis=1) > 0)
        advantage[rows, score.argmax(axis=1)[rows]] = 1
        advantage[rows, score.argmin(axis=1)[rows]] = -1
        return broadcast_to_tokens(advantage, inputs)

    def bound(self, score: Group, inputs: EstimatorInputs) -> float:
        return 1.0


def one_token_per_sequence(x: Group, inputs: EstimatorInputs) -> tuple[Completion, Tokens]:
    """Return x as one token per sequence, and the mask of the used ones."""
    return x.reshape(-1, 1), np.repeat(inputs.used, x.shape[1])[:, None]


def broadcast_to_tokens(advantage: Group, inputs: EstimatorInputs) -> AdvantageEstimate:
    return AdvantageEstimate(np.broadcast_to(advantage.reshape(-1, 1), inputs.mask.shape))


def minus_mean_of_others(score: Group) -> Group:
    """Return r - mean of the G - 1 others, which is G / (G - 1) times r - mean of all."""
    return centered(score) * (score.shape[1] / (score.shape[1] - 1))


def largest_z_score(n: int, ddof: int, batch: int | None = None) -> float:
    """Return the largest distance of one of n numbers from their mean, in their stds, or in those of a batch that contains them."""
    return math.sqrt(max(((batch or n) - ddof) * (n - 1) / n, 0.0))


def largest_range(score: Group) -> float:
    return np.ptp(score, axis=-1).max()


def largest_distance_from_mean(score: Group) -> float:
    """Return the largest possible distance of a reward from its group's mean."""
    return largest_range(score) * (score.shape[1] - 1) / score.shape[1]
