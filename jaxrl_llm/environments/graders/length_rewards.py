"""Graders that weigh a response's length: a target, the others of its group, a cut-off."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

from annotated_types import Gt

from jaxrl_llm.environments.grader import Grader, Sample, make_grader
from jaxrl_llm.environments.graders.text import LengthUnit, length_of


@dataclass(frozen=True, kw_only=True)
class OfRight:
    """Options that say which responses are right: those to which a grader gives `at_least`."""

    grader: str = "exact_match"
    grader_options: dict[str, Any] = field(default_factory=dict)
    at_least: float = 1.0
    unit: LengthUnit = "tokens"

    @cached_property
    def _of_right(self) -> Grader:
        return make_grader(self.grader, self.grader_options)

    def start(self) -> None:
        if hasattr(self._of_right, "start"):
            self._of_right.start()

    def is_right(self, sample: Sample) -> bool:
        return self._of_right(sample) >= self.at_least


@dataclass(frozen=True, kw_only=True)
class LengthTarget(OfRight):
    """Reward for a right response of about the length that the prompt asks for (Aggarwal & Welleck 2025, L1, arXiv 2503.04697).

    n is the length of the response. exact (LCPO-Exact, eq. 1): right - alpha |target - n|. max (LCPO-Max, eq. 2):
    right * clip(alpha (target - n) + delta, 0, 1), so that a shorter response is worth more, and one far beyond the target nothing.
    """

    target: Annotated[int, Gt(0)] | None = None
    """Length for all rows. None: that in the row's column `column`."""
    column: str = "target_length"
    form: Literal["exact", "max"] = "exact"
    alpha: Annotated[float, Gt(0)] = 0.0003
    delta: float = 0.5

    def __call__(self, sample: Sample) -> float:
        target, n, right = self._target(sample), length_of(sample, self.unit), float(self.is_right(sample))
        if self.form == "exact":
            return right - self.alpha * abs(target - n)
        return right * min(max(self.alpha * (target - n) + self.delta, 0.0), 1.0)

    def problem(self, row: Sample) -> str:
        try:
            self._target(row)
        except ValueError as error:
            return str(error)
        return ""

    def _target(self, sample: Sample) -> int:
        target = sample.columns.get(self.column) if self.target is None else self.target
        if not isinstance(target, int) or isinstance(target, bool) or target < 1:
            raise ValueError(
                f"{self.column}: got {target!r}, want a whole number above 0, the length that is asked for"
            )
        return target


@dataclass(frozen=True, kw_only=True)
class RelativeLength(OfRight):
    """Length against the others of the group (Kimi k1.5, arXiv 2501.12599, 2.3.3): g = 0.5 - (n - shortest) / (longest - shortest)
    for a right response, min(0, g) for a wrong one, 0 for all if they are equally long.

    The group is what is graded together: with a budget in rounds, the samples of one round.
    """

    def grade_group(self, group: Sequence[Sample]) -> list[float]:
        lengths = [length_of(sample, self.unit) for sample in group]
        shortest, longest = min(lengths), max(lengths)
        if shortest == longest:
            return [0.0] * len(group)
        found = [0.5 - (n - shortest) / (longest - shortest) for n in lengths]
        return [g if self.is_right(sample) else min(0.0, g) for g, sample in zip(found, group, strict=True)]

    def __call__(self, sample: Sample) -> float:
        return self.grade_group([sample])[0]


@dataclass(frozen=True, kw_only=True)
class CutOff:
    """-1 for a response that was cut off at the limit, else 0."""

    def __call__(self, sample: Sample) -> float:
        return -float(sample.finish == "length")
