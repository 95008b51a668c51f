"""Groups of samples in, rewards and failures out: graders run in worker processes under a deadline.

One worker holds one group at a time and answers through its own pipe. A grader that raises, hangs, dies or returns
nonsense costs its own group and no other; a worker that hangs is killed and replaced. What a failed group means for
training is decided elsewhere.

    with GraderPool(RewardConfig((GraderConfig("exact_match"),))) as pool:
        graded = pool.grade([[Sample("<1+1>", "2#", "2#", "eos"), Sample("<1+1>", "3#", "2#", "eos")]])
    graded.reward  # [[1, 0]]

Graders are trusted code. Running code that a model wrote needs a sandbox inside the grader; the pool is none.
"""

from __future__ import annotations

import collections
import logging
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards.config import RewardConfig
from jaxrl_llm.rewards.graders import Sample, problems
from jaxrl_llm.rewards.worker import FLOAT32_MAX, Failure, Verdict, failed, serve

START_LIMIT_S = 120.0
NUM_LOGGED = 5

log = logging.getLogger("jaxrl_llm.rewards")


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


def part_metrics(graded: Graded, names: Sequence[str]) -> dict[str, float]:
    """`rewards/<name>/mean` over the groups that did not fail, absent if all did; `rewards/<name>/<failure>`, groups lost to it."""
    good = graded.failure == Failure.NONE
    found = {}
    for index, name in enumerate(names):
        part = graded.parts[index, good]
        if part.size:
            found[f"rewards/{name}/mean"] = float(part.mean(dtype=np.float64))
        lost = graded.failure[graded.failed_by == index]
        found |= {f"rewards/{name}/{kind.name.lower()}": float(np.sum(lost == kind)) for kind in Failure if kind}
    return found


class GraderPool:
    """Worker processes for the graders of a config. Use it as a context manager, by `grade` or by `submit`, not by both at a time.

    Workers start in the background. They die with the pool, and on Linux with the parent too, however it ends.

    Raises:
      UserError: everything that is wrong with the config's graders, or (from `grade`) a worker cannot start.
    """

    def __init__(self, config: RewardConfig):
        if found := problems(config):
            raise UserError("\n".join(found))
        self._config = config
        self._names = [grader.label for grader in config.graders]
        self._specs = [(grader.grader, dict(grader.options)) for grader in config.graders]
        self._num_failures: collections.Counter[tuple[int, Failure]] = collections.Counter()
        self.first_failure = ""
        """Which grader failed first, and how, in its own words."""
        self._workers: list[_Worker] = []
        # One thread for as long as the pool lives: a worker dies with the thread that started it.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="graders")
        try:
            for _ in range(config.workers):
                self._workers.append(_Worker(self._specs))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kills every worker. Closing twice is fine."""
        while self._workers:
            self._workers.pop().kill()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def grade(self, groups: Sequence[Sequence[Sample]]) -> Graded:
        """Judges P groups of G samples each, in about ceil(P / workers) * deadline_s at most, whatever the graders do.

        Raises:
          UserError: a worker could not start. This and every other exception, KeyboardInterrupt too, closes the pool.
          ValueError: groups of different sizes, or a closed pool.
        """
        if not self._workers:
            raise ValueError("the pool is closed")
        sizes = {len(group) for group in groups}
        if len(sizes) > 1:
            raise ValueError(f"groups: got sizes {sorted(sizes)}, want one size")
        verdicts: list[Verdict] = [Verdict([], [])] * len(groups)
        try:
            for index, verdict in self._verdicts(groups):
                verdicts[index] = self._checked(verdict)
                if verdicts[index].failure:
                    self._report(verdicts[index], groups[index])
        except BaseException:
            self.close()
            raise
        return self._graded(verdicts, max(sizes, default=0))

    def submit(self, groups: Sequence[Sequence[Sample]]) -> Future[Graded]:
        """`grade`, behind what was submitted before, while the caller goes on."""
        return self._thread.submit(self.grade, groups)

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

    def _graded(self, verdicts: Sequence[Verdict], size: int) -> Graded:
        parts = np.full((len(self._names), len(verdicts), size), np.nan, np.float64)
        for index, verdict in enumerate(verdicts):
            if not verdict.failure:
                parts[:, index] = verdict.parts
        return Graded(
            reward=np.einsum("n,npg->pg", self._weights(), parts).astype(np.float32),
            parts=parts.astype(np.float32),
            failure=np.array([verdict.failure for verdict in verdicts], np.int32),
            failed_by=np.array([verdict.grader for verdict in verdicts], np.int32),
            votes=[[""] * size if verdict.failure else verdict.votes for verdict in verdicts],
        )

    def _verdicts(self, groups: Sequence[Sequence[Sample]]) -> Iterator[tuple[int, Verdict]]:
        """One (index, verdict) for each group, in the order in which they come."""
        todo = collections.deque(enumerate(groups))
        num_missing = len(groups)
        while num_missing:
            for slot, worker in enumerate(self._workers):
                if worker.idle and todo:
                    if worker.begin(*todo[0], self._config.deadline_s):
                        todo.popleft()
                    else:
                        self._replace(slot)
            for index, verdict in self._wait():
                num_missing -= 1
                yield index, verdict

    def _wait(self) -> Iterator[tuple[int, Verdict]]:
        """Sleeps until some worker answers, dies or is late; frees or replaces it."""
        busy = [worker for worker in self._workers if not worker.idle]
        pause_s = max(0.0, min(worker.limit for worker in busy) - time.monotonic())
        readable = multiprocessing.connection.wait([worker.connection for worker in busy], pause_s)
        now = time.monotonic()
        for slot, worker in enumerate(self._workers):
            # An answer that lies in the pipe counts, even if this process was too busy to fetch it before the limit.
            if worker.connection in readable:
                verdict = worker.receive()
            elif worker.limit <= now:
                verdict = failed(Failure.TIMED_OUT, worker.grader, f"no answer within {worker.patience_s:g} s")
            else:
                continue
            if verdict is None:
                continue
            index = worker.group
            if index is None and verdict.failure:
                name = self._names[verdict.grader]
                raise UserError(f'grader "{name}": a worker could not start: {verdict.text}')
            if verdict.failure in (Failure.TIMED_OUT, Failure.DIED):
                self._replace(slot)
            else:
                worker.rest()
            if index is not None:
                yield index, verdict

    def _replace(self, slot: int) -> None:
        self._workers[slot].kill()
        self._workers[slot] = _Worker(self._specs)

    def _report(self, verdict: Verdict, group: Sequence[Sample]) -> None:
        self._num_failures[verdict.grader, verdict.failure] += 1
        count = self._num_failures[verdict.grader, verdict.failure]
        self.first_failure = self.first_failure or f"grader {self._names[verdict.grader]}: {verdict.text}"
        if count <= NUM_LOGGED:
            last = " (further ones are counted, not logged)" if count == NUM_LOGGED else ""
            grader, name, prompt = self._names[verdict.grader], verdict.failure.name, group[0].prompt[:200]
            log.warning("grader %s: %s: %r; prompt %r%s", grader, name, verdict.text, prompt, last)


class _Worker:
    """One process, one pipe, at most one group. `limit` is when (monotonic s) our patience ends: inf while idle."""

    def __init__(self, specs: Sequence[tuple[str, Mapping[str, Any]]]):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, specs), name="grader", daemon=True)
        with _no_main():
            self.process.start()
        theirs.close()
        self._expect(None, START_LIMIT_S)

    @property
    def idle(self) -> bool:
        return self.limit == math.inf

    def begin(self, index: int, group: Sequence[Sample], deadline_s: float) -> bool:
        """Hands over a group and starts its clock. False if the worker died while idle: the group is not to blame."""
        try:
            # Some mappings cannot be pickled, such as read-only ones.
            self.connection.send([sample._replace(columns=dict(sample.columns)) for sample in group])
        except OSError:
            return False
        self._expect(index, deadline_s)
        return True

    def rest(self) -> None:
        self._expect(None, math.inf)

    def receive(self) -> Verdict | None:
        """The verdict; None if it was only word that the next grader has begun."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            return failed(Failure.DIED, self.grader, f"exit code {self.kill()}")
        if isinstance(message, int):
            self.grader = message
            return None
        return message

    def kill(self) -> int | None:
        """Kills the process and its group; returns the exit code. SIGKILL, since a grader can ignore the rest."""
        if self.process.is_alive():
            with suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
        self.process.join()
        self.connection.close()
        return self.process.exitcode

    def _expect(self, group: int | None, patience_s: float) -> None:
        self.group = group
        self.grader = 0
        self.patience_s = patience_s
        self.limit = time.monotonic() + patience_s


@contextmanager
def _no_main() -> Iterator[None]:
    """Hides `__main__`: spawn would run the parent's script again in each worker, imports of jax and all."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
