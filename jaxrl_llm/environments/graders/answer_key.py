"""What an answer is worth: keys that are equal for equal answers, by which grading and voting agree.

A number's key is its exact fraction. A formula's is what it is worth at a few fixed points that its letters stand for, so no
algebra is done: two formulas are equal if they agree at all of them to 30 digits. Tuples, sets and equations are made of keys.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple

from jaxrl_llm.environments.graders import formula_words
from jaxrl_llm.environments.graders.arithmetic import Undefined
from jaxrl_llm.environments.graders.formula import read
from jaxrl_llm.environments.graders.formula_value import Key, Meaning, difference_of, key_of, nodes_of, symbols_of
from jaxrl_llm.environments.graders.scanner import Unreadable

MAX_CHARACTERS = 1000


class Reading(NamedTuple):
    """One meaning of an answer."""

    value: Key | None
    """Of x = 5 it is 5. None for an equation that gives no value."""
    statement: Key | None = None
    """Of an equation or inequality: equal for those that say the same."""
    letter: str = ""
    """The letter that it gives a value to."""
    choices: tuple = ()
    """How each kind of sign with two meanings was read; None where there is no such sign."""

    @property
    def as_wanted(self) -> str:
        """The vote of all that agrees with this. An equation's is none that an answer without its letter has."""
        return spelled(self.value if self.statement is None else self.statement)

    @property
    def as_own(self) -> str:
        """The vote of an answer that is not the wanted one."""
        return spelled(self.statement if self.value is None else self.value)


def readings(text: str) -> tuple[Reading, ...]:
    """What a text may mean, the canonical meaning first: 12.5% is 0.125, or else 12.5; 90 degrees are 90, or else pi / 2; a
    logarithm without a base is one to the base 10, or else e.

    Raises Unreadable for what is no formula, or has no value.
    """
    if len(text) > MAX_CHARACTERS:
        raise Unreadable(f"got {len(text):,} characters, want {MAX_CHARACTERS:,} at most")
    tree = read(text)
    half = formula_words.half_of_day(text) or None
    kinds = {node[0] for node in nodes_of(tree)}
    percents = (Fraction(1, 100), Fraction(1)) if "percent" in kinds else (None,)
    degrees = (False, True) if "degree" in kinds else (None,)
    naturals = (False, True) if "base_of_log" in kinds else (None,)
    try:
        found = [
            _together(list(_of_item(tree, Meaning(*choices))))._replace(choices=(*choices, half))
            for choices in itertools.product(percents, degrees, naturals)
        ]
    except (Undefined, OverflowError, ZeroDivisionError, RecursionError) as error:
        raise Unreadable(str(error) or "it has no value") from None
    # 5 p.m. answers 5, and is another vote than 5 a.m.
    marked = [one._replace(value=(half, one.value), statement=None) for one in found if half and one.value is not None]
    return (*marked, *found)


def agree(wanted: tuple[Reading, ...], got: tuple[Reading, ...]) -> bool:
    """Whether two answers share a meaning. Where both have the same sign it is read in the same way: 25% is not 2500%."""
    return any(_same(a, b) for a, b in itertools.product(wanted, got))


def _same(a: Reading, b: Reading) -> bool:
    if any(None not in pair and pair[0] != pair[1] for pair in zip(a.choices, b.choices, strict=True)):
        return False
    # Where both are statements these count: y = 5 is not x = 5, though each answers 5.
    if a.statement is not None and b.statement is not None:
        return a.statement == b.statement
    return a.value is not None and a.value == b.value


def spelled(key: Key) -> str:
    """One text for equal keys, as short as people write it where it can be."""
    if isinstance(key, Fraction):
        # Python refuses to write integers of more than 4,300 digits in tens.
        small = key.numerator.bit_length() + key.denominator.bit_length() < 8000
        return str(key) if small else f"{hex(key.numerator)}/{hex(key.denominator)}"
    kind, *parts = key
    if kind == "words":
        # In quotes, so that no words are the text of another key.
        return repr(parts[0])
    if kind == "bracket":
        return f"{parts[0]}{', '.join(map(spelled, parts[1]))}{parts[2]}"
    if kind == "several":
        return f"{{{', '.join(map(spelled, parts))}}}"
    return f"{kind}({', '.join(map(_part, parts))})"


def _part(part: object) -> str:
    if isinstance(part, Fraction) or (isinstance(part, tuple) and part and isinstance(part[0], str)):
        return spelled(part)
    return f"({', '.join(map(_part, part))})" if isinstance(part, tuple) else str(part)


# From items to keys.


def _of_item(tree: tuple, meaning: Meaning) -> Iterator[Reading]:
    """The answers that a tree gives: several for a list, or for plus or minus."""
    kind = tree[0]
    if kind == "list":
        for item in tree[1:]:
            if not _is_condition(item):
                yield from _of_item(item, meaning)
    elif kind != "set" and any(node[0] in _BOTH_SIGNS for node in nodes_of(tree)):
        yield _of_one(tree, meaning)
        yield _of_one(tree, replace(meaning, sign=-1))
    else:
        yield _of_one(tree, meaning)


def _is_condition(tree: tuple) -> bool:
    r"""What says of a letter which numbers it stands for: k \in \mathbb{Z}."""
    return tree[0] == "relation" and tree[1] == ("in",) and (_name(tree[2][-1]) or "").startswith("mathbb")


_BOTH_SIGNS = ("plus_minus", "minus_plus")


def _together(found: list[Reading]) -> Reading:
    """Several answers, in whatever order. Values of different letters are a tuple in the order of the letters."""
    if len(found) == 1:
        return found[0]
    values, statements = ([getattr(reading, part) for reading in found] for part in ("value", "statement"))
    letters = [reading.letter for reading in found if reading.letter]
    value = None
    if None not in values and len(set(letters)) <= 1:
        value = _several(values)
    elif None not in values and len(set(letters)) == len(found):
        value = ("bracket", "(", tuple(key for _, key in sorted(zip(letters, values, strict=True))), ")")
    statement = None if None in statements else _several(statements)
    if not found or (value is None and statement is None):
        raise Unreadable("answers that do not go together")
    return Reading(value, statement)


def _several(keys: list[Key]) -> Key:
    return ("several", *sorted(keys, key=spelled))


def _of_one(tree: tuple, meaning: Meaning) -> Reading:
    if tree[0] == "relation":
        return _of_relation(tree[1], tree[2], meaning)
    return Reading(_value(tree, meaning))


def _value(tree: tuple, meaning: Meaning) -> Key:
    """The key of what is no statement."""
    kind, *parts = tree
    if kind == "words":
        return tree
    if kind == "bracket":
        opening, items, closing = parts
        return ("bracket", opening, tuple(_value(item, meaning) for item in items), closing)
    if kind == "set":
        keys = dict.fromkeys(reading.value for item in parts for reading in _of_item(item, meaning))
        if None in keys:
            raise Unreadable("a set of statements")
        return next(iter(keys)) if len(keys) == 1 else _several(list(keys))
    if kind == "matrix":
        if len({len(row) for row in parts}) != 1:
            raise Unreadable("rows of different lengths")
        return ("matrix", *(tuple(_value(item, meaning) for item in row) for row in parts))
    if kind == "ratio":
        keys = [key_of(part, meaning) for part in parts]
        if 0 in keys:
            return ("ratio", *keys)
        return ("ratio", *(key_of(("quotient", part, parts[0]), meaning) for part in parts))
    if kind in ("list", "relation"):
        raise Unreadable("statements within a formula")
    return _infinity(tree) or key_of(tree, meaning)


def _infinity(tree: tuple) -> Key | None:
    if tree == ("constant", "infinity"):
        return ("infinity", 1)
    return ("infinity", -1) if tree == ("negative", ("constant", "infinity")) else None


# Statements.

_FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
_CLOSED = {"<=": "]", "<": ")", ">=": "[", ">": "("}


def _of_relation(signs: tuple[str, ...], sides: tuple[tuple, ...], meaning: Meaning) -> Reading:
    left, right = sides[0], sides[-1]
    if set(signs) <= {"=", "about"}:
        if "about" in signs and (signs[0] == "=" or _name(left) is None):
            # What is rounded says no more than what it is a rounding of.
            exact = sides[: signs.index("about") + 1]
            return _of_one(("relation", signs[: len(exact) - 1], exact) if len(exact) > 1 else left, meaning)
        if left[0] == right[0] == "bracket" and all(map(_name, left[2])) and len(left[2]) == len(right[2]):
            return _together([_of_equation(*pair, meaning) for pair in zip(left[2], right[2], strict=True)])
        plain = not symbols_of(left) and not symbols_of(right)
        if left[0] == "words" or _is_applied(left) or len(sides) > 2 or plain or right[0] in _NOT_NUMBERS:
            return Reading(_value(right, meaning))
        return _of_equation(left, right, meaning)
    if signs == ("in",):
        return Reading(_value(right, meaning))
    if signs == ("!=",) and (difference := difference_of(left, right, meaning, signed=False)) is not None:
        return Reading(None, ("differ", difference))
    if len(signs) == 1 and signs[0] in _FLIPPED:
        return _of_inequality(left, signs[0], right, meaning)
    if len(signs) == 2 and (set(signs) <= {"<", "<="} or set(signs) <= {">", ">="}) and _name(sides[1]):
        if signs[0] in (">", ">="):
            left, right, signs = right, left, tuple(_FLIPPED[sign] for sign in reversed(signs))
        opening, closing = _CLOSED[_FLIPPED[signs[0]]], _CLOSED[signs[1]]
        value = ("bracket", opening, (_value(left, meaning), _value(right, meaning)), closing)
        return Reading(value, ("within", _name(sides[1]), value))
    raise Unreadable("relations that do not go together")


_NOT_NUMBERS = ("bracket", "set", "matrix", "words", "ratio")


def _of_equation(left: tuple, right: tuple, meaning: Meaning) -> Reading:
    name, value = _name(left) or _segment(left), right
    if name is None and _name(right) is not None:
        name, value = _name(right), left
    if name is not None and _infinity(value):
        return Reading(_infinity(value))
    if (difference := difference_of(left, right, meaning, signed=False)) is None:
        return Reading(key_of(right, meaning))
    statement = ("equation", difference)
    if name is None or name in symbols_of(value):
        return Reading(None, statement)
    return Reading(key_of(value, meaning), statement, "" if symbols_of(value) else name)


def _of_inequality(left: tuple, sign: str, right: tuple, meaning: Meaning) -> Reading:
    if _name(left) is None and _name(right) is not None:
        left, sign, right = right, _FLIPPED[sign], left
    if _infinity(right):
        raise Unreadable("an inequality with infinity")
    above, below = (left, right) if sign in (">", ">=") else (right, left)
    if (difference := difference_of(above, below, meaning, signed=True)) is None:
        raise Unreadable("an inequality between equals")
    statement = ("positive", len(sign), difference)
    if _name(left) is None or symbols_of(right):
        return Reading(None, statement)
    bound, bracket = key_of(right, meaning), _CLOSED[sign]
    if sign in (">", ">="):
        return Reading(("bracket", bracket, (bound, ("infinity", 1)), ")"), statement)
    return Reading(("bracket", "(", (("infinity", -1), bound), bracket), statement)


def _name(tree: tuple) -> str | None:
    return tree[1] if tree[0] == "symbol" else None


def _segment(tree: tuple) -> str | None:
    """AB, which is a length."""
    if tree[0] != "product":
        return None
    ends = [_name(part) or "" for part in tree[1:]]
    return "".join(ends) if all(len(end) == 1 and end.isupper() for end in ends) else None


def _is_applied(tree: tuple) -> bool:
    r"""f(x), f^{-1}(x), P(A), m \angle A: the name of what follows, whatever its letters."""
    if any(name.startswith(("angle ", "overline ")) for name in symbols_of(tree)):
        return True
    if tree[0] != "product":
        return False
    function, argument = tree[1:]
    function = function[1] if function[0] == "power" else function
    name = (_name(function) or "").rstrip("'")
    return name in _FUNCTION_NAMES and argument[0] in ("symbol", "number", "bracket", "negative", "quotient")


_FUNCTION_NAMES = ("f", "g", "h", "F", "G", "H", "P")
