"""Whatever a grader does, only its group is lost, within the deadline, and no process that it started is left."""

import contextlib
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from jaxrl_llm.environments.config import GraderConfig, RewardConfig
from jaxrl_llm.environments.grader import Sample
from jaxrl_llm.environments.grader_pool import Failure, GraderPool

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="subreapers and parent-death signals are Linux's")

HERE = Path(__file__).parent
# Unique to this test run.
MARK = f"JAXRL_TEST_MARK=attacks-{os.getpid()}"
DEADLINE_S = 0.6
# Two pools of one worker, and the watchdog of each.
NUM_IDLE = 4


def group(*completions):
    return [Sample("<prompt>", text, "", "eos") for text in completions]


def marked():
    """Pids of running processes with our mark in their environment, or with a parent that has it: an independent oracle."""
    found, parents = set(), {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text(errors="replace").rpartition(")")[2].split()
            if fields[0] not in "ZX":
                parents[int(path.name)] = int(fields[1])
                if MARK in (path / "environ").read_bytes().decode(errors="replace"):
                    found.add(int(path.name))
        except OSError:
            continue
    found -= {os.getpid()}
    return found | {pid for pid, parent in parents.items() if parent in found}


def sleepers():
    """Pids of processes that attacks started without an environment: their command holds the mark."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found |= {path.parent.name} if MARK.partition("=")[2].encode() in path.read_bytes() else set()
        except OSError:
            continue
    return found


def descriptors_and_threads():
    """Return the open file descriptors, each with what it names, and the threads of this process."""
    opened = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor that lists the others
            opened.add((fd, os.readlink(f"/proc/self/fd/{fd}")))
    return opened, set(os.listdir("/proc/self/task"))


@pytest.fixture(scope="module")
def open_here():
    """Count the descriptors and threads opened since; what earlier tests left may end at any time."""
    inherited = descriptors_and_threads()
    return lambda: [len(now - earlier) for now, earlier in zip(descriptors_and_threads(), inherited, strict=True)]


def settles(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


class Pools(NamedTuple):
    short: GraderPool
    """For attacks that should miss the deadline."""
    patient: GraderPool
    """For attacks that should not, even on a loaded machine."""


@pytest.fixture(scope="module")
def pools(open_here):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HERE)
        patch.setenv(*MARK.split("="))
        patch.setattr("jaxrl_llm.environments.grader_pool.NUM_LOGGED", 1000)
        graders = (GraderConfig("attacks:attack"),)
        made = Pools(*(GraderPool(RewardConfig(graders, 1, deadline_s, 0.25)) for deadline_s in (DEADLINE_S, 30.0)))
        with made.short, made.patient:
            for pool in made:
                pool.submit([group("1")]).result(timeout=30)
            yield made
    assert settles(lambda: not marked())


WANTED = {
    "fork, exit": (Failure.DIED, "exit code 0"),
    "fork, both continue": Failure.NONE,
    "fork, the child continues later": Failure.NONE,
    "daemon": Failure.NONE,
    "daemon, sleep": Failure.TIMED_OUT,
    "daemon, exit": (Failure.DIED, "exit code 0"),
    "child": Failure.NONE,
    "child without environment": Failure.NONE,
    "shell with a background job": Failure.NONE,
    "thread": Failure.NONE,
    "fork many": Failure.NONE,
    "chain": Failure.NONE,
    "close everything": Failure.DIED,
    "send garbage": (Failure.DIED, "an invalid verdict"),
    "send a number": (Failure.DIED, "an invalid verdict"),
    "send another verdict": (Failure.DIED, "an invalid verdict"),
    "send half a message": (Failure.TIMED_OUT, "no answer within 0.6 s"),
    "send without end": (Failure.DIED, "more than"),
    "stop": Failure.TIMED_OUT,
    "stop the watchdog": Failure.TIMED_OUT,
    "kill the group": (Failure.DIED, "ended by Killed (9); reward.memory_gib is 0.25"),
    "kill the watchdog": Failure.DIED,
    "terminate the watchdog": Failure.NONE,
    "flood stderr": Failure.NONE,
    "lower limits": Failure.NONE,
    "allocate": (Failure.DIED, "MemoryError (reward.memory_gib is 0.25)"),
    "recurse": (Failure.RAISED, "RecursionError"),
    "exit code": (Failure.DIED, "exit code 3"),
    "abort": (Failure.DIED, "ended by Aborted (6); reward.memory_gib is 0.25"),
}


@pytest.mark.parametrize("attack", WANTED)
def test_nothing_is_left_of_an_attack(attack, pools, open_here, caplog):
    caplog.set_level(logging.WARNING, "jaxrl_llm.environments")
    wanted, words = WANTED[attack] if isinstance(WANTED[attack], tuple) else (WANTED[attack], "")
    pool = pools.short if wanted == Failure.TIMED_OUT else pools.patient
    before, start = open_here(), time.monotonic()
    graded = pool.submit([group(attack, "5")]).result(timeout=60)
    seconds = time.monotonic() - start
    assert graded.failure.tolist() == [wanted]
    np.testing.assert_array_equal(graded.reward, [[np.nan] * 2 if wanted else [1, 5]])
    assert words in "".join(text for text in caplog.messages if wanted.name in text)
    np.testing.assert_array_equal(pool.submit([group("2", "3")]).result(timeout=60).reward, [[2, 3]])
    # The second beyond the deadline is for a loaded machine.
    assert wanted != Failure.TIMED_OUT or DEADLINE_S <= seconds < DEADLINE_S + 1
    assert settles(lambda: len(marked()) == NUM_IDLE and not sleepers()), [
        Path(f"/proc/{pid}/cmdline").read_bytes() for pid in marked()
    ]
    assert settles(lambda: open_here() == before), (open_here(), before)


def test_a_worker_that_stops_reading_is_a_missed_deadline(pools):
    """The worker is stopped from outside while more is sent than any pipe holds."""
    worker = int(pools.short.submit([group("pid")]).result(timeout=30).reward[0, 0])
    os.kill(worker, signal.SIGSTOP)
    # Distinct objects, because pickle writes equal ones once.
    large, start = ["1" + " " * (100_000 + i) for i in range(8)], time.monotonic()
    graded = pools.short.submit([group(*large)]).result(timeout=30)
    assert DEADLINE_S <= time.monotonic() - start < DEADLINE_S + 1
    assert graded.failure.tolist() == [Failure.TIMED_OUT]
    np.testing.assert_array_equal(pools.short.submit([group(*large)]).result(timeout=30).reward, [[1] * 8])


def test_what_a_grader_writes_to_standard_error_is_bounded_and_harmless(monkeypatch, caplog, capfd):
    monkeypatch.syspath_prepend(HERE)
    caplog.set_level(logging.WARNING, "jaxrl_llm.environments")
    with GraderPool(RewardConfig((GraderConfig("attacks:attack"),), workers=1)) as pool:
        assert settles(lambda: pool.grade([group("flood stderr")]).reward[0] == 1 and len(caplog.messages) >= 50)
        logged = [text.removeprefix("a grader's standard error: ") for text in caplog.messages]
        assert logged[0] == r"\x1b[2J a line of a million" and len(logged) == 50
        assert logged[49].endswith("a line of a million (the rest is dropped)")
    caplog.clear()
    with GraderPool(RewardConfig((GraderConfig("attacks:attack"),), workers=1)) as pool:
        assert settles(lambda: pool.grade([group("long line on stderr")]) and len(caplog.messages) > 1)
        for _ in range(3):
            pool.grade([group("long line on stderr")])
            time.sleep(0.02)
    logged = [text.removeprefix("a grader's standard error: ") for text in caplog.messages]
    assert logged == ["x" * 300, "(a worker shows the first 8 KiB of its standard error; the rest is dropped)"]
    assert capfd.readouterr() == ("", "")


def test_a_process_left_running_is_logged_once(monkeypatch, caplog):
    monkeypatch.syspath_prepend(HERE)
    caplog.set_level(logging.WARNING, "jaxrl_llm.environments")
    with GraderPool(RewardConfig((GraderConfig("attacks:attack"),), workers=1)) as pool:
        pool.grade([group("child"), group("child")])
    [logged] = caplog.messages
    assert logged.startswith("a grader left a process running after grading: 'sleep 600'; it was killed")
