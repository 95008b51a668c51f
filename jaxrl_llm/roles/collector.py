"""Rollouts with their grades: groups are graded as they finish, while the others are still being decoded."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
from jaxtyping import Array, Key

from jaxrl_llm.environments.grader_pool import GraderPool
from jaxrl_llm.roles.grading import blank_grades, make_groups, samples_of
from jaxrl_llm.rollout.engine import Engine
from jaxrl_llm.rollout.session import Stats
from jaxrl_llm.tasks.rows import Row
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import Groups, Policy, Prompts


class Collected(NamedTuple):
    groups: Groups
    """NumPy, equal on every host; graded groups are kept."""
    stats: Stats
    waited: float
    """Seconds spent waiting for graders after the last token."""


class GivenUp(Exception):
    """`give_up` returned True between two decode chunks."""


def never() -> bool:
    return False


@dataclass(frozen=True)
class Collector:
    """Samples responses from a policy and has them graded. Each host grades its share of the groups."""

    engine: Engine
    pool: GraderPool
    task: Task

    def __call__(
        self,
        policy: Policy,
        prompts: Prompts,
        rows: Sequence[Row],
        key: Key[Array, ""],
        give_up: Callable[[], bool] = never,
    ) -> Collected:
        """Graded groups, one per prompt.

        Args:
            policy: samples the responses.
            prompts: their `row` is an index into `rows`.
            rows: of the task, with the answers.
            key: random key of the sampled tokens.
            give_up: called between decode chunks; True stops the sampling.

        Raises:
            GivenUp: `give_up` returned True; no state has changed.
        """
        session = self.engine.session(policy, key)
        ids = session.add(prompts)
        graded, num, me = [], jax.process_count(), jax.process_index()
        while session.pending:
            finished = session.advance()
            mine = finished[finished % num == me]
            if len(mine):
                graded.append((mine, self.pool.submit(samples_of(self.task, rows, session.rollouts(mine)))))
            if give_up():
                raise GivenUp
        start = time.perf_counter()
        grades = blank_grades(len(prompts.length), self.engine.cfg.samples, len(self.pool.names))
        for mine, job in graded:
            grades.set(mine, job.result())
        groups = make_groups(session.take(ids), grades)
        return Collected(groups, session.stats, time.perf_counter() - start)
