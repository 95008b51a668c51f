r"""Parser of final answers, in LaTeX or plain text, into syntax trees.

A tree is a tuple: its kind, then its parts.

    Unordered: ("list", items), ("set", items). Ordered: ("bracket", opening, items, closing), ("matrix", rows), ("ratio", parts).
    Statements: ("relation", signs, sides). Text: ("words", text).
    Numbers: ("number", Fraction), ("symbol", name), ("constant", name), ("sum" | "difference" | "product" | "quotient" | "power" |
    "plus_minus" | "minus_plus", a, b), ("negative" | "absolute" | "floor" | "ceiling" | "factorial" | "percent" | "degree", a),
    ("root", n, a), ("binomial", n, k), ("log", a, base), ("base_of_log",), ("call", function, a).

Unknown syntax is refused: a formula that is read in part would be another formula.
"""

import re
from fractions import Fraction

from jaxrl_llm.environments.graders.formula import vocabulary
from jaxrl_llm.environments.graders.formula.scanner import Scanner, Unreadable
from jaxrl_llm.environments.graders.formula.vocabulary import FUNCTIONS, GREEK, NAMED, RELATIONS
from jaxrl_llm.environments.graders.normalization import SCALES

MAX_DEPTH = 30
MAX_HEIGHT = 150
"""Limit on the height of the tree, which grows with each term, because its evaluation is recursive."""
ZERO = ("number", Fraction(0))

DECORATIONS = frozenset(
    "mathbb overline bar vec hat widehat tilde overrightarrow overleftrightarrow angle triangle text".split()
)
_BASES_OF_LOGS = {"log": ("base_of_log",), "ln": ("constant", "e"), "lg": ("number", Fraction(10))}
_DIVISOR = re.compile(r"\s?/\s?(?=[0-9])")
_END_OF_LINE = re.compile(r"\s*,?\s*\\\\")
_SCRIPT = re.compile(r"_\s?(?:\{\s*((?:\\text\{[^{}]*\}|[^{}])*?)\s*\}|\\text\{([^{}]*)\}|(\\?[A-Za-z]+|[0-9]))")


def parse(text: str) -> tuple:
    """Return the tree of an answer. Raises Unreadable."""
    try:
        return _parse(vocabulary.normalize(text))
    except Unreadable:
        if words := vocabulary.date(text) or vocabulary.quoted(text):
            return ("words", words)
        raise


def _parse(text: str) -> tuple:
    if words := vocabulary.words(text):
        return ("words", words)
    if why := vocabulary.prose(text):
        raise Unreadable(why)
    parser = _Parser(text)
    tree = parser.items()
    if parser.peek():
        parser.fail()
    if _height(tree) > MAX_HEIGHT:
        raise Unreadable(f"got more than {MAX_HEIGHT} terms or factors")
    return tree


class _Parser(Scanner):
    """Recursive descent, from the loosest to the tightest binding."""

    def __init__(self, text: str):
        super().__init__(text)
        self.depth = 0
        self.absolute_depth = 0

    def items(self) -> tuple:
        """Read a list of answers, or a single one."""
        found = [self.relation()]
        while self.take_separators():
            found.append(self.relation())
        return found[0] if len(found) == 1 else ("list", *found)

    def take_separators(self) -> bool:
        self.peek()
        start = self.position
        while any(map(self.take, (",", ";", r"\cup", r"\lor", r"\vee"))) or self.match(vocabulary.OR_AND):
            pass
        return self.position > start

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
            elif scale := self.match(vocabulary.SCALE):
                result = ("product", result, ("number", Fraction(SCALES[scale["inner"] or scale["bare"]])))
            elif unit := self.unit():
                result = result if unit == "unit" else (unit, result)
                if self.at_factor() and self.peek() not in "(":
                    self.fail("a factor behind a unit")
            elif self.at_factor():
                if self.peek().isdigit() and self.text[: self.position].rstrip()[-1:].isdigit():
                    self.fail("two numbers without an operator between them")
                result = ("product", result, self.power())
            else:
                return result

    def signed(self) -> tuple:
        negative = False
        while self.peek() and self.text[self.position] in "+-":
            negative ^= self.text[self.position] == "-"
            self.position += 1
        if not self.at_factor() and self.peek() != "|":
            self.fail("want a number or a variable")
        return ("negative", self.power()) if negative else self.power()

    def at_factor(self) -> bool:
        following = self.peek()
        if not following or following in ")]},;:=<>+-*/&%!^_'":
            return False
        if following == "|":
            return not self.absolute_depth
        if following == "\\":
            return not self.looking_at(*vocabulary.NO_FACTORS) and not vocabulary.OR_AND.match(self.text, self.position)
        return not vocabulary.OR_AND.match(self.text, self.position)

    def unit(self) -> str:
        """Read a unit, percent or degree sign; return its kind, "" if there is none."""
        self.peek()
        if self.match(vocabulary.PERCENT):
            return "percent"
        if self.match(vocabulary.DEGREE):
            return "degree"
        return "unit" if self.match(vocabulary.UNITS) else ""

    def power(self) -> tuple:
        base = self.primary()
        while True:
            if self.match(vocabulary.DEGREE):
                base = ("degree", base)
            elif self.take("^"):
                base = ("power", base, self.command_argument(whole_numbers=True))
            elif self.peek() == "!" and not self.text.startswith("!=", self.position):
                self.take("!")
                base = ("factorial", base)
            else:
                return base

    def command_argument(self, whole_numbers: bool = False) -> tuple:
        r"""Read an argument of a command: a group, a command, or one character. With `whole_numbers`, as in x^12, "12" is one."""
        if self.take("{"):
            return self.until("}")
        if whole_numbers and self.take("-"):
            return ("negative", self.command_argument(whole_numbers=True))
        if self.peek().isdigit():
            if whole_numbers:
                return self.number()
            self.position += 1
            return ("number", Fraction(self.text[self.position - 1]))
        return self.primary()

    def until(self, end: str) -> tuple:
        inner = self.items()
        self.expect(end)
        return inner

    def primary(self) -> tuple:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable(f"got more than {MAX_DEPTH} levels of brackets")
        found = self.atom()
        self.depth -= 1
        return found

    def atom(self) -> tuple:
        following = self.peek()
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
        self.fail()

    def absolute(self, end: str) -> tuple:
        self.absolute_depth += 1
        inner = self.items()
        self.expect(end)
        self.absolute_depth -= 1
        return ("absolute", inner)

    def bracket(self) -> tuple:
        """Read a tuple or an interval; a number in round brackets is the number."""
        opening, absolute_depth = self.text[self.position], self.absolute_depth
        self.position, self.absolute_depth = self.position + 1, 0
        inner = self.items()
        closing = self.peek()
        if closing not in (")", "]"):
            self.fail("want a closing bracket")
        self.position, self.absolute_depth = self.position + 1, absolute_depth
        if inner[0] == "list":
            return ("bracket", opening, inner[1:], closing)
        if opening + closing == "()" or (opening + closing == "[]" and inner[0] == "matrix"):
            return inner
        return ("bracket", opening, (inner,), closing)

    def letters(self) -> tuple:
        run = re.compile("[A-Za-z]+").match(self.text, self.position)[0]
        if run in NAMED or run in FUNCTIONS or run == "sqrt" or (run in GREEK and len(run) > 3):
            self.position += len(run)
            return self.named(run)
        if vocabulary.is_word(run):
            self.fail("a word")
        self.position += 1
        if run[0] in "ei" and self.peek() != "_":
            return ("constant", run[0])
        return self.symbol(run[0])

    def symbol(self, name: str) -> tuple:
        if found := self.match(_SCRIPT):
            name += "_" + re.sub(r"[\s{}\\]|text", "", next(part for part in found.groups() if part is not None))
        while self.text.startswith("'", self.position):
            self.position += 1
            name += "'"
        return ("symbol", name)

    def command(self) -> tuple:
        if self.take(r"\{"):
            return ("set",) if self.take(r"\}") else _set_of(self.until(r"\}"))
        found = self.match(re.compile(r"\\([A-Za-z]+)"))
        if found is None:
            self.fail()
        return self.named(found[1])

    def named(self, name: str) -> tuple:
        """Read what follows a command, or a word of the same name."""
        if name in FUNCTIONS:
            return self.call(FUNCTIONS[name])
        if name in NAMED:
            return NAMED[name]
        if name.removeprefix("var") in GREEK:
            return self.symbol(name.removeprefix("var"))
        if name == "frac":
            return ("quotient", self.command_argument(), self.command_argument())
        if name == "binom":
            return ("binomial", self.command_argument(), self.command_argument())
        if name == "sqrt":
            degree = self.degree_of_root()
            return ("root", degree, self.primary() if self.peek() == "(" else self.command_argument(whole_numbers=True))
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
        self.fail(f"\\{name} is not supported")

    def degree_of_root(self) -> int:
        found = self.match(re.compile(r"\s?\[\s?([0-9]{1,3})\s?\]"))
        return int(found[1]) if found else 2

    def decorated(self, name: str) -> tuple:
        """Read a symbol with a decoration, whatever is in its braces; a word before an equals sign only names the value."""
        found = self.match(re.compile(r"\s*\{\s*([^{}]*?)\s*\}|\s*([A-Za-z]+)"))
        if found is None:
            self.fail()
        inner = found[1] if found[1] is not None else found[2]
        if name == "text":
            if self.peek() in ("=", ":") or self.looking_at(r"\approx", r"\in"):
                return ("words", inner.casefold())
            if len(inner) != 1:
                self.fail("words beside a formula")
            return self.symbol(inner)
        return self.symbol(f"{name} {inner}")

    def call(self, name: str) -> tuple:
        base = self.command_argument(whole_numbers=True) if self.take("_") else _BASES_OF_LOGS.get(name)
        power = self.command_argument(whole_numbers=True) if self.take("^") else None
        inverse = power == ("negative", ("number", Fraction(1)))
        command_argument = self.function_argument()
        if name in _BASES_OF_LOGS:
            called = ("log", command_argument, base)
        else:
            called = ("call", f"a{name}" if inverse else name, command_argument)
        return called if power is None or inverse else ("power", called, power)

    def function_argument(self) -> tuple:
        """Read the brackets; without them all factors up to the next function, and a number that divides them: sin 2x cos y is
        sin(2x) cos(y), cos pi/3 is a half, sin x/x is a quotient."""
        if self.peek() in ("(", "{"):
            return self.primary()
        result = self.signed()
        while self.at_factor() and not self.looking_at(*(f"\\{name}" for name in FUNCTIONS)) and self.peek() != "(":
            result = ("product", result, self.power())
        if self.match(_DIVISOR):
            result = ("quotient", result, self.power())
        return result

    def cases(self) -> tuple:
        """Read a system: one equation per line."""
        found = []
        while not self.take(r"\end"):
            found.append(self.relation())
            self.match(_END_OF_LINE)
        self.expect("{cases}")
        return ("list", *found)

    def matrix(self) -> tuple:
        found = self.match(re.compile(r"\s*\{([pbB]?matrix|array)\}(?:\s*\{[lcr| ]+\})?"))
        if found is None:
            self.fail("want a matrix or cases")
        rows = [[self.sum()]]
        while True:
            if self.take("&"):
                rows[-1].append(self.sum())
            elif self.take("\\\\"):
                if not self.looking_at(r"\end"):
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
