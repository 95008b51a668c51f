"""Estimates of how often each row of the task is answered right, from its visits so far."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxrl_llm.errors import UserError
from jaxrl_llm.experience import by_prompt

if TYPE_CHECKING:
    from jaxrl_llm.types import Groups


class PassRates(NamedTuple):
    """Counts per row of the task, of which earlier visits count less."""

    right: Float[np.ndarray, " rows"]
    """Sum of what was measured: right responses."""
    samples: Float[np.ndarray, " rows"]


def unvisited(num_rows: int) -> PassRates:
    return PassRates(np.zeros(num_rows), np.zeros(num_rows))


def observed(rates: PassRates, groups: "Groups", by: str, memory: float) -> PassRates:
    """Return the counts after these groups; one that could not be graded changes nothing.

    Args:
        rates: before.
        groups: graded; a row may be visited several times.
        by: measure of a response, from 0 to 1, as in `Groups.measure`.
        memory: factor of all earlier counts of a row at each of its visits.

    Raises:
        UserError: a response measures less than 0 or more than 1. Its rate would be no probability, and what is computed from it,
            as p (1 - p), no variance; cut off at 0 and 1, a penalty from -1 to 0 would make all prompts look alike.
    """
    x = groups.measure(by)
    outside = x[(groups.rollouts.prompt >= 0) & ((x < 0) | (x > 1))]
    if len(outside):
        raise UserError(
            f"experience: got pass rates by {by}, which gave a response {outside[0]:g}, want them by success, or by a grader whose "
            "rewards are from 0 to 1"
        )
    right, size = by_prompt.reduced(np.add, x, groups), groups.rollouts.size
    new = PassRates(rates.right.copy(), rates.samples.copy())
    for p in np.flatnonzero(~np.isnan(right) & (size > 0)):
        row = groups.rollouts.prompts.row[p]
        new.right[row] = memory * new.right[row] + right[p]
        new.samples[row] = memory * new.samples[row] + size[p]
    return new


def estimated(rates: PassRates, row: Int[np.ndarray, " n"], prior: float) -> Float[np.ndarray, " n"]:
    """Return the estimate for each row, from 0 to 1; 0.5 for one that was never visited. `prior`: samples that 0.5 counts for, of
    all rows."""
    right, samples = rates.right[row] + 0.5 * prior, rates.samples[row] + prior
    return np.where(samples > 0, right / np.where(samples > 0, samples, 1), 0.5)


def expected(rates: PassRates, row: Int[np.ndarray, " n"]) -> dict[str, float]:
    """Return the metric `expected_success`: the mean pass rate, so far, of those of the rows that were visited; nothing if none
    was."""
    seen = row[rates.samples[row] > 0]
    return {"expected_success": float(estimated(rates, seen, 0.0).mean())} if len(seen) else {}
