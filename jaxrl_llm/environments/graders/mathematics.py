r"""Grader of mathematics: compares the value of the last \boxed{} with the row's answer."""

import functools
import re
from dataclasses import dataclass
from typing import ClassVar

from jaxrl_llm.environments.grader import Sample
from jaxrl_llm.environments.graders.formula.equivalence import Interpretation, agree, interpretations
from jaxrl_llm.environments.graders.formula.scanner import Unreadable
from jaxrl_llm.environments.graders.text import FinalText

# A box without braces holds the digits, the letter or the command behind it.
_BOX = re.compile(r"\\(?:boxed|fbox)(?:\s?(\{)|\s?([0-9]+|(?<=\s)[A-Za-z]|\\[A-Za-z]+))")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Math(FinalText):
    r"""1 if the content of the last \boxed{} equals the row's answer, else 0: numbers, expressions, sets, intervals, matrices.

    The row's answer may contain a \boxed{} itself, as worked solutions do; else all of it counts. Answers are equal if they have
    the same value, whatever their form (docs/rewards.md); single letters are variables, not units. A last \boxed{ that is never
    closed, or has more than 1,000 characters, is no answer. Rows whose answer cannot be read are refused before the run starts.
    """

    needs: ClassVar[str] = "mpmath"

    def start(self) -> None:
        # Import mpmath and build its tables.
        interpretations(r"\sqrt{2}")

    def __call__(self, sample: Sample) -> float:
        if why := self.problem(sample):
            raise ValueError(why)
        got = _interpret_or_none(self._boxed(sample))
        return float(got is not None and agree(_reference(sample.answer), got))

    def extract(self, sample: Sample) -> str:
        """Return the vote: that of the row's answer if the answer is right, whatever its form, else its own."""
        text = self._boxed(sample)
        got = _interpret_or_none(text)
        if got is None:
            # Not a formula, so never the vote of a row's answer.
            return f"? {' '.join(text.split())}" if text.strip() else ""
        if sample.answer and not self.problem(sample) and agree(reference := _reference(sample.answer), got):
            return reference[0].vote_if_right
        return got[0].vote_if_wrong

    def problem(self, row: Sample) -> str:
        """Return why the row's answer cannot be graded; "" if it can."""
        try:
            _reference(row.answer)
        except Unreadable as error:
            return f"the row's answer: got {row.answer[:200]!r}, want mathematics: {error}"
        return ""

    def _boxed(self, sample: Sample) -> str:
        return last_boxed(self.final_text(sample))


def last_boxed(text: str) -> str:
    r"""Return the content of the last \boxed{}, with braces matched; "" if there is none or it is never closed. Linear time."""
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


# The row's answer is read once per group, a response's answer once for both grade and vote.
@functools.lru_cache(maxsize=256)
def _reference(answer: str) -> tuple[Interpretation, ...]:
    return interpretations(last_boxed(answer) if _BOX.search(answer) else answer)


@functools.lru_cache(maxsize=256)
def _interpret_or_none(text: str) -> tuple[Interpretation, ...] | None:
    try:
        return interpretations(text)
    except Unreadable:
        return None
