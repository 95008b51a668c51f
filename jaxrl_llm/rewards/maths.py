r"""The grader of mathematics: the last \boxed{} against the answer, equal as math-verify understands it."""

import functools
import logging
import re
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge

from jaxrl_llm.rewards.graders import Sample
from jaxrl_llm.rewards.text import FinalText

MAX_CHARACTERS = 1000

_SPACED_DIGITS = re.compile(r"(?<=[0-9]),?\\[,!](?=[0-9]{3})")


@dataclass(frozen=True, kw_only=True)
class Math(FinalText):
    r"""1 if what stands in the last \boxed{} equals the row's answer, else 0: numbers, expressions, sets, intervals, matrices.

    The row's answer may hold a \boxed{} itself, as worked solutions do; else all of it counts. Equality is math-verify's
    `verify(gold, answer)`: 1/2 is 0.5, "x=5" answers 5, 50\% answers both 50 and 0.5, (1,2) is not [1,2]. A last \boxed{ that
    is never closed is no answer, nor is one of more than 1,000 characters. A row's answer that cannot be read makes the grader
    raise.

    math-verify stops itself by SIGALRM, which works in the main thread of a process only: in the pool's workers, not in your
    threads.
    """

    needs: ClassVar[str] = "math_verify"

    seconds: Annotated[int, Ge(1)] = 3
    """Time for reading, and again for comparing, one answer. Past it the answer is wrong."""

    def start(self) -> None:
        # It warns of every formula that takes too long.
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        # The first call builds its parsers.
        _parse(r"\frac{1}{2}", self.seconds)

    def __call__(self, sample: Sample) -> float:
        from math_verify import verify

        want = _parse(last_boxed(sample.answer) if r"\boxed" in sample.answer else sample.answer, self.seconds)
        if not want:
            raise ValueError(f"the row's answer: got {sample.answer[:200]!r}, want mathematics")
        got = _parse(last_boxed(self.final_text(sample)), self.seconds)
        return float(bool(got) and verify(want, got, timeout_seconds=self.seconds))

    def extract(self, sample: Sample) -> str:
        found = _parse(last_boxed(self.final_text(sample)), self.seconds)
        try:
            return str(found[0]) if found else ""
        except ValueError:
            # Python refuses to print integers of more than 4,300 digits.
            return found[-1]


# The row's answer is read once for all samples of its group, a response's for its grade and for its vote.
@functools.lru_cache(maxsize=256)
def _parse(text: str, seconds: int) -> list:
    """math-verify's readings of a formula: an expression, where it can be read, and the text. Empty if there is none."""
    from math_verify import parse

    text = _SPACED_DIGITS.sub("", text).strip().removesuffix(".")
    if not text or len(text) > MAX_CHARACTERS:
        return []
    return parse(rf"\boxed{{{text}}}", parsing_timeout=seconds)


def last_boxed(text: str) -> str:
    r"""What stands inside the last \boxed{}, braces matched; empty if there is none or it is never closed. Linear in time."""
    start = text.rfind(r"\boxed")
    opening = re.compile(r"\\boxed\s?\{").match(text, start) if start >= 0 else None
    if opening is None:
        return ""
    depth = 1
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, opening.end()):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth:
            return text[opening.end() : brace.start()]
    return ""
