"""Budgets: how many samples each prompt of a step gets, out of a fixed number. Each is a frozen dataclass of its constants with the
methods of `Budget`. A prompt that could not be graded is no wrong answer: it gets no further samples."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol

import numpy as np
from annotated_types import Ge, Le
from jaxtyping import Int
from pydantic import ConfigDict

from jaxrl_llm.experience import by_prompt
from jaxrl_llm.experience.pass_rates import PassRates, estimated, observed, unvisited

if TYPE_CHECKING:
    from jaxrl_llm.types import Groups

Samples = Int[np.ndarray, " n"]
Number = Annotated[int, Ge(1)]
Fraction = Annotated[float, Ge(0), Le(1)]


class Budget(Protocol):
    """Pure functions over a state: a tree of NumPy arrays that is saved in checkpoints."""

    in_rounds: bool
    """True if `allocate` is called again within a step, with what was graded."""

    def most(self, prompts: int, rows: int) -> int:
        """Return the most samples that one of `prompts` prompts can get of `rows`."""

    def init(self, num_rows: int) -> Any:
        """Return the state before the first step."""

    def allocate(self, state: Any, row: Int[np.ndarray, " n"], seen: "Groups | None", left: int) -> tuple[Any, Samples]:
        """Return the next state, and the number of further samples of each prompt.

        Args:
            state: of the budget.
            row: of the task, of each prompt.
            seen: the step's groups so far, in the order of `row`; None at the first call, which gives every prompt 1 or more.
            left: samples that are left; the result sums to no more.
        """

    def observe(self, state: Any, groups: "Groups") -> Any:
        """Return the state after a step's graded groups."""


def gives_equally(budget: Budget, prompts: int, rows: int) -> bool:
    """Return whether every prompt gets the same: all samples are given at once, and none can get more than its share."""
    return not budget.in_rounds and budget.most(prompts, rows) * prompts == rows


class Stateless:
    """The part of a budget that remembers nothing between steps."""

    def init(self, num_rows: int) -> tuple:
        return ()

    def observe(self, state: tuple, groups: "Groups") -> tuple:
        return state


@dataclass(frozen=True, kw_only=True)
class UniformBudget(Stateless):
    """Equally many samples for each prompt; of a rest, one each for the first ones."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["uniform"] = "uniform"
    in_rounds: ClassVar[bool] = False

    def most(self, prompts: int, rows: int) -> int:
        return -(-rows // prompts)

    def allocate(
        self, state: tuple, row: Int[np.ndarray, " n"], seen: "Groups | None", left: int
    ) -> tuple[tuple, Samples]:
        return state, equal_shares(len(row), left)


def equal_shares(n: int, total: int) -> Samples:
    """Return n numbers that differ by 1 at most and sum to `total`."""
    return np.full(n, total // n) + (np.arange(n) < total % n)


@dataclass(frozen=True, kw_only=True)
class FromPassRates:
    """The part of a budget that allocates by estimates of the prompts' pass rates, from earlier steps."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    by: str = "success"
    """Measure of a response: success, or the name of a grader whose rewards are from 0 to 1; others end the run."""
    low: Annotated[int, Ge(2)] = 2
    """Least samples of a prompt."""
    high: Annotated[int, Ge(2)] = 128
    """Most samples of a prompt."""
    memory: Fraction = 0.5
    """Weight of all earlier visits of a prompt beside its last one."""
    in_rounds: ClassVar[bool] = False

    def most(self, prompts: int, rows: int) -> int:
        return min(self.high, rows - (prompts - 1) * self.low)

    def init(self, num_rows: int) -> PassRates:
        return unvisited(num_rows)

    def observe(self, state: PassRates, groups: "Groups") -> PassRates:
        return observed(state, groups, self.by, self.memory)


@dataclass(frozen=True, kw_only=True)
class Vip(FromPassRates):
    """Least variance of the gradient: minimizes the sum of a / (n - 1) with a = p (1 - p), the variance that RLOO's estimate has
    (VIP, arXiv 2602.01601).

    The closed form is n = clip(1 + sqrt(a / lambda), low, high), lambda such that all sum to the total; this is the best allocation
    in whole numbers, by greedy steps, which is exact because each term is convex.
    """

    kind: Literal["vip"] = "vip"
    prior: Annotated[float, Ge(0)] = 1.0
    """Samples for which a pass rate of 0.5 counts in each estimate: keeps a prompt that was always or never solved in play."""

    def allocate(
        self, state: PassRates, row: Int[np.ndarray, " n"], seen: "Groups | None", left: int
    ) -> tuple[PassRates, Samples]:
        p = estimated(state, row, self.prior)
        return state, greedy(
            lambda i, n: p[i] * (1 - p[i]) / ((n - 1) * n), np.zeros(len(p)), self.low, self.high, left
        )


@dataclass(frozen=True, kw_only=True)
class Knapsack(FromPassRates):
    """Most value of the groups that have a gradient: maximizes the sum of (1 - p^n - (1 - p)^n) p (1 - p)^2, the chance of a mixed
    group times the gain of a step on it (Knapsack RL, arXiv 2509.25849).

    Concave in n, so greedy steps are exact. What is left goes to prompts that were never solved, then to all others.
    """

    kind: Literal["knapsack"] = "knapsack"
    prior: Annotated[float, Ge(0)] = 0.0
    """Samples for which a pass rate of 0.5 counts in each estimate."""

    def allocate(
        self, state: PassRates, row: Int[np.ndarray, " n"], seen: "Groups | None", left: int
    ) -> tuple[PassRates, Samples]:
        p = estimated(state, row, self.prior)

        def gain(i: int, n: int) -> float:
            """Difference of the values that sample n + 1 makes."""
            return (p[i] ** n * (1 - p[i]) + (1 - p[i]) ** n * p[i]) * p[i] * (1 - p[i]) ** 2

        return state, greedy(gain, (p > 0).astype(float), self.low, self.high, left)


def greedy(gain: Callable[[int, int], float], last: np.ndarray, low: int, high: int, total: int) -> Samples:
    """Return numbers from `low` to `high` that sum to `total`, each unit given to where it gains most.

    Args:
        gain: gain(i, n) of one more at i beyond n; it falls with n.
        last: of equal gains, where this is least comes first, then where there are fewest, then the first.
        low, high: bounds of each. With too little for `low`, all get equal shares; with too much, `high`.
        total: the sum.
    """
    size = len(last)
    if total < low * size:
        return equal_shares(size, total)
    found = np.full(size, low)
    heap = [(-gain(i, low), last[i], low, i) for i in range(size) if low < high]
    heapq.heapify(heap)
    for _ in range(total - low * size):
        if not heap:
            break
        _, _, n, i = heap[0]
        found[i] = n + 1
        if n + 1 < high:
            heapq.heapreplace(heap, (-gain(i, n + 1), last[i], n + 1, i))
        else:
            heapq.heappop(heap)
    return found


@dataclass(frozen=True, kw_only=True)
class Rounds(Stateless):
    """Samples in rounds, for prompts that have no right response yet (AR3PO, arXiv 2509.25808)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["rounds"] = "rounds"
    by: str = "success"
    """success, or the name of a grader: a response of 1 or more is right."""
    per_round: Number = 4
    """Samples of a prompt per round."""
    rounds: Number = 4

    @property
    def in_rounds(self) -> bool:
        return self.rounds > 1

    def most(self, prompts: int, rows: int) -> int:
        return min(self.per_round * self.rounds, rows)

    def allocate(
        self, state: tuple, row: Int[np.ndarray, " n"], seen: "Groups | None", left: int
    ) -> tuple[tuple, Samples]:
        wanted = np.ones(len(row), bool) if seen is None else self._wanted(seen)
        return state, shared(np.where(wanted, self.per_round, 0), left)

    def _wanted(self, seen: "Groups") -> np.ndarray:
        """Prompts that get another round: graded, with a round to come."""
        x, size = seen.measure(self.by), seen.rollouts.size
        right = by_prompt.reduced(np.add, np.where(np.isnan(x), x, x >= 1), seen)
        return ~np.isnan(right) & (size < self.per_round * self.rounds) & self._lacks(right, size - right)

    def _lacks(self, right: np.ndarray, wrong: np.ndarray) -> np.ndarray:
        return right == 0


@dataclass(frozen=True, kw_only=True)
class ReinforceAda(Rounds):
    """Samples in rounds, until a prompt has enough of both kinds, or of one (Reinforce-Ada, arXiv 2510.04996).

    Train on a balanced choice of them by the filter `{kind: max_variance, by: success, keep: K}`; with
    `objective.baseline_over: sampled` the baseline is that of all samples drawn, as in the paper.
    """

    kind: Literal["reinforce_ada"] = "reinforce_ada"
    until: Literal["balanced", "positive"] = "balanced"
    """balanced: `keep` // 2 right responses, and wrong ones for the rest. positive: one right response."""
    keep: Annotated[int, Ge(2)] = 4
    """K: responses that are trained on."""

    def _lacks(self, right: np.ndarray, wrong: np.ndarray) -> np.ndarray:
        half = self.keep // 2
        return {"balanced": (right < half) | (wrong < self.keep - half), "positive": right < 1}[self.until]


@dataclass(frozen=True, kw_only=True)
class Screening(Stateless):
    """A few samples of each prompt, and what is left for those whose numbers differ (SPEED-RL, arXiv 2506.09016).

    Their log-probs stay those that were captured: both parts are of one step and one policy. (The published code keeps prompts over
    steps, and computes their old log-probs again.)
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["screening"] = "screening"
    by: str = "success"
    """success, the name of a grader, or reward: the weighted sum."""
    initial: Annotated[int, Ge(2)] = 4
    """Samples of each prompt in the first round."""
    high: Annotated[int, Ge(2)] = 64
    """Most samples of a prompt."""
    in_rounds: ClassVar[bool] = True

    def most(self, prompts: int, rows: int) -> int:
        return min(self.high, rows)

    def allocate(
        self, state: tuple, row: Int[np.ndarray, " n"], seen: "Groups | None", left: int
    ) -> tuple[tuple, Samples]:
        if seen is None:
            return state, shared(np.full(len(row), self.initial), left)
        x, size = seen.measure(self.by), seen.rollouts.size
        teaches = by_prompt.reduced(np.maximum, x, seen) > by_prompt.reduced(np.minimum, x, seen)
        samples = np.zeros(len(row), int)
        # Once: the second round is the last.
        if teaches.any() and (size == self.initial).all():
            room = np.maximum(self.high - size[teaches], 0)
            samples[teaches] = np.minimum(equal_shares(int(teaches.sum()), left), room)
        return state, samples


def shared(wanted: Samples, left: int) -> Samples:
    """Return what each gets of `left`: what it wants, or as much as all others who want more; of a rest, one each for the first."""
    if wanted.sum() <= left:
        return wanted.astype(int)
    levels = np.arange(wanted.max() + 1)
    level = int(levels[np.minimum(wanted, levels[:, None]).sum(axis=1) <= left][-1])
    found = np.minimum(wanted, level)
    more = np.flatnonzero(wanted > level)[: left - found.sum()]
    found[more] += 1
    return found
