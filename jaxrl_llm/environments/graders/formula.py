r"""LaTeX and plain formulas as people write final answers, read into a tree.

A tree is a tuple: its kind, then its parts.

    Unordered: ("list", items), ("set", items). Ordered: ("bracket", opening, items, closing), ("matrix", rows), ("ratio", parts).
    Statements: ("relation", signs, sides). Text: ("words", text).
    Numbers: ("number", Fraction), ("symbol", name), ("constant", name), ("sum" | "difference" | "product" | "quotient" | "power" |
    "plus_minus" | "minus_plus", a, b), ("negative" | "absolute" | "floor" | "ceiling" | "factorial" | "percent" | "degree", a),
    ("root", n, a), ("binomial", n, k), ("log", a, base), ("base_of_log",), ("call", function, a).

What it does not know it refuses: a formula that is read in part would be read as something else.
"""

import re
from fractions import Fraction

from jaxrl_llm.environments.graders import formula_words
from jaxrl_llm.environments.graders.formula_words import FUNCTIONS, GREEK, NAMED, RELATIONS
from jaxrl_llm.environments.graders.normalization import SCALES
from jaxrl_llm.environments.graders.scanner import Scanner, Unreadable

MAX_DEPTH = 30
MAX_HEIGHT = 150
"""Of the tree, which grows with each term: what reads it calls itself."""
ZERO = ("number", Fraction(0))

DECORATIONS = frozenset(
    "mathbb overline bar vec hat widehat tilde overrightarrow overleftrightarrow angle triangle text".split()
)
_BASES_OF_LOGS = {"log": ("base_of_log",), "ln": ("constant", "e"), "lg": ("number", Fraction(10))}
_DIVISOR = re.compile(r"\s?/\s?(?=[0-9])")
_END_OF_LINE = re.compile(r"\s*,?\s*\\\\")
_SCRIPT = re.compile(r"_\s?(?:\{\s*((?:\\text\{[^{}]*\}|[^{}])*?)\s*\}|\\text\{([^{}]*)\}|(\\?[A-Za-z]+|[0-9]))")


def read(text: str) -> tuple:
    """The tree of an answer. Raises Unreadable."""
    try:
        return _read(formula_words.prepare(text))
    except Unreadable:
        if words := formula_words.date(text) or formula_words.quoted(text):
            return ("words", words)
        raise


def _read(text: str) -> tuple:
    if words := formula_words.words(text):
        return ("words", words)
    if why := formula_words.prose(text):
        raise Unreadable(why)
    reader = _Reader(text)
    tree = reader.items()
    if reader.rest():
        reader.refuse()
    if _height(tree) > MAX_HEIGHT:
        raise Unreadable(f"got more than {MAX_HEIGHT} terms or factors")
    return tree


class _Reader(Scanner):
    """From the loosest to the tightest binding."""

    def __init__(self, text: str):
        super().__init__(text)
        self.depth = 0
        self.bars = 0

    def items(self) -> tuple:
        """Several answers, or the one that there is."""
        found = [self.relation()]
        while self.separator():
            found.append(self.relation())
        return found[0] if len(found) == 1 else ("list", *found)

    def separator(self) -> bool:
        self.rest()
        start = self.at
        while any(map(self.take, (",", ";", r"\cup", r"\lor", r"\vee"))) or self.match(formula_words.OR_AND):
            pass
        return self.at > start

    def relation(self) -> tuple:
        sides, signs = [self.ratio()], []
        while sign := next((name for spelling, name in RELATIONS if self.take(spelling)), None):
            signs.append(sign)
            sides.append(self.ratio())
        return ("relation", tuple(signs), tuple(sides)) if signs else sides[0]

    def ratio(self) -> tuple:
        parts = [self.sum()]
        while self.take(":"):
            parts.append(self.sum())
        return parts[0] if len(parts) == 1 else ("ratio", *parts)

    def sum(self) -> tuple:
        signs = {"+": "sum", "-": "difference", r"\pm": "plus_minus", r"\mp": "minus_plus"}
        result = None
        while True:
            kind = next((kind for sign, kind in signs.items() if self.take(sign)), None)
            if result is not None and kind is None:
                return result
            term = self.product()
            if result is not None:
                result = (kind, result, term)
            elif kind in ("plus_minus", "minus_plus"):
                result = (kind, ZERO, term)
            else:
                result = ("negative", term) if kind == "difference" else term

    def product(self) -> tuple:
        result = self.signed()
        while True:
            if self.take("*") or self.take(r"\cdot") or self.take(r"\times"):
                result = ("product", result, self.signed())
            elif self.take("/") or self.take(r"\div"):
                result = ("quotient", result, self.signed())
            elif scale := self.match(formula_words.SCALE):
                result = ("product", result, ("number", Fraction(SCALES[scale["inner"] or scale["bare"]])))
            elif unit := self.unit():
                result = result if unit == "unit" else (unit, result)
                if self.begins_factor() and self.rest() not in "(":
                    self.refuse("a unit ends a number")
            elif self.begins_factor():
                if self.rest().isdigit() and self.text[: self.at].rstrip()[-1:].isdigit():
                    self.refuse("two numbers without a sign between them")
                result = ("product", result, self.power())
            else:
                return result

    def signed(self) -> tuple:
        negative = False
        while self.rest() and self.text[self.at] in "+-":
            negative ^= self.text[self.at] == "-"
            self.at += 1
        if not self.begins_factor() and self.rest() != "|":
            self.refuse("want a number or a letter")
        return ("negative", self.power()) if negative else self.power()

    def begins_factor(self) -> bool:
        following = self.rest()
        if not following or following in ")]},;:=<>+-*/&%!^_'":
            return False
        if following == "|":
            return not self.bars
        if following == "\\":
            return not self.ahead(*formula_words.NO_FACTORS) and not formula_words.OR_AND.match(self.text, self.at)
        return not formula_words.OR_AND.match(self.text, self.at)

    def unit(self) -> str:
        """Reads a unit, or what stands in the place of one; its kind, "" if there is none."""
        self.rest()
        if self.match(formula_words.PERCENT):
            return "percent"
        if self.match(formula_words.DEGREE):
            return "degree"
        return "unit" if self.match(formula_words.UNITS) else ""

    def power(self) -> tuple:
        base = self.primary()
        while True:
            if self.match(formula_words.DEGREE):
                base = ("degree", base)
            elif self.take("^"):
                base = ("power", base, self.argument(whole_numbers=True))
            elif self.rest() == "!" and not self.text.startswith("!=", self.at):
                self.take("!")
                base = ("factorial", base)
            else:
                return base

    def argument(self, whole_numbers: bool = False) -> tuple:
        r"""Of a command: a group, a command, or one character; "12" is two of them, in x^12 it is one."""
        if self.take("{"):
            return self.until("}")
        if whole_numbers and self.take("-"):
            return ("negative", self.argument(whole_numbers=True))
        if self.rest().isdigit():
            if whole_numbers:
                return self.number()
            self.at += 1
            return ("number", Fraction(self.text[self.at - 1]))
        return self.primary()

    def until(self, end: str) -> tuple:
        inner = self.items()
        self.expect(end)
        return inner

    def primary(self) -> tuple:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable(f"got more than {MAX_DEPTH} levels of brackets")
        found = self.unguarded()
        self.depth -= 1
        return found

    def unguarded(self) -> tuple:
        following = self.rest()
        if following.isdigit() or following == ".":
            return self.number()
        if following in ("(", "["):
            return self.bracket()
        if self.take("{"):
            return self.until("}")
        if self.take("|"):
            return self.absolute("|")
        if following == "\\":
            return self.command()
        if following.isalpha() and following.isascii():
            return self.letters()
        self.refuse()

    def absolute(self, end: str) -> tuple:
        self.bars += 1
        inner = self.items()
        self.expect(end)
        self.bars -= 1
        return ("absolute", inner)

    def bracket(self) -> tuple:
        """A tuple or an interval; in round brackets one number is that number."""
        opening, bars = self.text[self.at], self.bars
        self.at, self.bars = self.at + 1, 0
        inner = self.items()
        closing = self.rest()
        if closing not in (")", "]"):
            self.refuse("want a closing bracket")
        self.at, self.bars = self.at + 1, bars
        if inner[0] == "list":
            return ("bracket", opening, inner[1:], closing)
        if opening + closing == "()" or (opening + closing == "[]" and inner[0] == "matrix"):
            return inner
        return ("bracket", opening, (inner,), closing)

    def letters(self) -> tuple:
        run = re.compile("[A-Za-z]+").match(self.text, self.at)[0]
        if run in NAMED or run in FUNCTIONS or run == "sqrt" or (run in GREEK and len(run) > 3):
            self.at += len(run)
            return self.named(run)
        if formula_words.is_word(run):
            self.refuse("a word")
        self.at += 1
        if run[0] in "ei" and self.rest() != "_":
            return ("constant", run[0])
        return self.symbol(run[0])

    def symbol(self, name: str) -> tuple:
        if found := self.match(_SCRIPT):
            name += "_" + re.sub(r"[\s{}\\]|text", "", next(part for part in found.groups() if part is not None))
        while self.text.startswith("'", self.at):
            self.at += 1
            name += "'"
        return ("symbol", name)

    def command(self) -> tuple:
        if self.take(r"\{"):
            return ("set",) if self.take(r"\}") else _set_of(self.until(r"\}"))
        found = self.match(re.compile(r"\\([A-Za-z]+)"))
        if found is None:
            self.refuse()
        return self.named(found[1])

    def named(self, name: str) -> tuple:
        """A command, or the word of the same name."""
        if name in FUNCTIONS:
            return self.call(FUNCTIONS[name])
        if name in NAMED:
            return NAMED[name]
        if name.removeprefix("var") in GREEK:
            return self.symbol(name.removeprefix("var"))
        if name == "frac":
            return ("quotient", self.argument(), self.argument())
        if name == "binom":
            return ("binomial", self.argument(), self.argument())
        if name == "sqrt":
            degree = self.degree_of_root()
            return ("root", degree, self.primary() if self.rest() == "(" else self.argument(whole_numbers=True))
        pairs = {"lfloor": ("floor", r"\rfloor"), "lceil": ("ceiling", r"\rceil"), "lvert": ("absolute", r"\rvert")}
        if name in pairs:
            return (pairs[name][0], self.until(pairs[name][1]))
        if name == "langle":
            inner = self.until(r"\rangle")
            return ("bracket", "(", inner[1:] if inner[0] == "list" else (inner,), ")")
        if name == "begin":
            return self.cases() if self.take("{cases}") else self.matrix()
        if name in DECORATIONS:
            return self.decorated(name)
        self.refuse(f"\\{name} is not known here")

    def degree_of_root(self) -> int:
        found = self.match(re.compile(r"\s?\[\s?([0-9]{1,3})\s?\]"))
        return int(found[1]) if found else 2

    def decorated(self, name: str) -> tuple:
        """One symbol, whatever stands in the braces; a word before an equals sign is only the name of what follows."""
        found = self.match(re.compile(r"\s*\{\s*([^{}]*?)\s*\}|\s*([A-Za-z]+)"))
        if found is None:
            self.refuse()
        inner = found[1] if found[1] is not None else found[2]
        if name == "text":
            if self.rest() in ("=", ":") or self.ahead(r"\approx", r"\in"):
                return ("words", inner.casefold())
            if len(inner) != 1:
                self.refuse("words beside a formula")
            return self.symbol(inner)
        return self.symbol(f"{name} {inner}")

    def call(self, name: str) -> tuple:
        base = self.argument(whole_numbers=True) if self.take("_") else _BASES_OF_LOGS.get(name)
        power = self.argument(whole_numbers=True) if self.take("^") else None
        inverse = power == ("negative", ("number", Fraction(1)))
        argument = self.function_argument()
        if name in _BASES_OF_LOGS:
            called = ("log", argument, base)
        else:
            called = ("call", f"a{name}" if inverse else name, argument)
        return called if power is None or inverse else ("power", called, power)

    def function_argument(self) -> tuple:
        """What is in brackets; without them all factors up to the next function, and a number that divides them: sin 2x cos y is
        sin(2x) cos(y), cos pi/3 a half, sin x/x a quotient."""
        if self.rest() in ("(", "{"):
            return self.primary()
        result = self.signed()
        while self.begins_factor() and not self.ahead(*(f"\\{name}" for name in FUNCTIONS)) and self.rest() != "(":
            result = ("product", result, self.power())
        if self.match(_DIVISOR):
            result = ("quotient", result, self.power())
        return result

    def cases(self) -> tuple:
        """A system: one equation a line."""
        found = []
        while not self.take(r"\end"):
            found.append(self.relation())
            self.match(_END_OF_LINE)
        self.expect("{cases}")
        return ("list", *found)

    def matrix(self) -> tuple:
        found = self.match(re.compile(r"\s*\{([pbB]?matrix|array)\}(?:\s*\{[lcr| ]+\})?"))
        if found is None:
            self.refuse("only a matrix can be read here")
        rows = [[self.sum()]]
        while True:
            if self.take("&"):
                rows[-1].append(self.sum())
            elif self.take("\\\\"):
                if not self.ahead(r"\end"):
                    rows.append([self.sum()])
            else:
                break
        self.expect(r"\end")
        self.expect(f"{{{found[1]}}}")
        return ("matrix", *map(tuple, rows))


def _set_of(inner: tuple) -> tuple:
    return ("set", *inner[1:]) if inner[0] == "list" else ("set", inner)


def _height(tree: tuple) -> int:
    level, height = [tree], 0
    while level:
        level = [part for node in level for part in node if isinstance(part, tuple)]
        height += 1
    return height
