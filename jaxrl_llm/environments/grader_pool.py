"""Pool of worker processes that grade groups of samples under a deadline.

A worker grades one group at a time. A grader that raises, hangs, dies or returns an unusable value costs its own group and no
other; a worker that hangs is killed and replaced, with all processes that it started. The caller decides what a failed group
means for training.

    with GraderPool(RewardConfig((GraderConfig("exact_match"),))) as pool:
        graded = pool.grade([[Sample("<1+1>", "2#", "2#", "eos"), Sample("<1+1>", "3#", "2#", "eos")]])
    graded.reward  # [[1, 0]]

Graders are trusted code. The pool is no sandbox: to run code that a model wrote, a grader needs one of its own.
"""

from __future__ import annotations

import collections
import itertools
import logging
import math
import select
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrl_llm.config.options import with_options
from jaxrl_llm.config.user_code import importable_name
from jaxrl_llm.environments.config import GraderConfig, RewardConfig
from jaxrl_llm.environments.grader import Grader, Sample, problems
from jaxrl_llm.environments.worker import (
    FLOAT32_MAX,
    Failure,
    GraderSetup,
    Verdict,
    WorkerSetup,
    encodable,
    failed_verdict,
)
from jaxrl_llm.environments.worker_handle import END_LIMIT_S, WorkerProcess, pack_group
from jaxrl_llm.errors import UserError
from jaxrl_llm.metrics.terminal import printable

NUM_LOGGED = 5
MAX_ERROR_LINES = 50

log = logging.getLogger("jaxrl_llm.environments")


@dataclass(frozen=True)
class Graded:
    """P groups of G samples, graded by n graders."""

    reward: np.ndarray
    """f32[P G], the weighted sum of the components; NaN in all of a group that failed, and beyond the end of one that is smaller
    than G, the largest group."""
    components: np.ndarray
    """f32[n P G], reward per grader, before weights; NaN where `reward` is, and of a grader that does not grade the task."""
    failure: np.ndarray
    """i32[P], one `Failure` per group."""
    failed_by: np.ndarray
    """i32[P], index of the grader that failed; -1 where none did."""
    votes: list[list[str]]
    """P lists of G final answers, extracted by the first grader that extracts (without one: the stripped completions); "" for no
    answer, and in all of a group that failed."""
    earned: list[list[dict[int, float]]] | None = None
    """P lists of G: where in the response the reward was earned. By the number of characters up to the end of a step, the weighted
    sum of what the graders gave for it; those without steps count at the end of the response. {} in a group that failed; None: no
    grader has steps."""


def component_metrics(
    components: np.ndarray, graded: np.ndarray, failure: np.ndarray, failed_by: np.ndarray, names: Sequence[str]
) -> dict[str, float]:
    """Return `rewards/<name>/mean` over the rows that the grader graded, absent if there is none, and the number of groups lost to
    each failure, `rewards/<name>/<failure>`.

    Args:
        components: f32[B n], reward per row and grader; NaN of one that does not grade the row's task.
        graded: bool[B].
        failure: as in `Graded`.
        failed_by: as in `Graded`.
        names: names of the graders.
    """
    found = {}
    for index, name in enumerate(names):
        rewards = components[graded, index]
        rewards = rewards[~np.isnan(rewards)]
        if rewards.size:
            found[f"rewards/{name}/mean"] = float(rewards.mean(dtype=np.float64))
        lost = failure[failed_by == index]
        found |= {f"rewards/{name}/{kind.name.lower()}": float(np.sum(lost == kind)) for kind in Failure if kind}
    return found


def stripped_completions(group: Sequence[Sample]) -> list[str]:
    """Return the votes of samples without a grader that extracts answers."""
    return [encodable(sample.completion.strip()) for sample in group]


class GraderPool:
    """Worker processes that grade: a context manager. Do not call `grade` and `submit` concurrently.

        with rl.GraderPool(rewards.reward, workers=4, deadline_s=2.0) as pool:      # rewards.py is a file of your own
            groups = rl.grade(rollouts, task, pool)

    Workers start in the background. They die with the pool, and with the process that owns it, however that ends; on Linux all
    processes that a grader started die with them.

    Raises:
        UserError: every error in the config's graders, or (from `grade`) a worker cannot start.
    """

    def __init__(self, reward: RewardConfig | Grader | str, **limits: Any):
        """
        Args:
            reward: a config; or one grader, by name ("gsm8k", "my_module:my_function") or as a function of a module of its own.
            limits: other fields of `RewardConfig`: workers, deadline_s, memory_gib; and `options` and `step_end` of the one grader.
        """
        config = _reward_config(reward, limits)
        if found := problems(config):
            raise UserError("\n".join(found))
        self._config = config
        self.names = [grader.label for grader in config.graders]
        graders = [GraderSetup(one.grader, dict(one.options), one.step_end, one.tasks) for one in config.graders]
        self.has_steps = any(grader.step_end for grader in graders)
        self._setup = WorkerSetup(graders, config.memory_gib)
        self._num_failures: collections.Counter[tuple[int, Failure]] = collections.Counter()
        self.first_failure = ""
        """Name of the grader that failed first, and its message; "" if none did."""
        self._has_reported_left_running = False
        self._num_error_lines = 0
        self._workers: list[WorkerProcess] = []
        self._is_closed = False
        self._workers_lock = threading.RLock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="graders")
        try:
            for _ in range(config.workers):
                self._workers.append(WorkerProcess(self._setup))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill all workers. Idempotent. A thread that is grading gets a ValueError."""
        self._is_closed = True
        for worker in self._workers:
            worker.release()
        # A thread that is grading wakes up when its workers end, and then releases the lock.
        has_lock = self._workers_lock.acquire(timeout=END_LIMIT_S)
        try:
            while self._workers:
                self._workers.pop().kill()
        finally:
            if has_lock:
                self._workers_lock.release()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def grade(self, groups: Sequence[Sequence[Sample]]) -> Graded:
        """Grade P groups of up to G samples, in about ceil(P / workers) * deadline_s seconds at most, whatever the graders do.

        Raises:
            UserError: a worker could not start. This and every other exception, KeyboardInterrupt too, closes the pool.
            ValueError: the pool is closed.
        """
        self._require_open()
        verdicts: list[Verdict] = [Verdict([], [])] * len(groups)
        with self._workers_lock:
            for worker in self._workers:
                # Since it was made nobody looked at it, for minutes perhaps, while a model was compiled.
                if not worker.idle:
                    worker.await_start()
            try:
                for index, verdict in self._verdicts(groups):
                    verdicts[index] = self._checked_sum(verdict, groups[index])
                    self._report(verdicts[index], groups[index])
            except BaseException:
                self.close()
                raise
        return self._graded(verdicts, groups)

    def submit(self, groups: Sequence[Sequence[Sample]]) -> Future[Graded]:
        """Run `grade` in the background, after all groups submitted before."""
        return self._thread.submit(self.grade, groups)

    def _require_open(self) -> None:
        if self._is_closed:
            raise ValueError("the pool is closed")

    def _weights(self) -> np.ndarray:
        """Weights of the graders, f64[n]."""
        return np.array([grader.weight for grader in self._config.graders], np.float64)

    def _checked_sum(self, verdict: Verdict, group: Sequence[Sample]) -> Verdict:
        """Return the verdict, or a failure if the weighted sum of finite components, or of the steps, exceeds float32."""
        if verdict.failure:
            return verdict
        weighted = self._weights()[:, None] * np.array([x or [0.0] * len(group) for x in verdict.components])
        # Steps may end in one token, so that any of them may be added.
        of_steps = [sum(map(abs, earned.values())) for earned in self._earned(verdict, group)] if self.has_steps else 0
        if (np.maximum(np.abs(weighted.sum(axis=0)), of_steps) <= FLOAT32_MAX).all():
            return verdict
        worst = int(np.abs(weighted).max(axis=1).argmax())
        return failed_verdict(Failure.NOT_FINITE, worst, "the weighted sum is beyond float32")

    def _graded(self, verdicts: Sequence[Verdict], groups: Sequence[Sequence[Sample]]) -> Graded:
        size = max(map(len, groups), default=0)
        components = np.full((len(self.names), len(verdicts), size), np.nan, np.float64)
        for index, verdict in enumerate(verdicts):
            for grader, rewards in enumerate(() if verdict.failure else verdict.components):
                components[grader, index, : len(rewards)] = rewards
        is_absent = np.isnan(components)
        reward = np.einsum("n,npg->pg", self._weights(), np.where(is_absent, 0.0, components))
        return Graded(
            reward=np.where(is_absent.all(axis=0), np.nan, reward).astype(np.float32),
            components=components.astype(np.float32),
            failure=np.array([verdict.failure for verdict in verdicts], np.int32),
            failed_by=np.array([verdict.grader for verdict in verdicts], np.int32),
            votes=[self._votes(verdict, group) for verdict, group in zip(verdicts, groups, strict=True)],
            earned=[self._earned(verdict, group) for verdict, group in zip(verdicts, groups, strict=True)]
            if self.has_steps
            else None,
        )

    def _earned(self, verdict: Verdict, group: Sequence[Sample]) -> list[dict[int, float]]:
        """Return where each sample's reward was earned, as in `Graded`."""
        found: list[dict[int, float]] = [{} for _ in group]
        if verdict.failure:
            return found
        for index, (grader, weight) in enumerate(zip(self._setup.graders, self._weights().tolist(), strict=True)):
            if not verdict.components[index]:
                continue
            for place, (earned, sample) in enumerate(zip(found, group, strict=True)):
                steps = grader.sample(sample).steps or (sample.completion,)
                values = verdict.steps[index][place] if grader.step_end else [verdict.components[index][place]]
                for end, value in zip(itertools.accumulate(map(len, steps)), values, strict=True):
                    earned[end] = earned.get(end, 0.0) + weight * value
        return found

    def _votes(self, verdict: Verdict, group: Sequence[Sample]) -> list[str]:
        if verdict.failure:
            return [""] * len(group)
        return verdict.votes or stripped_completions(group)

    def _verdicts(self, groups: Sequence[Sequence[Sample]]) -> Iterator[tuple[int, Verdict]]:
        """Yield one (index, verdict) per group, in the order of completion."""
        todo, num_missing = collections.deque(range(len(groups))), len(groups)
        while num_missing:
            for index, verdict in [*self._send_groups(todo, groups), *self._wait_for_verdicts()]:
                num_missing -= 1
                yield index, verdict

    def _send_groups(
        self, todo: collections.deque[int], groups: Sequence[Sequence[Sample]]
    ) -> Iterator[tuple[int, Verdict]]:
        """Send groups to idle workers; yield a failure for each that cannot be sent."""
        for slot, worker in enumerate(self._workers):
            while worker.idle and todo:
                index = todo.popleft()
                try:
                    frame = pack_group(groups[index])
                except Exception as error:
                    text = encodable(f"the row cannot be sent to a worker: {type(error).__name__}: {error}"[:500])
                    yield index, failed_verdict(Failure.RAISED, 0, text)
                    continue
                if not worker.start_group(index, frame, groups[index], self._config.deadline_s):
                    todo.appendleft(index)
                    self._replace(slot)
                    break

    def _wait_for_verdicts(self) -> Iterator[tuple[int, Verdict]]:
        """Sleep until a worker answers, dies or is late; free or replace it."""
        busy = [(slot, worker) for slot, worker in enumerate(self._workers) if not worker.idle]
        if not busy:
            return
        poll = select.poll()
        slot_of = {fd: slot for slot, worker in busy for fd in worker.register(poll)}
        pause_s = max(0.0, min(worker.deadline for _, worker in busy) - time.monotonic())
        ready = {slot_of[fd] for fd, _ in poll.poll(math.ceil(1000 * pause_s))}
        self._require_open()
        now = time.monotonic()
        for slot, worker in busy:
            # An answer in the pipe counts, even if this process was too busy to read it before the deadline.
            verdict = worker.exchange() if slot in ready else None
            verdict = verdict or (worker.timed_out() if worker.deadline <= now else None)
            self._log_stderr(worker)
            if verdict is None:
                continue
            index = worker.group
            if index is None and verdict.failure:
                name = self.names[verdict.grader]
                raise UserError(f'grader "{name}": a worker could not start: {verdict.text}')
            if verdict.failure in (Failure.TIMED_OUT, Failure.DIED):
                self._replace(slot)
            else:
                worker.set_idle()
            if index is not None:
                yield index, verdict

    def _replace(self, slot: int) -> None:
        self._require_open()
        old, self._workers[slot] = self._workers[slot], WorkerProcess(self._setup)
        old.kill()
        self._log_stderr(old)

    def _log_stderr(self, worker: WorkerProcess) -> None:
        """Log the first `MAX_ERROR_LINES` that graders write to standard error, escaped so that they cannot move the cursor."""
        for line in worker.error_lines():
            self._num_error_lines += 1
            if self._num_error_lines <= MAX_ERROR_LINES:
                last = " (the rest is dropped)" if self._num_error_lines == MAX_ERROR_LINES else ""
                log.warning("a grader's standard error: %s%s", printable(line[:300]), last)

    def _report(self, verdict: Verdict, group: Sequence[Sample]) -> None:
        if verdict.left_running and not self._has_reported_left_running:
            self._has_reported_left_running = True
            log.warning(
                "a grader left a process running after grading: %r; it was killed, as others will be (start a helper that should "
                "live as long as the worker in the grader's `start`)",
                verdict.left_running,
            )
        if not verdict.failure:
            return
        self._num_failures[verdict.grader, verdict.failure] += 1
        count = self._num_failures[verdict.grader, verdict.failure]
        self.first_failure = self.first_failure or f"grader {self.names[verdict.grader]}: {verdict.text}"
        if count <= NUM_LOGGED:
            last = " (further ones are counted, not logged)" if count == NUM_LOGGED else ""
            grader, name, prompt = self.names[verdict.grader], verdict.failure.name, group[0].prompt[:200]
            log.warning("grader %s: %s: %r; prompt %r%s", grader, name, verdict.text, prompt, last)


def _reward_config(reward: RewardConfig | Grader | str, limits: Mapping[str, Any]) -> RewardConfig:
    if not isinstance(reward, RewardConfig):
        name = reward if isinstance(reward, str) else importable_name(reward, "reward")
        limits = dict(limits)
        own = {key: limits.pop(key) for key in ("options", "step_end") if key in limits}
        reward = RewardConfig((GraderConfig(name, **own),))
    return with_options(reward, limits)
