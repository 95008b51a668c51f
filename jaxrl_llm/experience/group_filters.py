"""Filters of whole groups: which prompts teach. Each is a frozen dataclass of its constants, and a function of groups."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Bool
from pydantic import ConfigDict

from jaxrl_llm.experience import by_prompt

if TYPE_CHECKING:
    from jaxrl_llm.types import Groups

Rows = Bool[np.ndarray, " B"]


@dataclass(frozen=True, kw_only=True)
class KeepAll:
    """Keeps every graded row."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["none"] = "none"

    def __call__(self, groups: "Groups") -> Rows:
        return groups.keep


@dataclass(frozen=True, kw_only=True)
class Signal:
    """Keeps groups whose numbers differ: max > min.

    By success it is the condition of DAPO's dynamic sampling, 0 < right < G (Yu et al. 2025, arXiv 2503.14476, eq. 11). The
    number matters: by a sum in which format or length count, groups stay whose answers are all wrong, and a model that learns
    from them may collapse (arXiv 2609.13866). Advantages cannot decide this: six equal rewards of 0.3 have a float32 mean one ulp
    off, and an "advantage" of 0.75.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["signal"] = "signal"
    by: str = "success"
    """success, the name of a grader, or reward: the weighted sum."""

    def __call__(self, groups: "Groups") -> Rows:
        x = groups.measure(self.by)
        return by_prompt.of_rows(
            by_prompt.reduced(np.maximum, x, groups) > by_prompt.reduced(np.minimum, x, groups), groups
        )


@dataclass(frozen=True, kw_only=True)
class DifficultyBand:
    """Keeps groups whose mean number lies from `low` to `high`, both included (Bae et al. 2025, arXiv 2504.03380)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["difficulty_band"] = "difficulty_band"
    by: str = "success"
    """success, the name of a grader, or reward: the weighted sum."""
    low: float = 0.2
    high: float = 0.8

    def __call__(self, groups: "Groups") -> Rows:
        mean = by_prompt.means(groups.measure(self.by), groups)
        return by_prompt.of_rows(by_prompt.between(mean, self.low, self.high), groups)
