"""Grading: samples from rollouts, and groups from grades."""

import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxrl_llm.environments.grader import Grader, Sample
from jaxrl_llm.environments.grader_pool import Graded, GraderPool
from jaxrl_llm.environments.in_process import grade_in_process
from jaxrl_llm.environments.worker import Failure
from jaxrl_llm.errors import UserError
from jaxrl_llm.parallel import hosts
from jaxrl_llm.tasks.rows import Row
from jaxrl_llm.tasks.stream import rows_asked
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.tasks.tokenizer import Tokenizer
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
    has_steps = isinstance(reward, GraderPool) and reward.has_steps
    grades = blank_grades(rollouts, len(graded.components), has_steps)
    if len(mine):
        grades.set(mine, graded)
        grades.set_steps(mine, graded, rollouts, task.tokenizer)
    names = reward.names if isinstance(reward, GraderPool) else [getattr(reward, "__name__", type(reward).__name__)]
    return make_groups(rollouts, grades, np.arange(num) % jax.process_count(), names)


def _check_rows(rows: Sequence[Row], prompts: Prompts) -> None:
    for p, index in enumerate(prompts.row):
        tokens = prompts.tokens[p, : prompts.length[p]]
        if index >= len(rows) or not np.array_equal(rows[index].asked_by(prompts.uid[p], tokens).tokens, tokens):
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
    step_reward: Float[np.ndarray, "P G C"] | None = None

    def set(self, index: Int[np.ndarray, " p"], graded: Graded) -> None:
        """Set the grades of the groups `index`."""
        at = np.asarray(index), slice(graded.reward.shape[1])
        self.reward[at], self.components[at] = graded.reward, np.moveaxis(graded.components, 0, -1)
        self.failure[index], self.failed_by[index] = graded.failure, graded.failed_by
        for p, answers in zip(index, graded.votes, strict=True):
            vote = [(zlib.crc32(answer.encode()) >> 1 or 1) if answer else 0 for answer in answers]
            self.vote[p, : len(answers)] = vote

    def set_steps(self, index: Int[np.ndarray, " p"], graded: Graded, rollouts: Rollouts, tokenizer: Tokenizer) -> None:
        """Set `step_reward` of the groups `index`, if the graders have steps. `rollouts`: of all P groups."""
        if self.step_reward is None:
            return
        for p, group in zip(index, graded.earned, strict=True):
            for g, (b, earned) in enumerate(zip(np.flatnonzero(rollouts.prompt == p), group, strict=True)):
                ids = rollouts.tokens[b, : rollouts.length[b]].tolist()
                for slot, reward in rewarded_slots(earned, ids, rollouts.sampled[b], tokenizer):
                    self.step_reward[p, g, slot] = reward


def rewarded_slots(
    earned: Mapping[int, float], ids: Sequence[int], sampled: Bool[np.ndarray, " C"], tokenizer: Tokenizer
) -> list[tuple[int, float]]:
    """Return (slot, reward) where a response earned its reward: at the last token of each step, and for the last step at the row's
    last one, the end token included. A token that the policy did not sample earns nothing: the last sampled one before it does, if
    there is one.

    Args:
        earned: reward by the number of characters up to the end of a step, as in `Graded`.
        ids: tokens of the response.
        sampled: of the row.
        tokenizer: that of the response.
    """
    ends, slots = sorted(earned), np.flatnonzero(sampled)
    last = [*tokenizer.tokens_at(ids, ends[:-1]), len(ids) - 1] if ends else []
    found: dict[int, float] = {}
    for end, place in zip(ends, np.searchsorted(slots, last, side="right") - 1, strict=True):
        if place >= 0:
            slot = int(slots[place])
            found[slot] = found.get(slot, 0.0) + earned[end]
    return list(found.items())


def blank_grades(rollouts: Rollouts, graders: int, has_steps: bool = False) -> Grades:
    """Return the grades of groups that nobody has graded."""
    prompts, samples = len(rollouts.prompts.length), int(rollouts.size.max())
    return Grades(
        reward=np.full((prompts, samples), np.nan, np.float32),
        components=np.full((prompts, samples, graders), np.nan, np.float32),
        failure=np.zeros(prompts, np.int32),
        failed_by=np.full(prompts, -1, np.int32),
        vote=np.zeros((prompts, samples), np.int32),
        step_reward=np.full((prompts, samples, rollouts.tokens.shape[1]), np.nan, np.float32) if has_steps else None,
    )


def samples_of(task: Task, rows: Sequence[Row], rollouts: Rollouts) -> list[list[Sample]]:
    """Return the samples of each group, as the graders read them.

    Args:
        task: decodes the responses.
        rows: with the answers; `rollouts.prompts.row` is an index into them.
        rollouts: of the groups.
    """
    texts, asked = task.decode(rollouts.tokens, rollouts.length), rows_asked(rows, rollouts.prompts)
    found: list[list[Sample]] = [[] for _ in asked]
    for b, p in enumerate(rollouts.prompt.tolist()):
        if p >= 0:
            row, finish = asked[p], Finish(rollouts.finish[b]).name.lower()
            num_tokens = int(rollouts.length[b])
            found[p].append(Sample(row.text, texts[b], row.answer, finish, row.columns, num_tokens, task=row.task))
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
        step_reward=None if grades.step_reward is None else of_rows(grades.step_reward, np.nan),
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
    failure, prompt, steps = groups.failure[speaks], groups.rollouts.prompt, groups.step_reward
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
        step_reward=None if steps is None else np.where(graded[:, None], steps, np.float32(np.nan)),
    )
