"""What an answer is worth: keys that are equal for equal answers, by which grading and voting agree.

A number's key is its exact fraction. A formula's is what it is worth at a few fixed points that its letters stand for, so no
algebra is done: two formulas are equal if they agree at all of them to 30 digits. Tuples, sets and equations are made of keys.
"""

import functools
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

from jaxrl_llm.rewards.formula import read
from jaxrl_llm.rewards.quantity import Arithmetic, Number, Undefined, settle
from jaxrl_llm.rewards.scanner import Unreadable

MAX_CHARACTERS = 1000
MAX_SYMBOLS = 12

Key = tuple | Fraction


class Reading(NamedTuple):
    """One meaning of an answer."""

    value: Key | None
    """Of x = 5 it is 5. None for an equation that gives no value."""
    statement: Key | None = None
    """Of an equation or inequality: equal for those that say the same."""
    choices: tuple = ()
    """How each kind of sign with two meanings was read; None where there is no such sign."""


@dataclass(frozen=True)
class _Meaning:
    """What signs with several meanings stand for."""

    percent: Fraction | None
    degree: bool | None
    """Whether the sign of degrees is a factor of pi / 180, or a unit that is passed over."""
    natural: bool | None
    """Whether a logarithm without a base has base e, or 10."""
    sign: int = 1
    """Of plus or minus."""


def readings(text: str) -> tuple[Reading, ...]:
    """What a text may mean, the canonical meaning first: 12.5% is 0.125, or else 12.5; 90 degrees are 90, or else pi / 2; a
    logarithm without a base is one to the base 10, or else e.

    Raises Unreadable for what is no formula, or has no value.
    """
    if len(text) > MAX_CHARACTERS:
        raise Unreadable(f"got {len(text):,} characters, want {MAX_CHARACTERS:,} at most")
    tree = read(text)
    kinds = {node[0] for node in _nodes(tree)}
    percents = (Fraction(1, 100), Fraction(1)) if "percent" in kinds else (None,)
    degrees = (False, True) if "degree" in kinds else (None,)
    naturals = (False, True) if "base_of_log" in kinds else (None,)
    try:
        return tuple(
            _together(list(_of_item(tree, _Meaning(*choices))))._replace(choices=choices)
            for choices in itertools.product(percents, degrees, naturals)
        )
    except (Undefined, OverflowError, ZeroDivisionError, RecursionError) as error:
        raise Unreadable(str(error) or "it has no value") from None


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


def _of_item(tree: tuple, meaning: _Meaning) -> Iterator[Reading]:
    """The answers that a tree gives: several for a list, or for plus or minus."""
    kind = tree[0]
    if kind == "list":
        for item in tree[1:]:
            if not _is_condition(item):
                yield from _of_item(item, meaning)
    elif (
        kind != "bracket"
        and kind != "set"
        and meaning.sign == 1
        and any(node[0] in _BOTH_SIGNS for node in _nodes(tree))
    ):
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
    letters = [statement[1] for statement in statements if statement is not None and statement[0] == "is"]
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
    return ("several", *sorted(keys, key=repr))


def _of_one(tree: tuple, meaning: _Meaning) -> Reading:
    if tree[0] == "relation":
        return _of_relation(tree[1], tree[2], meaning)
    return Reading(_value(tree, meaning))


def _value(tree: tuple, meaning: _Meaning) -> Key:
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
        keys = [_key(part, meaning) for part in parts]
        if 0 in keys:
            return ("ratio", *keys)
        return ("ratio", *(_key(("quotient", part, parts[0]), meaning) for part in parts))
    if kind in ("list", "relation"):
        raise Unreadable("statements within a formula")
    return _infinity(tree) or _key(tree, meaning)


def _infinity(tree: tuple) -> Key | None:
    if tree == ("constant", "infinity"):
        return ("infinity", 1)
    return ("infinity", -1) if tree == ("negative", ("constant", "infinity")) else None


# Statements.

_FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
_CLOSED = {"<=": "]", "<": ")", ">=": "[", ">": "("}


def _of_relation(signs: tuple[str, ...], sides: tuple[tuple, ...], meaning: _Meaning) -> Reading:
    left, right = sides[0], sides[-1]
    if set(signs) <= {"=", "about"}:
        if "about" in signs and _name(left) is None:
            return _of_one(left, meaning)
        if left[0] == right[0] == "bracket" and all(map(_name, left[2])) and len(left[2]) == len(right[2]):
            return _together([_of_equation(*pair, meaning) for pair in zip(left[2], right[2], strict=True)])
        plain = not _symbols(left) and not _symbols(right)
        if left[0] == "words" or _is_applied(left) or len(sides) > 2 or plain or right[0] in _NOT_NUMBERS:
            return Reading(_value(right, meaning))
        return _of_equation(left, right, meaning)
    if signs == ("in",):
        return Reading(_value(right, meaning))
    if signs == ("!=",) and (difference := _difference(left, right, meaning, signed=False)) is not None:
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


def _of_equation(left: tuple, right: tuple, meaning: _Meaning) -> Reading:
    name, value = _name(left), right
    if name is None and _name(right) is not None:
        name, value = _name(right), left
    if name is not None and _infinity(value):
        return Reading(_infinity(value))
    if (difference := _difference(left, right, meaning, signed=False)) is None:
        return Reading(_key(right, meaning))
    statement = ("equation", difference)
    if name is None or name in _symbols(value):
        return Reading(None, statement)
    return Reading(_key(value, meaning), ("is", name, statement) if not _symbols(value) else statement)


def _of_inequality(left: tuple, sign: str, right: tuple, meaning: _Meaning) -> Reading:
    if _name(left) is None and _name(right) is not None:
        left, sign, right = right, _FLIPPED[sign], left
    if _infinity(right):
        raise Unreadable("an inequality with infinity")
    above, below = (left, right) if sign in (">", ">=") else (right, left)
    if (difference := _difference(above, below, meaning, signed=True)) is None:
        raise Unreadable("an inequality between equals")
    statement = ("positive", len(sign), difference)
    if _name(left) is None or _symbols(right):
        return Reading(None, statement)
    bound, bracket = _key(right, meaning), _CLOSED[sign]
    if sign in (">", ">="):
        return Reading(("bracket", bracket, (bound, ("infinity", 1)), ")"), statement)
    return Reading(("bracket", "(", (("infinity", -1), bound), bracket), statement)


def _name(tree: tuple) -> str | None:
    return tree[1] if tree[0] == "symbol" else None


def _is_applied(tree: tuple) -> bool:
    r"""f(x), f^{-1}(x), P(A), m \angle A: the name of what follows, whatever its letters."""
    if any(name.startswith(("angle ", "overline ")) for name in _symbols(tree)):
        return True
    if tree[0] != "product":
        return False
    function, argument = tree[1:]
    function = function[1] if function[0] == "power" else function
    name = (_name(function) or "").rstrip("'")
    return name in _FUNCTION_NAMES and argument[0] in ("symbol", "number", "bracket")


_FUNCTION_NAMES = ("f", "g", "h", "F", "G", "H", "P", "p", "T", "V", "S")


# Keys of numbers and formulas.


def _difference(left: tuple, right: tuple, meaning: _Meaning, signed: bool) -> Key | None:
    """Of left - right up to a factor, which is positive where it is `signed`: its values at three points over that at the first.
    None where it is 0 in itself."""
    tree = ("difference", left, right)
    first, *others = _points(_symbols(tree), 3)

    def ratio(point: Mapping[str, Fraction], digits: int) -> Number:
        arithmetic = Arithmetic(digits)
        base = _evaluate(tree, first, arithmetic, meaning)
        base = arithmetic.absolute(base) if signed else base
        return arithmetic.divide(_evaluate(tree, point, arithmetic, meaning), base)

    if settle(lambda digits: _evaluate(tree, first, Arithmetic(digits), meaning)) == 0:
        return None
    points = [first, *others] if signed else others
    return (*(settle(functools.partial(ratio, point)) for point in points), *sorted(_symbols(tree)))


def _key(tree: tuple, meaning: _Meaning) -> Key:
    """Of a number; of a formula at two points where all letters are positive, and where the one or the other is negative."""
    symbols = _symbols(tree)

    def at(point: Mapping[str, Fraction], real: bool = False) -> Key:
        return settle(lambda digits: _evaluate(tree, point, Arithmetic(digits, real), meaning))

    if not symbols:
        return at({})
    # Rounding hides small differences: a third point is far away.
    points = _points(symbols, 3 if {"floor", "ceiling"} & {node[0] for node in _nodes(tree)} else 2)
    first, *others = map(at, points)
    negative = {}
    for name in symbols:
        try:
            negative[name] = at(points[0] | {name: -points[0][name]}, real=("constant", "i") not in set(_nodes(tree)))
        except Undefined:
            negative[name] = ("undefined",)
    changed = tuple((name, key) for name, key in negative.items() if key != first)
    return first if {first} == set(others) and not changed else ("formula", first, *others, changed)


def _points(symbols: tuple[str, ...], number: int) -> list[dict[str, Fraction]]:
    """A letter stands for the same number in every formula, as if drawn at random from (0, 1), (1, 2), (2, 1002)."""
    return [
        {name: first + size * Fraction(zlib.crc32(f"{first} {name}".encode()) % 10_006 + 1, 10_007) for name in symbols}
        for first, size in ((0, 1), (1, 1), (2, 1000))[:number]
    ]


def _symbols(tree: tuple) -> tuple[str, ...]:
    found = sorted({node[1] for node in _nodes(tree) if node[0] == "symbol"})
    if len(found) > MAX_SYMBOLS:
        raise Unreadable(f"got {len(found)} letters, want {MAX_SYMBOLS} at most")
    return tuple(found)


def _nodes(tree: tuple) -> Iterator[tuple]:
    """All trees within a tree."""
    todo = [tree]
    while todo:
        node = todo.pop()
        if node and isinstance(node[0], str):
            yield node
        todo.extend(part for part in node if isinstance(part, tuple))


def _evaluate(tree: tuple, point: Mapping[str, Fraction], arithmetic: Arithmetic, meaning: _Meaning) -> Number:
    kind, *parts = tree
    if kind == "number":
        return parts[0]
    if kind == "symbol":
        return point[parts[0]]
    if kind == "constant":
        return _constant(parts[0], arithmetic)
    if kind == "call":
        name, argument = parts
        return arithmetic.function(name, _evaluate(argument, point, arithmetic, replace(meaning, degree=True)))
    if kind == "root":
        return arithmetic.root(parts[0], _evaluate(parts[1], point, arithmetic, meaning))
    if kind not in _OPERATIONS:
        raise Unreadable("a list, a tuple or words within a formula")
    values = [_evaluate(part, point, arithmetic, meaning) for part in parts]
    return _OPERATIONS[kind](arithmetic, meaning, *values)


def _constant(name: str, arithmetic: Arithmetic) -> Number:
    if name == "infinity":
        raise Undefined("infinity within a formula")
    return arithmetic.mp.mpc(0, 1) if name == "i" else +getattr(arithmetic.mp, name)


_OPERATIONS: dict[str, Callable[..., Number]] = {
    "sum": lambda by, _, a, b: by.add(a, b),
    "difference": lambda by, _, a, b: by.add(a, -b),
    "plus_minus": lambda by, meaning, a, b: by.add(a, meaning.sign * b),
    "minus_plus": lambda by, meaning, a, b: by.add(a, -meaning.sign * b),
    "product": lambda by, _, a, b: by.multiply(a, b),
    "quotient": lambda by, _, a, b: by.divide(a, b),
    "power": lambda by, _, a, b: by.power(a, b),
    "negative": lambda by, _, a: -a,
    "absolute": lambda by, _, a: by.absolute(a),
    "floor": lambda by, _, a: by.floor(a),
    "ceiling": lambda by, _, a: by.ceiling(a),
    "factorial": lambda by, _, a: by.factorial(a),
    "binomial": lambda by, _, a, b: by.binomial(a, b),
    "log": lambda by, _, a, base: by.log(a, base),
    "base_of_log": lambda by, meaning: +by.mp.e if meaning.natural else Fraction(10),
    "percent": lambda by, meaning, a: by.multiply(a, meaning.percent),
    "degree": lambda by, meaning, a: by.divide(by.multiply(a, +by.mp.pi), Fraction(180)) if meaning.degree else a,
}
