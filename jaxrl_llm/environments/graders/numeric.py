r"""Graders of numbers, which are compared as exact fractions.

`1,234`, `1 234`, `$5.00`, `5 dollars`, `12 cm^2`, `50%`, `3 million`, `1e3`, `1.5 \times 10^{3}`, `\frac{1}{2}`, `1/2`, `3 1/2`,
`3.`, `2516_8`, digits of any script and a Unicode minus are numbers. Units and their exponents are ignored. Text that only looks
like a number is invalid, and never read as its last digits: `3,14` and `1.234,56` (a comma is no decimal point), `1.2.3`, `2^10`,
`\sqrt{2}`, `2\pi`, `x/2`, `1/0`, `12:30`, `2024-01-15`, a number of more than a thousand digits.
"""

import functools
import re
from dataclasses import dataclass
from fractions import Fraction
from math import inf
from typing import Annotated, Literal

from annotated_types import Ge, Lt

from jaxrl_llm.environments.grader import Sample
from jaxrl_llm.environments.graders.normalization import LETTER, SCALES, in_base, to_ascii
from jaxrl_llm.environments.graders.text import FinalText

MAX_DIGITS = 1000
MAX_EXPONENT = 1000

_RUN = r"(?:[0-9][0-9.,]*|\.[0-9][0-9.,]*)"
_BRACES = r"\{(?:[^{}\n]|\{[^{}\n]{0,99}\}){0,99}\}"
_ARGUMENT = r"\{\s?-?[0-9.,]+\s?\}"
_FRACTION = r"\\frac\{\s?(?P<TOP>-?[0-9.,]+)\s?\}\{\s?(?P<BOTTOM>-?[0-9.,]+)\s?\}"
_UNIT = r"\{(?:\\[a-z]{1,9}\{[^{}0-9]{0,30}\}|[^{}0-9\\\n]){0,30}(?:\^\s?\{?-?[0-9]\}?)?\s?\}"
_ROOT = rf"\\sqrt\s?(?:\[[0-9]{{1,3}}\])?\s?(?:{_BRACES}|[0-9]+)"
# Each alternative starts outside words and numbers and matches as much as it can, so one pass reads the text.
_NUMBER = re.compile(
    rf"""
    # Ignored: a unit in the form of a fraction; the index or the exponent of a letter or a unit.
    (?P<ignored>
        \\frac{_UNIT}{_UNIT}
        | [_^]\s?(?:\{{[^{{}}\n]{{0,99}}\}}|[-+]?[0-9]+|\\circ)
    )
    |
    # Invalid: roots, formulas in a fraction, times, dates, divisors of a letter.
    (?P<invalid>
        {_ROOT}
        | \\frac(?!{_ARGUMENT}{_ARGUMENT})\s?{_BRACES}\s?{_BRACES}
        | (?<![{LETTER}.]) [0-9]+(?::[0-9]+)+
        | (?<![{LETTER}.]) (?:[0-9]{{4}}-[0-9]{{1,2}}-[0-9]{{1,2}}|[0-9]{{1,2}}-[0-9]{{1,2}}-[0-9]{{4}})(?![0-9])
        | /\s?{_RUN}
        | (?<![{LETTER}.]) 0[xX][0-9a-fA-F]+
    )
    |
    (?<![{LETTER}.]) (?P<digits>[0-9][0-9A-F]*)_(?:\{{(?P<base>[0-9]{{1,2}})\}}|(?P<bare_base>[0-9]{{1,2}}))(?![0-9])
    |
    (?P<sign>(?<![{LETTER})\]}}%])[-+])?  (?:\\?[$€£¥]\s?(?P<sign_after>[-+])?)?  (?<![{LETTER}.])
    (?:
        {_FRACTION.replace("TOP", "top").replace("BOTTOM", "bottom")}
        | (?P<mixed>[0-9]+)[ ](?P<mixed_top>[0-9]+)/(?P<mixed_bottom>[0-9]+)(?![0-9./])
        | (?P<run>{_RUN})
          (?:
              (?<=[0-9])\s?{_FRACTION.replace("TOP", "part_top").replace("BOTTOM", "part_bottom")}
              | (?P<slashes>(?:\s?/\s?-?{_RUN})+)
              | [eE](?P<exponent>[-+]?[0-9]+(?:\.[0-9]+)*)
              | \s?(?:\\times|\\cdot|\*|x)\s{{0,2}}10\s?(?:\^|\*\*)\s?\{{?(?P<power>[-+]?[0-9]+)\}}?
          )?
    )
    (?P<formula>
        \s?\^(?!\s?\{{?\s?\\circ)\s?(?:\{{[^{{}}\n]{{0,99}}\}}|-?[0-9]+)?
        | \s?(?:\\pi(?![a-z])|{_ROOT}|‰)
    )?
    (?:\s?(?P<scale>{"|".join(SCALES)})s?(?![a-z]))?
    (?P<percent>\s?(?:\\?%|per\s?cent\b))?
    """,
    re.VERBOSE,
)
_PLAIN = re.compile(
    r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[1-9][0-9]?(?:,[0-9]{2})+,[0-9]{3}|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
)
_FRACTIONS = re.compile(r"\\frac\s?(?:\{([^{}]{0,99})\}|([0-9]))\s?(?:\{([^{}]{0,99})\}|([0-9]))")


def numbers(text: str, percent: Fraction = Fraction(1)) -> list[Fraction | None]:
    """Return the numbers of a text from left to right; None for one that is invalid. `percent`: value of 1 %."""
    return [_value(match, percent) for match in _matches(text)]


# The row's answer is read once per group, a response's answer once for both grade and vote.
@functools.lru_cache(maxsize=256)
def _number(text: str, where: str, percent: Fraction) -> Fraction | None:
    """Return the last, the first or the only number of a text; None if there is none, or it is invalid."""
    found = _matches(text)
    if not found or (where == "only" and len(found) > 1):
        return None
    return _value(found[0] if where == "first" else found[-1], percent)


def _matches(text: str) -> list[re.Match]:
    """Matches of numbers, and of text that looks like one."""
    text = to_ascii(text).replace("{,}", ",")
    if "frac" in text:
        text = text.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
        text = _FRACTIONS.sub(lambda found: rf"\frac{{{found[1] or found[2]}}}{{{found[3] or found[4]}}}", text)
    return [match for match in _NUMBER.finditer(text) if not match["ignored"]]


def canonical_text(number: Fraction | None) -> str:
    """Return the same text for equal numbers: "-3", "1/2"; "" for None."""
    return "" if number is None else str(number)


@dataclass(frozen=True, kw_only=True)
class Numeric(FinalText):
    """1 if the number in the final text equals the answer, else 0: |number - answer| <= max(abs_tol, rel_tol * |answer|), exactly.

    Rows whose answer does not contain exactly one number are refused before the run starts.
    """

    where: Literal["last", "first", "only"] = "last"
    """Which number of the final text counts; "only": the text must contain no other."""
    abs_tol: Annotated[float, Ge(0), Lt(inf)] = 0.0
    rel_tol: Annotated[float, Ge(0), Lt(inf)] = 0.0
    percent: Literal["unit", "hundredth"] = "unit"
    """Value of 50%: 50 ("unit") or 0.5 ("hundredth"), in both responses and answers."""

    def __call__(self, sample: Sample) -> float:
        return float(self._is_right(self._number_in(sample), self._reference(sample.answer)))

    def extract(self, sample: Sample) -> str:
        """Return the vote: that of the row's answer if the number is right, within the tolerance, else its own."""
        got, reference = self._number_in(sample), self._reference(sample.answer) if sample.answer else None
        return canonical_text(reference if self._is_right(got, reference) else got)

    def problem(self, row: Sample) -> str:
        """Return why the row's answer cannot be graded; "" if it can."""
        try:
            self._reference(row.answer)
        except ValueError as error:
            return str(error)
        return ""

    def _is_right(self, got: Fraction | None, reference: Fraction | None) -> bool:
        if got is None or reference is None:
            return False
        # Via str, so that a tolerance of 0.1 is exactly one tenth.
        allowed = max(Fraction(str(self.abs_tol)), Fraction(str(self.rel_tol)) * abs(reference))
        return abs(got - reference) <= allowed

    def _number_in(self, sample: Sample) -> Fraction | None:
        return _number(self.final_text(sample), self.where, self._percent)

    @property
    def _percent(self) -> Fraction:
        return Fraction(1, 100) if self.percent == "hundredth" else Fraction(1)

    def _reference(self, answer: str) -> Fraction:
        number = _number(answer, "only", self._percent)
        if number is None:
            raise ValueError(f"the row's answer: got {answer[-200:]!r}, want one number")
        return number


@dataclass(frozen=True, kw_only=True)
class Gsm8k(Numeric):
    """1 if the number after the last "####" equals the answer, else 0 (Cobbe et al. 2021, arXiv 2110.14168).

    The first number on that line counts. The row's answer may be the worked solution, which ends in "#### 42", or only 42.
    """

    after: str = "####"
    where: Literal["last", "first", "only"] = "first"

    def final_text(self, sample: Sample) -> str:
        return super().final_text(sample).lstrip().partition("\n")[0]

    def _reference(self, answer: str) -> Fraction:
        return super()._reference(answer.rpartition(self.after)[2] if self.after else answer)


def _value(match: re.Match, percent: Fraction) -> Fraction | None:
    """Signed value, with percent and scale; None if it is invalid."""
    magnitude = None if match["invalid"] or match["formula"] else _magnitude(match)
    if magnitude is None:
        return None
    negative = (match["sign"] == "-") != (match["sign_after"] == "-")
    return magnitude * (-1 if negative else 1) * (percent if match["percent"] else 1) * SCALES.get(match["scale"], 1)


def _magnitude(match: re.Match) -> Fraction | None:
    """Value without sign and percent; None if it is invalid."""
    if match["digits"]:
        return (
            in_base(match["digits"], int(match["base"] or match["bare_base"]))
            if len(match["digits"]) <= MAX_DIGITS
            else None
        )
    if match["top"]:
        return _ratio(_decimal(match["top"]), _decimal(match["bottom"]))
    if match["mixed"]:
        return _sum(_decimal(match["mixed"]), _ratio(_decimal(match["mixed_top"]), _decimal(match["mixed_bottom"])))
    if match["part_top"]:
        return _sum(_decimal(match["run"]), _ratio(_decimal(match["part_top"]), _decimal(match["part_bottom"])))
    if match["slashes"]:
        parts = match["slashes"].split("/")[1:]
        return _ratio(_decimal(match["run"]), _decimal(parts[0])) if len(parts) == 1 else None
    power = match["exponent"] or match["power"]
    if power is None:
        return _decimal(match["run"])
    if len(power) > 6 or "." in power or abs(int(power)) > MAX_EXPONENT:
        return None
    number = _decimal(match["run"])
    return None if number is None else number * Fraction(10) ** int(power)


def _decimal(text: str) -> Fraction | None:
    """Value of digits with at most one point, optionally grouped by commas. Trailing punctuation is ignored."""
    digits = text.strip().rstrip(".,")
    sign, digits = (-1, digits[1:]) if digits.startswith("-") else (1, digits)
    if len(digits) > MAX_DIGITS or not _PLAIN.fullmatch(digits):
        return None
    return sign * Fraction(digits.replace(",", ""))


def _ratio(top: Fraction | None, bottom: Fraction | None) -> Fraction | None:
    return top / bottom if top is not None and bottom else None


def _sum(a: Fraction | None, b: Fraction | None) -> Fraction | None:
    return a + b if a is not None and b is not None else None
