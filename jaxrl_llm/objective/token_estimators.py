"""Advantages of single tokens, from rewards and values at each: as `group_estimators`, dataclasses with `estimate` and `bound`."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from annotated_types import Ge, Gt, Le
from jaxtyping import Int
from pydantic import ConfigDict

from jaxrl_llm.objective.estimator import Estimator
from jaxrl_llm.objective.group_estimators import about_mean, at_each_token, in_stds
from jaxrl_llm.objective.outcome import Completion, Estimate, Group, Outcome, Tokens, scores
from jaxrl_llm.objective.statistics import centered, whiten

Fraction = Annotated[float, Ge(0), Le(1)]
OTHERS = "compares with what other groups and states are worth: equal rewards teach too"


@dataclass(frozen=True)
class ReinforcePlusPlus(Estimator):
    """Returns to go of the tokens' rewards, whitened over the batch's tokens (Hu 2025, REINFORCE++)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["reinforce_pp"] = "reinforce_pp"
    baseline: bool = False
    """First r - mean of the group; then nothing is discounted."""
    gamma: Fraction = 1.0
    variance: Literal["sample", "population"] = "sample"
    """Of the whitening: verl's n - 1, or OpenRLHF's n."""
    eps: Annotated[float, Gt(0)] = 1e-8
    eps_beside: Literal["variance", "std"] = "variance"
    """Divided by sqrt(var + eps), or by std + eps (AReaL)."""
    reads_the_batch: ClassVar[bool] = True
    gives_what_is_to_come: ClassVar[bool] = True

    def estimate(self, outcome: Outcome) -> Estimate:
        if self.baseline:
            returns = at_each_token(centered(scores(outcome)), outcome).advantage
        else:
            # verl: what is between two drawn tokens passes credit on.
            returns = to_go(token_rewards(outcome), outcome.mask, self.gamma)
        if self.eps_beside == "std":
            return Estimate(whiten(returns, outcome.mask, self._ddof, 0.0, self.eps))
        return Estimate(whiten(returns, outcome.mask, self._ddof, self.eps))

    def bound(self, score: Group, outcome: Outcome) -> float:
        tokens = np.count_nonzero(outcome.mask)
        if tokens < 2:
            return about_mean(score) if self.baseline else np.abs(score).max()
        return in_stds(tokens, self._ddof)

    def of_equal_rewards(self, graders: int) -> str:
        return "" if self.baseline else OTHERS

    @property
    def compares_a_group(self) -> bool:
        return self.baseline

    @property
    def _ddof(self) -> int:
        return int(self.variance == "sample")


@dataclass(frozen=True)
class Gae(Estimator):
    """Generalized advantage estimation over completion tokens with the critic's values (Schulman et al. 2016, eq. 16)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["gae"] = "gae"
    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    whiten: bool = True
    """(A - mean) / sqrt(var + 1e-8) over the batch's tokens, var with n - 1; after the returns."""
    compares_a_group: ClassVar[bool] = False
    gives_what_is_to_come: ClassVar[bool] = True

    def estimate(self, outcome: Outcome) -> Estimate:
        """delta_t = r_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lam A_{t+1}. Tokens that were not drawn are passed over."""
        reward, mask, values = token_rewards(outcome), outcome.mask, outcome.values.astype(np.float64)
        advantage = np.zeros_like(reward)
        after, value = np.zeros(len(reward)), np.zeros(len(reward))
        for t in reversed(range(reward.shape[1])):
            delta = reward[:, t] + self.gamma * value - values[:, t]
            now = delta + self.gamma * self.lam * after
            after, value = np.where(mask[:, t], now, after), np.where(mask[:, t], values[:, t], value)
            advantage[:, t] = after
        returns = advantage + values
        return Estimate(whiten(advantage, mask) if self.whiten else advantage, returns)

    def bound(self, score: Group, outcome: Outcome) -> float:
        tokens = np.count_nonzero(outcome.mask)
        return in_stds(tokens, 1) if self.whiten and tokens > 1 else math.inf

    def of_equal_rewards(self, graders: int) -> str:
        return OTHERS


def token_rewards(outcome: Outcome) -> Completion:
    """The tokens' own rewards, the sequence's at the last token that was drawn."""
    mask = outcome.mask
    last: Int[np.ndarray, " B"] = mask.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)
    rewards = np.where(mask, outcome.token_reward, 0.0).astype(np.float64)
    rewards[np.arange(len(last)), last] += np.where(mask.any(axis=1), outcome.reward.reshape(-1), 0.0)
    return rewards


def to_go(rewards: Completion, mask: Tokens, gamma: float) -> Completion:
    """At each token the sum of the rewards from it on, discounted by `gamma` per token that was drawn."""
    returns, after = np.zeros_like(rewards), np.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        after = np.where(mask[:, t], rewards[:, t] + gamma * after, after)
        returns[:, t] = after
    return returns
