r"""Vocabulary of formulas: functions, relations, units, words; and normalization of notation that differs in layout only."""

import re

from jaxrl_llm.environments.graders import normalization

GREEK = frozenset(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron rho sigma tau upsilon phi chi psi omega "
    "Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar".split()
)
FUNCTIONS = {
    **{name: name for name in "sin cos tan cot sec csc sinh cosh tanh coth exp".split()},
    **{f"arc{name}": f"a{name}" for name in "sin cos tan cot sec csc sinh cosh tanh".split()},
    "ln": "ln",
    "log": "log",
    "lg": "lg",
}
"""mpmath's name per command."""
NAMED = {
    "pi": ("constant", "pi"),
    "infty": ("constant", "infinity"),
    "inf": ("constant", "infinity"),
    "infinity": ("constant", "infinity"),
    "emptyset": ("set",),
    "varnothing": ("set",),
}
RELATIONS = (
    *((rf"\{name}", "<=") for name in ("leq", "le", "leqslant")),
    *((rf"\{name}", ">=") for name in ("geq", "ge", "geqslant")),
    *((rf"\{name}", "!=") for name in ("neq", "ne")),
    (r"\lt", "<"),
    (r"\gt", ">"),
    (r"\in", "in"),
    (r"\approx", "about"),
    ("<=", "<="),
    (">=", ">="),
    ("!=", "!="),
    ("=", "="),
    ("<", "<"),
    (">", ">"),
)
NO_FACTORS = (
    *(spelling for spelling, _ in RELATIONS if spelling.startswith("\\")),
    *(rf"\{name}" for name in "cdot times div pm mp cup lor vee rfloor rceil rvert rangle end circ % }".split()),
    "\\\\",
)

_UNIT_NAMES = (
    "in mm cm dm km nm um ft yd mi lb lbs oz mg kg mph kph kmh rpm hr hrs min mins sec secs ms ns ml mL dL kW kWh Hz kHz MHz GHz "
    "kJ Pa kPa atm eV mol USD EUR GBP usd per sq cubic rad am pm ways"
).split()
_PROSE = frozenset(
    "is the of for if to by at it its are was be so we as when then that this has have not no an on from than with but can "
    "how".split()
)
# Chinese, Japanese and Korean, but for characters that multiply (ten, hundred, thousand, half) or bound the number before them.
_IDEOGRAPH = "(?![十百千半余餘多几幾以未不至和或到とや])[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7a3]"
_WORD = rf"(?:[A-Za-z]{{4,}}|(?:{_IDEOGRAPH})+|{'|'.join(sorted(map(re.escape, _UNIT_NAMES), key=len, reverse=True))})"
_NOT_WORDS = "|".join(
    sorted([*FUNCTIONS, "sqrt", "frac", "binom", "infty", "infinity", "begin", "matrix"], key=len, reverse=True)
)
# Words that change the number before them, so that it is not the whole answer.
_CHANGING = (
    "and|or|not|than|to|half|halves|thirds?|quarters?|dozen|least|most|minus|plus|less|more|fewer|except|if|unless|"
    "mil|mille|millones|Millionen|Tausend|тысяч\\w*|миллион\\w*|миллиард\\w*"
)
_TEXT = rf"\\text\s?\{{(?![^{{}}]*(?:(?<![A-Za-z])(?:{_CHANGING})(?![A-Za-z])|[十百千半余餘多几幾以未不至和或到とや]))[^{{}}]*\}}"
_EXPONENT = r"(?:\s?\^\s?(?:\{[^{}]*\}|-?[0-9]))?"
_UNIT = rf"(?:{_TEXT}|(?<![A-Za-z\\])(?!(?:{_NOT_WORDS}|{_CHANGING})(?![A-Za-z])){_WORD}(?![A-Za-z])){_EXPONENT}"
UNITS = re.compile(
    rf"\s*(?:\\frac\s?\{{\s*{_UNIT}\s*\}}\s?\{{\s*{_UNIT}\s*\}}|{_UNIT}(?:\s*(?:/|\\cdot|\*)?\s*{_UNIT})*)"
)
_SCALE_NAMES = rf"(?:{'|'.join(normalization.SCALES)})"
SCALE = re.compile(
    rf"\s*(?:\\text\s?\{{\s*(?P<inner>{_SCALE_NAMES})s?(?![a-z])[A-Za-z ]*\}}|(?P<bare>{_SCALE_NAMES})s?(?![a-z]))"
)
PERCENT = re.compile(r"\s*(?:\\?%|percent(?![a-z])|\\text\s?\{\s*(?:\\?%|percent)\s*\})")
DEGREE = re.compile(
    r"\s*(?:\^\s?(?:\\circ(?![a-z])|\{\s*\\circ\s*\})|\\degree(?![a-z])|degrees?(?![a-z])|\\text\s?\{\s*degrees?\s*\})"
    r"(?:\s*(?:[CF](?![A-Za-z])|\\text\s?\{\s*[CF]\s*\}))?"
)
OR_AND = re.compile(r"\s*(?:(?:or|and)(?![A-Za-z])|\\text\s?\{\s*(?:,?\s*(?:or|and)|,)\s*\})")

MAX_WORDS = 6
"""Limit on an answer in words; more of them are prose."""

_CURRENCY = re.compile(r"\\\$|\\(?:pounds|euro|yen)(?![a-z])|[€£¥₹₩₽¢]")
_LAYOUT = re.compile(
    r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|small|[lL]arge|!)(?![a-z])\.?|\\(?:text)?color\{[A-Za-z]+\}|\$"
)
_SPACING = re.compile(r"\\(?:quad|qquad|thinspace|enspace)(?![a-z])|(?<!\\)\\[,;:> ]|~")
_FONTS = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|up|normal)?|math(?:rm|bf|it|sf|tt|normal|cal)|mbox|hbox|underline|operatorname|boldsymbol|bm)\*?\s?\{"
)
_MATH_IN_TEXT = re.compile(
    r"\\text\{\s*((?:(?![^\W\d_])[^{}])*|[^{}]*[0-9][^{}]*|\([A-Za-z]\)\s*|[ei]|[A-Za-z](?:\s*,\s*(?:and )?\s*[A-Za-z])+)\s*\}"
)
_SYNONYMS = {
    r"\dfrac": r"\frac",
    r"\tfrac": r"\frac",
    r"\cfrac": r"\frac",
    r"\sfrac": r"\frac",
    r"\nicefrac": r"\frac",
    r"\Pr": "P",
    r"\dbinom": r"\binom",
    r"\tbinom": r"\binom",
    r"\lbrace": r"\{",
    r"\rbrace": r"\}",
    r"\lbrack": "[",
    r"\rbrack": "]",
    r"\lVert": r"\lvert",
    r"\colon": ":",
    r"\ast": "*",
    r"\land": " and ",
    r"\wedge": " and ",
    r"\mid": "|",
    r"\vert": "|",
}
_SYNONYM_COMMANDS = re.compile("|".join(f"{re.escape(name)}(?![a-zA-Z])" for name in _SYNONYMS))
_LEADING = re.compile(r"^\s*(?:=|\\approx(?![a-z]))\s*")
_OVER = re.compile(r"\{([^{}]*)\\over(?![a-z])([^{}]*)\}")
_MIXED = re.compile(r"(?<![0-9./^])([0-9]+) +([0-9]+)/([0-9]+)(?![0-9./])")
_COMMAS = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9]|,[0-9])")
# Powers in programs and plain text.
_POWER = re.compile(r"(?<=[A-Za-z0-9)}])\s?\*\*\s?(?=[A-Za-z0-9({-])")
_SCIENTIFIC = re.compile(r"(?<=[0-9])\s?x\s?(?=10\s?\^)")
_SET_BUILDER = re.compile(
    r"\\\{\s*[a-z]\s*(?:\\in\s*(?:\\mathbb\s?\{?R\}?|\\text\{R\})\s*)?[|:](?=[^|:]*(?:[<>=]|\\[gl]eq?|\\in|\\neq?))(.*)\\\}"
)
_DATE = re.compile(
    r"(?i:(january|february|march|april|may|june|july|august|september|october|november|december)\s*([0-9]{1,2})(?:st|nd|rd|th)?"
    r"(?:\s*,?\s*([0-9]{4}))?)"
)
_HALF_OF_DAY = re.compile(r"[0-9](?:\s|\\[a-z]{4,6}\{|[~{}]|\\[,;: ])*([AaPp])\.?\s?[Mm](?![A-Za-z])")
_POINTS_OF_HALF_DAY = re.compile(r"(?<=[0-9 ])([AaPp])(?:\.\s?[Mm]\.?|M)(?![A-Za-z])")
_TWO_POINTS = re.compile(r"[0-9]\.[0-9]+\.[0-9]|(?<![0-9])[0-9]{1,3}(?:\.[0-9]{3})+,[0-9]")


def normalize(text: str) -> str:
    r"""Return the text without differences in layout: sizes, spaces, fonts, dollars, thousands separators."""
    text = _SPACING.sub(
        " ", _LAYOUT.sub("", normalization.to_ascii(_CURRENCY.sub(" ", text)).replace(r"\(", "(").replace(r"\)", ")"))
    )
    text = _SYNONYM_COMMANDS.sub(lambda found: _SYNONYMS[found[0]], text)
    text = _FONTS.sub(lambda found: r"\text{", text)
    text = _POINTS_OF_HALF_DAY.sub(lambda found: f"{found[1].lower()}m", text)
    text = _MATH_IN_TEXT.sub(r" \1 ", text)
    text = _MIXED.sub(r"(\1+\2/\3)", _OVER.sub(r"\\frac{\1}{\2}", text)).strip()
    if text.startswith(r"\[") and text.endswith(r"\]"):
        text = text[2:-2].strip()
    text = _SCIENTIFIC.sub(r"\\times ", _POWER.sub("^", _LEADING.sub("", text).removesuffix(".")))
    if found := _SET_BUILDER.fullmatch(text):
        text = found[1]
    return _COMMAS.sub(
        lambda found: found[0].replace(",", "") if _groups_thousands(text, found.start()) else found[0], text.strip()
    )


def words(text: str) -> str:
    """Return an answer that consists of words, in lower case: a name, "no solution"; "" for others."""
    in_text = text.startswith(r"\text")
    bare = re.sub(r"\\text\s?\{([^{}]*)\}", r"\1", text).strip(" .!")
    if not re.fullmatch(r"[^\W\d_](?:[^\W\d_]|[' -])*", bare) or OR_AND.match(bare):
        return ""
    runs = bare.split()
    if len(runs) > (MAX_WORDS if in_text else 3) or (
        not in_text and set(map(str.casefold, runs[1:])) & _PROSE - {"no", "not"}
    ):
        return ""
    if not (in_text and len(bare) > 1) and not any(is_word(run) for run in runs) and len(runs) == 1:
        return ""
    if not in_text and all(len(run) == 1 and run.isascii() for run in runs):
        return ""
    if bare in NAMED or bare in FUNCTIONS or bare in GREEK:
        return ""
    return " ".join(runs).casefold()


def date(text: str) -> str:
    """Return a day of a month, with or without a year, in canonical form; "" if the text is something else."""
    found = _DATE.fullmatch(re.sub(r"\\text\s?\{([^{}]*)\}", r"\1", text).strip(" .$"))
    return " ".join(part.casefold().lstrip("0") for part in found.groups() if part) if found else ""


def am_or_pm(text: str) -> str:
    """Return "am" or "pm" of a time; "" if there is none."""
    found = _HALF_OF_DAY.search(text)
    return f"{found[1].casefold()}m" if found else ""


def quoted(text: str) -> str:
    r"""Return the words of an answer that is one short \text{...}, such as a date; "" for others."""
    found = re.fullmatch(r"\$?\\(?:text(?:bf|it|rm)?|mbox|mathrm)\s?\{([^{}]*[^\W\d_][^{}]*)\}\.?\$?", text.strip())
    runs = found[1].split() if found else []
    return " ".join(runs).casefold() if len(runs) <= MAX_WORDS else ""


def is_word(run: str) -> bool:
    """True for letters that form a word and not a product of variables."""
    if run in FUNCTIONS or run in NAMED or run in GREEK or run == "sqrt":
        return False
    return (
        len(run) >= 4
        or bool(re.fullmatch("[A-Z][a-z]{2,}", run))
        or run.casefold() in _PROSE
        or run.casefold() in ("yes", "odd", "one", "two", "six", "ten", "all", "tie", "dne", "nan", "none")
        or not run.isascii()
    )


def prose(text: str) -> str:
    """Return why a text is prose and not a formula; "" if it is not."""
    bare = re.sub(r"\\text\s?\{[^{}]*\}|\\[A-Za-z]+", " ", text)
    if found := [run for run in re.findall(r"(?<![A-Za-z])[A-Za-z]+", bare) if run.casefold() in _PROSE]:
        return f"reads as prose ({found[0]!r})"
    if _TWO_POINTS.search(text):
        return "a number with two decimal points, or with points between thousands"
    return ""


def _groups_thousands(text: str, start: int) -> bool:
    """True if a comma between digits groups thousands. In brackets it separates, unless commas followed by a space do."""
    before = text[:start]
    depth = sum(before.count(mark) for mark in "([") - sum(before.count(mark) for mark in ")]")
    depth += before.count(r"\{") - before.count(r"\}")
    return depth <= 0 or ", " in text or ";" in text
