"""Rollouts with their grades: requests are graded as they finish, while others are still being decoded."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int, Key

from jaxrl_llm.environments.grader_pool import Graded, GraderPool
from jaxrl_llm.roles.grading import blank_grades, grade, make_groups, merge_requests, samples_of
from jaxrl_llm.rollout.config import InexactReuse, NoTree, RolloutConfig
from jaxrl_llm.rollout.engine import Engine
from jaxrl_llm.rollout.reuse import begin
from jaxrl_llm.rollout.sample import Controls
from jaxrl_llm.rollout.session import Session, Stats
from jaxrl_llm.tasks.rows import Row
from jaxrl_llm.tasks.stream import completion_limits
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import Groups, Policy, Prompts, Rollouts, join_groups, select_groups


class Asked(NamedTuple):
    """Requests: prompts, and how many samples of each."""

    prompts: Prompts
    group: Int[np.ndarray, " n"]
    """Number of the group that a request belongs to, from 0: a group may be asked for in several requests."""
    samples: Int[np.ndarray, " n"]
    first_sample: Int[np.ndarray, " n"]
    """Sample number of the first row."""
    hints: list[list[int]] | None = None
    """Tokens that each row begins with, []: none. None: no request of the step has any."""
    known: Rollouts | None = None
    """An earlier response for each row, some without a token, to be kept as far as the policy does. None: there are none."""


More = Callable[[Groups, Int[np.ndarray, " n"]], Asked | None]
"""more(groups, group): requests that follow from these graded ones, each with the number of its group."""


class Collected(NamedTuple):
    groups: Groups
    """In the order of their numbers, NumPy, equal on every host; graded groups are kept."""
    stats: Stats
    waited: float
    """Seconds in which nothing was decoded because grades were missing."""
    kept: Int[np.ndarray, " B"] | None = None
    """Tokens of each row that are those of an earlier response; None: of trees, which have none."""


class GivenUp(Exception):
    """`give_up` returned True between two decode chunks."""


def never() -> bool:
    return False


def ask(prompts: Prompts, samples: int) -> Asked:
    """Return the requests of as many groups as prompts, of equally many samples."""
    num = len(prompts.length)
    return Asked(prompts, np.arange(num), np.full(num, samples), np.zeros(num, int))


@dataclass(frozen=True)
class Collector:
    """Samples responses from a policy and has them graded. Each host grades its share of the requests."""

    engine: Engine
    pool: GraderPool
    task: Task
    threshold: float = 1.0
    """Lowest reward by the first grader of a right response."""

    def __call__(
        self,
        policy: Policy,
        asked: Asked | Prompts,
        rows: Sequence[Row],
        key: Key[Array, ""],
        give_up: Callable[[], bool] = never,
        more: More | None = None,
    ) -> Collected:
        """Graded groups.

        With `more`, the grades of what a chunk finished are waited for once the next chunk is decoded, and what they lead to joins
        the chunk after it: which chunk that is depends on no grader's speed, so a run can be repeated.

        Args:
            policy: samples the responses.
            asked: the first requests; or prompts, each with the configured number of independent samples, all with the same
                sampling parameters. Their prompts' `row` is an index into `rows`.
            rows: of the task, with the answers.
            key: random key of the sampled tokens.
            give_up: called between decode chunks; True stops the sampling.
            more: called with graded requests, in an order that depends on no grader.

        Raises:
            GivenUp: `give_up` returned True; no state has changed.
        """
        if isinstance(asked, Asked) and not isinstance(self.engine.cfg.tree, NoTree):
            return self._trees(policy, asked, rows, key, give_up, more)
        session = self.engine.session(policy, key)
        requests, none = _Requests(session, rows, self.engine.cfg), np.zeros(0, int)
        grading, last = _Grading(self, requests), none
        if isinstance(asked, Prompts):
            requests.add(ask(asked, self.engine.cfg.samples), self.engine.controls(len(asked.length)))
        else:
            requests.add(asked)
        while session.pending or len(last):
            finished = session.advance() if session.pending else none
            grading.submit(finished)
            if more and len(last):
                following = more(grading.groups(last, session.rollouts(last)), np.array(requests.group)[last])
                if following:
                    requests.add(following)
            last = finished if more else none
            if give_up():
                raise GivenUp
        ids = np.argsort(requests.group, kind="stable")
        found = merge_requests(grading.groups(ids, session.take(ids)), np.sort(requests.group))
        return Collected(found, session.stats, grading.waited, np.concatenate([requests.kept[id] for id in ids]))

    def _trees(
        self, policy: Policy, asked: Asked | None, rows: Sequence[Row], key: Key[Array, ""], give_up: Callable[[], bool],
        more: More | None,
    ) -> Collected:  # fmt: skip
        """Graded trees; arguments as in `__call__`. A round of requests is graded as a whole before the next one is asked for."""

        def between() -> None:
            if give_up():
                raise GivenUp

        sampler, waited = self.engine.tree_sampler(policy, key, between), 0.0
        parts, group = [], []
        while asked is not None:
            limit = completion_limits(rows, asked.prompts.row, self.engine.cfg.max_new_tokens)
            rollouts = sampler.grow(asked.prompts, None, limit, asked.samples)
            begun = time.perf_counter()
            parts.append(grade(rollouts, self.task, self.pool, rows).replace(threshold=self.threshold))
            waited += time.perf_counter() - begun
            group += asked.group.tolist()
            asked = more(parts[-1], asked.group) if more else None
        found = select_groups(join_groups(*parts), np.argsort(group, kind="stable"))
        return Collected(found, sampler.stats, waited)


class _Requests:
    """The requests of a session, and what their rows begin with."""

    def __init__(self, session: Session, rows: Sequence[Row], cfg: RolloutConfig):
        self.session, self.rows, self.cfg = session, rows, cfg
        self.group: list[int] = []
        """Group of each request, by its id."""
        self.hint: dict[int, Int[np.ndarray, " G"]] = {}
        """Tokens of the hint of each row of a request; empty: there are no hints."""
        self.kept: dict[int, Int[np.ndarray, " G"]] = {}
        """Tokens of an earlier response that each row of a request begins with."""

    def add(self, asked: Asked, controls: Controls | None = None) -> None:
        cfg, known = self.cfg, asked.hints
        limit = completion_limits(self.rows, asked.prompts.row, cfg.max_new_tokens)
        kept = np.zeros(asked.samples.sum(), np.int32)
        if asked.known is not None:
            leniency = cfg.reuse.leniency if isinstance(cfg.reuse, InexactReuse) else None
            known, kept = begin(self.session, asked.known, controls, limit, leniency)
        ids = self.session.add(
            asked.prompts, asked.samples, controls, limit, known=known, first_sample=asked.first_sample
        ).tolist()
        ends = np.cumsum(asked.samples)[:-1]
        self.group += asked.group.tolist()
        self.kept |= dict(zip(ids, np.split(kept, ends), strict=True))
        if asked.hints is not None:
            tokens = np.array([len(hint) for hint in asked.hints], np.int32)
            self.hint |= dict(zip(ids, np.split(tokens, ends), strict=True))


class _Grading:
    """Grades of a session's requests."""

    def __init__(self, collector: Collector, requests: _Requests):
        self.collector, self.requests = collector, requests
        self.jobs: deque[tuple[Int[np.ndarray, " n"], Future[Graded]]] = deque()
        self.done: list[tuple[Int[np.ndarray, " n"], Graded]] = []
        """Requests of this host, and their grades."""
        self.waited = 0.0

    def submit(self, ids: Int[np.ndarray, " n"]) -> None:
        """Have this host's share of the requests graded in the background."""
        mine = ids[ids % jax.process_count() == jax.process_index()]
        if len(mine):
            rollouts = self.requests.session.rollouts(mine)
            samples = samples_of(self.collector.task, self.requests.rows, rollouts)
            self.jobs.append((mine, self.collector.pool.submit(samples)))

    def groups(self, ids: Int[np.ndarray, " n"], rollouts: Rollouts) -> Groups:
        """Wait for the grades of these requests. Returns a group for each, equal on every host.

        Args:
            ids: the requests that were submitted together before all others whose grades are not known, or all of them.
            rollouts: theirs.
        """
        begun, place = time.perf_counter(), {id: i for i, id in enumerate(ids.tolist())}
        while self.jobs and self.jobs[0][0][0] in place:
            mine, job = self.jobs.popleft()
            self.done.append((mine, job.result()))
        self.waited += time.perf_counter() - begun
        pool = self.collector.pool
        grades = blank_grades(rollouts, len(pool.names), pool.has_steps)
        for mine, graded in self.done:
            if mine[0] in place:
                index = np.array([place[id] for id in mine.tolist()])
                grades.set(index, graded)
                grades.set_steps(index, graded, rollouts, self.collector.task.tokenizer)
        found = make_groups(rollouts, grades, ids % jax.process_count(), pool.names, self.collector.threshold)
        hint = self.requests.hint
        return found.replace(hint=np.concatenate([hint[id] for id in ids.tolist()])) if hint else found
