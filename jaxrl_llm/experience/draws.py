"""Draws: which stored groups come back. Each is a frozen dataclass of its constants, called with what is known of the groups."""

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
from annotated_types import Gt
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
