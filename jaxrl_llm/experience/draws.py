"""Draws: which stored groups come back. Each is a frozen dataclass of its constants, called with what is known of the groups."""

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
from annotated_types import Ge, Gt
from jaxtyping import Float, Int
from pydantic import ConfigDict


class Candidates(NamedTuple):
    """What is known of n stored groups, oldest first."""

    age: Int[np.ndarray, " n"]
    """Updates since the newest policy that sampled a token of the group."""
    uses: Int[np.ndarray, " n"]
    """Steps that trained on it, the one that sampled it included."""
    reward: Float[np.ndarray, " n"]
    """Mean over its graded rows."""
    success: Float[np.ndarray, " n"]
    """Share of right responses among its graded rows."""
    signal: Float[np.ndarray, " n"]
    """Mean distance of the rewards of its graded rows from their mean: the size of its advantages."""
    entropy: Float[np.ndarray, " n"]
    """Mean over its sampled tokens, when they were sampled, in nats."""
    size: Int[np.ndarray, " n"]
    """Its rows."""
    row: Int[np.ndarray, " n"]
    """Its row of the task."""


@dataclass(frozen=True, kw_only=True)
class UniformDraw:
    """All alike."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["uniform"] = "uniform"

    def __call__(self, groups: Candidates) -> Float[np.ndarray, " n"]:
        return np.ones(len(groups.age))


@dataclass(frozen=True, kw_only=True)
class RecencyDraw:
    """Younger ones more often: the weight halves every `half_life` updates."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["recency"] = "recency"
    half_life: Annotated[float, Gt(0)] = 4.0

    def __call__(self, groups: Candidates) -> Float[np.ndarray, " n"]:
        # From the youngest on, so that not all weights vanish.
        return 0.5 ** ((groups.age - groups.age.min()) / self.half_life)


@dataclass(frozen=True, kw_only=True)
class PrioritizedDraw:
    """Weight signal^alpha, where a group's signal is the mean size of its advantages (PER, arXiv 1511.05952, 3.3, with
    |advantage| for |delta|)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["prioritized"] = "prioritized"
    alpha: Annotated[float, Ge(0)] = 0.6
    """0: all alike."""

    def __call__(self, groups: Candidates) -> Float[np.ndarray, " n"]:
        return groups.signal**self.alpha


@dataclass(frozen=True, kw_only=True)
class BySuccessesDraw:
    """Groups of k right ones among n responses form a bucket; a bucket with weight N(k; n/2, sigma), its groups alike. Solved and
    hopeless groups never come back (ExGRPO, arXiv 2510.02245, 3.2)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["by_successes"] = "by_successes"
    sigma: Annotated[float, Gt(0)] = 1.0
    """In responses."""

    def __call__(self, groups: Candidates) -> Float[np.ndarray, " n"]:
        right, size = np.round(groups.success * groups.size).astype(int), groups.size
        bucket = np.stack([right, size], axis=1)
        _, place, count = np.unique(bucket, axis=0, return_inverse=True, return_counts=True)
        # Weights of the largest bucket first, so that not all of them vanish.
        away = -((right - size / 2) ** 2) / (2 * self.sigma**2)
        some = (right > 0) & (right < size)
        away -= away[some].max(initial=-np.inf)
        return np.where(some, np.exp(np.where(some, away, 0)) / count[place.ravel()], 0.0)
