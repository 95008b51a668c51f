"""Text normalization: digits, signs, commas and spaces of all scripts to ASCII, and no thousands separators."""

import functools
import re
import unicodedata
from fractions import Fraction

LETTER = r"A-Za-z0-9_\u00aa-\u052f"
"""Letters for a regular expression's class, of scripts with spaces between words. Chinese has none before a number."""

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "0123456789+-()n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋", "0123456789+-")
_FRACTION = re.compile("[\u00bc-\u00be\u2150-\u215e]")
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋]+")
_NON_ASCII = re.compile(r"[^\x00-\x7f]")
_ASCII_FORMS = {
    **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d", "-"),
    **dict.fromkeys("\u2019\u02bc\u2032\uff07", "'"),
    **dict.fromkeys("\u3001\u060c\ufe50\uff64\u066c", ","),
    **dict.fromkeys("\u3002\uff61\u06d4\u0964", ". "),
    **dict.fromkeys("\u00d7\u2715\u2a2f", r"\times "),
    **dict.fromkeys("\u00b7\u22c5\u2219", r"\cdot "),
    **dict.fromkeys("\u00b0\u00ba", r"^\circ "),
    "\u066b": ".",
    "\u066a": "%",
    "\u2044": "/",
    "\u2215": "/",
    "\u00f7": "/",
    "\u2236": ":",
    "\u221a": r"\sqrt ",
    "\u221e": r"\infty ",
    "\u00b1": r"\pm ",
    "\u2264": r"\le ",
    "\u2265": r"\ge ",
    "\u2260": r"\ne ",
    "\u2248": r"\approx ",
    "\u2208": r"\in ",
    "\u222a": r"\cup ",
    "\u2205": r"\emptyset ",
    "\u27e8": r"\langle ",
    "\u27e9": r"\rangle ",
    "\u211d": r"\mathbb{R}",
    "\u03c0": r"\pi ",
}

SCALES = {
    **{"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12},
    **{"lakh": 10**5, "crore": 10**7, "\u4e07": 10**4, "\u842c": 10**4, "\ub9cc": 10**4},
    **dict.fromkeys("\u4ebf\u5104\uc5b5", 10**8),
}
"""Factor per word that multiplies the number before it."""

_SPACE = r"[ \u00a0\u2007\u2009\u202f]"
_SEPARATOR = rf"(?:,?\\[,!] ?|\{{,\}}|\\ |~|[_']|{_SPACE})"
# The first group has 1 to 3 digits and no leading 0, each further one exactly 3.
_GROUPED = re.compile(
    rf"(?<![0-9.,_])(?<![0-9]['~])[1-9][0-9]{{0,2}}{_SEPARATOR}[0-9]{{3}}(?:{_SEPARATOR}[0-9]{{3}})*(?![0-9/])"
)
_SEPARATORS = re.compile(_SEPARATOR)


def to_ascii(text: str) -> str:
    """Convert characters with a meaning for numbers to ASCII, keep other letters, and remove thousands separators but commas."""
    if not text.isascii():
        text = _FRACTION.sub(lambda found: f" {_vulgar_fraction(found[0])} ", text)
        text = _RAISED.sub(lambda found: f"^{{{found[0].translate(_SUPERSCRIPTS)}}}", text)
        text = _LOWERED.sub(lambda found: f"_{{{found[0].translate(_SUBSCRIPTS)}}}", text)
        text = _NON_ASCII.sub(lambda found: _ascii_form(found[0]), text)
    return _GROUPED.sub(lambda found: _SEPARATORS.sub("", found[0]), text)


@functools.cache
def _ascii_form(character: str) -> str:
    if character in _ASCII_FORMS:
        return _ASCII_FORMS[character]
    digit = unicodedata.decimal(character, None)
    if digit is not None:
        return str(digit)
    name = unicodedata.name(character, "").split()
    if name[:1] == ["GREEK"] and name[2:3] == ["LETTER"] and len(name) == 4:
        return f"\\{name[3].lower() if name[1] == 'SMALL' else name[3].capitalize()} ".replace("lamda", "lambda")
    # Full-width letters and signs. A space is kept, because it may separate thousands.
    same = unicodedata.normalize("NFKC", character)
    return same if same.isascii() and not same.isspace() else character


@functools.cache
def _vulgar_fraction(character: str) -> str:
    """Return a fraction character as text, such as "1/2"."""
    return unicodedata.normalize("NFKC", character).replace("\u2044", "/")


def in_base(digits: str, base: int) -> Fraction | None:
    """Return the value of `digits` in a base; None if the base has no such digits."""
    try:
        return Fraction(int(digits, base)) if 2 <= base <= 36 else None
    except ValueError:
        return None
