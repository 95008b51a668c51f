r"""Graders of numbers: read as people write them, compared as exact fractions.

`1,234`, `1 234`, `$5.00`, `5 dollars`, `12 cm^2`, `50%`, `3 million`, `1e3`, `1.5 \times 10^{3}`, `\frac{1}{2}`, `1/2`, `3 1/2`,
`3.`, `2516_8`, digits of any language and a Unicode minus are numbers. A unit is passed over, its exponents too. What only looks
like a number is none, and never its last digits: `3,14` and `1.234,56` (a comma is no decimal point), `1.2.3`, `2^10`,
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
from jaxrl_llm.environments.graders.normalization import LETTER, SCALES, in_base, plain
from jaxrl_llm.environments.graders.text import FinalText

MAX_DIGITS = 1000
MAX_EXPONENT = 1000

_RUN = r"(?:[0-9][0-9.,]*|\.[0-9][0-9.,]*)"
_BRACES = r"\{(?:[^{}\n]|\{[^{}\n]{0,99}\}){0,99}\}"
_ARGUMENT = r"\{\s?-?[0-9.,]+\s?\}"
_FRACTION = r"\\frac\{\s?(?P<TOP>-?[0-9.,]+)\s?\}\{\s?(?P<BOTTOM>-?[0-9.,]+)\s?\}"
_UNIT = r"\{(?:\\[a-z]{1,9}\{[^{}0-9]{0,30}\}|[^{}0-9\\\n]){0,30}(?:\^\s?\{?-?[0-9]\}?)?\s?\}"
_ROOT = rf"\\sqrt\s?(?:\[[0-9]{{1,3}}\])?\s?(?:{_BRACES}|[0-9]+)"
# Each alternative starts where no word or number is under way and takes all that it can, so one pass reads the text.
_NUMBER = re.compile(
    rf"""
    # Nothing: a unit in the form of a fraction; the index or the exponent of a letter or a unit.
    (?P<passed>
        \\frac{_UNIT}{_UNIT}
        | [_^]\s?(?:\{{[^{{}}\n]{{0,99}}\}}|[-+]?[0-9]+|\\circ)
    )
    |
    # None: roots, formulas in a fraction, times, dates, what divides a letter.
    (?P<none>
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
    """All numbers of a text from left to right; None for what looks like one and is none. `percent`: the value of 1 %."""
    return [_value(match, percent) for match in _found(text)]


# The row's answer is read once for all samples of its group, a response's for its grade and for its vote.
@functools.lru_cache(maxsize=256)
def _number(text: str, where: str, percent: Fraction) -> Fraction | None:
    """The last, the first or the only number of a text; None if there is none."""
    found = _found(text)
    if not found or (where == "only" and len(found) > 1):
        return None
    return _value(found[0] if where == "first" else found[-1], percent)


def _found(text: str) -> list[re.Match]:
    """Where numbers stand, and what looks like one."""
    text = plain(text).replace("{,}", ",")
    if "frac" in text:
        text = text.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
        text = _FRACTIONS.sub(lambda found: rf"\frac{{{found[1] or found[2]}}}{{{found[3] or found[4]}}}", text)
    return [match for match in _NUMBER.finditer(text) if not match["passed"]]


def spelled(number: Fraction | None) -> str:
    """One spelling for equal numbers: "-3", "1/2"; empty for None."""
    return "" if number is None else str(number)


@dataclass(frozen=True, kw_only=True)
class Numeric(FinalText):
    """1 if the number in the final text is the answer's, else 0: |number - answer| <= max(abs_tol, rel_tol * |answer|), exactly.

    The row's answer must hold one number, else it is refused before the run starts.
    """

    where: Literal["last", "first", "only"] = "last"
    """Which number of the final text counts; "only": there may be no other."""
    abs_tol: Annotated[float, Ge(0), Lt(inf)] = 0.0
    rel_tol: Annotated[float, Ge(0), Lt(inf)] = 0.0
    percent: Literal["unit", "hundredth"] = "unit"
    """50% is 50, the sign being a unit as dollars are; or it is 0.5. In responses and answers alike."""

    def __call__(self, sample: Sample) -> float:
        return float(self._is_right(self._find(sample), self._wanted(sample.answer)))

    def extract(self, sample: Sample) -> str:
        """A right number votes as the row's answer does, however far a tolerance reaches."""
        got, want = self._find(sample), self._wanted(sample.answer) if sample.answer else None
        return spelled(want if self._is_right(got, want) else got)

    def problem(self, row: Sample) -> str:
        """What is wrong with the row's answer; nothing if it can be graded."""
        try:
            self._wanted(row.answer)
        except ValueError as error:
            return str(error)
        return ""

    def _is_right(self, got: Fraction | None, want: Fraction | None) -> bool:
        if got is None or want is None:
            return False
        # Through str, so that a tolerance of 0.1 is one tenth.
        allowed = max(Fraction(str(self.abs_tol)), Fraction(str(self.rel_tol)) * abs(want))
        return abs(got - want) <= allowed

    def _find(self, sample: Sample) -> Fraction | None:
        return _number(self.final_text(sample), self.where, self._percent)

    @property
    def _percent(self) -> Fraction:
        return Fraction(1, 100) if self.percent == "hundredth" else Fraction(1)

    def _wanted(self, answer: str) -> Fraction:
        number = _number(answer, "only", self._percent)
        if number is None:
            raise ValueError(f"the row's answer: got {answer[-200:]!r}, want one number")
        return number


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


def _value(match: re.Match, percent: Fraction) -> Fraction | None:
    """None if it is none."""
    size = None if match["none"] or match["formula"] else _size(match)
    if size is None:
        return None
    negative = (match["sign"] == "-") != (match["sign_after"] == "-")
    return size * (-1 if negative else 1) * (percent if match["percent"] else 1) * SCALES.get(match["scale"], 1)


def _size(match: re.Match) -> Fraction | None:
    """Without its sign and its percent. None if it is none."""
    if match["digits"]:
        return (
            in_base(match["digits"], int(match["base"] or match["bare_base"]))
            if len(match["digits"]) <= MAX_DIGITS
            else None
        )
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
    if len(power) > 6 or "." in power or abs(int(power)) > MAX_EXPONENT:
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
