r"""The grader of mathematics: the last \boxed{} against the answer, equal where they are worth the same."""

import functools
import re
from dataclasses import dataclass
from typing import ClassVar

from jaxrl_llm.environments.grader import Sample
from jaxrl_llm.environments.graders.answer_key import Reading, agree, readings
from jaxrl_llm.environments.graders.scanner import Unreadable
from jaxrl_llm.environments.graders.text import FinalText

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
        if why := self.problem(sample):
            raise ValueError(why)
        got = _read_or_none(self._found(sample))
        return float(got is not None and agree(_wanted(sample.answer), got))

    def extract(self, sample: Sample) -> str:
        """A right answer votes as the row's answer does, whatever its form; a wrong one votes for itself."""
        text = self._found(sample)
        got = _read_or_none(text)
        if got is None:
            # No formula, so never the row's answer.
            return f"? {' '.join(text.split())}" if text.strip() else ""
        if sample.answer and not self.problem(sample) and agree(wanted := _wanted(sample.answer), got):
            return wanted[0].as_wanted
        return got[0].as_own

    def problem(self, row: Sample) -> str:
        """What is wrong with the row's answer; nothing if it can be graded."""
        try:
            _wanted(row.answer)
        except Unreadable as error:
            return f"the row's answer: got {row.answer[:200]!r}, want mathematics: {error}"
        return ""

    def _found(self, sample: Sample) -> str:
        return last_boxed(self.final_text(sample))


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
@functools.lru_cache(maxsize=256)
def _wanted(answer: str) -> tuple[Reading, ...]:
    return readings(last_boxed(answer) if _BOX.search(answer) else answer)


@functools.lru_cache(maxsize=256)
def _read_or_none(text: str) -> tuple[Reading, ...] | None:
    try:
        return readings(text)
    except Unreadable:
        return None
