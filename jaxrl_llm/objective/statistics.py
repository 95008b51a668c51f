"""Means and stds of groups and of batches in float64: equal numbers are exactly 0 from their mean, and order changes no bit.

They are computed from differences to the smallest number, never as differences of sums, and sums over unordered numbers are rounded
once. Group statistics are over the last axis; batch statistics over all tokens in a mask, rows (sequences) unordered.
"""

import math

import numpy as np
from jaxtyping import Bool, Float

Group = Float[np.ndarray, "*rows n"]
PerGroup = Float[np.ndarray, "*rows 1"]
Completion = Float[np.ndarray, "B C"]
Tokens = Bool[np.ndarray, "B C"]


def ratio(top: np.ndarray, bottom: np.ndarray | float) -> np.ndarray:
    """Return top / bottom, 0 where bottom is 0."""
    return np.divide(top, bottom, out=np.zeros(np.broadcast_shapes(top.shape, np.shape(bottom))), where=bottom != 0)


def total(x: Group) -> PerGroup:
    """Return the sum of each group, rounded once."""
    # Slices of one list: a list per group would keep the garbage collector at work.
    numbers, n = x.ravel().tolist(), x.shape[-1]
    sums = [math.fsum(numbers[start : start + n]) for start in range(0, len(numbers), n)]
    return np.array(sums).reshape(*x.shape[:-1], 1)


def centered(x: Group) -> Group:
    """Return x - mean of its group."""
    above = x - x.min(axis=-1, keepdims=True)
    return above - total(above) / x.shape[-1]


def deviation(x: Group, ddof: int) -> PerGroup:
    """Return the std of each group; 0 for a single number."""
    return np.sqrt(total(centered(x) ** 2) / max(x.shape[-1] - ddof, 1))


def leave_one_out(x: Float[np.ndarray, "P G"]) -> Float[np.ndarray, "P G G-1"]:
    """Return the rest of the group for each sample. Subtracting from a sum would keep the rounding error."""
    size = x.shape[1]
    return x[:, np.nonzero(~np.eye(size, dtype=bool))[1].reshape(size, size - 1)]


def batch_centered(x: Completion, mask: Tokens) -> Completion:
    """Return x - mean over `mask`."""
    above = x - x[mask].min()
    return above - _batch_total(above, mask) / np.count_nonzero(mask)


def batch_deviation(x: Completion, mask: Tokens, ddof: int) -> float:
    """Return the std over `mask`."""
    return math.sqrt(_batch_total(batch_centered(x, mask) ** 2, mask) / (np.count_nonzero(mask) - ddof))


def _batch_total(x: Completion, mask: Tokens) -> float:
    """Sum each row, then the rows with one rounding: exact summation over all tokens would be too slow."""
    return math.fsum(np.where(mask, x, 0.0).sum(axis=1))


def whiten(x: Completion, mask: Tokens, ddof: int = 1, eps: float = 1e-8, beside_std: float = 0.0) -> Completion:
    """Return (x - mean) / (sqrt(var + eps) + beside_std) over the tokens in `mask`; x unchanged for fewer than two."""
    if np.count_nonzero(mask) < 2:
        return x
    return ratio(batch_centered(x, mask), math.sqrt(batch_deviation(x, mask, ddof) ** 2 + eps) + beside_std)
