"""What a step asks for: samples of each prompt as a budget allocates them, or prompts until enough groups are accepted."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import Int

from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.budgets import Budget, gives_equally
from jaxrl_llm.experience.filters import Filter
from jaxrl_llm.roles.collector import Asked
from jaxrl_llm.roles.grading import merge_requests
from jaxrl_llm.types import Groups, Prompts, join_groups, select_groups

Draw = Callable[[int], Prompts]
"""draw(n): the next n prompts."""


def select_prompts(prompts: Prompts, index: np.ndarray) -> Prompts:
    return jax.tree.map(lambda x: x[index], prompts)


def join_prompts(parts: Iterable[Prompts]) -> Prompts:
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


class Taken(NamedTuple):
    """Groups of a step."""

    fresh: Groups
    """P groups of B rows in all, some of which may be fillers."""
    rejected: Groups | None
    """Groups that were sampled and graded beside them, none of them kept; None: there are none."""
    metrics: dict[str, float]


class StepRequests(Protocol):
    """Requests of one step."""

    state: Any
    """State of the budget after the step."""

    def first(self, draw: Draw) -> Asked:
        """Return the first requests."""

    def more(self, groups: Groups, number: Int[np.ndarray, " n"]) -> Asked | None:
        """Return the requests that follow from graded ones. `number`: of the group of each."""

    def finish(self, groups: Groups) -> Taken:
        """Return the step's groups. `groups`: all of them, in the order of their numbers."""


class Asking(Protocol):
    """What a step asks for. Its state is a tree of NumPy arrays that is saved in checkpoints."""

    follows_up: bool
    """True if grades may lead to further requests within a step."""
    asks_at_once: int | None
    """Prompts that are asked for together, of as many samples each as the engine is configured for; None: this varies."""

    def init(self, num_rows: int) -> Any:
        """Return the state before the first step."""

    def start(self, state: Any) -> StepRequests:
        """Return the requests of one step."""

    def observe(self, state: Any, groups: Groups) -> Any:
        """Return the state after a step's graded groups."""


@dataclass(frozen=True)
class ByBudget:
    """P prompts, and samples of each as a budget allocates them."""

    budget: Budget
    prompts: int
    rows: int
    """B: samples in all, at most."""

    @property
    def follows_up(self) -> bool:
        return self.budget.in_rounds

    @property
    def asks_at_once(self) -> int | None:
        return self.prompts if gives_equally(self.budget, self.prompts, self.rows) else None

    def init(self, num_rows: int) -> Any:
        return self.budget.init(num_rows)

    def start(self, state: Any) -> StepRequests:
        return _Rounds(self, state)

    def observe(self, state: Any, groups: Groups) -> Any:
        return self.budget.observe(state, groups)


class _Rounds:
    def __init__(self, asking: ByBudget, state: Any):
        self.budget, self.prompts, self.rows, self.state = asking.budget, asking.prompts, asking.rows, state
        self.graded: list[tuple[int, Groups]] = []
        """A request each, with the number of its group."""
        self.drawn, self.waiting = np.zeros(self.prompts, int), 0
        self.equal = asking.asks_at_once is not None

    def first(self, draw: Draw) -> Asked:
        self.asked = draw(self.prompts)
        samples = self._allocate(None)
        if (samples < 1).any():
            raise UserError(
                f"experience.budget: got {samples.min()} samples for a prompt in the first round, want 1 or more for each"
            )
        return self._ask(samples)

    def more(self, groups: Groups, number: Int[np.ndarray, " n"]) -> Asked | None:
        """Asks for the next round once the one before is graded as a whole."""
        self.graded += [(n, select_groups(groups, np.array([i]))) for i, n in enumerate(number.tolist())]
        self.waiting -= len(number)
        if self.waiting or not self._left:
            return None
        self.graded.sort(key=lambda numbered: (numbered[0], numbered[1].rollouts.sample[0]))
        seen = merge_requests(join_groups(*(part for _, part in self.graded)), np.array([n for n, _ in self.graded]))
        samples = self._allocate(seen)
        return self._ask(samples) if samples.any() else None

    def finish(self, groups: Groups) -> Taken:
        if self._left:
            groups = select_groups(groups, np.arange(self.prompts), self.rows)
        return Taken(groups, None, {} if self.equal else _spread(self.drawn))

    @property
    def _left(self) -> int:
        return self.rows - int(self.drawn.sum())

    def _allocate(self, seen: Groups | None) -> Int[np.ndarray, " P"]:
        self.state, samples = self.budget.allocate(self.state, self.asked.row, seen, self._left)
        return np.asarray(samples)

    def _ask(self, samples: Int[np.ndarray, " P"]) -> Asked:
        some = np.flatnonzero(samples)
        asked = Asked(select_prompts(self.asked, some), some, samples[some], self.drawn[some])
        self.drawn, self.waiting = self.drawn + samples, len(some)
        return asked


def _spread(samples: Int[np.ndarray, " P"]) -> dict[str, float]:
    """Metrics of the samples that a step's prompts got."""
    return {
        "budget/min_samples": float(samples.min()),
        "budget/max_samples": float(samples.max()),
        "budget/share_at_min": float(np.mean(samples == samples.min())),
    }


@dataclass(frozen=True)
class UntilAccepted:
    """P groups that a filter accepts: each rejected one is replaced by one of the next prompt, while others are decoded.

    The prompts asked for are the first ones of which P are accepted, in whichever order they finish, so what is sampled depends on
    no grader's speed (DAPO's dynamic sampling, arXiv 2503.14476).
    """

    judge: Filter
    """Without a state, which would depend on the order in which groups finish."""
    prompts: int
    samples: int
    attempts: int
    """Prompts asked for, at most, per prompt of the step."""

    follows_up: ClassVar[bool] = True
    asks_at_once: ClassVar[None] = None

    def init(self, num_rows: int) -> Any:
        return ()

    def start(self, state: Any) -> StepRequests:
        return _Accepted(self)

    def observe(self, state: Any, groups: Groups) -> Any:
        return ()


class _Accepted:
    def __init__(self, asking: UntilAccepted):
        self.asking, self.state, self.num_asked = asking, (), 0
        self.keep: dict[int, np.ndarray] = {}
        """Rows kept of each group, by its number."""

    def first(self, draw: Draw) -> Asked:
        self.draw = draw
        return self._ask(draw(self.asking.prompts))

    def more(self, groups: Groups, number: Int[np.ndarray, " n"]) -> Asked | None:
        judged = self.asking.judge(groups)
        for n, rows in zip(number.tolist(), np.split(judged.keep, np.cumsum(groups.rollouts.size)[:-1]), strict=True):
            self.keep[n] = rows
        left = self.asking.attempts * self.asking.prompts - self.num_asked
        replaced = min(np.count_nonzero(~judged.kept), left)
        # One by one: how many are rejected at once differs between meshes.
        return self._ask(join_prompts(self.draw(1) for _ in range(replaced))) if replaced else None

    def finish(self, groups: Groups) -> Taken:
        """Too few accepted groups are filled up with rejected ones, of which no row is kept."""
        keep, num = np.concatenate([self.keep[n] for n in range(self.num_asked)]), self.asking.prompts
        judged = groups.replace(keep=keep)
        order, accepted = np.argsort(~judged.kept, kind="stable"), int(judged.kept.sum())
        fresh, rest = np.sort(order[:num]), np.sort(order[num:])
        metrics = {
            "refill/prompts": float(self.num_asked),
            "refill/attempts": self.num_asked / num,
            "refill/accepted": accepted / self.num_asked,
            "refill/missing": float(num - accepted),
        }
        return Taken(select_groups(judged, fresh), select_groups(judged, rest) if len(rest) else None, metrics)

    def _ask(self, prompts: Prompts) -> Asked:
        n = len(prompts.length)
        number = self.num_asked + np.arange(n)
        self.num_asked += n
        return Asked(prompts, number, np.full(n, self.asking.samples), np.zeros(n, int))
