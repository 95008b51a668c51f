"""What is kept of the rollouts, and how long they are used."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge
from pydantic import ConfigDict

FILTERS = ("auto", "has_signal", "success", "none")
"""Every other name is a grader's."""


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
    """Filter, replay."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    filter: str = "auto"
    """has_signal: keeps a group whose rewards differ. success: keeps a group in which some responses are right and some wrong, as
    the evaluation counts them. The name of a grader: keeps a group to which this one gave different numbers. none: keeps every
    group that was graded. auto: what the preset's source does; without a preset has_signal where a group of equal rewards has no
    gradient to give, else none."""
    replay: ReplayConfig = ReplayConfig()
