"""Curricula that aim at what teaches most: by the prompts' pass rates so far, or by a column of the task's rows. Each is a frozen
dataclass of its constants; `over(columns, seed)` is the curriculum over a task's rows."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
from annotated_types import Ge, Gt, Le, MinLen
from jaxtyping import Float, Int
from pydantic import ConfigDict

from jaxrl_llm.experience import by_prompt
from jaxrl_llm.experience.described import shares_of
from jaxrl_llm.experience.pass_rates import PassRates, estimated, expected, observed, unvisited
from jaxrl_llm.experience.strata import Columns, column_problems, is_number, texts_of

if TYPE_CHECKING:
    from jaxrl_llm.types import Groups

Fraction = Annotated[float, Ge(0), Le(1)]
Positive = Annotated[float, Gt(0)]
Rows = Int[np.ndarray, " n"]
EPS = 1e-4
"""Beside the standard deviation of an advantage, as in GRPO."""


@dataclass(frozen=True, kw_only=True)
class ByPassRate:
    """The part of a curriculum that chooses rows with a weight that follows from their pass rates in earlier visits. No row comes
    twice in a batch while others have a weight."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    by: str = "success"
    """Measure of a response from 0 to 1: success, or the name of a grader."""
    memory: Fraction = 0.5
    """Weight of all earlier visits of a prompt beside its last one."""
    prior: Annotated[float, Ge(0)] = 1.0
    """Samples for which a pass rate of 0.5 counts in each estimate: no prompt is left out for good."""

    def over(self, columns: Columns, seed: int) -> "ByPassRate":
        return self

    def weight(self, p: Float[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
        """Return the weight of rows with these pass rates, 0 or more."""
        raise NotImplementedError

    def init(self, num_rows: int) -> PassRates:
        return unvisited(num_rows)

    def choose(self, state: PassRates, rng: np.random.Generator, n: int) -> tuple[PassRates, Rows]:
        return state, drawn(self.weight(estimated(state, np.arange(len(state.samples)), self.prior)), rng, n)

    def observe(self, state: PassRates, groups: "Groups") -> PassRates:
        return observed(state, groups, self.by, self.memory)

    def describe(self, state: PassRates, rows: Rows) -> dict[str, float]:
        return expected(state, rows)


def drawn(weight: Float[np.ndarray, " rows"], rng: np.random.Generator, n: int) -> Rows:
    """Return n rows, one by one in proportion to the weights of those that are left; once none is left, all are there again.
    Without any weight all rows have the same."""
    weight, found = weight if weight.any() else np.ones(len(weight)), []
    while n:
        part = min(n, np.count_nonzero(weight))
        found.append(rng.choice(len(weight), size=part, replace=False, p=weight / weight.sum()))
        n -= part
    return np.concatenate(found)


@dataclass(frozen=True, kw_only=True)
class Unsolved(ByPassRate):
    """Rows in proportion to 1 - p (Kimi k1.5, arXiv 2501.12599: prioritized sampling)."""

    kind: Literal["unsolved"] = "unsolved"

    def weight(self, p: Float[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
        return 1 - p


@dataclass(frozen=True, kw_only=True)
class Learnability(ByPassRate):
    """Rows in proportion to p (1 - p), the variance of success (arXiv 2502.12272)."""

    kind: Literal["learnability"] = "learnability"

    def weight(self, p: Float[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
        return p * (1 - p)


@dataclass(frozen=True, kw_only=True)
class DifficultyTargeted(ByPassRate):
    """Rows in proportion to exp(-|d - target| / tau), d = 1 - p (DOTS, arXiv 2506.05316, eq. 2, where a model predicts d
    from the rewards of reference prompts)."""

    kind: Literal["difficulty_targeted"] = "difficulty_targeted"
    target: Fraction = 0.5
    tau: Positive = 0.1
    """Divisor of the difference of difficulties. The paper's is 0.001: nearly the closest ones alone."""

    def weight(self, p: Float[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
        away = np.abs(1 - p - self.target)
        # From the closest on, so that not all weights vanish.
        return np.exp(-(away - away.min()) / self.tau)


class TargetDifficulty(NamedTuple):
    """State of `AdaRft`."""

    difficulty: Float[np.ndarray, ""]
    times: Int[np.ndarray, " rows"]
    """Times that each row was chosen."""


@dataclass(frozen=True, kw_only=True)
class AdaRft:
    """Rows of the difficulty closest to a target, which rises while rewards are high and falls while they are low (AdaRFT, arXiv
    2504.05520): target <- clip(target + step tanh(sensitivity (mean - wanted)), low, high). Of equally close rows those that were
    chosen least often, by chance among equals."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    column: Annotated[str, MinLen(1)]
    """Column of the task's rows with their difficulty, a number."""
    kind: Literal["ada_rft"] = "ada_rft"
    by: str = "success"
    """success, the name of a grader, or reward: what the mean is of."""
    start: float = 0.0
    step: Positive = 50.0
    sensitivity: Positive = 2.0
    wanted: float = 0.5
    low: float = 0.0
    high: float = 100.0

    def misfits(self, columns: Columns) -> list[str]:
        """Errors about the column."""
        found = column_problems(self.column, columns)
        wrong = [] if found else [row.get(self.column) for row in columns if not is_number(row.get(self.column))]
        return found + [
            f"experience.curriculum.column: got {value!r} as a row's {self.column}, want a number in each"
            for value in wrong[:1]
        ]

    def over(self, columns: Columns, seed: int) -> "_AdaRft":
        return _AdaRft(self, np.array([float(row[self.column]) for row in columns]))


class _AdaRft(NamedTuple):
    cfg: AdaRft
    difficulty: Float[np.ndarray, " rows"]

    def init(self, num_rows: int) -> TargetDifficulty:
        return TargetDifficulty(np.array(float(self.cfg.start)), np.zeros(num_rows, np.int32))

    def choose(self, state: TargetDifficulty, rng: np.random.Generator, n: int) -> tuple[TargetDifficulty, Rows]:
        times, found, away = state.times.copy(), [], np.abs(self.difficulty - state.difficulty)
        while n:
            part = np.lexsort((rng.random(len(times)), times, away))[:n]
            times[part] += 1
            found.append(part)
            n -= len(part)
        return state._replace(times=times), np.concatenate(found)

    def observe(self, state: TargetDifficulty, groups: "Groups") -> TargetDifficulty:
        x, cfg = groups.measure(self.cfg.by), self.cfg
        if np.isnan(x).all():
            return state
        moved = state.difficulty + cfg.step * np.tanh(cfg.sensitivity * (np.nanmean(x) - cfg.wanted))
        return state._replace(difficulty=np.asarray(np.clip(moved, cfg.low, cfg.high)))

    def describe(self, state: TargetDifficulty, rows: Rows) -> dict[str, float]:
        return {"target": float(state.difficulty), "difficulty": float(self.difficulty[rows].mean())}


class Gains(NamedTuple):
    """State of `Sec`."""

    gain: Float[np.ndarray, " values"]
    """Q, expected |advantage| of each value of the column."""
    times: Int[np.ndarray, " rows"]
    """Times that each row was chosen."""


@dataclass(frozen=True, kw_only=True)
class Sec:
    """A bandit over the values of a column: value c with probability softmax(Q_c / tau), where Q_c <- Q_c + rate (mean
    |advantage| - Q_c), advantages as in GRPO (SEC, arXiv 2505.14970). Of its rows the one that was chosen least often."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    column: Annotated[str, MinLen(1)]
    """Column of the task's rows, whose values are compared as text."""
    kind: Literal["sec"] = "sec"
    by: str = "success"
    """success, the name of a grader, or reward: what the advantage is of."""
    rate: Fraction = 0.5
    tau: Positive = 1.0

    def misfits(self, columns: Columns) -> list[str]:
        """Errors about the column."""
        return column_problems(self.column, columns)

    def over(self, columns: Columns, seed: int) -> "_Sec":
        names, value = np.unique(texts_of(self.column, columns), return_inverse=True)
        return _Sec(self, value, tuple(names.tolist()))


class _Sec(NamedTuple):
    cfg: Sec
    value: Int[np.ndarray, " rows"]
    """Index of each row's value."""
    names: tuple[str, ...]
    """The values."""

    def init(self, num_rows: int) -> Gains:
        return Gains(np.zeros(self.value.max() + 1), np.zeros(num_rows, np.int32))

    def choose(self, state: Gains, rng: np.random.Generator, n: int) -> tuple[Gains, Rows]:
        weight = np.exp((state.gain - state.gain.max()) / self.cfg.tau)
        times, found = state.times.copy(), np.zeros(n, int)
        for i, value in enumerate(rng.choice(len(weight), size=n, p=weight / weight.sum())):
            rows = np.flatnonzero(self.value == value)
            found[i] = rows[np.lexsort((rng.random(len(rows)), times[rows]))[0]]
            times[found[i]] += 1
        return state._replace(times=times), found

    def observe(self, state: Gains, groups: "Groups") -> Gains:
        x, size, prompt = groups.measure(self.cfg.by), groups.rollouts.size, groups.rollouts.prompt
        own, gain = prompt >= 0, state.gain.copy()
        mean = by_prompt.means(x, groups)
        away = np.where(own, x - mean[prompt], 0)
        std = np.sqrt(by_prompt.reduced(np.add, away**2, groups) / np.maximum(size - 1, 1))
        size_of_advantage = by_prompt.means(np.abs(away), groups) / (std + EPS)
        graded = (size > 0) & ~np.isnan(mean)
        value = self.value[groups.rollouts.prompts.row]
        for c in np.unique(value[graded]):
            gain[c] += self.cfg.rate * (size_of_advantage[graded & (value == c)].mean() - gain[c])
        return state._replace(gain=gain)

    def describe(self, state: Gains, rows: Rows) -> dict[str, float]:
        return shares_of(self.names, self.value, rows)
