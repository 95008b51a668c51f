"""A worker process: groups of samples in, verdicts out. A light module, since each worker imports it when it starts.

Without numpy a worker can set OMP_NUM_THREADS before numpy reads it.
"""

import enum
import json
import math
import numbers
import os
import pickle
import resource
import socket
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

from jaxrl_llm.environments import descendants
from jaxrl_llm.environments.grader import Grader, Sample, make

FLOAT32_MAX = 3.4028234663852886e38
LENGTH_BYTES = 8
MAX_VOTES_CHARACTERS = 10_000_000
MAX_LINE_BYTES = 2**26
"""Above what a verdict with that many characters takes as JSON, 6 bytes each."""


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
    """The worker process ended while grading (os._exit, a signal, more memory than it may have), or said what is no verdict."""


class Verdict(NamedTuple):
    """A group, judged; or the first failure, with the grader that is to blame."""

    parts: list[list[float]]
    """[n G], what each grader gave each sample."""
    votes: list[str]
    """[G], the final answers; empty where no grader extracts any."""
    failure: Failure = Failure.NONE
    grader: int = -1
    text: str = ""
    left_running: str = ""
    """The command line of a process that the graders left behind, and that was ended."""


def failed(failure: Failure, grader: int, text: str) -> Verdict:
    return Verdict([], [], failure, grader, text)


class Setup(NamedTuple):
    """What a worker is told first."""

    graders: Sequence[tuple[str, Mapping[str, Any]]]
    """Names and options."""
    memory_gib: float


def serve(connection: socket.socket) -> None:
    """A worker's life: a `Setup` in, an empty `Verdict` out; then a group in, a `Verdict` out, until the connection ends.

    In come pickles, each after its length in 8 bytes; out go lines of JSON, since what graders have touched is not unpickled.
    Before a group's second and each further grader its index is sent, so that the trainer knows whom to blame for a silence.
    """
    worker, requests = os.getpid(), connection.makefile("rb")

    def tell(message: int | Verdict) -> None:
        # A child that a grader forked, and that went on as if it were the worker, says nothing.
        if os.getpid() != worker:
            os._exit(0)
        connection.sendall(encode(message))

    setup = pickle.loads(_frame(requests))
    os.environ["OMP_NUM_THREADS"] = "1"
    _limit_memory(setup.memory_gib)
    graders = []
    for index, (name, options) in enumerate(setup.graders):
        try:
            graders.append(_start(name, options))
        except BaseException as error:
            return tell(_raised(error, index, setup.memory_gib))
    tell(Verdict([[] for _ in graders], []))
    helpers = descendants.descendants()
    while frame := _frame(requests):
        verdict = _judge_frame(graders, frame, tell, setup.memory_gib)
        tell(verdict._replace(left_running=descendants.end_descendants(helpers).command))


def _frame(requests: BinaryIO) -> bytes:
    """The next pickle; empty at the end."""
    return requests.read(int.from_bytes(requests.read(LENGTH_BYTES), "big"))


def _judge_frame(graders: Sequence[Grader], frame: bytes, tell: Callable[[int], None], memory_gib: float) -> Verdict:
    try:
        group = pickle.loads(frame)
    except BaseException as error:
        return _raised(error, 0, memory_gib)
    return judge(graders, group, tell, memory_gib)


def encode(message: int | Verdict) -> bytes:
    """A line: a grader's index, or a verdict. In ASCII, since a grader's text may hold what UTF-8 cannot."""
    return json.dumps(message._asdict() if isinstance(message, Verdict) else message).encode("ascii") + b"\n"


def decode(line: bytes, num_graders: int, size: int) -> int | Verdict:
    """What `encode` made, for a group of `size` samples; its texts can be encoded and printed.

    Raises ValueError: it is nothing that a worker says.
    """
    try:
        message = json.loads(line)
    except RecursionError:
        raise ValueError("nested") from None
    if type(message) is int and 0 <= message < num_graders:
        return message
    if type(message) is not dict or tuple(message) != Verdict._fields:
        raise ValueError("no message")
    verdict = Verdict(**message)
    texts = verdict.text, verdict.left_running
    lists = _is_list(verdict.parts, list) and _is_list(verdict.votes, str)
    if not lists or type(verdict.grader) is not int or {*map(type, texts)} != {str}:
        raise ValueError("wrong types")
    failure = Failure(verdict.failure)
    if failure and not 0 <= verdict.grader < num_graders:
        raise ValueError("no such grader")
    full = [num_graders, *[size] * num_graders]
    if not failure and ([len(verdict.parts), *map(len, verdict.parts)] != full or len(verdict.votes) not in (0, size)):
        raise ValueError("wrong sizes")
    if not all(_is_list(part, float) and all(abs(x) <= FLOAT32_MAX for x in part) for part in verdict.parts):
        raise ValueError("no numbers")
    text, left = map(encodable, texts)
    return verdict._replace(failure=failure, votes=[*map(encodable, verdict.votes)], text=text, left_running=left)


def encodable(text: str) -> str:
    """The text, with lone surrogates written out."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _is_list(value: object, kind: type) -> bool:
    return type(value) is list and all(type(item) is kind for item in value)


def judge(
    graders: Sequence[Grader], group: Sequence[Sample], tell: Callable[[int], None], memory_gib: float
) -> Verdict:
    """The group by each grader in turn; votes are the answers that the first extracting grader reads."""
    parts, votes = [], []
    voter = next((i for i, grader in enumerate(graders) if hasattr(grader, "extract")), -1)
    for index, grader in enumerate(graders):
        if index:
            tell(index)
        try:
            parts.append([_reward(grader(sample)) for sample in group])
            if index == voter:
                votes = _votes(grader, group)
        except _Nonsense as error:
            return failed(error.failure, index, error.text)
        except BaseException as error:
            return _raised(error, index, memory_gib)
    return Verdict(parts, votes)


def _raised(error: BaseException, index: int, memory_gib: float) -> Verdict:
    """What filled the memory may stay in it, so a worker whose memory is full counts as dead, and another takes over."""
    if isinstance(error, MemoryError):
        return failed(Failure.DIED, index, f"{_in_a_line(error)} (reward.memory_gib is {memory_gib:g})")
    return failed(Failure.RAISED, index, _in_a_line(error))


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


def _votes(grader: Grader, group: Sequence[Sample]) -> list[str]:
    votes = [grader.extract(sample) for sample in group]
    for vote in votes:
        if not isinstance(vote, str):
            raise _Nonsense(Failure.WRONG_TYPE, f"extract returned a {type(vote).__name__}, want a str")
    if (total := sum(map(len, votes))) > MAX_VOTES_CHARACTERS:
        want = f"want at most {MAX_VOTES_CHARACTERS:,} for a group"
        raise _Nonsense(Failure.WRONG_TYPE, f"extract returned {total:,} characters, {want}")
    # Of subclasses of str the text alone.
    return [str.__str__(vote) for vote in votes]


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


def _limit_memory(gib: float) -> None:
    """Private writable memory of this process, and of each that it starts. Linux counts no files mapped for reading, and no address
    space that is only reserved, so a library's size on disk does not matter."""
    most = int(gib * 2**30)
    for held in resource.getrlimit(resource.RLIMIT_DATA):
        most = most if held == resource.RLIM_INFINITY else min(most, held)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
