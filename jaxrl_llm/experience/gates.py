"""Gates: which of the chosen prompts are sampled."""

from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Int

from jaxrl_llm.types import Groups


class Gate(Protocol):
    """Pure functions over a state: a tree of NumPy arrays that is saved in checkpoints."""

    def init(self, num_rows: int) -> Any:
        """Return the state before the first step."""

    def admit(
        self, state: Any, rng: np.random.Generator, row: Int[np.ndarray, " n"]
    ) -> tuple[Any, Bool[np.ndarray, " n"]]:
        """Return the next state, and which of these rows of the task are sampled."""

    def observe(self, state: Any, groups: Groups) -> Any:
        """Return the state after a step's graded groups."""


class AdmitAll:
    """No gate: every prompt is sampled."""

    def init(self, num_rows: int) -> tuple:
        return ()

    def admit(
        self, state: tuple, rng: np.random.Generator, row: Int[np.ndarray, " n"]
    ) -> tuple[tuple, Bool[np.ndarray, " n"]]:
        return state, np.ones(len(row), bool)

    def observe(self, state: tuple, groups: Groups) -> tuple:
        return state
