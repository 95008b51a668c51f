"""Rollouts with their grades: groups are graded as they finish, while the others are still being decoded."""

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxrl_llm.environments.grader import Sample
from jaxrl_llm.environments.grader_pool import Graded, GraderPool
from jaxrl_llm.parallel import hosts
from jaxrl_llm.rollout.engine import Engine
from jaxrl_llm.rollout.session import Stats
from jaxrl_llm.tasks.rows import Row
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import Finish, Groups, Policy, Prompts, Rollouts


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
                graded.append((mine, self.pool.submit(self._samples(rows, session.rollouts(mine)))))
            if give_up():
                raise GivenUp
        start = time.perf_counter()
        found = _ungraded(len(prompts.length), self.engine.cfg.samples, len(self.pool.names))
        for mine, job in graded:
            for kept, new in zip(found, _grades(job.result()), strict=True):
                kept[mine] = new
        grades = hosts.each_from(found, np.arange(len(prompts.length)) % num)
        groups = Groups(
            rollouts=session.take(ids),
            reward=grades.reward.reshape(-1),
            components=grades.components.reshape(-1, grades.components.shape[2]),
            failure=grades.failure,
            failed_by=grades.failed_by,
            vote=grades.vote.reshape(-1),
            keep=~np.isnan(grades.reward).reshape(-1),
        )
        return Collected(groups, session.stats, time.perf_counter() - start)

    def _samples(self, rows: Sequence[Row], rollouts: Rollouts) -> list[list[Sample]]:
        """Samples of each group, as the graders read them."""
        size, texts = self.engine.cfg.samples, self.task.decode(rollouts.tokens, rollouts.length)

        def sample_of(row: Row, b: int) -> Sample:
            finish = Finish(rollouts.finish[b]).name.lower()
            return Sample(row.prompt, texts[b], row.answer, finish, row.columns, int(rollouts.length[b]))

        return [
            [sample_of(rows[index], b) for b in range(p * size, (p + 1) * size)]
            for p, index in enumerate(rollouts.prompts.row)
        ]


class _Grades(NamedTuple):
    """Grades of P groups of G rows."""

    reward: Float[np.ndarray, "P G"]
    components: Float[np.ndarray, "P G n"]
    failure: Int[np.ndarray, " P"]
    failed_by: Int[np.ndarray, " P"]
    vote: Int[np.ndarray, "P G"]


def _ungraded(prompts: int, samples: int, graders: int) -> _Grades:
    return _Grades(
        reward=np.full((prompts, samples), np.nan, np.float32),
        components=np.full((prompts, samples, graders), np.nan, np.float32),
        failure=np.zeros(prompts, np.int32),
        failed_by=np.full(prompts, -1, np.int32),
        vote=np.zeros((prompts, samples), np.int32),
    )


def _grades(graded: Graded) -> _Grades:
    vote = [[(zlib.crc32(answer.encode()) >> 1 or 1) if answer else 0 for answer in group] for group in graded.votes]
    components = np.moveaxis(graded.components, 0, -1)
    return _Grades(graded.reward, components, graded.failure, graded.failed_by, np.array(vote, np.int32))
