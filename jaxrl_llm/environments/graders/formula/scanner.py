"""Scanner of a formula: a position in its text, and the reading of literals and numbers."""

import re
from fractions import Fraction
from typing import NoReturn

from jaxrl_llm.environments.graders.normalization import in_base

MAX_EXPONENT = 10_000

_NUMBER = re.compile(
    r"(?P<base_digits>[0-9][0-9A-F]*)\s?_\s?(?:\{\s*(?P<base>[0-9]{1,2}|\\text\{\s*[a-z]+\s*\})\s*\}|(?P<one>[0-9]{1,2}))"
    r"|(?P<digits>[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:\\(?:overline|bar|dot)\s?\{(?P<repeated>[0-9]+)\})?"
    r"(?:[eE](?P<exponent>[-+]?[0-9]+)(?![A-Za-z0-9]))?"
)
_BASES = ("", "", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_PLAIN_FRACTION = re.compile(r"\s?\\frac\s?(?:\{\s?([0-9]+)\s?\}|([0-9])(?=[\s{0-9]))\s?(?:\{\s?([0-9]+)\s?\}|([0-9]))")


class Unreadable(ValueError):
    """The text is not a formula that the parser supports."""


class Scanner:
    """One pass from left to right; a method reads the element it is named after and advances `position`."""

    def __init__(self, text: str):
        self.text = text
        self.position = 0

    def peek(self) -> str:
        """Skip spaces and return the next character; "" at the end."""
        while self.position < len(self.text) and self.text[self.position].isspace():
            self.position += 1
        return self.text[self.position : self.position + 1]

    def take(self, literal: str) -> bool:
        """Skip spaces and `literal`; False if something else follows."""
        self.peek()
        found = self.text.startswith(literal, self.position)
        # A command ends where its letters do.
        if (
            found
            and literal[-1].isalpha()
            and self.text[self.position + len(literal) : self.position + len(literal) + 1].isalpha()
        ):
            return False
        self.position += len(literal) * found
        return found

    def match(self, pattern: re.Pattern) -> re.Match | None:
        found = pattern.match(self.text, self.position)
        if found:
            self.position = found.end()
        return found

    def expect(self, literal: str) -> None:
        if not self.take(literal):
            self.fail(f"want {literal!r}")

    def fail(self, why: str = "") -> NoReturn:
        found = self.text[self.position : self.position + 20] or "the end"
        raise Unreadable(f"syntax error at {found!r}" + (f": {why}" if why else ""))

    def looking_at(self, *literals: str) -> bool:
        start = self.position
        found = any(self.take(literal) for literal in literals)
        self.position = start
        return found

    def number(self) -> tuple:
        found = self.match(_NUMBER)
        if found is None:
            self.fail()
        if found["base_digits"]:
            return ("number", _in_base(found["base_digits"], found["base"] or found["one"]))
        value = Fraction(found["digits"].rstrip(".") or "0")
        if repeated := found["repeated"]:
            places = len(found["digits"].partition(".")[2])
            value += Fraction(int(repeated), 10**places * (10 ** len(repeated) - 1))
        if power := found["exponent"]:
            if len(power) > 7 or abs(int(power)) > MAX_EXPONENT:
                raise Unreadable(f"got 10 to the power of {power[:20]}, want at most {MAX_EXPONENT}")
            value *= Fraction(10) ** int(power)
        elif found["digits"].isdigit() and (part := self.match(_PLAIN_FRACTION)):
            top, bottom = (int(a or b) for a, b in (part.group(1, 2), part.group(3, 4)))
            if not bottom:
                raise Unreadable("division by zero")
            value += Fraction(top, bottom)
        elif self.text.startswith(".", self.position):
            self.fail("a number with two decimal points")
        return ("number", value)


def _in_base(digits: str, base: str) -> Fraction:
    name = re.sub(r"\\text|[{}\s]", "", base)
    radix = int(name) if name.isdigit() else _BASES.index(name) if name in _BASES else 0
    value = in_base(digits, radix)
    if value is None:
        raise Unreadable(f"got the number {digits[:50]} in base {name}, which has no such digits")
    return value
