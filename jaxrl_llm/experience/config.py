"""What is kept of the rollouts, what they are worth, and how long they are used."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge
from pydantic import ConfigDict


@dataclass(frozen=True)
class ReplayConfig:
    """A ring of whole groups that learned something; fresh groups that the filter dropped are replaced from it."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    capacity: Annotated[int, Ge(0)] = 0
    """Groups kept. 0 is the identity: fresh groups pass through, dropped ones stay empty."""
    max_age: Annotated[int, Ge(1)] = 8
    """A group older than so many updates is not taken."""


@dataclass(frozen=True)
class ExperienceConfig:
    """Filter, advantage, replay."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    filter: Literal["has_signal", "none"] = "has_signal"
    """has_signal keeps a group whose rewards differ; the others have no gradient to give."""
    advantage: Literal["grpo", "rloo", "mean_only"] = "grpo"
    """grpo: (r - mean) / (std + 1e-4), std with n - 1. rloo: r - mean of the others. mean_only: r - mean (Dr. GRPO)."""
    replay: ReplayConfig = ReplayConfig()
