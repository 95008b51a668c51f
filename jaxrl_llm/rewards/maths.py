r"""The grader of mathematics: the last \boxed{} against the answer, equal where they are worth the same."""

import functools
import re
from dataclasses import dataclass
from typing import ClassVar

from jaxrl_llm.rewards.answer import Reading, agree, readings, spelled
from jaxrl_llm.rewards.formula import Unreadable
from jaxrl_llm.rewards.graders import Sample
from jaxrl_llm.rewards.text import FinalText

# Braces open a box; without them it holds the digits, the letter or the command behind it.
_BOX = re.compile(r"\\(?:boxed|fbox)(?:\s?(\{)|\s?([0-9]+|(?<=\s)[A-Za-z]|\\[A-Za-z]+))")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Math(FinalText):
    r"""1 if what stands in the last \boxed{} equals the row's answer, else 0: numbers, expressions, sets, intervals, matrices.

    The row's answer may hold a \boxed{} itself, as worked solutions do; else all of it counts. Equal is what has the same value,
    whatever its form (docs/rewards.md); letters are no units. A last \boxed{ that is never closed is no answer, nor is one of
    more than 1,000 characters. A row's answer that cannot be read is refused before the run starts.
    """

    needs: ClassVar[str] = "mpmath"

    def start(self) -> None:
        # Imports mpmath and builds its tables.
        readings(r"\sqrt{2}")

    def __call__(self, sample: Sample) -> float:
        return float(self._grade(sample)[0])

    def extract(self, sample: Sample) -> str:
        return self._grade(sample)[1]

    def problem(self, row: Sample) -> str:
        """What is wrong with the row's answer; nothing if it can be graded."""
        try:
            _read(_wanted(row.answer))
        except Unreadable as error:
            return f"got {row.answer[:200]!r}, want mathematics: {error}"
        return ""

    def _grade(self, sample: Sample) -> tuple[bool, str]:
        """Whether the answer is right, and its vote: that of the row's answer if it is, its own if not."""
        text = last_boxed(self.final_text(sample))
        got = _read_or_none(text)
        if got is not None and sample.answer:
            if why := self.problem(sample):
                raise ValueError(f"the row's answer: {why}")
            if agree(wanted := _read(_wanted(sample.answer)), got):
                return True, _wanted_vote(wanted[0])
        if got is None:
            # No formula: a vote of its own, which is never the row's.
            return False, f"? {' '.join(text.split())}" if text.strip() else ""
        return False, _own_vote(got[0])


def last_boxed(text: str) -> str:
    r"""What stands inside the last \boxed{}, braces matched; empty if there is none or it is never closed. Linear in time."""
    start = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    box = _BOX.match(text, start) if start >= 0 else None
    if box is None:
        return ""
    if box[2] is not None:
        return box[2]
    depth = 1
    for brace in _BRACE.finditer(text, box.end()):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth:
            return text[box.end() : brace.start()]
    return ""


# The row's answer is read once for all samples of its group, a response's for its grade and for its vote.
@functools.lru_cache(maxsize=1024)
def _read(text: str) -> tuple[Reading, ...]:
    return readings(text)


@functools.lru_cache(maxsize=1024)
def _read_or_none(text: str) -> tuple[Reading, ...] | None:
    try:
        return readings(text) if text.strip() else None
    except Unreadable:
        return None


def _wanted(answer: str) -> str:
    return last_boxed(answer) if _BOX.search(answer) else answer


def _own_vote(reading: Reading) -> str:
    return spelled(reading.value if reading.value is not None else reading.statement)


def _wanted_vote(reading: Reading) -> str:
    return spelled(reading.statement if reading.statement is not None else reading.value)
