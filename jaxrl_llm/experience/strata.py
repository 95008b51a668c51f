"""Stratified curricula: each batch draws from strata of a task's rows in fixed shares, and in each stratum the rows that were
chosen least often. Configs are frozen dataclasses; `over(columns, seed)` is the curriculum over a task's rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from annotated_types import Ge, Le, MinLen
from jaxtyping import Float, Int
from pydantic import ConfigDict

from jaxrl_llm.experience.described import shares_of
from jaxrl_llm.experience.pass_rates import PassRates, estimated, expected, observed, unvisited

if TYPE_CHECKING:
    from jaxrl_llm.types import Groups

Columns = Sequence[Mapping[str, Any]]
"""Columns of each row of a task: `[row.columns for row in task.train]`."""
Share = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
MAX_SHOWN = 20


class Drawn(NamedTuple):
    """What was chosen so far."""

    times: Int[np.ndarray, " rows"]
    """Times that each row was chosen."""
    owed: Float[np.ndarray, " strata"]
    """Rows of each stratum that are still due: less than one of each, but for rounding. They sum to 0."""


def draw(
    drawn: Drawn,
    stratum: Int[np.ndarray, " rows"],
    share: Float[np.ndarray, " strata"],
    rng: np.random.Generator,
    n: int,
) -> tuple[Drawn, Int[np.ndarray, " n"]]:
    """Return what was chosen then, and the next n rows. Each is of the stratum that is due most, and of its rows the one that was
    chosen least often, by chance among equals. No row comes twice while its stratum has others.

    Args:
        drawn: before.
        stratum: of each row.
        share: weight of each stratum. One without rows leaves its share to the others; if all that have rows have no weight, they
            come as often as they have rows.
        rng: for the choice among equals.
        n: number of rows.
    """
    size = np.bincount(stratum, minlength=len(share)).astype(float)
    share = np.where(size > 0, share, 0)
    share = share if share.any() else size
    owed, share, order = np.where(share > 0, drawn.owed, 0), share / share.sum(), np.zeros(n, int)
    owed -= share * owed.sum()
    for i in range(n):
        owed += share
        # Of equal debts, which rounding may have made unequal, the first.
        order[i] = np.argmax(np.where(share > 0, owed.round(9), -np.inf))
        owed[order[i]] -= 1
    times, chosen = drawn.times.copy(), np.zeros(n, int)
    for s in np.unique(order):
        members, at = np.flatnonzero(stratum == s), np.flatnonzero(order == s)
        for start in range(0, len(at), len(members)):
            part = at[start : start + len(members)]
            least = np.lexsort((rng.random(len(members)), times[members]))[: len(part)]
            chosen[part] = members[least]
            times[members[least]] += 1
    return Drawn(times, owed), chosen


@dataclass(frozen=True, kw_only=True)
class StratifiedByColumn:
    """Every batch has the values of a column in fixed shares, such as levels of difficulty or sources."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    column: Annotated[str, MinLen(1)]
    """Column of the task's rows. Its values are compared as text; those of rows without it are empty."""
    kind: Literal["stratified"] = "stratified"
    shares: dict[str, Share] | None = None
    """Weight of each value; one that is not named is never sampled. None: as they are among the task's rows."""

    def misfits(self, columns: Columns) -> list[str]:
        """Errors about the column and its values."""
        where, values = "experience.curriculum", {*texts_of(self.column, columns)}
        if missing := column_problems(self.column, columns):
            return missing
        shares = {value: 1.0 for value in values} if self.shares is None else self.shares
        found = [
            f"{where}.shares.{value}: got no row whose column {self.column} has this value, want one of: {_shown(sorted(values))}"
            for value in shares
            if value not in values
        ]
        if not any(shares.values()):
            found.append(f"{where}.shares: got no weight above 0, want one or more")
        return found

    def over(self, columns: Columns, seed: int) -> "_Column":
        return _Column(self, columns)


class _Column:
    def __init__(self, cfg: StratifiedByColumn, columns: Columns):
        names, self.stratum = np.unique(texts_of(cfg.column, columns), return_inverse=True)
        self.names = names.tolist()
        shares = np.bincount(self.stratum) if cfg.shares is None else [cfg.shares.get(name, 0.0) for name in self.names]
        self.share = np.array(shares, float)

    def init(self, num_rows: int) -> Drawn:
        return Drawn(np.zeros(num_rows, np.int32), np.zeros(len(self.share)))

    def choose(self, state: Drawn, rng: np.random.Generator, n: int) -> tuple[Drawn, Int[np.ndarray, " n"]]:
        return draw(state, self.stratum, self.share, rng, n)

    def observe(self, state: Drawn, groups: "Groups") -> Drawn:
        return state

    def describe(self, state: Drawn, rows: Int[np.ndarray, " n"]) -> dict[str, float]:
        return shares_of(self.names, self.stratum, rows)


class ByDifficulty(NamedTuple):
    """State of `StratifiedByDifficulty`."""

    drawn: Drawn
    rates: PassRates


@dataclass(frozen=True, kw_only=True)
class StratifiedByDifficulty:
    """Every batch has prompts that are new, hard, medium and easy for the policy in fixed shares, by its pass rates in earlier
    visits."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["stratified_by_difficulty"] = "stratified_by_difficulty"
    by: str = "success"
    """Measure of a response from 0 to 1: success, or the name of a grader."""
    edges: Annotated[tuple[Fraction, ...], MinLen(1)] = (0.25, 0.75)
    """Pass rates at which a stratum begins, rising: below the first is the hardest."""
    shares: tuple[Share, ...] | None = None
    """Weight of the rows that were never visited, and then of each stratum from the hardest to the easiest: one number more than
    strata. One without rows leaves its share to the others. None: equal weights."""
    memory: Fraction = 0.5
    """Weight of all earlier visits of a prompt beside its last one."""

    @property
    def problems(self) -> list[str]:
        """Errors about edges and shares that do not fit together."""
        found, where, num = [], "experience.curriculum", len(self.edges) + 2
        if list(self.edges) != sorted({*self.edges}):
            found.append(f"{where}.edges: got {list(self.edges)}, want rising numbers")
        if self.shares is not None and len(self.shares) != num:
            found.append(
                f"{where}.shares: got {len(self.shares)} numbers, want {num}: for rows never visited, and for {num - 1} strata"
            )
        elif self.shares is not None and not any(self.shares):
            found.append(f"{where}.shares: got no weight above 0, want one or more")
        return found

    def over(self, columns: Columns, seed: int) -> "StratifiedByDifficulty":
        return self

    def init(self, num_rows: int) -> ByDifficulty:
        drawn = Drawn(np.zeros(num_rows, np.int32), np.zeros(len(self.edges) + 2))
        return ByDifficulty(drawn, unvisited(num_rows))

    def choose(
        self, state: ByDifficulty, rng: np.random.Generator, n: int
    ) -> tuple[ByDifficulty, Int[np.ndarray, " n"]]:
        share = np.ones(len(self.edges) + 2) if self.shares is None else np.array(self.shares, float)
        drawn, rows = draw(state.drawn, self.strata(state.rates), share, rng, n)
        return state._replace(drawn=drawn), rows

    def strata(self, rates: PassRates) -> Int[np.ndarray, " rows"]:
        """Return the stratum of each row: 0 for one that was never visited, then from the hardest to the easiest."""
        p = estimated(rates, np.arange(len(rates.samples)), 0.0)
        return np.where(rates.samples > 0, 1 + np.searchsorted(self.edges, p, side="right"), 0)

    def observe(self, state: ByDifficulty, groups: "Groups") -> ByDifficulty:
        return state._replace(rates=observed(state.rates, groups, self.by, self.memory))

    def describe(self, state: ByDifficulty, rows: Int[np.ndarray, " n"]) -> dict[str, float]:
        names = ["new", f"below_{self.edges[0]:g}", *(f"from_{edge:g}" for edge in self.edges)]
        return shares_of(names, self.strata(state.rates), rows) | expected(state.rates, rows)


def column_problems(column: str, columns: Columns) -> list[str]:
    """Error if no row has the column."""
    if any(column in row for row in columns):
        return []
    known = sorted({name for row in columns for name in row})
    return [f"experience.curriculum.column: got {column!r}, want a column of the task: {_shown(known)}"]


def texts_of(column: str, columns: Columns) -> list[str]:
    """Return the values of a column as text, "" where a row has none."""
    return [str(row.get(column, "")) for row in columns]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)


def _shown(names: list[str]) -> str:
    more = f", and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return (", ".join(names[:MAX_SHOWN]) or "it has none") + more
