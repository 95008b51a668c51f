"""Gates: which of the chosen prompts are sampled. Each is a frozen dataclass of its constants with the methods of `Gate`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Protocol

import numpy as np
from annotated_types import Ge, Gt, Le
from jaxtyping import Bool, Float, Int
from pydantic import ConfigDict

from jaxrl_llm.experience import by_prompt

if TYPE_CHECKING:
    from jaxrl_llm.types import Groups

Fraction = Annotated[float, Ge(0), Le(1)]
Number = Annotated[int, Ge(1)]
Admitted = Bool[np.ndarray, " n"]
EASY, HARD = 0, 1


class Gate(Protocol):
    """Pure functions over a state: a tree of NumPy arrays that is saved in checkpoints."""

    def init(self, num_rows: int) -> Any:
        """Return the state before the first step."""

    def admit(self, state: Any, rng: np.random.Generator, row: Int[np.ndarray, " n"]) -> tuple[Any, Admitted]:
        """Return the next state, and which of these rows of the task are sampled."""

    def observe(self, state: Any, groups: "Groups") -> Any:
        """Return the state after a step's graded groups."""


@dataclass(frozen=True, kw_only=True)
class AdmitAll:
    """Every prompt is sampled."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["none"] = "none"

    def init(self, num_rows: int) -> tuple:
        return ()

    def admit(self, state: tuple, rng: np.random.Generator, row: Int[np.ndarray, " n"]) -> tuple[tuple, Admitted]:
        return state, np.ones(len(row), bool)

    def observe(self, state: tuple, groups: "Groups") -> tuple:
        return state


class GresoState(NamedTuple):
    streak: Int[np.ndarray, " rows"]
    """Latest visits in a row whose numbers were all equal."""
    side: Int[np.ndarray, " rows"]
    """EASY or HARD: of the last of them."""
    visited: Bool[np.ndarray, " rows"]
    explore: Float[np.ndarray, "2"]
    """p: chance that an EASY or a HARD prompt with a streak of 1 is sampled."""


@dataclass(frozen=True, kw_only=True)
class Greso:
    """Skips prompts without signal of late (Zheng et al. 2025, GRESO, arXiv 2506.02177, alg. 1).

    A prompt whose last z visits had equal numbers is sampled with probability max(p^z, least). p is one number for easy prompts
    (all right) and one for hard ones (all wrong): it falls by `rate` after a step in which their share of all groups reaches its
    target, `target` / 3 for easy and 2 `target` / 3 for hard ones, and rises by it after any other. It stays while all prompts of a
    step are new, as in the authors' code: in the first epoch nothing can be skipped.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["greso"] = "greso"
    by: str = "success"
    """success, the name of a grader, or reward: the weighted sum."""
    target: Fraction = 0.25
    start: Fraction = 0.5
    rate: Fraction = 0.01
    low: Fraction = 0.05
    high: Fraction = 0.95
    """Bounds of p."""
    least: Annotated[float, Gt(0), Le(1)] = 0.01
    easy: float = 0.98
    """Lowest mean of an easy group."""
    hard: float = 0.11
    """Highest mean of a hard group."""

    def init(self, num_rows: int) -> GresoState:
        return GresoState(
            np.zeros(num_rows, np.int32), np.zeros(num_rows, np.int32), np.zeros(num_rows, bool), np.full(2, self.start)
        )

    def admit(
        self, state: GresoState, rng: np.random.Generator, row: Int[np.ndarray, " n"]
    ) -> tuple[GresoState, Admitted]:
        chance = np.maximum(state.explore[state.side[row]] ** state.streak[row], self.least)
        return state, rng.random(len(row)) < np.where(state.streak[row] > 0, chance, 1.0)

    def observe(self, state: GresoState, groups: "Groups") -> GresoState:
        x = groups.measure(self.by)
        equal = by_prompt.reduced(np.maximum, x, groups) == by_prompt.reduced(np.minimum, x, groups)
        mean, size = by_prompt.means(x, groups), groups.rollouts.size
        graded = ~np.isnan(mean) & (size > 0)
        of_side = np.stack([equal & (mean >= self.easy), equal & (mean <= self.hard)]) & graded
        streak, side, visited = state.streak.copy(), state.side.copy(), state.visited.copy()
        again = graded & visited[groups.rollouts.prompts.row]
        for p in np.flatnonzero(graded):
            visited[groups.rollouts.prompts.row[p]] = True
            row, now = groups.rollouts.prompts.row[p], np.flatnonzero(of_side[:, p])
            if not len(now):
                streak[row] = 0
                continue
            streak[row] = streak[row] + 1 if side[row] == now[0] else 1
            side[row] = now[0]
        explore = state.explore
        if again.any():
            above = of_side.sum(axis=1) / graded.sum() >= np.array([self.target / 3, 2 * self.target / 3])
            explore = np.clip(explore + np.where(above, -self.rate, self.rate), self.low, self.high)
        return GresoState(streak, side, visited, explore)


class ExcludedState(NamedTuple):
    streak: Int[np.ndarray, "2 rows"]
    """Latest visits in a row that were solved, and that were hopeless."""
    back: Int[np.ndarray, " rows"]
    """Step from which the prompt is sampled again."""
    step: Int[np.ndarray, ""]


@dataclass(frozen=True, kw_only=True)
class ExcludeSolved:
    """Leaves out prompts that are solved or hopeless, for a while.

    After `visits` visits in a row with a mean of at least `solved` (Polaris drops those above 0.9 between its stages), or of at
    most `hopeless`, a prompt is not sampled for `returns_after` steps; then it has to prove itself once more. None is left out for
    good: a fifth of all prompts changes sides (arXiv 2606.10709).
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["exclude_solved"] = "exclude_solved"
    by: str = "success"
    """success, the name of a grader, or reward: the weighted sum."""
    solved: float | None = 0.9
    """None: solved prompts stay."""
    hopeless: float | None = 0.0
    """None: hopeless prompts stay."""
    visits: Number = 2
    returns_after: Number = 50

    def init(self, num_rows: int) -> ExcludedState:
        return ExcludedState(np.zeros((2, num_rows), np.int32), np.zeros(num_rows, np.int32), np.array(0, np.int32))

    def admit(
        self, state: ExcludedState, rng: np.random.Generator, row: Int[np.ndarray, " n"]
    ) -> tuple[ExcludedState, Admitted]:
        return state, state.back[row] <= state.step

    def observe(self, state: ExcludedState, groups: "Groups") -> ExcludedState:
        mean, size = by_prompt.means(groups.measure(self.by), groups), groups.rollouts.size
        streak, back = state.streak.copy(), state.back.copy()
        for p in np.flatnonzero(~np.isnan(mean) & (size > 0)):
            row = groups.rollouts.prompts.row[p]
            now = np.array(
                [
                    self.solved is not None and mean[p] >= self.solved,
                    self.hopeless is not None and mean[p] <= self.hopeless,
                ]
            )
            streak[:, row] = np.where(now, streak[:, row] + 1, 0)
            if streak[:, row].max() >= self.visits:
                streak[:, row], back[row] = 0, state.step + 1 + self.returns_after
        return ExcludedState(streak, back, state.step + np.int32(1))
