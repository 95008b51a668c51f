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


def of_rows(x: Bool[np.ndarray, " P"], groups: "Groups") -> Bool[np.ndarray, " B"]:
    """Return the truth of each row's prompt; False for fillers."""
    prompt = groups.rollouts.prompt
    return x[prompt] & (prompt >= 0)


def chosen(
    choose: Callable[[np.ndarray, np.ndarray], Int[np.ndarray, " k"]], x: Rows, groups: "Groups"
) -> Bool[np.ndarray, " B"]:
    """Return True for the rows that `choose(numbers, samples)` names of each prompt, by their place in it.

    A prompt with a number that is NaN has none. `samples`: sample numbers, ascending.
    """
    found, prompt = np.zeros(len(x), bool), groups.rollouts.prompt
    ends = np.cumsum(groups.rollouts.size)
    for rows in np.split(np.flatnonzero(prompt >= 0), ends[:-1]):
        if len(rows) and not np.isnan(x[rows]).any():
            rows = rows[np.argsort(groups.rollouts.sample[rows], kind="stable")]
            found[rows[choose(x[rows], groups.rollouts.sample[rows])]] = True
    return found
