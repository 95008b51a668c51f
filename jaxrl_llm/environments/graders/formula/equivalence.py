"""Equivalence of answers: hashable keys that are equal for equal answers, used for both grading and voting.

The key of a number is its exact fraction. The key of a formula is its value at a few fixed points for its variables, so no algebra
is done: two formulas are equal if they agree at all points to 30 digits. Keys of tuples, sets and equations are made of keys.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple

from jaxrl_llm.environments.graders.formula import vocabulary
from jaxrl_llm.environments.graders.formula.arithmetic import Undefined
from jaxrl_llm.environments.graders.formula.parser import parse
from jaxrl_llm.environments.graders.formula.scanner import Unreadable
from jaxrl_llm.environments.graders.formula.value import Conventions, Key, difference_key, key_of, nodes_of, symbols_of

MAX_CHARACTERS = 1000


class Interpretation(NamedTuple):
    """One possible meaning of an answer."""

    value: Key | None
    """Key of the value, 5 for x = 5; None for an equation that gives no value."""
    statement: Key | None = None
    """Key of an equation or inequality, equal for equivalent ones."""
    variable: str = ""
    """The variable to which it gives a value."""
    choices: tuple = ()
    """Chosen meaning of each ambiguous sign; None if the answer has no such sign."""

    @property
    def vote_if_right(self) -> str:
        """Vote of all answers that agree with this reference. For an equation it differs from the vote of its bare value."""
        return canonical_text(self.value if self.statement is None else self.statement)

    @property
    def vote_if_wrong(self) -> str:
        """Vote of an answer that differs from the reference."""
        return canonical_text(self.statement if self.value is None else self.value)


def interpretations(text: str) -> tuple[Interpretation, ...]:
    """Return all meanings of a text, the canonical one first: 12.5% is 0.125 or 12.5; 90 degrees are 90 or pi / 2; a logarithm
    without a base has base 10 or e.

    Raises:
        Unreadable: the text is not a formula, or has no value.
    """
    if len(text) > MAX_CHARACTERS:
        raise Unreadable(f"got {len(text):,} characters, want {MAX_CHARACTERS:,} at most")
    tree = parse(text)
    am_or_pm = vocabulary.am_or_pm(text) or None
    kinds = {node[0] for node in nodes_of(tree)}
    percents = (Fraction(1, 100), Fraction(1)) if "percent" in kinds else (None,)
    degrees = (False, True) if "degree" in kinds else (None,)
    naturals = (False, True) if "base_of_log" in kinds else (None,)
    try:
        found = [
            _combine(list(_interpret_item(tree, Conventions(*choices))))._replace(choices=(*choices, am_or_pm))
            for choices in itertools.product(percents, degrees, naturals)
        ]
    except (Undefined, OverflowError, ZeroDivisionError, RecursionError) as error:
        raise Unreadable(str(error) or "it has no value") from None
    # 5 p.m. is equal to 5, and votes differently from 5 a.m.
    timed = [
        one._replace(value=(am_or_pm, one.value), statement=None) for one in found if am_or_pm and one.value is not None
    ]
    return (*timed, *found)


def agree(reference: tuple[Interpretation, ...], got: tuple[Interpretation, ...]) -> bool:
    """True if two answers share a meaning. A sign that both have is read alike in both: 25% is not 2500%."""
    return any(_agree_as(a, b) for a, b in itertools.product(reference, got))


def _agree_as(a: Interpretation, b: Interpretation) -> bool:
    if any(None not in pair and pair[0] != pair[1] for pair in zip(a.choices, b.choices, strict=True)):
        return False
    # Two statements are compared as such: y = 5 is not x = 5, though both are equal to 5.
    if a.statement is not None and b.statement is not None:
        return a.statement == b.statement
    return a.value is not None and a.value == b.value


def canonical_text(key: Key) -> str:
    """Return the same text for equal keys, short where possible."""
    if isinstance(key, Fraction):
        # Python refuses to convert integers of more than 4,300 digits to decimal.
        small = key.numerator.bit_length() + key.denominator.bit_length() < 8000
        return str(key) if small else f"{hex(key.numerator)}/{hex(key.denominator)}"
    kind, *parts = key
    if kind == "words":
        # In quotes, so that words differ from the text of every other key.
        return repr(parts[0])
    if kind == "bracket":
        return f"{parts[0]}{', '.join(map(canonical_text, parts[1]))}{parts[2]}"
    if kind == "several":
        return f"{{{', '.join(map(canonical_text, parts))}}}"
    return f"{kind}({', '.join(map(_part_text, parts))})"


def _part_text(part: object) -> str:
    if isinstance(part, Fraction) or (isinstance(part, tuple) and part and isinstance(part[0], str)):
        return canonical_text(part)
    return f"({', '.join(map(_part_text, part))})" if isinstance(part, tuple) else str(part)


# Items.


def _interpret_item(tree: tuple, conventions: Conventions) -> Iterator[Interpretation]:
    """Interpret each answer in a tree: several for a list, two for a plus-minus sign."""
    kind = tree[0]
    if kind == "list":
        for item in tree[1:]:
            if not _is_domain_condition(item):
                yield from _interpret_item(item, conventions)
    elif kind != "set" and any(node[0] in _BOTH_SIGNS for node in nodes_of(tree)):
        yield _interpret(tree, conventions)
        yield _interpret(tree, replace(conventions, sign=-1))
    else:
        yield _interpret(tree, conventions)


def _is_domain_condition(tree: tuple) -> bool:
    r"""True for the domain of a variable: k \in \mathbb{Z}."""
    return tree[0] == "relation" and tree[1] == ("in",) and (_symbol(tree[2][-1]) or "").startswith("mathbb")


_BOTH_SIGNS = ("plus_minus", "minus_plus")


def _combine(found: list[Interpretation]) -> Interpretation:
    """Combine several answers, in any order. Values of different variables become a tuple in the order of the variables."""
    if len(found) == 1:
        return found[0]
    values, statements = (
        [getattr(interpretation, part) for interpretation in found] for part in ("value", "statement")
    )
    variables = [interpretation.variable for interpretation in found if interpretation.variable]
    value = None
    if None not in values and len(set(variables)) <= 1:
        value = _several(values)
    elif None not in values and len(set(variables)) == len(found):
        value = ("bracket", "(", tuple(key for _, key in sorted(zip(variables, values, strict=True))), ")")
    statement = None if None in statements else _several(statements)
    if not found or (value is None and statement is None):
        raise Unreadable("answers of different kinds")
    return Interpretation(value, statement)


def _several(keys: list[Key]) -> Key:
    return ("several", *sorted(keys, key=canonical_text))


def _interpret(tree: tuple, conventions: Conventions) -> Interpretation:
    if tree[0] == "relation":
        return _interpret_relation(tree[1], tree[2], conventions)
    return Interpretation(_value(tree, conventions))


def _value(tree: tuple, conventions: Conventions) -> Key:
    """Key of a tree that is not a statement."""
    kind, *parts = tree
    if kind == "words":
        return tree
    if kind == "bracket":
        opening, items, closing = parts
        return ("bracket", opening, tuple(_value(item, conventions) for item in items), closing)
    if kind == "set":
        keys = dict.fromkeys(
            interpretation.value for item in parts for interpretation in _interpret_item(item, conventions)
        )
        if None in keys:
            raise Unreadable("a set of statements")
        return next(iter(keys)) if len(keys) == 1 else _several(list(keys))
    if kind == "matrix":
        if len({len(row) for row in parts}) != 1:
            raise Unreadable("rows of different lengths")
        return ("matrix", *(tuple(_value(item, conventions) for item in row) for row in parts))
    if kind == "ratio":
        keys = [key_of(part, conventions) for part in parts]
        if 0 in keys:
            return ("ratio", *keys)
        return ("ratio", *(key_of(("quotient", part, parts[0]), conventions) for part in parts))
    if kind in ("list", "relation"):
        raise Unreadable("statements within a formula")
    return _infinity(tree) or key_of(tree, conventions)


def _infinity(tree: tuple) -> Key | None:
    if tree == ("constant", "infinity"):
        return ("infinity", 1)
    return ("infinity", -1) if tree == ("negative", ("constant", "infinity")) else None


# Statements.

_FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
_CLOSED = {"<=": "]", "<": ")", ">=": "[", ">": "("}


def _interpret_relation(signs: tuple[str, ...], sides: tuple[tuple, ...], conventions: Conventions) -> Interpretation:
    left, right = sides[0], sides[-1]
    if set(signs) <= {"=", "about"}:
        if "about" in signs and (signs[0] == "=" or _symbol(left) is None):
            # The exact value before a rounded one is the answer.
            exact = sides[: signs.index("about") + 1]
            return _interpret(("relation", signs[: len(exact) - 1], exact) if len(exact) > 1 else left, conventions)
        if left[0] == right[0] == "bracket" and all(map(_symbol, left[2])) and len(left[2]) == len(right[2]):
            return _combine([_interpret_equation(*pair, conventions) for pair in zip(left[2], right[2], strict=True)])
        plain = not symbols_of(left) and not symbols_of(right)
        if left[0] == "words" or _is_applied(left) or len(sides) > 2 or plain or right[0] in _NOT_NUMBERS:
            return Interpretation(_value(right, conventions))
        return _interpret_equation(left, right, conventions)
    if signs == ("in",):
        return Interpretation(_value(right, conventions))
    if signs == ("!=",) and (difference := difference_key(left, right, conventions, signed=False)) is not None:
        return Interpretation(None, ("differ", difference))
    if len(signs) == 1 and signs[0] in _FLIPPED:
        return _interpret_inequality(left, signs[0], right, conventions)
    if len(signs) == 2 and (set(signs) <= {"<", "<="} or set(signs) <= {">", ">="}) and _symbol(sides[1]):
        if signs[0] in (">", ">="):
            left, right, signs = right, left, tuple(_FLIPPED[sign] for sign in reversed(signs))
        opening, closing = _CLOSED[_FLIPPED[signs[0]]], _CLOSED[signs[1]]
        value = ("bracket", opening, (_value(left, conventions), _value(right, conventions)), closing)
        return Interpretation(value, ("within", _symbol(sides[1]), value))
    raise Unreadable("a combination of relations that is not supported")


_NOT_NUMBERS = ("bracket", "set", "matrix", "words", "ratio")


def _interpret_equation(left: tuple, right: tuple, conventions: Conventions) -> Interpretation:
    name, value = _symbol(left) or _segment(left), right
    if name is None and _symbol(right) is not None:
        name, value = _symbol(right), left
    if name is not None and _infinity(value):
        return Interpretation(_infinity(value))
    if (difference := difference_key(left, right, conventions, signed=False)) is None:
        return Interpretation(key_of(right, conventions))
    statement = ("equation", difference)
    if name is None or name in symbols_of(value):
        return Interpretation(None, statement)
    return Interpretation(key_of(value, conventions), statement, "" if symbols_of(value) else name)


def _interpret_inequality(left: tuple, sign: str, right: tuple, conventions: Conventions) -> Interpretation:
    if _symbol(left) is None and _symbol(right) is not None:
        left, sign, right = right, _FLIPPED[sign], left
    if _infinity(right):
        raise Unreadable("an inequality with infinity")
    above, below = (left, right) if sign in (">", ">=") else (right, left)
    if (difference := difference_key(above, below, conventions, signed=True)) is None:
        raise Unreadable("an inequality between equals")
    statement = ("positive", len(sign), difference)
    if _symbol(left) is None or symbols_of(right):
        return Interpretation(None, statement)
    bound, bracket = key_of(right, conventions), _CLOSED[sign]
    if sign in (">", ">="):
        return Interpretation(("bracket", bracket, (bound, ("infinity", 1)), ")"), statement)
    return Interpretation(("bracket", "(", (("infinity", -1), bound), bracket), statement)


def _symbol(tree: tuple) -> str | None:
    """Name of a tree that is one symbol, else None."""
    return tree[1] if tree[0] == "symbol" else None


def _segment(tree: tuple) -> str | None:
    """Name of a line segment such as AB, which stands for its length; else None."""
    if tree[0] != "product":
        return None
    ends = [_symbol(part) or "" for part in tree[1:]]
    return "".join(ends) if all(len(end) == 1 and end.isupper() for end in ends) else None


def _is_applied(tree: tuple) -> bool:
    r"""True for a left side such as f(x), f^{-1}(x), P(A) or m \angle A, which only names the value on the right."""
    if any(name.startswith(("angle ", "overline ")) for name in symbols_of(tree)):
        return True
    if tree[0] != "product":
        return False
    function, argument = tree[1:]
    function = function[1] if function[0] == "power" else function
    name = (_symbol(function) or "").rstrip("'")
    return name in _FUNCTION_NAMES and argument[0] in ("symbol", "number", "bracket", "negative", "quotient")


_FUNCTION_NAMES = ("f", "g", "h", "F", "G", "H", "P")
