"""Graders of text: exact match, regular expressions, format, length.

Each is a frozen dataclass: its fields are the options, and a call returns the reward.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, MinLen

from jaxrl_llm.environments.grader import Sample

LengthUnit = Literal["tokens", "words", "characters"]


@dataclass(frozen=True, kw_only=True)
class ExactMatch:
    """1 if the whole response equals the answer, character for character, else 0.

    A right answer that is cut off, continued or padded earns 0, so a policy gains nothing by never ending or by listing answers.
    """

    finished: bool = True
    """A response that was cut off earns 0 in any case, because its continuation is unknown."""

    def __call__(self, sample: Sample) -> float:
        cut_off = self.finished and sample.finish == "length"
        return float(sample.completion == sample.answer and not cut_off)


@dataclass(frozen=True, kw_only=True)
class FinalText:
    """Options that select the part of a response that holds its final answer, for all graders that extract one."""

    after: str = ""
    """Only the text after the last occurrence of this counts, for example "Answer:"; a response without it has no answer."""
    finished: bool = True
    """A response that was cut off has no final answer, because its last number may be incomplete."""

    def final_text(self, sample: Sample) -> str:
        """Return the text after the reasoning and `after`; "" if there is none, or the response was cut off.

        Reasoning ends with the last "</think>"; after a "<think>" that is not closed there is no final text.
        """
        if self.finished and sample.finish == "length":
            return ""
        text = sample.completion.rpartition("</think>")[2]
        if "<think>" in text or self.after not in text:
            return ""
        return text.rpartition(self.after)[2] if self.after else text


@dataclass(frozen=True, kw_only=True)
class Regex(FinalText):
    """1 if the match of the pattern in the final text equals the answer, else 0. Spaces around both are ignored.

    The group of the pattern counts, or the whole match if it has none. A pattern that backtracks endlessly fails its group at the
    deadline.
    """

    pattern: Annotated[str, MinLen(1)]
    """In Python's syntax, with at most one group; (?i) at its start ignores case, (?s) lets the dot match line ends."""
    where: Literal["last", "first"] = "last"
    """Which match counts."""

    def __post_init__(self) -> None:
        if (groups := compile_pattern(self.pattern).groups) > 1:
            raise ValueError(f"pattern: got {groups} groups, want at most one; (?:...) groups without capturing")

    def __call__(self, sample: Sample) -> float:
        found = self._find(sample)
        return float(found is not None and found == sample.answer.strip())

    def extract(self, sample: Sample) -> str:
        return self._find(sample) or ""

    def _find(self, sample: Sample) -> str | None:
        found = None
        for match in re.finditer(self.pattern, self.final_text(sample)):
            found = (match.group(match.re.groups) or "").strip()
            if self.where == "first":
                break
        return found


@dataclass(frozen=True, kw_only=True)
class Format:
    """1 if the whole response matches the pattern, else 0. The answer is not used."""

    pattern: Annotated[str, MinLen(1)]
    """In Python's syntax; the dot also matches line ends."""

    def __post_init__(self) -> None:
        compile_pattern(self.pattern)

    def __call__(self, sample: Sample) -> float:
        return float(re.fullmatch(self.pattern, sample.completion, re.DOTALL) is not None)


@dataclass(frozen=True, kw_only=True)
class Length:
    """Length penalty from 0 down to -1. n is the length of the response, in `unit`.

    With a limit, the soft overlong punishment of DAPO (Yu et al. 2025, arXiv 2503.14476, eq. 13):
    0 while n <= limit - soft, then (limit - soft - n) / soft, and -1 where n > limit; soft = 0 leaves only that step.
    With a target: -|n - target| / target, at least -1.
    """

    limit: Annotated[int, Ge(1)] | None = None
    """L_max in eq. 13."""
    soft: Annotated[int, Ge(0)] = 0
    """L_cache in eq. 13: number of units below the limit over which the penalty grows."""
    target: Annotated[int, Ge(1)] | None = None
    """Length without penalty. Either this or `limit`."""
    unit: LengthUnit = "tokens"

    def __post_init__(self) -> None:
        if (self.limit is None) == (self.target is None):
            raise ValueError(f"got limit {self.limit} and target {self.target}, want exactly one of them")
        if self.soft > (self.limit or 0):
            raise ValueError(f"soft: got {self.soft}, want at most {self.limit or 0} (the limit)")

    def __call__(self, sample: Sample) -> float:
        n = length_of(sample, self.unit)
        if self.target is not None:
            return -min(1.0, abs(n - self.target) / self.target)
        if n > self.limit:
            return -1.0
        start = self.limit - self.soft
        return 0.0 if n <= start else (start - n) / self.soft


def length_of(sample: Sample, unit: LengthUnit) -> int:
    """Return the length of the response in this unit."""
    if unit == "words":
        return len(sample.completion.split())
    if unit == "characters":
        return len(sample.completion)
    if sample.num_tokens is None:
        raise ValueError("length: got a sample without its number of tokens; set unit to words or characters")
    return sample.num_tokens


def compile_pattern(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern: got {pattern!r}, want a regular expression: {error}") from None
