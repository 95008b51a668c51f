"""Which grader judges the completions, and how long it may take."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import ConfigDict


@dataclass(frozen=True)
class RewardConfig:
    """One grader, run in processes of its own."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    grader: Annotated[str, MinLen(1)] = "exact_match"
    """A built-in name, or "my_package.my_module:function": a function of one `Sample` that returns a number."""
    workers: Annotated[int, Ge(1)] = 2
    """Processes that grade at the same time, each with one thread for numerical libraries."""
    deadline_s: Annotated[float, Gt(0), Le(86_400)] = 10.0
    """Wall-clock seconds for one group, all its samples together. Past it the worker is killed and the group fails."""
