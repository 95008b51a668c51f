"""Curricula: which rows of the task are sampled next."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxrl_llm.experience.config import OwnCurriculum
from jaxrl_llm.experience.stage_checks import checked_init, checked_state, checked_tuple
from jaxrl_llm.types import Groups


class Curriculum(NamedTuple):
    """Pure functions over a state: a tree of NumPy arrays that is saved in checkpoints."""

    init: Callable[[int], Any]
    """init(num_rows): the state before the first step."""
    choose: Callable[[Any, np.random.Generator, int], tuple[Any, Int[np.ndarray, " n"]]]
    """choose(state, rng, n): the next state, and the indices of the next n rows."""
    observe: Callable[[Any, Groups], Any]
    """observe(state, groups): the state after a step's graded groups, including those that the filter dropped.
    `rollouts.prompts.row` has their row indices."""


def own_curriculum(cfg: OwnCurriculum) -> Curriculum:
    """Return a custom curriculum, its results checked."""
    own, name = cfg.made(), f"experience.curriculum {cfg.function}"

    def choose(state: Any, rng: np.random.Generator, n: int) -> tuple[Any, Int[np.ndarray, " n"]]:
        after, rows = checked_tuple(name, own.choose(state, rng, n), ("state", "rows"))
        return checked_state(name, state, after), rows

    def observe(state: Any, groups: Groups) -> Any:
        return checked_state(name, state, own.observe(state, groups))

    return Curriculum(checked_init(name, own.init), choose, observe)


def in_order(order: Callable[[int], int]) -> Curriculum:
    """Return the curriculum that takes the rows of an endless stream in order. `order`: maps a position in the stream to its
    row."""

    def choose(position: np.ndarray, rng: np.random.Generator, n: int) -> tuple[np.ndarray, Int[np.ndarray, " n"]]:
        return position + n, np.array([order(int(position) + i) for i in range(n)])

    return Curriculum(lambda num_rows: np.zeros((), np.int64), choose, lambda position, groups: position)
