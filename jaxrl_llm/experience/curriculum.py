"""Curricula: which rows of the task are sampled next."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxrl_llm.experience.config import OwnCurriculum
from jaxrl_llm.experience.stage_checks import first_state, next_state, parts_of
from jaxrl_llm.types import Groups


class Curriculum(NamedTuple):
    """Pure functions over a state, which is a tree of NumPy arrays and belongs into checkpoints."""

    init: Callable[[int], Any]
    """The state before the first step, from the number of rows."""
    choose: Callable[[Any, np.random.Generator, int], tuple[Any, Int[np.ndarray, " n"]]]
    """The next state, and the indices of the next n rows."""
    observe: Callable[[Any, Groups], Any]
    """The state that has seen a step's graded groups, those that the filter dropped too; `rollouts.prompts.row` says which rows
    they are of."""


def own_curriculum(cfg: OwnCurriculum) -> Curriculum:
    own, name = cfg.made(), f"experience.curriculum {cfg.function}"

    def choose(state: Any, rng: np.random.Generator, n: int) -> tuple[Any, Int[np.ndarray, " n"]]:
        after, rows = parts_of(name, own.choose(state, rng, n), ("state", "rows"))
        return next_state(name, state, after), rows

    def observe(state: Any, groups: Groups) -> Any:
        return next_state(name, state, own.observe(state, groups))

    return Curriculum(first_state(name, own.init), choose, observe)


def in_order(order: Callable[[int], int]) -> Curriculum:
    """The rows of an endless stream, one after another. `order`: from a place in the stream to the row."""

    def choose(place: np.ndarray, rng: np.random.Generator, n: int) -> tuple[np.ndarray, Int[np.ndarray, " n"]]:
        return place + n, np.array([order(int(place) + i) for i in range(n)])

    return Curriculum(lambda num_rows: np.zeros((), np.int64), choose, lambda place, groups: place)
