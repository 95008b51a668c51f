"""The sampler: prompts -> generate -> reward. It needs no optimizer and no loss."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Array, Key

from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.curricula import Curriculum, Uniform, VisitCount, counted
from jaxrl_llm.roles.collector import Collected, never
from jaxrl_llm.tasks.stream import make_prompts
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import Groups, Policy, Prompts

# Third number of the curriculum's seed, which makes its generator another than that of filter and replay.
CURRICULUM = 1


def next_prompts(
    task: Task, curriculum: Curriculum | Uniform, choice: VisitCount, rng: np.random.Generator, n: int
) -> tuple[VisitCount, Prompts]:
    """Return the curriculum's next state, and the prompts of the n training rows that it chooses.

        choice = curriculum.init(len(task.train))
        choice, prompts = rl.next_prompts(task, curriculum, choice, rng, 64)

    Args:
        task: its `train` rows are chosen from.
        curriculum: one that counts visits: `rl.curricula.Uniform()`, or `rl.curricula.counted` of your own.
        choice: its state.
        rng: for its random numbers.
        n: number of prompts.

    Raises:
        UserError: the curriculum counts no visits, or its rows are not n indices of the task's rows.
    """
    if not isinstance(choice, VisitCount):
        raise UserError(
            f"choice: got {type(choice).__name__}, the state of a curriculum that counts no visits, from which each visit of a "
            "prompt gets its noise; want curriculum = rl.curricula.counted(yours), and choice = curriculum.init(len(task.train))"
        )
    after, chosen = curriculum.choose(choice, rng, n)
    num = len(task.train)
    try:
        row = np.asarray(chosen)
    except ValueError:
        row = np.asarray(chosen, object)
    if row.shape != (n,) or row.dtype.kind not in "iu" or not ((row >= 0) & (row < num)).all():
        raise UserError(f"curriculum: got rows {row.tolist()}, want {n} indices of the task's {num} rows")
    return after, make_prompts(task, task.train, row, choice.visits + np.arange(n))


class Sampler:
    """A source of graded groups: `use` a policy, `take` a step's groups, `observe` them."""

    def __init__(
        self,
        task: Task,
        curriculum: Curriculum,
        collect: Callable[..., Collected],
        key: Key[Array, ""],
        prompts: int,
        seed: int,
    ):
        """
        Args:
            task: its `train` rows are sampled.
            curriculum: chooses the rows.
            collect: a `Collector`.
            key: random key of all sampled tokens.
            prompts: P, prompts per step.
            seed: of the curriculum's random numbers.
        """
        self.task, self.curriculum, self.collect = task, counted(curriculum), collect
        self.key, self.prompts, self.seed = key, prompts, seed
        self.state: VisitCount = self.curriculum.init(len(task.train))
        """Resumable state; part of `RunState`."""
        self.policy: Policy | None = None
        self.give_up: Callable[[], bool] = never
        self.last: Collected | None = None
        """Result of the last `take`, with its statistics."""

    def use(self, policy: Policy) -> None:
        """Sample from `policy` in later calls of `take`."""
        self.policy = policy

    def take(self, step: int) -> Groups:
        """Graded groups of a step. Raises GivenUp, with the state unchanged, if `give_up` returns True meanwhile."""
        rng = np.random.default_rng((self.seed, step, CURRICULUM))
        state, prompts = next_prompts(self.task, self.curriculum, self.state, rng, self.prompts)
        self.last = self.collect(self.policy, prompts, self.task.train, self.key, self.give_up)
        self.state = state
        return self.last.groups

    def observe(self, groups: Groups) -> None:
        """Update the curriculum with the groups of a step."""
        self.state = self.curriculum.observe(self.state, groups)
