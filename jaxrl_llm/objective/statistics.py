"""Means and stds of groups and of batches in float64: equal numbers are exactly 0 from their mean, and order changes no bit.

They are computed from differences to the smallest number, never as differences of sums, and sums over unordered numbers are rounded
once. Statistics of groups take one number per row, and return one per row: that of its group. Batch statistics are over the rows or
the tokens in a mask, rows unordered.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

Rows = Float[np.ndarray, " B"]
Numbers = Float[np.ndarray, "B *C"]
"""One per row, or one per token."""
Mask = Bool[np.ndarray, "B *C"]


class Grouping(NamedTuple):
    """Which rows are a group: consecutive ones. Every row is in a group, and no group is empty."""

    start: Int[np.ndarray, " P"]
    """First row of each group."""
    size: Int[np.ndarray, " P"]
    """Rows per group."""

    @classmethod
    def of(cls, number: Int[np.ndarray, " B"]) -> "Grouping":
        """Return the groups of rows with a number of their group, 0 or more: consecutive rows with the same are one."""
        start = np.flatnonzero(np.diff(number, prepend=-1))
        return cls(start, np.diff(start, append=len(number)))

    @property
    def rows(self) -> Int[np.ndarray, " B"]:
        """Size of each row's group."""
        return self.per_row(self.size)

    @property
    def largest(self) -> int:
        """Size of the largest group."""
        return int(self.size.max())

    def per_row(self, x: np.ndarray) -> np.ndarray:
        """Return one number per group as one per row."""
        return np.repeat(x, self.size)


def ratio(top: np.ndarray, bottom: np.ndarray | float) -> np.ndarray:
    """Return top / bottom, 0 where bottom is 0."""
    return np.divide(top, bottom, out=np.zeros(np.broadcast_shapes(top.shape, np.shape(bottom))), where=bottom != 0)


def total(x: Rows, groups: Grouping) -> Rows:
    """Return the sum of each group, rounded once."""
    # Slices of one list: a list per group would keep the garbage collector at work.
    numbers, starts = x.tolist(), groups.start.tolist()
    ends = [*starts[1:], len(numbers)]
    return groups.per_row(np.array([math.fsum(numbers[a:b]) for a, b in zip(starts, ends, strict=False)]))


def least(x: Rows, groups: Grouping) -> Rows:
    """Return the smallest of each group."""
    return groups.per_row(np.minimum.reduceat(x, groups.start))


def most(x: Rows, groups: Grouping) -> Rows:
    """Return the largest of each group."""
    return groups.per_row(np.maximum.reduceat(x, groups.start))


def value_range(x: Rows, groups: Grouping) -> Rows:
    """Return the largest minus the smallest of each group."""
    return most(x, groups) - least(x, groups)


def first_with(chosen: Bool[np.ndarray, " B"], groups: Grouping) -> Int[np.ndarray, " P"]:
    """Return the first chosen row of each group, at least one of which is chosen."""
    return np.minimum.reduceat(np.where(chosen, np.arange(len(chosen)), len(chosen)), groups.start)


def centered(x: Rows, groups: Grouping) -> Rows:
    """Return x - mean of its group; 0 in a group of one."""
    above = x - least(x, groups)
    return above - total(above, groups) / groups.rows


def deviation(x: Rows, groups: Grouping, ddof: int) -> Rows:
    """Return the std of each group; 0 in a group of one."""
    return np.sqrt(total(centered(x, groups) ** 2, groups) / np.maximum(groups.rows - ddof, 1))


def of_others(x: Rows, groups: Grouping, statistic: Callable[[Rows, Grouping], Rows]) -> Rows:
    """Return a statistic of the others in each row's group; 0 if there are none. Subtracting from a sum would keep the rounding
    error, so the others of each row are made a group."""
    row = np.flatnonzero(groups.rows > 1)
    number = groups.rows[row] - 1
    others = Grouping(np.cumsum(number) - number, number)
    # The others of a row: the rows from its group's first on, but itself.
    of = np.arange(number.sum()) - others.per_row(others.start) + others.per_row(groups.per_row(groups.start)[row])
    found = np.zeros(len(x))
    found[row] = statistic(x[of + (of >= others.per_row(row))], others)[others.start]
    return found


def batch_centered(x: Numbers, mask: Mask) -> Numbers:
    """Return x - mean over `mask`."""
    above = x - x[mask].min()
    return above - _batch_total(above, mask) / np.count_nonzero(mask)


def batch_deviation(x: Numbers, mask: Mask, ddof: int) -> float:
    """Return the std over `mask`."""
    return math.sqrt(_batch_total(batch_centered(x, mask) ** 2, mask) / (np.count_nonzero(mask) - ddof))


def _batch_total(x: Numbers, mask: Mask) -> float:
    """Sum each row, then the rows with one rounding: exact summation over all tokens would be too slow."""
    return math.fsum(np.where(mask, x, 0.0).reshape(len(x), -1).sum(axis=1))


def whiten(x: Numbers, mask: Mask, ddof: int = 1, eps: float = 1e-8, beside_std: float = 0.0) -> Numbers:
    """Return (x - mean) / (sqrt(var + eps) + beside_std) over `mask`; x unchanged if it has fewer than two."""
    if np.count_nonzero(mask) < 2:
        return x
    return ratio(batch_centered(x, mask), math.sqrt(batch_deviation(x, mask, ddof) ** 2 + eps) + beside_std)
