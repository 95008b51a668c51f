"""Graders of numbers: read as people write them, compared as exact fractions.

`1,234`, `$5.00`, `5 dollars`, `50%`, `1e3`, `1.5 \\times 10^{3}`, `\\frac{1}{2}`, `1/2`, `3 1/2`, `3.` and a Unicode minus are
numbers. A unit is passed over. What only looks like a number is none, and never its last digits: `3,14` and `1.234,56` (a comma
is no decimal point), `1.2.3`, `2^10`, `\\sqrt{2}`, `1/0`, a number of more than a thousand digits.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import inf
from typing import Annotated, Literal

from annotated_types import Ge, Lt

from jaxrl_llm.rewards.graders import Sample
from jaxrl_llm.rewards.text import FinalText

MAX_DIGITS = 1000
MAX_EXPONENT = 1000

# Each alternative starts where no word or number is under way and takes all that it can, so one pass reads the text.
_RUN = r"(?:[0-9][0-9.,]*|\.[0-9][0-9.,]*)"
_FRACTION = r"\\[dt]?frac\s?\{\s?(?P<TOP>-?[0-9.,]+)\s?\}\s?\{\s?(?P<BOTTOM>-?[0-9.,]+)\s?\}"
_NUMBER = re.compile(
    rf"""
    (?P<root> \\sqrt\s?(?:\[[0-9]{{1,3}}\])?(?:\{{[^{{}}\n]{{0,99}}\}}|[0-9]) )
    |
    (?P<sign>(?<![\w)\]}}%])[-+])?  (?:\\?[$€£¥]\s?(?P<sign_after>[-+])?)?  (?<![\w.])
    (?:
        {_FRACTION.replace("TOP", "top").replace("BOTTOM", "bottom")}
        | (?P<mixed>[0-9]+)[ ](?P<mixed_top>[0-9]+)/(?P<mixed_bottom>[0-9]+)(?![0-9./])
        | (?P<run>{_RUN})
          (?:
              {_FRACTION.replace("TOP", "part_top").replace("BOTTOM", "part_bottom")}
              | (?P<slashes>(?:\s?/\s?-?{_RUN})+)
              | [eE](?P<exponent>[-+]?[0-9]+)
              | \s?(?:\\times|\\cdot|\*|x)\s?10\s?\^\s?\{{?(?P<power>[-+]?[0-9]+)\}}?
          )?
    )
    (?P<raised>\s?\^\s?(?:\{{[^{{}}\n]{{0,99}}\}}|-?[0-9]+)?)?
    (?P<percent>\s?\\?%)?
    """,
    re.VERBOSE,
)
_PLAIN = re.compile(r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+")
_GROUPING = re.compile(r"(?<=[0-9]),?(?:\\[,!]|\{,\}|[\u2009\u202f])(?=[0-9]{3})")
_ONE_SPELLING = str.maketrans({"\u2212": "-", "\u2013": "-", "\u00d7": "*"})


def numbers(text: str, percent: Fraction = Fraction(1)) -> Iterator[Fraction | None]:
    """All numbers of a text from left to right; None for what looks like one and is none. `percent`: the value of 1 %."""
    for match in _NUMBER.finditer(_GROUPING.sub(",", text).translate(_ONE_SPELLING)):
        value = None if match["root"] or match["raised"] else _value(match)
        if value is not None:
            negative = (match["sign"] == "-") != (match["sign_after"] == "-")
            value *= (-1 if negative else 1) * (percent if match["percent"] else 1)
        yield value


def spelled(number: Fraction | None) -> str:
    """One spelling for equal numbers: "-3", "1/2"; empty for None."""
    return "" if number is None else str(number)


@dataclass(frozen=True, kw_only=True)
class Numeric(FinalText):
    """1 if the number in the final text is the answer's, else 0: |number - answer| <= max(abs_tol, rel_tol * |answer|), exactly.

    The row's answer must hold one number, else the grader raises.
    """

    where: Literal["last", "first", "only"] = "last"
    """Which number of the final text counts; "only": there may be no other."""
    abs_tol: Annotated[float, Ge(0), Lt(inf)] = 0.0
    rel_tol: Annotated[float, Ge(0), Lt(inf)] = 0.0
    percent: Literal["unit", "hundredth"] = "unit"
    """50% is 50, the sign being a unit as dollars are; or it is 0.5. In responses and answers alike."""

    def __call__(self, sample: Sample) -> float:
        want, got = self._wanted(sample.answer), self._find(sample)
        if got is None:
            return 0.0
        # Through str, so that a tolerance of 0.1 is one tenth.
        allowed = max(Fraction(str(self.abs_tol)), Fraction(str(self.rel_tol)) * abs(want))
        return float(abs(got - want) <= allowed)

    def extract(self, sample: Sample) -> str:
        return spelled(self._find(sample))

    def _numbers(self, text: str) -> list[Fraction | None]:
        return list(numbers(text, Fraction(1, 100) if self.percent == "hundredth" else Fraction(1)))

    def _find(self, sample: Sample) -> Fraction | None:
        found = self._numbers(self.final_text(sample))
        if not found or (self.where == "only" and len(found) > 1):
            return None
        return found[0] if self.where == "first" else found[-1]

    def _wanted(self, answer: str) -> Fraction:
        found = self._numbers(answer)
        if len(found) != 1 or found[0] is None:
            raise ValueError(f"the row's answer: got {answer[:200]!r}, want one number")
        return found[0]


@dataclass(frozen=True, kw_only=True)
class Gsm8k(Numeric):
    """1 if the number after the last "####" is the answer's, else 0 (Cobbe et al. 2021, arXiv 2110.14168).

    The first number on the marker's line counts. The row's answer may be the worked solution, which ends in "#### 42", or 42 alone.
    """

    after: str = "####"
    where: Literal["last", "first", "only"] = "first"

    def final_text(self, sample: Sample) -> str:
        return super().final_text(sample).lstrip().partition("\n")[0]

    def _wanted(self, answer: str) -> Fraction:
        return super()._wanted(answer.rpartition(self.after)[2] if self.after else answer)


def _value(match: re.Match) -> Fraction | None:
    """Without its sign. None if it is none."""
    if match["top"]:
        return _ratio(_plain(match["top"]), _plain(match["bottom"]))
    if match["mixed"]:
        return _sum(_plain(match["mixed"]), _ratio(_plain(match["mixed_top"]), _plain(match["mixed_bottom"])))
    if match["part_top"]:
        return _sum(_plain(match["run"]), _ratio(_plain(match["part_top"]), _plain(match["part_bottom"])))
    if match["slashes"]:
        parts = match["slashes"].split("/")[1:]
        return _ratio(_plain(match["run"]), _plain(parts[0])) if len(parts) == 1 else None
    power = match["exponent"] or match["power"]
    if power is None:
        return _plain(match["run"])
    if len(power) > 6 or abs(int(power)) > MAX_EXPONENT:
        return None
    number = _plain(match["run"])
    return None if number is None else number * Fraction(10) ** int(power)


def _plain(text: str) -> Fraction | None:
    """Digits with at most one point, perhaps grouped by commas; punctuation after them is the sentence's."""
    digits = text.strip().rstrip(".,")
    sign, digits = (-1, digits[1:]) if digits.startswith("-") else (1, digits)
    if len(digits) > MAX_DIGITS or not _PLAIN.fullmatch(digits):
        return None
    return sign * Fraction(digits.replace(",", ""))


def _ratio(top: Fraction | None, bottom: Fraction | None) -> Fraction | None:
    return top / bottom if top is not None and bottom else None


def _sum(a: Fraction | None, b: Fraction | None) -> Fraction | None:
    return a + b if a is not None and b is not None else None
