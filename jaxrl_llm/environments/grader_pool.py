"""Groups of samples in, rewards and failures out: graders run in worker processes under a deadline.

One worker holds one group at a time. A grader that raises, hangs, dies or returns nonsense costs its own group and no other; a
worker that hangs is killed and replaced, with all that it started. What a failed group means for training is decided elsewhere.

    with GraderPool(RewardConfig((GraderConfig("exact_match"),))) as pool:
        graded = pool.grade([[Sample("<1+1>", "2#", "2#", "eos"), Sample("<1+1>", "3#", "2#", "eos")]])
    graded.reward  # [[1, 0]]

Graders are trusted code. Running code that a model wrote needs a sandbox inside the grader; the pool is none.
"""

from __future__ import annotations

import collections
import logging
import math
import select
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from jaxrl_llm.environments.config import RewardConfig
from jaxrl_llm.environments.grader import Sample, problems
from jaxrl_llm.environments.worker import FLOAT32_MAX, Failure, Setup, Verdict, encodable, failed
from jaxrl_llm.environments.worker_process import END_LIMIT_S, WorkerProcess, pack_group
from jaxrl_llm.errors import UserError
from jaxrl_llm.metrics.terminal import printable

NUM_LOGGED = 5
MAX_ERROR_LINES = 50

log = logging.getLogger("jaxrl_llm.environments")


@dataclass(frozen=True)
class Graded:
    """P groups of G samples, judged by n graders."""

    reward: np.ndarray
    """f32[P G], the sum of weight * part; the whole row is NaN where the group failed."""
    parts: np.ndarray
    """f32[n P G], what each grader gave, before its weight; NaN where the group failed, by whichever grader."""
    failure: np.ndarray
    """i32[P], a `Failure` each."""
    failed_by: np.ndarray
    """i32[P], the index of the grader at which the group failed; -1 where it did not."""
    votes: list[list[str]]
    """P lists of G final answers, as the first grader that extracts one reads them (without any: the stripped completions);
    "" where there is none, or the group failed."""


def part_metrics(
    parts: np.ndarray, failure: np.ndarray, failed_by: np.ndarray, names: Sequence[str]
) -> dict[str, float]:
    """`rewards/<name>/mean` over the groups that did not fail, absent if all did; `rewards/<name>/<failure>`, groups lost to it.

    Args:
        parts, failure, failed_by: as in `Graded`.
        names: of the graders.
    """
    good = failure == Failure.NONE
    found = {}
    for index, name in enumerate(names):
        part = parts[index, good]
        if part.size:
            found[f"rewards/{name}/mean"] = float(part.mean(dtype=np.float64))
        lost = failure[failed_by == index]
        found |= {f"rewards/{name}/{kind.name.lower()}": float(np.sum(lost == kind)) for kind in Failure if kind}
    return found


class GraderPool:
    """Worker processes for the graders of a config. Use it as a context manager, by `grade` or by `submit`, not by both at a time.

    Workers start in the background. They die with the pool, and with the process that holds it, however that ends; on Linux all
    that a grader started dies with them.

    Raises:
      UserError: everything that is wrong with the config's graders, or (from `grade`) a worker cannot start.
    """

    def __init__(self, config: RewardConfig):
        if found := problems(config):
            raise UserError("\n".join(found))
        self._config = config
        self.names = [grader.label for grader in config.graders]
        graders = [(grader.grader, dict(grader.options)) for grader in config.graders]
        self._setup = Setup(graders, config.memory_gib)
        self._num_failures: collections.Counter[tuple[int, Failure]] = collections.Counter()
        self.first_failure = ""
        """Which grader failed first, and how, in its own words."""
        self._has_left_running = False
        self._num_error_lines = 0
        self._workers: list[WorkerProcess] = []
        self._is_closed = False
        self._at_workers = threading.RLock()
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
        """Kills every worker. Closing twice is fine, and so is closing while another thread grades: it gets a ValueError."""
        self._is_closed = True
        for worker in self._workers:
            worker.release()
        # A thread that grades is woken by the end of its workers; after that nobody else holds them.
        is_alone = self._at_workers.acquire(timeout=END_LIMIT_S)
        try:
            while self._workers:
                self._workers.pop().kill()
        finally:
            if is_alone:
                self._at_workers.release()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def grade(self, groups: Sequence[Sequence[Sample]]) -> Graded:
        """Judges P groups of G samples each, in about ceil(P / workers) * deadline_s at most, whatever the graders do.

        Raises:
          UserError: a worker could not start. This and every other exception, KeyboardInterrupt too, closes the pool.
          ValueError: groups of different sizes, or a closed pool.
        """
        self._must_be_open()
        sizes = {len(group) for group in groups}
        if len(sizes) > 1:
            raise ValueError(f"groups: got sizes {sorted(sizes)}, want one size")
        verdicts: list[Verdict] = [Verdict([], [])] * len(groups)
        with self._at_workers:
            try:
                for index, verdict in self._verdicts(groups):
                    verdicts[index] = self._checked(verdict)
                    self._report(verdicts[index], groups[index])
            except BaseException:
                self.close()
                raise
        return self._graded(verdicts, groups)

    def submit(self, groups: Sequence[Sequence[Sample]]) -> Future[Graded]:
        """`grade`, behind what was submitted before, while the caller goes on."""
        return self._thread.submit(self.grade, groups)

    def _must_be_open(self) -> None:
        if self._is_closed:
            raise ValueError("the pool is closed")

    def _weights(self) -> np.ndarray:
        """f64[n]."""
        return np.array([grader.weight for grader in self._config.graders], np.float64)

    def _checked(self, verdict: Verdict) -> Verdict:
        """The verdict, or a failure where parts that are finite make a sum that float32 cannot hold."""
        if verdict.failure:
            return verdict
        weighted = self._weights()[:, None] * np.array(verdict.parts, np.float64)
        if (np.abs(weighted.sum(axis=0)) <= FLOAT32_MAX).all():
            return verdict
        worst = int(np.abs(weighted).max(axis=1).argmax())
        return failed(Failure.NOT_FINITE, worst, "the weighted sum is beyond float32")

    def _graded(self, verdicts: Sequence[Verdict], groups: Sequence[Sequence[Sample]]) -> Graded:
        size = len(groups[0]) if groups else 0
        parts = np.full((len(self.names), len(verdicts), size), np.nan, np.float64)
        for index, verdict in enumerate(verdicts):
            if not verdict.failure:
                parts[:, index] = verdict.parts
        return Graded(
            reward=np.einsum("n,npg->pg", self._weights(), parts).astype(np.float32),
            parts=parts.astype(np.float32),
            failure=np.array([verdict.failure for verdict in verdicts], np.int32),
            failed_by=np.array([verdict.grader for verdict in verdicts], np.int32),
            votes=[self._votes(verdict, group) for verdict, group in zip(verdicts, groups, strict=True)],
        )

    def _votes(self, verdict: Verdict, group: Sequence[Sample]) -> list[str]:
        if verdict.failure:
            return [""] * len(group)
        return verdict.votes or [encodable(sample.completion.strip()) for sample in group]

    def _verdicts(self, groups: Sequence[Sequence[Sample]]) -> Iterator[tuple[int, Verdict]]:
        """One (index, verdict) for each group, in the order in which they come."""
        todo, num_missing = collections.deque(range(len(groups))), len(groups)
        while num_missing:
            for index, verdict in [*self._begin(todo, groups), *self._wait()]:
                num_missing -= 1
                yield index, verdict

    def _begin(self, todo: collections.deque[int], groups: Sequence[Sequence[Sample]]) -> Iterator[tuple[int, Verdict]]:
        """Hands groups to idle workers; a verdict for each that cannot be sent."""
        for slot, worker in enumerate(self._workers):
            while worker.idle and todo:
                index = todo.popleft()
                try:
                    frame = pack_group(groups[index])
                except Exception as error:
                    text = encodable(f"the row cannot be sent to a worker: {type(error).__name__}: {error}"[:500])
                    yield index, failed(Failure.RAISED, 0, text)
                    continue
                if not worker.begin(index, frame, len(groups[index]), self._config.deadline_s):
                    todo.appendleft(index)
                    self._replace(slot)
                    break

    def _wait(self) -> Iterator[tuple[int, Verdict]]:
        """Sleeps until some worker answers, dies or is late; frees or replaces it."""
        busy = [(slot, worker) for slot, worker in enumerate(self._workers) if not worker.idle]
        if not busy:
            return
        poll = select.poll()
        slot_of = {fd: slot for slot, worker in busy for fd in worker.register(poll)}
        pause_s = max(0.0, min(worker.limit for _, worker in busy) - time.monotonic())
        ready = {slot_of[fd] for fd, _ in poll.poll(math.ceil(1000 * pause_s))}
        self._must_be_open()
        now = time.monotonic()
        for slot, worker in busy:
            # An answer that lies in the pipe counts, even if this process was too busy to fetch it before the limit.
            verdict = worker.exchange() if slot in ready else None
            verdict = verdict or (worker.too_late() if worker.limit <= now else None)
            self._echo(worker)
            if verdict is None:
                continue
            index = worker.group
            if index is None and verdict.failure:
                name = self.names[verdict.grader]
                raise UserError(f'grader "{name}": a worker could not start: {verdict.text}')
            if verdict.failure in (Failure.TIMED_OUT, Failure.DIED):
                self._replace(slot)
            else:
                worker.rest()
            if index is not None:
                yield index, verdict

    def _replace(self, slot: int) -> None:
        self._must_be_open()
        old, self._workers[slot] = self._workers[slot], WorkerProcess(self._setup)
        old.kill()
        self._echo(old)

    def _echo(self, worker: WorkerProcess) -> None:
        """What graders write to standard error: the first of it, on lines of our own, where it can move no cursor."""
        for line in worker.errors():
            self._num_error_lines += 1
            if self._num_error_lines <= MAX_ERROR_LINES:
                last = " (the rest is dropped)" if self._num_error_lines == MAX_ERROR_LINES else ""
                log.warning("a grader's standard error: %s%s", printable(line[:300]), last)

    def _report(self, verdict: Verdict, group: Sequence[Sample]) -> None:
        if verdict.left_running and not self._has_left_running:
            self._has_left_running = True
            told = "a grader left a process running when it had graded: %r; it was ended, and so will be others (a helper that "
            log.warning(
                told + "is to live as long as the worker is started in the grader's `start`)", verdict.left_running
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
