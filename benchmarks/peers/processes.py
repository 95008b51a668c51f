"""Driver side of the workers: processes that answer one request at a time, and calls of several in turns."""

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATIENCE = 900.0
"""Maximum seconds per answer."""
QUIET = 0.1
"""Maximum share of the machine that other processes use during a call of a quiet round."""


class WorkerError(Exception):
    """A worker exited, or did not answer in time. The message holds the end of its output."""


class Worker:
    """One process running a module that calls `serve`."""

    def __init__(self, python: Path, module: str, threads: int, settings: Mapping[str, str]) -> None:
        number = str(threads)
        env = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": number,
            "MKL_NUM_THREADS": number,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **settings,
        }
        self._log = tempfile.TemporaryFile(mode="w+")
        pipe = subprocess.PIPE
        command = [python, "-m", module]
        self._process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=pipe, stdout=pipe, stderr=self._log)

    def ask(self, **question: dict) -> dict:
        """Send a request, as `ask(generate={..})`, and return the answer. Raises WorkerError."""
        try:
            self._process.stdin.write((json.dumps(question) + "\n").encode())
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerError(self._end()) from error
        return json.loads(self._line())

    def _line(self) -> bytes:
        """Return one line: the worker writes nothing after an answer, so the answer is complete at the newline."""
        found, end = b"", time.monotonic() + PATIENCE
        while not found.endswith(b"\n"):
            ready, _, _ = select.select([self._process.stdout], [], [], max(end - time.monotonic(), 0))
            piece = os.read(self._process.stdout.fileno(), 2**20) if ready else b""
            if not piece:
                raise WorkerError(self._end() if ready else f"no answer in {PATIENCE:.0f} s\n{self._end()}")
            found += piece
        return found

    def _end(self) -> str:
        # A worker that exits closes its pipe before it prints the error.
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        self._log.seek(0)
        return self._log.read()[-2000:].strip()

    def close(self) -> None:
        with suppress(BrokenPipeError):  # the unread request of a worker that has exited
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(timeout=10)
        self._process.stdout.close()
        self._log.close()


def in_turns(
    calls: Mapping[str, Callable[[int], dict]], rounds: int, deadline: float
) -> tuple[dict[str, list[dict]], dict[str, str]]:
    """Return the answers of each call, the same number for all, and the errors of those that failed.

    Answer 0 is the first call, which traces and compiles. Answer 1 is a warm-up (torch.compile may compile again). Then rounds of
    one call each, the order rotated by one per round, until `rounds` of them were quiet, or `deadline` (`time.monotonic()`) is
    past after at least `rounds`. A call gets the number of its turn. One that raises WorkerError is dropped.
    """
    answers, failed, turn = {name: [] for name in calls}, {}, 0
    while turn < rounds + 2 or (quiet(answers)[2:].count(True) < rounds and time.monotonic() < deadline):
        names = [*answers]
        shift = turn % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            try:
                answers[name].append(calls[name](turn))
            except WorkerError as error:
                failed[name] = str(error)
                del answers[name]
                print(f"{name}: {error}", file=sys.stderr, flush=True)
        turn += 1
        if not answers:
            break
    return answers, failed


def disturbance(answers: Mapping[str, list[dict]]) -> list[float]:
    """Return, per turn, the maximum share of the machine used by others during one of its calls."""
    return [max(answer["others"] for answer in turn) for turn in zip(*answers.values(), strict=True)]


def quiet(answers: Mapping[str, list[dict]]) -> list[bool]:
    return [others <= QUIET for others in disturbance(answers)]
