"""Graders of the text itself: equality, a pattern's answer, the form, the length.

Each is a frozen dataclass: its fields are the options, a call is the grade.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, MinLen

from jaxrl_llm.environments.grader import Sample


@dataclass(frozen=True, kw_only=True)
class ExactMatch:
    """1 if the whole response is the answer, character for character, else 0.

    A right answer that was cut off, continued or padded earns nothing: a policy cannot gain by never ending, nor by saying many
    things.
    """

    finished: bool = True
    """A response that was cut off earns 0, whatever it says: nobody knows how it would have gone on."""

    def __call__(self, sample: Sample) -> float:
        cut_off = self.finished and sample.finish == "length"
        return float(sample.completion == sample.answer and not cut_off)


@dataclass(frozen=True, kw_only=True)
class FinalText:
    """The part of a response in which its final answer is looked for: the options of every grader that extracts."""

    after: str = ""
    """Only what follows the last occurrence of this counts, for example "Answer:"; without it there is no answer."""
    finished: bool = True
    """A response that was cut off has no final answer: its last number may be half of one."""

    def final_text(self, sample: Sample) -> str:
        """What follows the reasoning and `after`; empty if there is nothing, or the response was cut off.

        Reasoning ends with the last "</think>"; "<think>" without an end is reasoning only.
        """
        if self.finished and sample.finish == "length":
            return ""
        text = sample.completion.rpartition("</think>")[2]
        if "<think>" in text or self.after not in text:
            return ""
        return text.rpartition(self.after)[2] if self.after else text


@dataclass(frozen=True, kw_only=True)
class Regex(FinalText):
    """1 if what the pattern finds in the final text is the answer, else 0. Spaces around both do not count.

    What it finds is its group, or the whole match where it has none. A pattern that backtracks for ever is stopped by the
    deadline, at the price of its group.
    """

    pattern: Annotated[str, MinLen(1)]
    """Python's syntax, with one group at most; (?i) at its start ignores case, (?s) lets the dot match line ends."""
    where: Literal["last", "first"] = "last"
    """Which match counts."""

    def __post_init__(self) -> None:
        if (groups := compiled(self.pattern).groups) > 1:
            raise ValueError(f"pattern: got {groups} groups, want one at most; (?:...) groups without counting")

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
    """1 if the whole response has the form of the pattern, else 0. The answer plays no part."""

    pattern: Annotated[str, MinLen(1)]
    """Python's syntax; the dot matches line ends too."""

    def __post_init__(self) -> None:
        compiled(self.pattern)

    def __call__(self, sample: Sample) -> float:
        return float(re.fullmatch(self.pattern, sample.completion, re.DOTALL) is not None)


@dataclass(frozen=True, kw_only=True)
class Length:
    """How long the response is, as a penalty from 0 down to -1. n is its length, in `unit`.

    With a limit, the soft punishment of overlong responses in DAPO (Yu et al. 2025, arXiv 2503.14476, eq. 13):
    0 while n <= limit - soft, then (limit - soft - n) / soft, and -1 where n > limit; soft = 0 leaves only that step.
    With a target: -|n - target| / target, at least -1.
    """

    limit: Annotated[int, Ge(1)] | None = None
    """L_max in eq. 13."""
    soft: Annotated[int, Ge(0)] = 0
    """L_cache in eq. 13: over so many last units the penalty grows."""
    target: Annotated[int, Ge(1)] | None = None
    """The length that costs nothing. Either this or `limit`."""
    unit: Literal["tokens", "words", "characters"] = "tokens"

    def __post_init__(self) -> None:
        if (self.limit is None) == (self.target is None):
            raise ValueError(f"got limit {self.limit} and target {self.target}, want exactly one of them")
        if self.soft > (self.limit or 0):
            raise ValueError(f"soft: got {self.soft}, want {self.limit or 0} (the limit) at most")

    def __call__(self, sample: Sample) -> float:
        n = self._length(sample)
        if self.target is not None:
            return -min(1.0, abs(n - self.target) / self.target)
        if n > self.limit:
            return -1.0
        start = self.limit - self.soft
        return 0.0 if n <= start else (start - n) / self.soft

    def _length(self, sample: Sample) -> int:
        if self.unit == "words":
            return len(sample.completion.split())
        if self.unit == "characters":
            return len(sample.completion)
        if sample.num_tokens is None:
            raise ValueError("length: the sample says nothing of its number of tokens; count words or characters")
        return sample.num_tokens


def compiled(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern: {pattern!r} is no regular expression: {error}") from None
