"""Worker process: groups of samples in, verdicts out. A light module, because each worker imports it at its start.

It does not import numpy, so that OMP_NUM_THREADS is set before numpy reads it.
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
from jaxrl_llm.environments.grader import Grader, Sample, make_grader, split_steps

FLOAT32_MAX = 3.4028234663852886e38
LENGTH_BYTES = 8
MAX_VOTES_CHARACTERS = 10_000_000
MAX_LINE_BYTES = 2**26
"""Above the size of a verdict with that many characters as JSON, 6 bytes per character."""


class Failure(enum.IntEnum):
    """Why a group could not be graded."""

    NONE = 0
    """Every sample has its reward."""
    RAISED = 1
    """A grader raised an exception on some sample; sys.exit counts as one."""
    TIMED_OUT = 2
    """No answer within `deadline_s`; the worker was killed."""
    NOT_FINITE = 3
    """A reward was NaN, infinite, or beyond float32."""
    WRONG_TYPE = 4
    """A reward was not a real number: None, a string, complex, an array. Booleans count as 0 and 1. Or not one number per step."""
    DIED = 5
    """The worker process ended while grading (os._exit, a signal, more memory than allowed), or sent an invalid verdict."""


class Verdict(NamedTuple):
    """Rewards of a group; or its first failure, and the grader that caused it."""

    components: list[list[float]]
    """[n G], reward per grader and sample, before weights; the mean of its steps. [] of a grader that does not grade the task."""
    votes: list[str]
    """[G], final answers; empty if no grader extracts them."""
    failure: Failure = Failure.NONE
    grader: int = -1
    """Index of the grader that failed; -1 if none did."""
    text: str = ""
    """Description of the failure."""
    left_running: str = ""
    """Command line of a process that the graders left running and that was killed; "" if there was none."""
    steps: Sequence[Sequence[Sequence[float]]] = ()
    """Per grader: one number per step of each sample; [] if it has no steps."""


def failed_verdict(failure: Failure, grader: int, text: str) -> Verdict:
    return Verdict([], [], failure, grader, text)


class GraderSetup(NamedTuple):
    """A grader as in `GraderConfig`."""

    name: str
    options: Mapping[str, Any]
    step_end: str = ""
    tasks: tuple[str, ...] = ()

    def grades(self, group: Sequence[Sample]) -> bool:
        """Return whether it grades the task of this group."""
        return not self.tasks or any(sample.task in self.tasks for sample in group[:1])

    def sample(self, sample: Sample) -> Sample:
        """Return the sample as the grader gets it, with its steps."""
        return sample._replace(steps=split_steps(sample.completion, self.step_end) if self.step_end else ())


Started = tuple[Grader, GraderSetup]


class WorkerSetup(NamedTuple):
    """First message to a worker."""

    graders: Sequence[GraderSetup]
    memory_gib: float
    """As in `RewardConfig`."""


def serve(connection: socket.socket) -> None:
    """Run a worker: receive a `WorkerSetup`, answer with an empty `Verdict`; then answer each group with its `Verdict`.

    Requests are pickles, each preceded by its length in 8 bytes. Answers are lines of JSON, because the trainer must not unpickle
    what graders may have written. The index of the second and each further grader is sent before it runs, so that the trainer
    knows which grader exceeds the deadline.
    """
    worker, requests = os.getpid(), connection.makefile("rb")

    def send(message: int | Verdict) -> None:
        # A process that a grader forked, and that continues as if it were the worker, sends nothing.
        if os.getpid() != worker:
            os._exit(0)
        connection.sendall(encode(message))

    setup = pickle.loads(_read_frame(requests))
    os.environ["OMP_NUM_THREADS"] = "1"
    _limit_memory(setup.memory_gib)
    graders = []
    for index, grader in enumerate(setup.graders):
        try:
            graders.append((_start(grader.name, grader.options), grader))
        except BaseException as error:
            return send(_exception_verdict(error, index, setup.memory_gib))
    send(Verdict([[] for _ in graders], [], steps=[[] for _ in graders]))
    helpers = descendants.descendants()
    while frame := _read_frame(requests):
        verdict = _grade_frame(graders, frame, send, setup.memory_gib)
        send(verdict._replace(left_running=descendants.end_descendants(helpers).command))


def _read_frame(requests: BinaryIO) -> bytes:
    """Read the next pickle; empty at the end of the connection."""
    return requests.read(int.from_bytes(requests.read(LENGTH_BYTES), "big"))


def _grade_frame(graders: Sequence[Started], frame: bytes, send: Callable[[int], None], memory_gib: float) -> Verdict:
    try:
        group = pickle.loads(frame)
    except BaseException as error:
        return _exception_verdict(error, 0, memory_gib)
    return grade_group(graders, group, send, memory_gib)


def encode(message: int | Verdict) -> bytes:
    """Return a line: a grader's index, or a verdict. In ASCII, because a grader's text may hold lone surrogates."""
    return json.dumps(message._asdict() if isinstance(message, Verdict) else message).encode("ascii") + b"\n"


def decode(line: bytes, graders: Sequence[GraderSetup], group: Sequence[Sample]) -> int | Verdict:
    """Return the message that `encode` made, on a group by these graders; its texts can be encoded as UTF-8.

    Raises:
        ValueError: the line is not a message of a worker.
    """
    num_graders = len(graders)
    try:
        message = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if type(message) is int and 0 <= message < num_graders:
        return message
    if type(message) is not dict or tuple(message) != Verdict._fields:
        raise ValueError("not a message")
    verdict = Verdict(**message)
    texts = verdict.text, verdict.left_running
    lists = _is_list_of(verdict.components, list) and _is_list_of(verdict.votes, str)
    if not lists or type(verdict.grader) is not int or {*map(type, texts)} != {str}:
        raise ValueError("wrong types")
    failure = Failure(verdict.failure)
    if failure and not 0 <= verdict.grader < num_graders:
        raise ValueError("no such grader")
    full = [len(group) if grader.grades(group) else 0 for grader in graders]
    if not failure and ([*map(len, verdict.components)] != full or len(verdict.votes) not in (0, len(group))):
        raise ValueError("wrong sizes")
    _check_steps(verdict, graders, group)
    if not all(map(_is_list_of_rewards, (*verdict.components, *(x for part in verdict.steps for x in part)))):
        raise ValueError("rewards that are not finite in float32")
    text, left = map(encodable, texts)
    return verdict._replace(failure=failure, votes=[*map(encodable, verdict.votes)], text=text, left_running=left)


def _check_steps(verdict: Verdict, graders: Sequence[GraderSetup], group: Sequence[Sample]) -> None:
    """Raise ValueError unless there is a list per grader, of a list per sample, of an item per step."""
    parts = verdict.steps
    if not (_is_list_of(parts, list) and all(_is_list_of(part, list) for part in parts)):
        raise ValueError("wrong types")
    want = [
        [len(grader.sample(sample).steps) for sample in group if grader.step_end and grader.grades(group)]
        for grader in graders
    ]
    if [[len(values) for values in part] for part in parts] != ([] if verdict.failure else want):
        raise ValueError("wrong sizes")


def _is_list_of_rewards(value: object) -> bool:
    return _is_list_of(value, float) and all(abs(x) <= FLOAT32_MAX for x in value)


def encodable(text: str) -> str:
    """Return the text with lone surrogates escaped."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _is_list_of(value: object, kind: type) -> bool:
    return type(value) is list and all(type(item) is kind for item in value)


def grade_group(
    graders: Sequence[Started], group: Sequence[Sample], send: Callable[[int], None], memory_gib: float
) -> Verdict:
    """Grade a group with each grader in turn.

    Args:
        graders: the graders, with what they were made of; of those that grade the group the first one with `extract` gives the
            votes.
        group: samples of one prompt.
        send: called with the index of each grader but the first, before it runs.
        memory_gib: the limit, for messages.

    Returns:
        The rewards and votes, or the first failure.
    """
    components, votes, steps = [[] for _ in graders], [], [[] for _ in graders]
    mine = [index for index, (_, setup) in enumerate(graders) if setup.grades(group)]
    voter = next((index for index in mine if hasattr(graders[index][0], "extract")), -1)
    for index in mine:
        grader, setup = graders[index]
        if index:
            send(index)
        try:
            samples = [setup.sample(sample) for sample in group]
            values = step_values_of(grader, samples) if setup.step_end else []
            steps[index] = values
            components[index] = [math.fsum(x) / len(x) for x in values] if values else rewards_of(grader, samples)
            if index == voter:
                votes = votes_of(grader, samples)
        except InvalidResult as error:
            return failed_verdict(error.failure, index, error.text)
        except BaseException as error:
            return _exception_verdict(error, index, memory_gib)
    return Verdict(components, votes, steps=steps)


def _exception_verdict(error: BaseException, index: int, memory_gib: float) -> Verdict:
    """Verdict on an exception. A MemoryError counts as DIED, so that the worker is replaced: its memory may stay full."""
    if isinstance(error, MemoryError):
        return failed_verdict(Failure.DIED, index, f"{_one_line(error)} (reward.memory_gib is {memory_gib:g})")
    return failed_verdict(Failure.RAISED, index, _one_line(error))


class InvalidResult(Exception):
    """A grader returned an unusable value."""

    def __init__(self, failure: Failure, text: str):
        self.failure, self.text = failure, text


def _start(name: str, options: Mapping[str, Any]) -> Grader:
    grader = make_grader(name, options)
    if hasattr(grader, "start"):
        grader.start()
    return grader


def reward_of(value: object) -> float:
    """Return what a grader returned as a number that float32 holds. Raises InvalidResult if it is none."""
    if not _is_real(value):
        raise InvalidResult(Failure.WRONG_TYPE, f"returned a {type(value).__name__}, want a real number")
    reward = _to_float(value)
    if not abs(reward) <= FLOAT32_MAX:
        raise InvalidResult(Failure.NOT_FINITE, f"returned {reward}")
    return reward


def rewards_of(grader: Grader, group: Sequence[Sample]) -> list[float]:
    """Return the rewards of a group. Raises InvalidResult unless there is a number that float32 holds for each sample."""
    if not hasattr(grader, "grade_group"):
        return [reward_of(grader(sample)) for sample in group]
    rewards = [reward_of(value) for value in grader.grade_group(group)]
    _require_one_each(len(rewards), "numbers", group)
    return rewards


def step_values_of(grader: Grader, group: Sequence[Sample]) -> list[list[float]]:
    """Return one number per step of each sample. Raises InvalidResult unless float32 holds each."""
    if not hasattr(grader, "grade_group"):
        return [_step_values(grader(sample), sample) for sample in group]
    found = list(grader.grade_group(group))
    _require_one_each(len(found), "lists", group)
    return [_step_values(values, sample) for values, sample in zip(found, group, strict=True)]


def _step_values(found: object, sample: Sample) -> list[float]:
    # Arrays of numpy, torch and jax have tolist.
    values, want = found.tolist() if hasattr(found, "tolist") else found, len(sample.steps)
    if not isinstance(values, list | tuple):
        kind = type(found).__name__
        raise InvalidResult(Failure.WRONG_TYPE, f"returned a {kind}, want a list of {want} numbers, one per step")
    if len(values) != want:
        raise InvalidResult(Failure.WRONG_TYPE, f"returned {len(values)} numbers, want {want}, one per step")
    return [reward_of(value) for value in values]


def _require_one_each(found: int, what: str, group: Sequence[Sample]) -> None:
    if found != len(group):
        raise InvalidResult(
            Failure.WRONG_TYPE, f"grade_group returned {found} {what}, want {len(group)}, one per sample"
        )


def votes_of(grader: Grader, group: Sequence[Sample]) -> list[str]:
    """Return the final answers that a grader extracts. Raises InvalidResult if one is not text, or if they are too long."""
    votes = [grader.extract(sample) for sample in group]
    for vote in votes:
        if not isinstance(vote, str):
            raise InvalidResult(Failure.WRONG_TYPE, f"extract returned a {type(vote).__name__}, want a str")
    if (total := sum(map(len, votes))) > MAX_VOTES_CHARACTERS:
        want = f"want at most {MAX_VOTES_CHARACTERS:,} per group"
        raise InvalidResult(Failure.WRONG_TYPE, f"extract returned {total:,} characters, {want}")
    # Plain str, where the grader returned a subclass.
    return [str.__str__(vote) for vote in votes]


def _is_real(value: object) -> bool:
    """True for real scalars of Python and numpy; numpy's bool is not registered with `numbers`."""
    cls = type(value)
    return isinstance(value, numbers.Real) or (cls.__module__, cls.__name__) == ("numpy", "bool")


def _to_float(number: numbers.Real) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _one_line(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip()[:500]


def _limit_memory(gib: float) -> None:
    """Limit the private writable memory of this process, and of each process that it starts. Linux counts neither files mapped for
    reading nor address space that is only reserved, so a library's size on disk does not matter."""
    limit = int(gib * 2**30)
    for present in resource.getrlimit(resource.RLIMIT_DATA):
        limit = limit if present == resource.RLIM_INFINITY else min(limit, present)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
