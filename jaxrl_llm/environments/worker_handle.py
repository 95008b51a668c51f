"""The trainer's handle of one worker, which may hang, send garbage or die: no call blocks longer than its limit."""

import math
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from jaxrl_llm.environments.grader import Sample
from jaxrl_llm.environments.worker import (
    LENGTH_BYTES,
    MAX_LINE_BYTES,
    Failure,
    Verdict,
    WorkerSetup,
    decode,
    failed_verdict,
)
from jaxrl_llm.errors import UserError

START_LIMIT_S = 120.0
# A watchdog needs milliseconds; a machine that swaps needs more.
END_LIMIT_S = 5.0
CHUNK_BYTES = 2**20


def pack(value: object) -> bytes:
    """Return a frame for a worker. Raises whatever pickle does."""
    content = pickle.dumps(value)
    return len(content).to_bytes(LENGTH_BYTES, "big") + content


def pack_group(group: Sequence[Sample]) -> bytes:
    # Some mappings cannot be pickled, such as read-only ones.
    return pack([sample._replace(columns=dict(sample.columns)) for sample in group])


def _start_watchdog() -> tuple[socket.socket, subprocess.Popen]:
    """Return the trainer's end of the worker's connection, and the watchdog."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    # Not with multiprocessing, which would run the trainer's `__main__` again in each worker, with all imports of jax.
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; "
        f"from jaxrl_llm.environments.watchdog import run_watchdog; run_watchdog({theirs.fileno()})"
    )
    with theirs:
        try:
            watchdog = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                pass_fds=[theirs.fileno()],
                # Ctrl-C in the terminal interrupts the trainer only.
                start_new_session=True,
            )
        except OSError:
            ours.close()
            raise
    return ours, watchdog


class WorkerProcess:
    """A worker and the group that it grades, at most one. `deadline`: monotonic time in seconds; inf while idle.

    Raises:
        UserError: the system cannot start another process.
    """

    def __init__(self, setup: WorkerSetup):
        self._setup = setup
        try:
            self._connection, self._watchdog = _start_watchdog()
        except OSError as error:
            raise UserError(f"reward.workers: a worker could not start: {error}") from error
        os.set_blocking(self._watchdog.stdout.fileno(), False)
        self._has_ended, self._cannot_send, self._cannot_receive = False, False, False
        self._incoming, self._errors = bytearray(), b""
        self._outgoing = memoryview(pack(setup))
        self._send()
        self.await_start()

    def await_start(self) -> None:
        """Start the clock within which a worker that is not ready has to be."""
        self._expect(None, (), START_LIMIT_S)

    @property
    def idle(self) -> bool:
        return self.deadline == math.inf

    def start_group(self, index: int, frame: bytes, group: Sequence[Sample], deadline_s: float) -> bool:
        """Send a group and start its clock.

        Args:
            index: number of the group.
            frame: the packed group.
            group: its samples.
            deadline_s: seconds until the verdict is late.

        Returns:
            False if the worker died while idle, so that the group is not to blame.
        """
        self._read_errors()
        self._incoming.clear()
        self._outgoing = memoryview(frame)
        self._send()
        self._expect(index, group, deadline_s)
        return not (self._has_ended or self._cannot_send or self._cannot_receive)

    def set_idle(self) -> None:
        self._expect(None, (), math.inf)

    def register(self, poll: select.poll) -> list[int]:
        """Register and return the file descriptors on which its next event may occur."""
        fds = [self._watchdog.stdout.fileno()]
        poll.register(fds[0], select.POLLIN)
        if not self._cannot_receive:
            fds.append(self._connection.fileno())
            poll.register(fds[1], select.POLLIN | (select.POLLOUT if self._outgoing else 0))
        return fds

    def exchange(self) -> Verdict | None:
        """Send and receive without blocking; return the verdict if it is complete."""
        self._send()
        self._receive()
        if b"\n" not in self._incoming:
            # In this order, so that what was sent before the end is received before the end is noticed.
            self._read_errors()
            self._receive()
        while (end := self._incoming.find(b"\n")) >= 0:
            line = bytes(self._incoming[:end])
            del self._incoming[: end + 1]
            try:
                message = decode(line, self._setup.graders, self._samples)
            except (ValueError, TypeError):
                return failed_verdict(Failure.DIED, self.grader, f"the worker sent an invalid verdict: {line[:100]!r}")
            if isinstance(message, Verdict):
                return message
            self.grader = message
        if len(self._incoming) > MAX_LINE_BYTES:
            return failed_verdict(Failure.DIED, self.grader, f"the worker sent more than {MAX_LINE_BYTES:,} bytes")
        return failed_verdict(Failure.DIED, self.grader, self._exit_text(self.kill())) if self._has_ended else None

    def timed_out(self) -> Verdict:
        return failed_verdict(Failure.TIMED_OUT, self.grader, f"no answer within {self.limit_s:g} s")

    def error_lines(self) -> list[str]:
        """Return the lines that arrived from standard error since the last call."""
        if not self._errors:
            return []
        *lines, rest = self._errors.split(b"\n")
        self._errors = b"" if self._has_ended else rest
        return [line.decode(errors="replace") for line in (*lines, rest if self._has_ended else b"") if line]

    def release(self) -> None:
        """Ask the watchdog to end the worker and all its descendants."""
        if self._watchdog.stdin.closed:
            return
        # A grader may have stopped it.
        self._watchdog.send_signal(signal.SIGCONT)
        # A byte, because a process that the trainer forked may hold the pipe open as well.
        with suppress(OSError, ValueError):  # another thread may close it, too
            self._watchdog.stdin.write(b"!")
        self._watchdog.stdin.close()

    def kill(self) -> int | None:
        """End the worker and all its descendants; return the worker's exit code if it is known. Idempotent."""
        self.release()
        try:
            self._watchdog.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            # The worker dies with it.
            self._watchdog.kill()
            with suppress(subprocess.TimeoutExpired):
                self._watchdog.wait(END_LIMIT_S)
        self._read_errors()
        self._has_ended = True
        self._connection.close()
        self._watchdog.stdout.close()
        return self._watchdog.returncode

    def _exit_text(self, code: int | None) -> str:
        if code is None or code >= 0:
            return f"exit code {code}"
        known = code in map(int.__neg__, signal.valid_signals())
        name = signal.strsignal(-code) if known else f"signal {-code}"
        return f"ended by {name} ({-code}); reward.memory_gib is {self._setup.memory_gib:g}"

    def _send(self) -> None:
        try:
            while self._outgoing and not self._cannot_send:
                self._outgoing = self._outgoing[self._connection.send(self._outgoing[:CHUNK_BYTES]) :]
        except BlockingIOError:
            pass
        except OSError:
            # It may have answered before.
            self._cannot_send, self._outgoing = True, memoryview(b"")

    def _receive(self) -> None:
        try:
            while not self._cannot_receive and len(self._incoming) <= MAX_LINE_BYTES:
                text = self._connection.recv(CHUNK_BYTES)
                self._incoming += text
                self._cannot_receive = not text
                if text.endswith(b"\n"):
                    break
        except BlockingIOError:
            pass
        except OSError:
            self._cannot_receive = True

    def _read_errors(self) -> None:
        """Read what the watchdog forwards, and notice its end."""
        if self._watchdog.stdout.closed:
            return
        while (text := self._watchdog.stdout.read(CHUNK_BYTES)) is not None:
            self._errors += text
            if not text:
                self._has_ended = True
                break

    def _expect(self, group: int | None, samples: Sequence[Sample], limit_s: float) -> None:
        self.group, self._samples = group, samples
        self.grader = 0
        self.limit_s = limit_s
        self.deadline = time.monotonic() + limit_s
