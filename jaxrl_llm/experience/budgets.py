"""Budgets: how many samples each prompt gets, out of a fixed number."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from jaxtyping import Int

from jaxrl_llm.types import Groups


class Budget(Protocol):
    in_rounds: ClassVar[bool]

    def init(self, num_rows: int) -> Any: ...

    def allocate(
        self, state: Any, row: Int[np.ndarray, " n"], seen: Groups | None, left: int
    ) -> tuple[Any, Int[np.ndarray, " n"]]: ...

    def observe(self, state: Any, groups: Groups) -> Any: ...


@dataclass(frozen=True)
class UniformBudget:
    kind: Literal["uniform"] = "uniform"
    in_rounds: ClassVar[bool] = False

    def init(self, num_rows: int) -> tuple:
        return ()

    def allocate(self, state: tuple, row: np.ndarray, seen: Groups | None, left: int) -> tuple[tuple, np.ndarray]:
        n = len(row)
        return state, np.full(n, left // n) + (np.arange(n) < left % n) if seen is None else np.zeros(n, int)

    def observe(self, state: tuple, groups: Groups) -> tuple:
        return state
