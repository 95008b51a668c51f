"""Numbers per row to numbers per prompt, for groups of any size; a prompt without rows has 0, and filler rows belong to nobody."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

if TYPE_CHECKING:
    from jaxrl_llm.types import Groups

Rows = Float[np.ndarray, " B"]
Prompts = Float[np.ndarray, " P"]


def reduced(ufunc: np.ufunc, x: Rows, groups: "Groups") -> Prompts:
    """Return the reduction of each prompt's numbers, in order; NaN if one of them is."""
    size = groups.rollouts.size
    found, some = np.zeros(len(size), x.dtype), np.flatnonzero(size)
    if len(some):
        start = (np.cumsum(size) - size)[some]
        found[some] = ufunc.reduceat(x[: size.sum()], start)
    return found


def means(x: Rows, groups: "Groups") -> Prompts:
    """Return the mean of each prompt's numbers."""
    return reduced(np.add, x, groups) / np.maximum(groups.rollouts.size, 1)


def between(x: np.ndarray, low: float | None, high: float | None) -> np.ndarray:
    """Return low <= x <= high, in float32, as rewards are: 0.9 is no less than 0.9. None: no bound; NaN: False."""
    x = x.astype(np.float32)
    return (x >= np.float32(-np.inf if low is None else low)) & (x <= np.float32(np.inf if high is None else high))


def of_rows(x: Bool[np.ndarray, " P"], groups: "Groups") -> Bool[np.ndarray, " B"]:
    """Return the truth of each row's prompt; False for fillers."""
    prompt = groups.rollouts.prompt
    return x[prompt] & (prompt >= 0)


def chosen(choose: Callable[[np.ndarray], Int[np.ndarray, " k"]], x: Rows, groups: "Groups") -> Bool[np.ndarray, " B"]:
    """Return True for the rows that `choose(numbers)` names of each prompt, by their place among its kept rows, which are in the
    order of their sample numbers. A row whose number is NaN is not among them."""
    found, rollouts = np.zeros(len(x), bool), groups.rollouts
    rows = np.flatnonzero(groups.keep & (rollouts.prompt >= 0) & ~np.isnan(x))
    rows = rows[np.lexsort((rollouts.sample[rows], rollouts.prompt[rows]))]
    for mine in np.split(rows, np.flatnonzero(np.diff(rollouts.prompt[rows])) + 1):
        if len(mine):
            found[mine[choose(x[mine])]] = True
    return found
