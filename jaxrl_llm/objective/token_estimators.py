"""Estimators with one advantage per token, from token rewards, steps and values; dataclasses as in `group_estimators`."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from annotated_types import Ge, Gt, Le
from jaxtyping import Bool, Int
from pydantic import ConfigDict

from jaxrl_llm.objective.estimator import (
    AdvantageEstimate,
    Completion,
    Estimator,
    EstimatorInputs,
    Tokens,
    sequence_rewards,
)
from jaxrl_llm.objective.group_estimators import NonNegative, largest_distance_from_mean, largest_z_score
from jaxrl_llm.objective.statistics import Grouping, Rows, centered, deviation, ratio, whiten

Fraction = Annotated[float, Ge(0), Le(1)]
OTHERS = "compares with other groups or states: equal rewards teach too"


@dataclass(frozen=True)
class ReinforcePlusPlus(Estimator):
    """Returns-to-go of the token rewards, whitened over the batch's tokens (Hu 2025, REINFORCE++)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["reinforce_pp"] = "reinforce_pp"
    baseline: bool = False
    """Subtract the group mean from each reward first; nothing is discounted then."""
    gamma: Fraction = 1.0
    variance: Literal["sample", "population"] = "sample"
    """Divisor of the whitening: n - 1 (verl) or n (OpenRLHF)."""
    eps: Annotated[float, Gt(0)] = 1e-8
    eps_beside: Literal["variance", "std"] = "variance"
    """Divide by sqrt(var + eps), or by std + eps (AReaL)."""
    uses_batch_statistics: ClassVar[bool] = True
    uses_returns_to_go: ClassVar[bool] = True

    def estimate(self, inputs: EstimatorInputs) -> AdvantageEstimate:
        if self.baseline:
            away = centered(sequence_rewards(inputs), inputs.groups)
            returns = np.broadcast_to(away[:, None], inputs.mask.shape)
        else:
            # As in verl, credit passes over unsampled tokens.
            returns = to_go(token_rewards(inputs), inputs.mask, self.gamma)
        if self.eps_beside == "std":
            return AdvantageEstimate(whiten(returns, inputs.mask, self._ddof, 0.0, self.eps))
        return AdvantageEstimate(whiten(returns, inputs.mask, self._ddof, self.eps))

    def bound(self, score: Rows, inputs: EstimatorInputs) -> float:
        tokens = np.count_nonzero(inputs.mask)
        if tokens < 2:
            own = score if inputs.step_reward is None else token_rewards(inputs)
            return largest_distance_from_mean(score, inputs.groups) if self.baseline else np.abs(own).max()
        return largest_z_score(tokens, self._ddof)

    def why_equal_rewards_teach(self, graders: int) -> str:
        return "" if self.baseline else OTHERS

    @property
    def compares_within_group(self) -> bool:
        return self.baseline

    @property
    def _ddof(self) -> int:
        return int(self.variance == "sample")


@dataclass(frozen=True)
class GrpoSteps(Estimator):
    """Sum of (r - mean) / (std + eps) of the steps that end at the token or later, mean and std over all steps of all rows of the
    group (Shao et al. 2024, DeepSeekMath, 4.1.3: process supervision).

    Token rewards count for the step of their token. A row without steps is one step. Also a row that is alone in its group
    has advantages if its steps differ.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["grpo_steps"] = "grpo_steps"
    std: Literal["sample", "population"] = "sample"
    """sample: divides by n - 1, as `grpo` does."""
    eps: NonNegative = 1e-4
    uses_returns_to_go: ClassVar[bool] = True

    def estimate(self, inputs: EstimatorInputs) -> AdvantageEstimate:
        ends = step_ends(inputs)
        rewards, number = token_rewards(inputs), np.cumsum(ends) - ends.ravel()
        # A step's reward is that of its tokens; what follows a row's last step was not sampled, and has none.
        value = np.bincount(number, rewards.ravel(), np.count_nonzero(ends))[: np.count_nonzero(ends)]
        groups = Grouping.of(_group_numbers(inputs.groups)[np.nonzero(ends)[0]])
        normalized = np.zeros_like(rewards)
        normalized[ends] = ratio(centered(value, groups), deviation(value, groups, self._ddof) + self.eps)
        return AdvantageEstimate(to_go(normalized, inputs.mask, 1.0))

    def bound(self, score: Rows, inputs: EstimatorInputs) -> float:
        steps = np.count_nonzero(step_ends(inputs), axis=1)
        of_group = inputs.groups.per_row(np.add.reduceat(steps, inputs.groups.start))
        # m (n - m) is largest for m = n / 2.
        n, m = np.maximum(of_group, 1), np.minimum(steps, of_group // 2)
        return np.sqrt(np.maximum(n - self._ddof, 0) * m * (n - m) / n).max()

    def why_equal_rewards_teach(self, graders: int) -> str:
        return "compares steps: they may differ where the responses' rewards are equal"

    @property
    def _ddof(self) -> int:
        return int(self.std == "sample")


@dataclass(frozen=True)
class Gae(Estimator):
    """Generalized advantage estimation over completion tokens with the critic's values (Schulman et al. 2016, eq. 16)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["gae"] = "gae"
    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    whiten: bool = True
    """(A - mean) / sqrt(var + 1e-8) over the batch's tokens, var with n - 1; after the returns."""
    compares_within_group: ClassVar[bool] = False
    uses_returns_to_go: ClassVar[bool] = True

    def estimate(self, inputs: EstimatorInputs) -> AdvantageEstimate:
        """delta_t = r_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lam A_{t+1}. Unsampled tokens are skipped."""
        reward, mask, values = token_rewards(inputs), inputs.mask, inputs.values.astype(np.float64)
        advantage = np.zeros_like(reward)
        after, value = np.zeros(len(reward)), np.zeros(len(reward))
        for t in reversed(range(reward.shape[1])):
            delta = reward[:, t] + self.gamma * value - values[:, t]
            now = delta + self.gamma * self.lam * after
            after, value = np.where(mask[:, t], now, after), np.where(mask[:, t], values[:, t], value)
            advantage[:, t] = after
        returns = advantage + values
        return AdvantageEstimate(whiten(advantage, mask) if self.whiten else advantage, returns)

    def bound(self, score: Rows, inputs: EstimatorInputs) -> float:
        tokens = np.count_nonzero(inputs.mask)
        return largest_z_score(tokens, 1) if self.whiten and tokens > 1 else math.inf

    def why_equal_rewards_teach(self, graders: int) -> str:
        return OTHERS


def token_rewards(inputs: EstimatorInputs) -> Completion:
    """Return the token rewards, with the graders' added at the last sampled token of each step; without steps, of the sequence."""
    mask = inputs.mask
    if inputs.token_reward is None:
        rewards = np.zeros(mask.shape)
    else:
        rewards = np.where(mask, inputs.token_reward, 0.0).astype(np.float64)
    if inputs.step_reward is not None:
        return rewards + np.where(mask & ~np.isnan(inputs.step_reward), inputs.step_reward, 0.0)
    rewards[np.arange(len(mask)), last_sampled(mask)] += np.where(mask.any(axis=1), inputs.reward, 0.0)
    return rewards


def step_ends(inputs: EstimatorInputs) -> Bool[np.ndarray, "B C"]:
    """Return True at the last token of each step; the last sampled token of a row is the last of a step."""
    mask, ends = inputs.mask, np.zeros(inputs.mask.shape, bool)
    ends[np.arange(len(mask)), last_sampled(mask)] = mask.any(axis=1)
    return ends if inputs.step_reward is None else ends | (mask & ~np.isnan(inputs.step_reward))


def last_sampled(mask: Tokens) -> Int[np.ndarray, " B"]:
    """Return the last token in the mask of each row, if there is one."""
    return mask.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)


def _group_numbers(groups: Grouping) -> Int[np.ndarray, " B"]:
    return groups.per_row(np.arange(len(groups.size)))


def to_go(rewards: Completion, mask: Tokens, gamma: float) -> Completion:
    """Return the sum of rewards from each token on, discounted by `gamma` per sampled token."""
    returns, after = np.zeros_like(rewards), np.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        after = np.where(mask[:, t], rewards[:, t] + gamma * after, after)
        returns[:, t] = after
    return returns
