"""A KL penalty paid in each token's reward."""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge
from pydantic import ConfigDict

from jaxrl_llm.objective.outcome import Completion, Tokens

# e^-d - 1 + d is never below 0, but its roundings are.
KL = {"k1": lambda d: d, "k2": lambda d: d**2 / 2, "k3": lambda d: np.maximum(np.expm1(-d) + d, 0.0)}


@dataclass(frozen=True)
class RewardKl:
    """What is taken from each token's reward: weight * the estimate of KL(policy that sampled || reference) at it."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["k1", "k2", "k3"] = "k1"
    weight: Annotated[float, Ge(0)] = 0.0
    to: Literal["reward", "advantage"] = "reward"
    """reward: before any statistic (verl, TRL). advantage: after them, each token getting what is still to come (OpenRLHF)."""

    def __call__(self, logprobs: Completion, reference: Completion, mask: Tokens) -> Completion:
        """Minus weight * the estimate at each token (Schulman 2020), 0 outside `mask`."""
        # What is infinite is named by `estimate`.
        with np.errstate(over="ignore", invalid="ignore"):
            return -self.weight * KL[self.kind](np.where(mask, logprobs.astype(np.float64) - reference, 0.0))
