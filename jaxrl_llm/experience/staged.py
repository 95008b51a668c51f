"""A curriculum of stages: parts of a task's rows, one after the other, each opened when the one before is mastered."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from annotated_types import Ge, Le, Lt, MinLen
from jaxtyping import Float, Int
from pydantic import ConfigDict, model_validator

from jaxrl_llm.experience import by_prompt
from jaxrl_llm.experience.described import shares_of
from jaxrl_llm.experience.strata import Columns, Drawn, column_problems, draw, is_number

if TYPE_CHECKING:
    from jaxrl_llm.types import Groups

WHERE = "experience.curriculum"


@dataclass(frozen=True)
class RowsOfStage:
    """Which rows a stage has: values of the column, or a range of numbers. A list of values will do: `[2, 3]`."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    values: Annotated[tuple[str | bool | int | float, ...], MinLen(1)] | None = None
    """Values of the column, compared as text."""
    at_least: float | None = None
    """Smallest number of the range. None: no bound."""
    at_most: float | None = None
    """Largest number of the range. None: no bound."""

    @model_validator(mode="before")
    @classmethod
    def written_out(cls, value: Any) -> Any:
        return {"values": value} if isinstance(value, list | tuple) else value

    @property
    def problem(self) -> str:
        """What is wrong with it; "" if nothing is."""
        bounds = (self.at_least, self.at_most) != (None, None)
        if bounds == (self.values is not None):
            return f"got {'both' if bounds else 'neither'}, want values, or a range (at_least, at_most)"
        if None not in (self.at_least, self.at_most) and self.at_least > self.at_most:
            return f"got at_least {self.at_least:g}, want at most at_most ({self.at_most:g})"
        return ""

    def has(self, value: Any) -> bool:
        """True if a row with this value of the column belongs to the stage."""
        if self.values is not None:
            return str(value) in {str(x) for x in self.values}
        low = -np.inf if self.at_least is None else self.at_least
        return is_number(value) and low <= value <= (np.inf if self.at_most is None else self.at_most)


class GateProgress(NamedTuple):
    """State of `Staged`."""

    drawn: Drawn
    """Times that each row was chosen, and what is due of each stage."""
    stage: Int[np.ndarray, ""]
    """Index of the current stage."""
    steps: Int[np.ndarray, ""]
    """Steps since it was opened."""
    window: Float[np.ndarray, " groups"]
    """Means of the last graded groups of its rows, the newest last; NaN: fewer were graded so far."""


@dataclass(frozen=True, kw_only=True)
class Staged:
    """Rows of one stage after the other. The next one opens when the mean over the last graded groups of the current stage's rows
    reaches a threshold; a share of the prompts comes from earlier stages, from each as often as it has rows, so that they are not
    forgotten. In each stage the rows that were chosen least often come first. After the last stage has opened, it stays."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    column: Annotated[str, MinLen(1)]
    """Column of the task's rows."""
    stages: Annotated[tuple[RowsOfStage, ...], MinLen(1)]
    """The stages in order. A row belongs to the first one that has it."""
    kind: Literal["stages"] = "stages"
    by: str = "success"
    """success, the name of a grader, or reward: what the mean is of."""
    reaches: float = 0.8
    """Mean at which the next stage opens."""
    groups: Annotated[int, Ge(1), Le(2**20)] = 64
    """Graded groups of the current stage's rows that the mean is over, the last ones. It counts once there are so many."""
    after: Annotated[int, Ge(0)] = 0
    """Steps after which the next stage opens in any case; 0: never."""
    rehearsal: Annotated[float, Ge(0), Lt(1)] = 0.2
    """Share of the prompts that comes from earlier stages, once there are some."""

    @property
    def problems(self) -> list[str]:
        """Errors about stages and gate."""
        found = [f"{WHERE}.stages.{i}: {problem}" for i, stage in enumerate(self.stages) if (problem := stage.problem)]
        if self.by == "success" and not 0 <= self.reaches <= 1:
            found.append(f"{WHERE}.reaches: got {self.reaches:g}, want 0 to 1: it is a share of right responses")
        return found

    def misfits(self, columns: Columns) -> list[str]:
        """Errors about the column and the rows of each stage."""
        if found := column_problems(self.column, columns):
            return found
        if self.problems:
            return []
        stage = self._stages_of(columns)
        for i in range(len(self.stages)):
            if not (stage == i).any():
                found.append(f"{WHERE}.stages.{i}: got no row that is in no earlier stage, want one or more")
        if len(rest := np.flatnonzero(stage < 0)):
            value = columns[rest[0]].get(self.column)
            found.append(
                f"{WHERE}.stages: got {len(rest)} rows in no stage, the first with {self.column} {value!r}, want each row in one"
            )
        return found

    def over(self, columns: Columns, seed: int) -> "_Staged":
        return _Staged(self, self._stages_of(columns))

    def _stages_of(self, columns: Columns) -> Int[np.ndarray, " rows"]:
        """Return the index of each row's stage, -1 if it has none."""
        known: dict[str, int] = {}
        return np.array([_first(self.stages, row.get(self.column, ""), known) for row in columns], int)


def _first(stages: Sequence[RowsOfStage], value: Any, known: dict[str, int]) -> int:
    """Return the first stage that has the value; -1: none has."""
    if repr(value) not in known:
        known[repr(value)] = next((i for i, stage in enumerate(stages) if stage.has(value)), -1)
    return known[repr(value)]


class _Staged(NamedTuple):
    cfg: Staged
    stage: Int[np.ndarray, " rows"]

    def init(self, num_rows: int) -> GateProgress:
        drawn = Drawn(np.zeros(num_rows, np.int32), np.zeros(len(self.cfg.stages)))
        return GateProgress(drawn, np.array(0), np.array(0), np.full(self.cfg.groups, np.nan))

    def choose(
        self, state: GateProgress, rng: np.random.Generator, n: int
    ) -> tuple[GateProgress, Int[np.ndarray, " n"]]:
        now, share = int(state.stage), np.bincount(self.stage, minlength=len(self.cfg.stages)).astype(float)
        share[:now] *= self.cfg.rehearsal / max(share[:now].sum(), 1.0)
        share[now], share[now + 1 :] = 1 - self.cfg.rehearsal, 0.0
        drawn, rows = draw(state.drawn, self.stage, share, rng, n)
        return state._replace(drawn=drawn), rows

    def observe(self, state: GateProgress, groups: "Groups") -> GateProgress:
        mean, row = by_prompt.means(groups.measure(self.cfg.by), groups), groups.rollouts.prompts.row
        counts = (self.stage[row] == state.stage) & (groups.rollouts.size > 0) & ~np.isnan(mean)
        window = np.concatenate([state.window, mean[counts]])[-len(state.window) :]
        steps = state.steps + 1
        # NaN, as long as there are too few groups, reaches nothing. The margin is of sums such as ten times 0.1.
        opens = window.mean() >= self.cfg.reaches - 1e-9 or 0 < self.cfg.after <= steps
        if opens and state.stage < len(self.cfg.stages) - 1:
            return state._replace(stage=state.stage + 1, steps=np.array(0), window=np.full_like(window, np.nan))
        return state._replace(steps=steps, window=window)

    def describe(self, state: GateProgress, rows: Int[np.ndarray, " n"]) -> dict[str, float]:
        """Return the number of the current stage, from 1, the share of its window that is filled and the window's mean, and the
        stages' shares of the rows."""
        seen = state.window[~np.isnan(state.window)]
        found = {"stage": float(state.stage + 1), "window_filled": len(seen) / len(state.window)}
        names = [f"stage_{i + 1}" for i in range(len(self.cfg.stages))]
        return found | ({"window_mean": float(seen.mean())} if len(seen) else {}) | shares_of(names, self.stage, rows)
