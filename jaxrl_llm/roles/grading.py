"""Grading: samples from rollouts, and groups from grades."""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxrl_llm.environments.grader import Grader, Sample
from jaxrl_llm.environments.grader_pool import Graded, GraderPool
from jaxrl_llm.environments.in_process import grade_in_process
from jaxrl_llm.environments.worker import Failure
from jaxrl_llm.errors import UserError
from jaxrl_llm.parallel import hosts
from jaxrl_llm.tasks.rows import Row
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import Finish, Groups, Prompts, Rollouts


def grade(rollouts: Rollouts, task: Task, reward: Grader | GraderPool, rows: Sequence[Row] | None = None) -> Groups:
    """Return the graded groups, NumPy, equal on every host; each host grades its share.

        groups = rl.grade(rollouts, task, lambda sample: float(sample.completion == sample.answer))

    Args:
        rollouts: of prompts whose `row` is an index into `rows`; of texts or ids, in the order of `rows`.
        task: decodes the responses.
        reward: function of one `Sample` that returns a number, called in this process; or a `GraderPool`.
        rows: with the answers; None: `task.train`.

    Raises:
        UserError: the prompts are not those of `rows`, or the function returned no number that float32 holds.
        Exception: whatever the function raises. (A pool counts it as a failure of the group.)
    """
    rows, num = task.train if rows is None else rows, len(rollouts.prompts.length)
    in_order = rollouts.prompts.replace(row=np.arange(num))
    asked = in_order if (rollouts.prompts.row < 0).all() else rollouts.prompts
    _check_rows(rows, asked)
    mine = np.arange(jax.process_index(), num, jax.process_count())
    samples = samples_of(task, rows, rollouts.replace(prompts=asked))
    samples = [samples[p] for p in mine]
    graded = reward.grade(samples) if isinstance(reward, GraderPool) else grade_in_process(reward, samples)
    grades = blank_grades(num, int(rollouts.size.max()), len(graded.components))
    if len(mine):
        grades.set(mine, graded)
    names = reward.names if isinstance(reward, GraderPool) else [getattr(reward, "__name__", type(reward).__name__)]
    return make_groups(rollouts, grades, np.arange(num) % jax.process_count(), names)


def _check_rows(rows: Sequence[Row], prompts: Prompts) -> None:
    for p, index in enumerate(prompts.row):
        tokens = prompts.tokens[p, : prompts.length[p]]
        if index >= len(rows) or not np.array_equal(rows[index].tokens, tokens):
            raise UserError(
                f"rollouts: got a prompt {p} other than that of row {index}, with its answer; want prompts of rl.next_prompts, "
                "or rows=... in the order of the prompts that engine.generate got"
            )


class Grades(NamedTuple):
    """Grades of P groups of up to G rows."""

    reward: Float[np.ndarray, "P G"]
    components: Float[np.ndarray, "P G n"]
    failure: Int[np.ndarray, " P"]
    failed_by: Int[np.ndarray, " P"]
    vote: Int[np.ndarray, "P G"]

    def set(self, index: Int[np.ndarray, " p"], graded: Graded) -> None:
        """Set the grades of the groups `index`."""
        at = np.asarray(index), slice(graded.reward.shape[1])
        self.reward[at], self.components[at] = graded.reward, np.moveaxis(graded.components, 0, -1)
        self.failure[index], self.failed_by[index] = graded.failure, graded.failed_by
        for p, answers in zip(index, graded.votes, strict=True):
            vote = [(zlib.crc32(answer.encode()) >> 1 or 1) if answer else 0 for answer in answers]
            self.vote[p, : len(answers)] = vote


def blank_grades(prompts: int, samples: int, graders: int) -> Grades:
    """Return the grades of groups that nobody has graded."""
    return Grades(
        reward=np.full((prompts, samples), np.nan, np.float32),
        components=np.full((prompts, samples, graders), np.nan, np.float32),
        failure=np.zeros(prompts, np.int32),
        failed_by=np.full(prompts, -1, np.int32),
        vote=np.zeros((prompts, samples), np.int32),
    )


def samples_of(task: Task, rows: Sequence[Row], rollouts: Rollouts) -> list[list[Sample]]:
    """Return the samples of each group, as the graders read them.

    Args:
        task: decodes the responses.
        rows: with the answers; `rollouts.prompts.row` is an index into them.
        rollouts: of the groups.
    """
    texts = task.decode(rollouts.tokens, rollouts.length)
    found: list[list[Sample]] = [[] for _ in rollouts.prompts.row]
    for b, p in enumerate(rollouts.prompt.tolist()):
        if p >= 0:
            row, finish = rows[rollouts.prompts.row[p]], Finish(rollouts.finish[b]).name.lower()
            found[p].append(Sample(row.prompt, texts[b], row.answer, finish, row.columns, int(rollouts.length[b])))
    return found


def make_groups(
    rollouts: Rollouts, grades: Grades, host: Int[np.ndarray, " P"], graders: Sequence[str] = (), threshold: float = 1.0
) -> Groups:
    """Return the groups, equal on every host; graded ones are kept.

    Args:
        rollouts: of the groups.
        grades: of each group, on one host.
        host: the one that has them.
        graders, threshold: as in `Groups`.
    """
    prompt = rollouts.prompt
    grades = hosts.each_from(grades, host)
    own = np.flatnonzero(prompt >= 0)
    place = own - (np.cumsum(rollouts.size) - rollouts.size)[prompt[own]]

    def of_rows(grades: np.ndarray, filler: float) -> np.ndarray:
        found = np.full((len(prompt), *grades.shape[2:]), filler, grades.dtype)
        found[own] = grades[prompt[own], place]
        return found

    reward = of_rows(grades.reward, np.nan)
    return Groups(
        rollouts=rollouts,
        reward=reward,
        components=of_rows(grades.components, np.nan),
        failure=grades.failure,
        failed_by=grades.failed_by,
        vote=of_rows(grades.vote, 0),
        keep=~np.isnan(reward),
        graders=tuple(graders),
        threshold=threshold,
    )


def merge_requests(groups: Groups, group: Int[np.ndarray, " P"]) -> Groups:
    """Return the groups of which some were asked for in several requests. If grading one of them failed, all of the group failed.

    Args:
        groups: one per request.
        group: number of the group of each request, ascending.
    """
    begins = np.diff(group, prepend=-1) != 0
    if begins.all():
        return groups
    first, of_request = np.flatnonzero(begins), np.cumsum(begins) - 1
    # The request that failed first, or the first one.
    speaks = [part[np.argmax(groups.failure[part] > 0)] for part in np.split(np.arange(len(group)), first[1:])]
    failure, prompt = groups.failure[speaks], groups.rollouts.prompt
    prompt = np.where(prompt >= 0, of_request[prompt], -1).astype(np.int32)
    graded = (prompt >= 0) & (failure == Failure.NONE)[prompt]
    return groups.replace(
        rollouts=groups.rollouts.replace(
            prompts=jax.tree.map(lambda x: x[first], groups.rollouts.prompts), prompt=prompt
        ),
        reward=np.where(graded, groups.reward, np.float32(np.nan)),
        components=np.where(graded[:, None], groups.components, np.float32(np.nan)),
        failure=failure,
        failed_by=groups.failed_by[speaks],
        vote=np.where(graded, groups.vote, 0).astype(np.int32),
        keep=groups.keep & graded,
    )
