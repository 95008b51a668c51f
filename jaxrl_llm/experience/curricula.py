"""Curricula: which rows of the task are sampled next."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxrl_llm.experience.config import OwnCurriculum
from jaxrl_llm.experience.stage_checks import checked_init, checked_metrics, checked_state, checked_tuple, copied
from jaxrl_llm.experience.strata import StratifiedByColumn as StratifiedByColumn
from jaxrl_llm.experience.strata import StratifiedByDifficulty as StratifiedByDifficulty
from jaxrl_llm.types import Groups

Order = Callable[[int], int]
"""Row index at a position of the endless stream of rows."""


def no_description(state: Any, rows: Int[np.ndarray, " n"]) -> dict[str, float]:
    return {}


class Curriculum(NamedTuple):
    """Pure functions over a state: a tree of NumPy arrays that is saved in checkpoints."""

    init: Callable[[int], Any]
    """init(num_rows): the state before the first step."""
    choose: Callable[[Any, np.random.Generator, int], tuple[Any, Int[np.ndarray, " n"]]]
    """choose(state, rng, n): the next state, and the indices of the next n rows."""
    observe: Callable[[Any, Groups], Any]
    """observe(state, groups): the state after a step's graded groups, including those that the filter dropped.
    `rollouts.prompts.row` has their row indices."""
    describe: Callable[[Any, Int[np.ndarray, " n"]], dict[str, float]] = no_description
    """describe(state, rows): metrics of the choice of a step's rows, each logged as `curriculum/NAME`."""


class VisitCount(NamedTuple):
    """State of a curriculum that counts its visits."""

    visits: Int[np.ndarray, ""]
    """Prompts chosen so far: the `uid` of the next one, on which its random numbers depend."""
    curriculum: Any
    """State of what chooses."""


@dataclass(frozen=True)
class Uniform:
    """Every row once per epoch, in an order that is shuffled each epoch: that of `jaxrl train` with the same seed.

        curriculum = rl.curricula.Uniform()
        choice = curriculum.init(len(task.train))

    Its state is a `VisitCount` around the number of rows.
    """

    seed: int = 0

    def init(self, num_rows: int) -> VisitCount:
        return VisitCount(np.zeros((), np.int64), np.array(num_rows))

    def choose(self, state: VisitCount, rng: np.random.Generator, n: int) -> tuple[VisitCount, Int[np.ndarray, " n"]]:
        visits, rows = in_order(make_order(int(state.curriculum), self.seed)).choose(state.visits, rng, n)
        return state._replace(visits=visits), rows

    def observe(self, state: VisitCount, groups: Groups) -> VisitCount:
        return state


def counted(curriculum: Any) -> Curriculum:
    """Return the curriculum with a count of its visits in the state, from which each visit of a prompt gets its own noise.

    curriculum = rl.curricula.counted(Hardest(memory=0.25))       # a class of your own: init, choose, observe, perhaps describe
    """

    def choose(state: VisitCount, rng: np.random.Generator, n: int) -> tuple[VisitCount, Int[np.ndarray, " n"]]:
        after, rows = curriculum.choose(state.curriculum, rng, n)
        return VisitCount(state.visits + n, after), rows

    def observe(state: VisitCount, groups: Groups) -> VisitCount:
        return state._replace(curriculum=curriculum.observe(state.curriculum, groups))

    def describe(state: VisitCount, rows: Int[np.ndarray, " n"]) -> dict[str, float]:
        return getattr(curriculum, "describe", no_description)(state.curriculum, rows)

    def init(num_rows: int) -> VisitCount:
        return VisitCount(np.zeros((), np.int64), curriculum.init(num_rows))

    return Curriculum(init, choose, observe, describe)


def own_curriculum(cfg: OwnCurriculum) -> Curriculum:
    """Return a custom curriculum, its results checked."""
    own, name = cfg.made(), f"experience.curriculum {cfg.function}"

    def choose(state: Any, rng: np.random.Generator, n: int) -> tuple[Any, Int[np.ndarray, " n"]]:
        after, rows = checked_tuple(name, own.choose(copied(state), rng, n), ("state", "rows"))
        return checked_state(name, state, after), rows

    def observe(state: Any, groups: Groups) -> Any:
        return checked_state(name, state, own.observe(copied(state), groups))

    def describe(state: Any, rows: Int[np.ndarray, " n"]) -> dict[str, float]:
        return checked_metrics(name, getattr(own, "describe", no_description)(copied(state), rows.copy()))

    return Curriculum(checked_init(name, own.init), choose, observe, describe)


def in_order(order: Order) -> Curriculum:
    """Return the curriculum that takes the rows of an endless stream in order. `order`: maps a position in the stream to its
    row."""

    def choose(position: np.ndarray, rng: np.random.Generator, n: int) -> tuple[np.ndarray, Int[np.ndarray, " n"]]:
        return position + n, np.array([order(int(position) + i) for i in range(n)])

    return Curriculum(lambda num_rows: np.zeros((), np.int64), choose, lambda position, groups: position)


def mixed_order(sizes: Sequence[int], weights: Sequence[float], seed: int) -> Order:
    """Return the order of the rows of several tasks, those of each behind those of the one before. Each task has its weight's share
    of the stream's first n positions, for every n, to within k positions for the k-th task; in the order of a task every row comes
    once per epoch, reshuffled each epoch. A pure function of the seed; with one task it is `make_order`.

    Args:
        sizes: rows of each task.
        weights: of each task, more than 0.
        seed: of all tasks, each of which has its own order.
    """
    # The first task's order is that of the task alone.
    seeds = [seed, *(int(np.random.SeedSequence((seed, k)).generate_state(1)[0]) for k in range(1, len(sizes)))]
    orders = [make_order(size, own) for size, own in zip(sizes, seeds, strict=True)]
    first = [0, *accumulate(sizes)]
    # Of what earlier tasks leave. Exact, so that 0.7 and 0.3 give 7 and 3 of every ten positions.
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact[k:]) for k, weight in enumerate(exact)]

    def row(position: int) -> int:
        for k, share in enumerate(shares):
            taken = position * share.numerator // share.denominator
            if (position + 1) * share.numerator // share.denominator > taken:
                return first[k] + orders[k](taken)
            position -= taken
        raise AssertionError("the last task takes what is left")

    return row


def make_order(num_rows: int, seed: int) -> Order:
    """Return the order of the stream: every row once per epoch, reshuffled each epoch; a pure function of the seed."""
    import grain

    stream = grain.MapDataset.range(num_rows).seed(seed).shuffle().repeat()
    return lambda position: int(stream[position])
