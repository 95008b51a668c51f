"""The sampler: prompts -> generate -> reward. It needs no optimizer and no loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Int, Key

from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.curriculum import Curriculum
from jaxrl_llm.roles.collector import Collected, never
from jaxrl_llm.tasks.stream import make_prompts
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import Groups, Policy, Prompts

# Third number of the curriculum's seed, which makes its generator another than that of filter and replay.
CURRICULUM = 1


class SamplerState(NamedTuple):
    """Resumable state of the sampler; part of `RunState`."""

    visits: Int[np.ndarray, ""]
    """Prompts sampled so far: the `uid` of the next one, on which its random numbers depend."""
    curriculum: Any


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
        self.task, self.curriculum, self.collect = task, curriculum, collect
        self.key, self.prompts, self.seed = key, prompts, seed
        self.state = SamplerState(np.zeros((), np.int64), curriculum.init(len(task.train)))
        self.policy: Policy | None = None
        self.give_up: Callable[[], bool] = never
        self.last: Collected | None = None
        """Result of the last `take`, with its statistics."""

    def use(self, policy: Policy) -> None:
        """Sample from `policy` in later calls of `take`."""
        self.policy = policy

    def take(self, step: int) -> Groups:
        """Graded groups of a step. Raises GivenUp, with the state unchanged, if `give_up` returns True meanwhile."""
        prompts, state = self._next(step)
        self.last = self.collect(self.policy, prompts, self.task.train, self.key, self.give_up)
        self.state = state
        return self.last.groups

    def observe(self, groups: Groups) -> None:
        """Update the curriculum with the groups of a step."""
        self.state = self.state._replace(curriculum=self.curriculum.observe(self.state.curriculum, groups))

    def _next(self, step: int) -> tuple[Prompts, SamplerState]:
        rng = np.random.default_rng((self.seed, step, CURRICULUM))
        curriculum, chosen = self.curriculum.choose(self.state.curriculum, rng, self.prompts)
        num = len(self.task.train)
        try:
            row = np.asarray(chosen)
        except ValueError:
            row = np.asarray(chosen, object)
        if row.shape != (self.prompts,) or row.dtype.kind not in "iu" or not ((row >= 0) & (row < num)).all():
            raise UserError(
                f"curriculum: got rows {row.tolist()}, want {self.prompts} indices of the task's {num} rows"
            )
        uid = self.state.visits + np.arange(self.prompts)
        prompts = make_prompts(self.task, self.task.train, row, uid)
        return prompts, SamplerState(self.state.visits + self.prompts, curriculum)
