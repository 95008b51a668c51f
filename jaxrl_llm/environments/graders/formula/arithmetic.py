"""Arithmetic in bounded time: exact for rationals of bounded size, with a fixed number of digits otherwise.

An irrational value is computed twice, with 60 and with 120 digits. Digits on which both agree are correct; a value that shrinks
with the error is zero. So equal values have equal keys, and keys are hashable: equality of keys is an equivalence relation.
"""

import functools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

LOW_DIGITS, HIGH_DIGITS = 60, 120
"""Decimal digits."""
KEY_BITS = 100
MAX_BITS = 2**18
"""Limit on an exact integer: 79,000 digits."""
MAX_RATIO_BITS = 2**13
"""Limit on the smaller part of an exact fraction, because the cost of reducing it is quadratic in its size."""
MAX_MAGNITUDE = 2**40
"""Largest binary exponent of an inexact value."""

Number = Any
"""A Fraction, or mpmath's mpf or mpc."""


class Undefined(ValueError):
    """The value is undefined, or cannot be computed within the limits."""


class Arithmetic:
    """Operations with `digits` decimal digits. `real`: a result that is not real is undefined."""

    def __init__(self, digits: int, real: bool = False):
        self.mp = _context(digits)
        self.real = real

    def add(self, a: Number, b: Number) -> Number:
        return self._bounded(a + b) if _are_fractions(a, b) else self._bounded(self.float(a) + self.float(b))

    def multiply(self, a: Number, b: Number) -> Number:
        return self._bounded(a * b) if _are_fractions(a, b) else self._bounded(self.float(a) * self.float(b))

    def divide(self, a: Number, b: Number) -> Number:
        if b == 0:
            raise Undefined("division by zero")
        return self._bounded(a / b) if _are_fractions(a, b) else self._bounded(self.float(a) / self.float(b))

    def power(self, a: Number, b: Number) -> Number:
        if a == 0:
            if not _are_fractions(b) or b <= 0:
                raise Undefined("a power of zero")
            return Fraction(0)
        if _are_fractions(a, b):
            if b.denominator == 1 and max(_bits(a), 1) * abs(b.numerator) <= MAX_BITS:
                return self._bounded(a**b.numerator)
            if b.denominator > 1 and b.denominator <= 64 and (root := _exact_root(a, b.denominator)) is not None:
                return self.power(root, Fraction(b.numerator))
            if a < 0 and b.denominator % 2 and b.denominator > 1:
                size = self.power(-a, b)
                return -size if b.numerator % 2 else size
        if b == 1:
            return a
        base, exponent = self.float(a), self.float(b)
        if not _is_integer(b):
            self._needs_real(base)
        if max(abs(self.mp.mag(base)), 1) * abs(exponent) > MAX_MAGNITUDE:
            raise Undefined("a power that is too large")
        return self._bounded(self.mp.power(base, int(b) if _is_integer(b) else exponent))

    def root(self, degree: int, a: Number) -> Number:
        """Return the real root if there is one."""
        if not 1 <= degree <= 1000:
            raise Undefined(f"a root of degree {degree}")
        real = _are_fractions(a) or isinstance(a, self.mp.mpf)
        if real and a < 0 and degree % 2:
            return -self.root(degree, -a)
        return self.power(a, Fraction(1, degree))

    def factorial(self, a: Number) -> Number:
        if _is_integer(a) and 0 <= a <= 2000:
            return Fraction(math.factorial(int(a)))
        return self._call(lambda x: self.mp.gamma(x + 1), a, 50)

    def binomial(self, a: Number, b: Number) -> Number:
        if _is_integer(a) and _is_integer(b) and 0 <= b <= a <= 5000:
            return Fraction(math.comb(int(a), int(b)))
        size = max(self.mp.mag(self.float(a)), self.mp.mag(self.float(b)))
        if size > 50:
            raise Undefined("a binomial coefficient that is too large")
        return self._bounded(self.mp.binomial(self.float(a), self.float(b)))

    def absolute(self, a: Number) -> Number:
        return abs(a)

    def floor(self, a: Number) -> Number:
        return Fraction(math.floor(a)) if _are_fractions(a) else self._call(self.mp.floor, a, 1000)

    def ceiling(self, a: Number) -> Number:
        return Fraction(math.ceil(a)) if _are_fractions(a) else self._call(self.mp.ceil, a, 1000)

    def log(self, a: Number, base: Number) -> Number:
        if a == 0 or base in (0, 1):
            raise Undefined("a logarithm of zero, or with base 0 or 1")
        self._needs_real(self.float(a))
        return self._bounded(self.mp.log(self.float(a)) / self.mp.log(self.float(base)))

    def function(self, name: str, a: Number) -> Number:
        """Return mpmath's function `name` of `a`."""
        # Reducing an angle costs as many bits as it has; the bits of exp grow with its argument's magnitude.
        return self._call(getattr(self.mp, name), a, 38 if name in ("exp", "sinh", "cosh", "tanh", "coth") else 1000)

    def float(self, a: Number) -> Number:
        return self._float(a.numerator) / self._float(a.denominator) if isinstance(a, Fraction) else a

    def _float(self, a: int) -> Number:
        # The first bits suffice; mpmath would read all of them.
        spare = max(a.bit_length() - 4 * HIGH_DIGITS * 2, 0)
        return self.mp.ldexp(self.mp.mpf(a >> spare), spare)

    def _call(self, function: Callable[[Number], Number], a: Number, max_magnitude: int) -> Number:
        value = self.float(a)
        if self.mp.mag(value) > max_magnitude:
            raise Undefined("a function of a number that is too large")
        try:
            return self._bounded(function(value))
        except (ValueError, ZeroDivisionError, OverflowError) as error:
            raise Undefined(str(error)) from None

    def _bounded(self, a: Number) -> Number:
        """Return `a`, exact while it is small, else rounded to the digits of this arithmetic."""
        if isinstance(a, Fraction):
            top, bottom = sorted((a.numerator.bit_length(), a.denominator.bit_length()))
            return a if bottom <= MAX_BITS and top <= MAX_RATIO_BITS else self.float(a)
        if not self.mp.isfinite(a) or (a != 0 and abs(self.mp.mag(a)) > MAX_MAGNITUDE):
            raise Undefined("a number that is too large")
        if self.real and isinstance(a, self.mp.mpc) and a.imag != 0:
            raise Undefined("a value that is not real")
        return a

    def _needs_real(self, base: Number) -> None:
        if self.real and (isinstance(base, self.mp.mpc) or base < 0):
            raise Undefined("a value that is not real")


def numeric_key(compute: Callable[[int], Number]) -> tuple | Fraction:
    """Return the key of the value that `compute` returns for a given number of digits.

    Raises:
        Undefined: there is no value, or too few of its digits are certain.
    """
    low = compute(LOW_DIGITS)
    if isinstance(low, Fraction):
        return low
    high = compute(HIGH_DIGITS)
    low, high = (value if hasattr(value, "imag") else Arithmetic(LOW_DIGITS).float(value) for value in (low, high))
    real, imag = _real_key(low.real, high.real), _real_key(low.imag, high.imag)
    return ("complex", real, imag) if imag != 0 else real


def _real_key(low: Number, high: Number) -> tuple | Fraction:
    if low == high == 0 or abs(high) * 10**20 < abs(low):
        return Fraction(0)
    if abs(low - high) * 10**35 > abs(high):
        raise Undefined("too few digits are certain")
    sign, top, exponent, _ = high._mpf_
    if abs(_context(HIGH_DIGITS).mag(high)) < 120:
        value = Fraction(-top if sign else top) * Fraction(2) ** exponent
        near = value.limit_denominator(10**30)
        if near and abs(value - near) * 10**100 < abs(value):
            return near
    from mpmath import libmp

    return ("approximately", *libmp.mpf_pos(high._mpf_, KEY_BITS, "n")[:3])


@functools.cache
def _context(digits: int) -> Any:
    import mpmath

    context = mpmath.MPContext()
    context.dps = digits
    return context


def _are_fractions(*numbers: Number) -> bool:
    return all(isinstance(number, Fraction) for number in numbers)


def _is_integer(a: Number) -> bool:
    return isinstance(a, Fraction) and a.denominator == 1


def _bits(a: Fraction) -> int:
    return max(a.numerator.bit_length(), a.denominator.bit_length())


def _exact_root(a: Fraction, degree: int) -> Fraction | None:
    if a < 0:
        root = _exact_root(-a, degree) if degree % 2 else None
        return None if root is None else -root
    if _bits(a) > MAX_RATIO_BITS:
        return None
    top, bottom = (_integer_root(part, degree) for part in (a.numerator, a.denominator))
    return Fraction(top, bottom) if top is not None and bottom is not None else None


def _integer_root(a: int, degree: int) -> int | None:
    """Integer root by Newton's method from above; None if there is none."""
    if a < 2:
        return a
    root = 1 << -(-a.bit_length() // degree)
    while True:
        better = ((degree - 1) * root + a // root ** (degree - 1)) // degree
        if better >= root:
            return root if root**degree == a else None
        root = better
