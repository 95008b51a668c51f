"""What a formula is worth: at a few fixed points that its letters stand for, exactly or to 30 digits."""

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

from jaxrl_llm.environments.graders.arithmetic import Arithmetic, Number, Undefined, settle
from jaxrl_llm.environments.graders.scanner import Unreadable

MAX_SYMBOLS = 12

Key = tuple | Fraction
"""Equal for what is worth the same."""


@dataclass(frozen=True)
class Meaning:
    """What signs with several meanings stand for."""

    percent: Fraction | None
    degree: bool | None
    """Whether the sign of degrees is a factor of pi / 180, or a unit that is passed over."""
    natural: bool | None
    """Whether a logarithm without a base has base e, or 10."""
    sign: int = 1
    """Of plus or minus."""


def key_of(tree: tuple, meaning: Meaning) -> Key:
    """Of a number, or of a formula."""
    if not symbols_of(tree):
        return _at({}, tree, meaning)
    points = _points(tree, 2)
    first, *others = (_at(point, tree, meaning) for point in points)
    changed = tuple((name, key) for name, key in _negatives(points[0], tree, meaning) if key != first)
    return first if {first} == set(others) and not changed else ("formula", first, *others, changed)


def difference_of(left: tuple, right: tuple, meaning: Meaning, signed: bool) -> Key | None:
    """Of left - right up to a factor, which is positive where it is `signed`; None where it is 0 in itself."""
    tree = ("difference", left, right)
    first, *others = points = _points(tree, 3)
    if _at(first, tree, meaning) == 0:
        return None
    # Divided by what it is at the first point, whose letters are put in as numbers.
    base = _with_numbers(tree, first)
    tree = ("quotient", tree, ("absolute", base) if signed else base)
    negatives = tuple(_negatives(first, tree, meaning))
    return (*(_at(point, tree, meaning) for point in (points if signed else others)), *negatives)


def _at(point: Mapping[str, Fraction], tree: tuple, meaning: Meaning, real: bool = False) -> Key:
    return settle(lambda digits: _evaluate(tree, point, Arithmetic(digits, real), meaning))


def _negatives(point: Mapping[str, Fraction], tree: tuple, meaning: Meaning) -> Iterator[tuple[str, Key]]:
    """What a formula is worth where one letter is negative, as roots and logarithms of real numbers go, if it has no i."""
    real = ("constant", "i") not in set(nodes_of(tree))
    for name in point:
        try:
            yield name, _at({**point, name: -point[name]}, tree, meaning, real)
        except Undefined:
            yield name, ("undefined",)


def _with_numbers(tree: tuple, point: Mapping[str, Fraction]) -> tuple:
    if tree[0] == "symbol":
        return ("number", point[tree[1]])
    return tuple(_with_numbers(part, point) if isinstance(part, tuple) else part for part in tree)


def _points(tree: tuple, number: int) -> list[dict[str, Fraction]]:
    """A letter stands for the same number in every formula, as if drawn at random from (0, 1), (1, 2), (2, 1002), (3, 4) ..."""
    nodes = list(nodes_of(tree))
    if any(node[0] in ("floor", "ceiling") for node in nodes):
        # Rounding hides small differences: the third point is far away.
        number = 3
    if any(node[0] == "power" and symbols_of(node[2]) and _may_be_negative(node[1]) for node in nodes):
        # At each point (-1)^n is 1 or -1, as the numerator of n is even or odd.
        number = 16
    return [
        {
            name: first + (1000 if first == 2 else 1) * Fraction(_drawn(f"{first} {name}"), 10_007)
            for name in symbols_of(tree)
        }
        for first in range(number)
    ]


def _may_be_negative(tree: tuple) -> bool:
    return bool(symbols_of(tree)) or any(node[0] in ("negative", "difference") for node in nodes_of(tree))


def _drawn(text: str) -> int:
    # An odd modulus: the parities of two letters' checksums differ at all points or at none.
    return zlib.crc32(text.encode(errors="surrogatepass")) % 10_005 + 1


def symbols_of(tree: tuple) -> tuple[str, ...]:
    found = sorted({node[1] for node in nodes_of(tree) if node[0] == "symbol"})
    if len(found) > MAX_SYMBOLS:
        raise Unreadable(f"got {len(found)} letters, want {MAX_SYMBOLS} at most")
    return tuple(found)


def nodes_of(tree: tuple) -> Iterator[tuple]:
    """All trees within a tree."""
    todo = [tree]
    while todo:
        node = todo.pop()
        if node and isinstance(node[0], str):
            yield node
        todo.extend(part for part in node if isinstance(part, tuple))


def _evaluate(tree: tuple, point: Mapping[str, Fraction], arithmetic: Arithmetic, meaning: Meaning) -> Number:
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
