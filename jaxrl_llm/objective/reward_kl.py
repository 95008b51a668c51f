"""KL penalty in each token's reward."""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge
from pydantic import ConfigDict

from jaxrl_llm.objective.estimator import Completion, Tokens

# e^-d - 1 + d is never negative, but can round below 0.
KL = {"k1": lambda d: d, "k2": lambda d: d**2 / 2, "k3": lambda d: np.maximum(np.expm1(-d) + d, 0.0)}


@dataclass(frozen=True)
class RewardKl:
    """KL penalty: weight * the per-token estimate of KL(behavior policy || reference) is subtracted from each token's reward."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["k1", "k2", "k3"] = "k1"
    weight: Annotated[float, Ge(0)] = 0.0
    to: Literal["reward", "advantage"] = "reward"
    """reward: before normalization (verl, TRL). advantage: after normalization, as returns-to-go (OpenRLHF)."""

    def __call__(self, logprobs: Completion, reference: Completion, mask: Tokens) -> Completion:
        """Return minus weight * the estimate at each token (Schulman 2020), 0 outside `mask`."""
        # Infinite values are reported by `estimate`.
        with np.errstate(over="ignore", invalid="ignore"):
            return -self.weight * KL[self.kind](np.where(mask, logprobs.astype(np.float64) - reference, 0.0))
