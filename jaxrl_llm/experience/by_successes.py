"""ExGRPO's choice of prompts: those whose last visit was partly right, by the number of right responses."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
from annotated_types import Ge, Gt, Le
from jaxtyping import Bool, Float, Int
from pydantic import ConfigDict

from jaxrl_llm.experience import by_prompt
from jaxrl_llm.experience.strata import Columns

if TYPE_CHECKING:
    from jaxrl_llm.types import Groups

Rows = Int[np.ndarray, " n"]


class LastVisits(NamedTuple):
    """State of `BySuccesses`."""

    position: Int[np.ndarray, ""]
    """Rows taken in shuffled order."""
    owed: Float[np.ndarray, ""]
    """Part of a row that is still due from the buckets, less than 1."""
    right: Int[np.ndarray, " rows"]
    """Right responses at each row's last graded visit."""
    samples: Int[np.ndarray, " rows"]
    """Graded responses at that visit; 0: never visited."""

    @property
    def candidates(self) -> Bool[np.ndarray, " rows"]:
        """True for rows whose last visit had right and wrong responses."""
        return (self.right > 0) & (self.right < self.samples)


@dataclass(frozen=True, kw_only=True)
class BySuccesses:
    """The question selection of ExGRPO (arXiv 2510.02245): a share of the prompts comes from buckets of rows with k of n right
    responses at their last visit. A bucket is drawn in proportion to the normal density of k around n / 2, and a row uniformly from
    it; none comes twice in a batch. k = 0 and k = n are in no bucket: such a row comes back only with the other prompts,
    every row once per epoch in an order that is shuffled each epoch, which also fill up what the buckets do not have."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["by_successes"] = "by_successes"
    share: Annotated[float, Ge(0), Le(1)] = 0.5
    """Share of the prompts that comes from the buckets."""
    sigma: Annotated[float, Gt(0)] = 1.0
    """Standard deviation of the density, in right responses."""

    def over(self, columns: Columns, seed: int) -> "_BySuccesses":
        # Configs are read before JAX is imported.
        from jaxrl_llm.experience.curricula import make_order

        return _BySuccesses(self, make_order(len(columns), seed))


class _BySuccesses(NamedTuple):
    cfg: BySuccesses
    order: Callable[[int], int]

    def init(self, num_rows: int) -> LastVisits:
        return LastVisits(np.array(0), np.array(0.0), np.zeros(num_rows, np.int32), np.zeros(num_rows, np.int32))

    def choose(self, state: LastVisits, rng: np.random.Generator, n: int) -> tuple[LastVisits, Rows]:
        due = float(state.owed) + self.cfg.share * n
        # A margin for sums such as ten times 0.1.
        wanted = min(int(due + 1e-9), n)
        revisited = self._from_buckets(state, rng, wanted)
        start, rest = int(state.position), n - len(revisited)
        fresh = [self.order(start + i) for i in range(rest)]
        state = state._replace(position=state.position + rest, owed=np.array(max(due - wanted, 0.0)))
        return state, np.array([*revisited, *fresh], int)

    def _from_buckets(self, state: LastVisits, rng: np.random.Generator, n: int) -> list[int]:
        """Return up to n candidates."""
        rows, found = np.flatnonzero(state.candidates), []
        # By twice the distance of k from n / 2, which is a whole number, with its sign.
        bucket = 2 * state.right[rows] - state.samples[rows]
        while len(found) < n and len(rows):
            there = np.unique(bucket)
            # From the closest on, so that not all densities vanish.
            squares = (there / (2 * self.cfg.sigma)) ** 2
            density = np.exp(-0.5 * (squares - squares.min()))
            members = np.flatnonzero(bucket == rng.choice(there, p=density / density.sum()))
            place = members[rng.integers(len(members))]
            found.append(int(rows[place]))
            rows, bucket = np.delete(rows, place), np.delete(bucket, place)
        return found

    def observe(self, state: LastVisits, groups: "Groups") -> LastVisits:
        """A group that could not be graded changes nothing."""
        right, size = by_prompt.reduced(np.add, groups.measure("success"), groups), groups.rollouts.size
        graded = np.flatnonzero(~np.isnan(right) & (size > 0))
        new = state._replace(right=state.right.copy(), samples=state.samples.copy())
        row = groups.rollouts.prompts.row[graded]
        new.right[row], new.samples[row] = right[graded].astype(np.int32), size[graded]
        return new

    def describe(self, state: LastVisits, rows: Rows) -> dict[str, float]:
        """Return the numbers of rows in buckets and of rows that were all right at their last visit, and the mean pass rate at
        their last visits of the chosen rows that had one."""
        seen, visited = rows[state.samples[rows] > 0], state.samples > 0
        found = {
            "candidates": float(state.candidates.sum()),
            "retired": float((visited & (state.right == state.samples)).sum()),
        }
        rate = state.right[seen] / np.maximum(state.samples[seen], 1)
        return found | ({"expected_success": float(rate.mean())} if len(seen) else {})
