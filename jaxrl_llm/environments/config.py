"""Reward section of a config: the graders, their weights, and the limits on time and memory.

Short forms, in YAML:

    reward: my_package.my_module:my_function
    reward: {grader: gsm8k, workers: 4}
    reward: {graders: [numeric, {grader: format, weight: 0.2, options: {pattern: ".*[.]"}}]}
"""

from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import ConfigDict, model_validator


@dataclass(frozen=True)
class GraderConfig:
    """One grader and its weight. A bare string is the grader's name."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    grader: Annotated[str, MinLen(1)]
    """A built-in name, or "my_package.my_module:function": a function of one `Sample` that returns a number, or one per step."""
    weight: float = 1.0
    """Factor in the weighted sum that is the reward. 0: logged only."""
    name: str = ""
    """Name in metrics and messages. Empty: the built-in's or the function's name."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the grader: fields of a built-in (docs/rewards.md), keyword arguments of a function."""
    step_end: str = ""
    """Text that ends each step of a response: the grader returns one number per step. Empty: one number per response."""
    tasks: tuple[str, ...] = ()
    """Names of the tasks of a mixture whose responses it grades. Empty: those of all tasks."""

    @property
    def label(self) -> str:
        """Name in use."""
        return self.name or self.grader.rpartition(":")[2] or self.grader

    def grades(self, task: str) -> bool:
        """Return whether it grades the responses of a task."""
        return not self.tasks or task in self.tasks

    @model_validator(mode="before")
    @classmethod
    def written_out(cls, value: Any) -> Any:
        return {"grader": value} if isinstance(value, str) else value


@dataclass(frozen=True)
class RewardConfig:
    """Weighted sum of the graders, which run in worker processes. A bare string is one grader."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    graders: Annotated[tuple[GraderConfig, ...], MinLen(1)] = (GraderConfig("exact_match"),)
    """One or more graders with distinct names."""
    workers: Annotated[int, Ge(1), Le(1024)] = 2
    """Number of processes that grade concurrently. Numerical libraries get one thread in each."""
    deadline_s: Annotated[float, Gt(0), Le(86_400)] = 10.0
    """Wall-clock seconds per group: all samples by all graders. A worker that exceeds it is killed, and the group fails."""
    memory_gib: Annotated[float, Ge(0.125), Le(65_536)] = 4.0
    """Writable memory in GiB per worker, and per process that its graders start. Beyond it Python raises MemoryError, and other
    libraries end the process; either fails the group. Linux only."""

    @model_validator(mode="before")
    @classmethod
    def written_out(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"graders": [value]}
        if isinstance(value, dict) and "graders" not in value and "grader" in value:
            names = ("grader", "weight", "name", "options", "step_end", "tasks")
            one = {key: value[key] for key in names if key in value}
            rest = {key: value[key] for key in value if key not in one}
            return {"graders": [one["grader"] if len(one) == 1 else one], **rest}
        return value
