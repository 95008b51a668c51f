"""A worker process: groups of samples in, verdicts out. A light module, since each worker imports it when it starts.

Without numpy a worker can set OMP_NUM_THREADS before numpy reads it.
"""

import ctypes
import enum
import math
import multiprocessing
import numbers
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from jaxrl_llm.rewards.graders import Grader, Sample, make

FLOAT32_MAX = 3.4028234663852886e38


class Failure(enum.IntEnum):
    """What became of a group."""

    NONE = 0
    """Every sample has its reward."""
    RAISED = 1
    """A grader raised on some sample; sys.exit counts as raising."""
    TIMED_OUT = 2
    """No answer within `deadline_s`; the worker was killed."""
    NOT_FINITE = 3
    """A reward was NaN, infinite, or beyond float32."""
    WRONG_TYPE = 4
    """A reward was not a real number: None, a string, complex, an array. Booleans count as 0 and 1."""
    DIED = 5
    """The worker process ended while grading: os._exit, a signal, out of memory."""


class Verdict(NamedTuple):
    """A group, judged; or the first failure, with the grader that is to blame."""

    parts: list[list[float]]
    """[n G], what each grader gave each sample."""
    votes: list[str]
    """[G], the final answers."""
    failure: Failure = Failure.NONE
    grader: int = -1
    text: str = ""


def failed(failure: Failure, grader: int, text: str) -> Verdict:
    return Verdict([], [], failure, grader, text)


def serve(connection: Connection, specs: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """A worker's life: settle, say so in a first `Verdict`; then a group in, a `Verdict` out, until the pipe ends.

    Before a group's second and each further grader its index is sent, so that the parent knows whom to blame for a silence.
    """
    # A group of its own: what the grader starts is killed with it, and Ctrl-C in the terminal reaches the parent alone.
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _die_with_parent()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    graders = []
    for index, (name, options) in enumerate(specs):
        try:
            graders.append(_start(name, options))
        except BaseException as error:
            return connection.send(failed(Failure.RAISED, index, _in_a_line(error)))
    connection.send(Verdict([], []))
    with suppress(EOFError):
        while True:
            connection.send(judge(graders, connection.recv(), connection.send))


def judge(graders: Sequence[Grader], group: Sequence[Sample], tell: Callable[[int], None]) -> Verdict:
    """The group by each grader in turn; votes are the answers that the first extracting grader reads, else the completions."""
    parts: list[list[float]] = []
    votes = [sample.completion.strip() for sample in group]
    voter = next((i for i, grader in enumerate(graders) if hasattr(grader, "extract")), -1)
    for index, grader in enumerate(graders):
        if index:
            tell(index)
        try:
            parts.append([_reward(grader(sample)) for sample in group])
            if index == voter:
                votes = [_vote(grader.extract(sample)) for sample in group]
        except _Nonsense as error:
            return failed(error.failure, index, error.text)
        except BaseException as error:
            return failed(Failure.RAISED, index, _in_a_line(error))
    return Verdict(parts, votes)


class _Nonsense(Exception):
    """A grader returned what cannot be used."""

    def __init__(self, failure: Failure, text: str):
        self.failure, self.text = failure, text


def _start(name: str, options: Mapping[str, Any]) -> Grader:
    grader = make(name, options)
    if hasattr(grader, "start"):
        grader.start()
    return grader


def _reward(value: object) -> float:
    if not _is_real(value):
        raise _Nonsense(Failure.WRONG_TYPE, f"returned a {type(value).__name__}, want a real number")
    reward = _to_float(value)
    if not abs(reward) <= FLOAT32_MAX:
        raise _Nonsense(Failure.NOT_FINITE, f"returned {reward}")
    return reward


def _vote(answer: object) -> str:
    if not isinstance(answer, str):
        raise _Nonsense(Failure.WRONG_TYPE, f"extract returned a {type(answer).__name__}, want a str")
    return answer


def _is_real(value: object) -> bool:
    """Python's and numpy's real scalars; numpy's bool is not registered among `numbers`."""
    kind = type(value)
    return isinstance(value, numbers.Real) or (kind.__module__, kind.__name__) == ("numpy", "bool")


def _to_float(number: numbers.Real) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _in_a_line(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip()[:500]


def _die_with_parent() -> None:
    """Asks Linux to kill this process when the thread that started it ends, whatever the grader is doing then."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # The parent may have died before the call.
        if os.getppid() != multiprocessing.parent_process().pid:
            os._exit(1)
