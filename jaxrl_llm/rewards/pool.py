"""Groups of samples in, rewards and failures out: graders run in worker processes under a deadline.

One worker holds one group at a time and answers through its own pipe. A grader that raises, hangs, dies or returns
nonsense costs its own group and no other; a worker that hangs is killed and replaced. What a failed group means for
training is decided elsewhere.

    with GraderPool(RewardConfig(grader="exact_match")) as pool:
        graded = pool.grade([[Sample("<1+1>", "2#", "2#", "eos"), Sample("<1+1>", "3#", "2#", "eos")]])
    graded.reward  # [[1, 0]]

Graders are trusted code. Running code that a model wrote needs a sandbox inside the grader; the pool is none.
"""

from __future__ import annotations

import collections
import ctypes
import enum
import logging
import math
import multiprocessing
import multiprocessing.connection
import numbers
import os
import signal
import sys
import time
import traceback
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards.graders import Grader, Sample, resolve

# Workers import this module: without numpy they start sooner, and can set OMP_NUM_THREADS before numpy reads it.
if TYPE_CHECKING:
    import numpy as np

    from jaxrl_llm.rewards.config import RewardConfig

START_LIMIT_S = 60.0
NUM_LOGGED = 5
FLOAT32_MAX = 3.4028234663852886e38

log = logging.getLogger("jaxrl_llm.rewards")


class Failure(enum.IntEnum):
    """What became of a group."""

    NONE = 0
    """Every sample has its reward."""
    RAISED = 1
    """The grader raised on some sample; sys.exit counts as raising."""
    TIMED_OUT = 2
    """No answer within `deadline_s`; the worker was killed."""
    NOT_FINITE = 3
    """A reward was NaN, infinite, or beyond float32."""
    WRONG_TYPE = 4
    """A reward was not a real number: None, a string, complex, an array. Booleans count as 0 and 1."""
    DIED = 5
    """The worker process ended while grading: os._exit, a signal, out of memory."""


@dataclass(frozen=True)
class Graded:
    """P groups of G samples, judged."""

    reward: np.ndarray
    """f32[P G]; the whole row is NaN where the group failed."""
    failure: np.ndarray
    """i32[P], a `Failure` each."""


class _Verdict(NamedTuple):
    rewards: list[float]
    failure: Failure = Failure.NONE
    text: str = ""


class GraderPool:
    """Worker processes for one grader. Use it as a context manager, from one thread at a time.

    Workers start in the background. They die with the pool, and on Linux with the parent too, however it ends.

    Raises:
      UserError: the grader cannot be resolved here, or (from `grade`) a worker cannot start.
    """

    def __init__(self, config: RewardConfig):
        resolve(config.grader)
        self._config = config
        self._num_failures: collections.Counter[Failure] = collections.Counter()
        self._workers: list[_Worker] = []
        try:
            for _ in range(config.workers):
                self._workers.append(_Worker(config.grader))
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

    def grade(self, groups: Sequence[Sequence[Sample]]) -> Graded:
        """Judges P groups of G samples each, in about ceil(P / workers) * deadline_s at most, whatever the grader does.

        Raises:
          UserError: a worker could not start. This and every other exception, KeyboardInterrupt too, closes the pool.
          ValueError: groups of different sizes, or a closed pool.
        """
        import numpy as np

        if not self._workers:
            raise ValueError("the pool is closed")
        sizes = {len(group) for group in groups}
        if len(sizes) > 1:
            raise ValueError(f"groups: got sizes {sorted(sizes)}, want one size")
        reward = np.full((len(groups), max(sizes, default=0)), np.nan, np.float32)
        failure = np.full(len(groups), Failure.NONE, np.int32)
        try:
            for index, verdict in self._verdicts(groups):
                failure[index] = verdict.failure
                if verdict.failure:
                    self._report(verdict, groups[index])
                else:
                    reward[index] = verdict.rewards
        except BaseException:
            self.close()
            raise
        return Graded(reward, failure)

    def _verdicts(self, groups: Sequence[Sequence[Sample]]) -> Iterator[tuple[int, _Verdict]]:
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

    def _wait(self) -> Iterator[tuple[int, _Verdict]]:
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
                verdict = _Verdict([], Failure.TIMED_OUT, f"no answer within {worker.patience_s:g} s")
            else:
                continue
            index = worker.group
            if index is None and verdict.failure:
                raise UserError(f'grader "{self._config.grader}": a worker could not start: {verdict.text}')
            if verdict.failure in (Failure.TIMED_OUT, Failure.DIED):
                self._replace(slot)
            else:
                worker.rest()
            if index is not None:
                yield index, verdict

    def _replace(self, slot: int) -> None:
        self._workers[slot].kill()
        self._workers[slot] = _Worker(self._config.grader)

    def _report(self, verdict: _Verdict, group: Sequence[Sample]) -> None:
        self._num_failures[verdict.failure] += 1
        count = self._num_failures[verdict.failure]
        if count <= NUM_LOGGED:
            last = " (further ones are counted, not logged)" if count == NUM_LOGGED else ""
            grader, name, prompt = self._config.grader, verdict.failure.name, group[0].prompt[:200]
            log.warning("grader %s: %s: %r; prompt %r%s", grader, name, verdict.text, prompt, last)


class _Worker:
    """One process, one pipe, at most one group. `limit` is when (monotonic s) our patience ends: inf while idle."""

    def __init__(self, grader: str):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, grader), name="grader", daemon=True)
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
            self.connection.send(group)
        except OSError:
            return False
        self._expect(index, deadline_s)
        return True

    def rest(self) -> None:
        self._expect(None, math.inf)

    def receive(self) -> _Verdict:
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return _Verdict([], Failure.DIED, f"exit code {self.kill()}")

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


def _serve(connection: multiprocessing.connection.Connection, grader_name: str) -> None:
    """A worker's life: settle, say so in a first `_Verdict`; then a group in, a `_Verdict` out, until the pipe ends."""
    # A group of its own: what the grader starts is killed with it, and Ctrl-C in the terminal reaches the parent alone.
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _die_with_parent()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        grader = resolve(grader_name)
    except UserError as error:
        return connection.send(_Verdict([], Failure.RAISED, str(error)))
    connection.send(_Verdict([]))
    with suppress(EOFError):
        while True:
            connection.send(_judge(grader, connection.recv()))


def _die_with_parent() -> None:
    """Asks Linux to kill this process when the thread that started it ends, whatever the grader is doing then."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # The parent may have died before the call.
        if os.getppid() != multiprocessing.parent_process().pid:
            os._exit(1)


def _judge(grader: Grader, group: Sequence[Sample]) -> _Verdict:
    """Rewards of a group, or its first failure."""
    rewards = []
    for sample in group:
        try:
            value = grader(sample)
            if not _is_real(value):
                return _Verdict([], Failure.WRONG_TYPE, f"returned a {type(value).__name__}, want a real number")
            reward = _to_float(value)
            if not abs(reward) <= FLOAT32_MAX:
                return _Verdict([], Failure.NOT_FINITE, f"returned {reward}")
            rewards.append(reward)
        except BaseException as error:
            return _Verdict([], Failure.RAISED, traceback.format_exception_only(error)[-1].strip()[:500])
    return _Verdict(rewards)


def _is_real(value: object) -> bool:
    """Python's and numpy's real scalars; numpy's bool is not registered among `numbers`."""
    kind = type(value)
    return isinstance(value, numbers.Real) or (kind.__module__, kind.__name__) == ("numpy", "bool")


def _to_float(number: numbers.Real) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf
