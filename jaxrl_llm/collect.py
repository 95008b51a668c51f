"""Rollouts with their grades: groups go to the graders as they finish, while the rest is still being decoded."""

import time
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxrl_llm.parallel import hosts
from jaxrl_llm.prompts.rows import Row
from jaxrl_llm.rewards.graders import Sample
from jaxrl_llm.rewards.pool import Graded, GraderPool
from jaxrl_llm.rollout.engine import Stats
from jaxrl_llm.run import Run
from jaxrl_llm.types import Finish, Policy, Prompts, Rollouts


class Grades(NamedTuple):
    """What the graders said of P groups of G responses, as NumPy, equal on every host. NaN where a group failed."""

    reward: Float[np.ndarray, "P G"]
    parts: Float[np.ndarray, "n P G"]
    """What each of the n graders gave, before weights."""
    failure: Int[np.ndarray, " P"]
    """A `Failure` each."""
    failed_by: Int[np.ndarray, " P"]
    """Which grader failed, -1 where none did."""
    vote: Int[np.ndarray, "P G"]
    """A number for each final answer, equal for equal ones; 0 where there is none."""


class Collected(NamedTuple):
    rollouts: Rollouts
    """NumPy, equal on every host."""
    grades: Grades
    stats: Stats
    waited: float
    """Seconds for graders after the last token."""


class GivenUp(Exception):
    """`give_up` said so between two segments."""


def collect(
    run: Run,
    pool: GraderPool,
    policy: Policy,
    prompts: Prompts,
    rows: tuple[Row, ...],
    key: Key[Array, ""],
    give_up: Callable[[], bool] = lambda: False,
) -> Collected:
    """G samples for each prompt, whose `row` is an index into `rows`, and their grades. Each host grades its share of the groups.

    Raises GivenUp where `give_up` says so; nothing is left behind then.
    """
    controls = run.engine.controls(len(prompts.length), run.cfg.rollout.temperature)
    generation = run.engine.start(policy, prompts, key, controls)
    graded, num, me = [], jax.process_count(), jax.process_index()
    for finished in generation:
        mine = finished[finished % num == me]
        if len(mine):
            graded.append((mine, pool.submit(groups_of(run, rows, generation.rollouts(mine)))))
        if give_up():
            raise GivenUp
    start, num_prompts, size = time.perf_counter(), len(prompts.length), run.cfg.rollout.samples
    merged = Grades(
        reward=np.full((num_prompts, size), np.nan, np.float32),
        # Prompts first, for the exchange.
        parts=np.full((num_prompts, len(run.cfg.reward.graders), size), np.nan, np.float32),
        failure=np.zeros(num_prompts, np.int32),
        failed_by=np.full(num_prompts, -1, np.int32),
        vote=np.zeros((num_prompts, size), np.int32),
    )
    for mine, job in graded:
        for kept, new in zip(merged, _grades(job.result()), strict=True):
            kept[mine] = new.reshape(len(mine), *kept.shape[1:])
    merged = hosts.each_from(merged, np.arange(num_prompts) % num)
    grades = merged._replace(parts=merged.parts.swapaxes(0, 1))
    return Collected(generation.rollouts(), grades, generation.stats, time.perf_counter() - start)


def groups_of(run: Run, rows: tuple[Row, ...], rollouts: Rollouts) -> list[list[Sample]]:
    """What the graders read of each group."""
    size = run.cfg.rollout.samples
    texts = run.task.decode(rollouts.tokens, rollouts.length)

    def sample_of(row: Row, b: int) -> Sample:
        finish = Finish(rollouts.finish[b]).name.lower()
        return Sample(row.prompt, texts[b], row.answer, finish, row.columns, int(rollouts.length[b]))

    return [
        [sample_of(rows[index], b) for b in range(p * size, (p + 1) * size)]
        for p, index in enumerate(rollouts.prompts.row)
    ]


def _grades(graded: Graded) -> Grades:
    """With the parts of a prompt together."""
    vote = [[(zlib.crc32(answer.encode()) >> 1 or 1) if answer else 0 for answer in group] for group in graded.votes]
    return Grades(
        graded.reward, graded.parts.swapaxes(0, 1), graded.failure, graded.failed_by, np.array(vote, np.int32)
    )
