"""Value of a formula at a few fixed points for its variables, exactly or to 30 digits."""

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

from jaxrl_llm.environments.graders.formula.arithmetic import Arithmetic, Number, Undefined, numeric_key
from jaxrl_llm.environments.graders.formula.scanner import Unreadable

MAX_SYMBOLS = 12

Key = tuple | Fraction
"""Hashable, and equal for equal values."""


@dataclass(frozen=True)
class Conventions:
    """Chosen meaning of each ambiguous sign; None if the formula has no such sign."""

    percent: Fraction | None
    degree: bool | None
    """True: the degree sign is a factor of pi / 180. False: it is a unit and ignored."""
    natural: bool | None
    """True: a logarithm without a base has base e. False: base 10."""
    sign: int = 1
    """Sign that stands for plus-minus, 1 or -1."""


def key_of(tree: tuple, conventions: Conventions) -> Key:
    """Return the key of a number or formula."""
    if not symbols_of(tree):
        return _key_at({}, tree, conventions)
    points = _points(tree, 2)
    first, *others = (_key_at(point, tree, conventions) for point in points)
    changed = tuple((name, key) for name, key in _keys_at_negatives(points[0], tree, conventions) if key != first)
    return first if {first} == set(others) and not changed else ("formula", first, *others, changed)


def difference_key(left: tuple, right: tuple, conventions: Conventions, signed: bool) -> Key | None:
    """Return the key of left - right up to a constant factor, up to a positive one if `signed`; None if it is identically 0."""
    tree = ("difference", left, right)
    first, *others = points = _points(tree, 3)
    if _key_at(first, tree, conventions) == 0:
        return None
    # Divided by its value at the first point.
    base = _substitute(tree, first)
    tree = ("quotient", tree, ("absolute", base) if signed else base)
    negatives = tuple(_keys_at_negatives(first, tree, conventions))
    return (*(_key_at(point, tree, conventions) for point in (points if signed else others)), *negatives)


def _key_at(point: Mapping[str, Fraction], tree: tuple, conventions: Conventions, real: bool = False) -> Key:
    return numeric_key(lambda digits: _evaluate(tree, point, Arithmetic(digits, real), conventions))


def _keys_at_negatives(
    point: Mapping[str, Fraction], tree: tuple, conventions: Conventions
) -> Iterator[tuple[str, Key]]:
    """Yield the key at the point with one variable negated, for each variable; in real numbers only, if the formula has no i."""
    real = ("constant", "i") not in set(nodes_of(tree))
    for name in point:
        try:
            yield name, _key_at({**point, name: -point[name]}, tree, conventions, real)
        except Undefined:
            yield name, ("undefined",)


def _substitute(tree: tuple, point: Mapping[str, Fraction]) -> tuple:
    if tree[0] == "symbol":
        return ("number", point[tree[1]])
    return tuple(_substitute(part, point) if isinstance(part, tuple) else part for part in tree)


def _points(tree: tuple, number: int) -> list[dict[str, Fraction]]:
    """Points at which to evaluate: a variable has the same pseudorandom values in all formulas, from (0, 1), (1, 2), (2, 1002),
    (3, 4) ..."""
    nodes = list(nodes_of(tree))
    if any(node[0] in ("floor", "ceiling") for node in nodes):
        # Rounding hides small differences: the third point is far away.
        number = 3
    if any(node[0] == "power" and symbols_of(node[2]) and _may_be_negative(node[1]) for node in nodes):
        # (-1)^n is 1 or -1 at a point, depending on the parity of the numerator of n.
        number = 16
    return [
        {
            name: first + (1000 if first == 2 else 1) * Fraction(_pseudorandom(f"{first} {name}"), 10_007)
            for name in symbols_of(tree)
        }
        for first in range(number)
    ]


def _may_be_negative(tree: tuple) -> bool:
    return bool(symbols_of(tree)) or any(node[0] in ("negative", "difference") for node in nodes_of(tree))


def _pseudorandom(text: str) -> int:
    # With an even modulus the parities of two names' checksums would differ at all points or at none.
    return zlib.crc32(text.encode(errors="surrogatepass")) % 10_005 + 1


def symbols_of(tree: tuple) -> tuple[str, ...]:
    """Return the names of the variables, sorted."""
    found = sorted({node[1] for node in nodes_of(tree) if node[0] == "symbol"})
    if len(found) > MAX_SYMBOLS:
        raise Unreadable(f"got {len(found)} variables, want at most {MAX_SYMBOLS}")
    return tuple(found)


def nodes_of(tree: tuple) -> Iterator[tuple]:
    """Yield all nodes of a tree."""
    todo = [tree]
    while todo:
        node = todo.pop()
        if node and isinstance(node[0], str):
            yield node
        todo.extend(part for part in node if isinstance(part, tuple))


def _evaluate(tree: tuple, point: Mapping[str, Fraction], arithmetic: Arithmetic, conventions: Conventions) -> Number:
    kind, *parts = tree
    if kind == "number":
        return parts[0]
    if kind == "symbol":
        return point[parts[0]]
    if kind == "constant":
        return _constant(parts[0], arithmetic)
    if kind == "call":
        name, argument = parts
        return arithmetic.function(name, _evaluate(argument, point, arithmetic, replace(conventions, degree=True)))
    if kind == "root":
        return arithmetic.root(parts[0], _evaluate(parts[1], point, arithmetic, conventions))
    if kind not in _OPERATIONS:
        raise Unreadable("a list, tuple or words within a formula")
    values = [_evaluate(part, point, arithmetic, conventions) for part in parts]
    return _OPERATIONS[kind](arithmetic, conventions, *values)


def _constant(name: str, arithmetic: Arithmetic) -> Number:
    if name == "infinity":
        raise Undefined("infinity within a formula")
    return arithmetic.mp.mpc(0, 1) if name == "i" else +getattr(arithmetic.mp, name)


_OPERATIONS: dict[str, Callable[..., Number]] = {
    "sum": lambda by, _, a, b: by.add(a, b),
    "difference": lambda by, _, a, b: by.add(a, -b),
    "plus_minus": lambda by, conventions, a, b: by.add(a, conventions.sign * b),
    "minus_plus": lambda by, conventions, a, b: by.add(a, -conventions.sign * b),
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
    "base_of_log": lambda by, conventions: +by.mp.e if conventions.natural else Fraction(10),
    "percent": lambda by, conventions, a: by.multiply(a, conventions.percent),
    "degree": lambda by, conventions, a: (
        by.divide(by.multiply(a, +by.mp.pi), Fraction(180)) if conventions.degree else a
    ),
}
