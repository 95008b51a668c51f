"""A worker as the trainer sees it: it may stop, lie, flood or die, and the trainer waits for it no longer than it means to."""

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
from jaxrl_llm.environments.worker import LENGTH_BYTES, MAX_LINE_BYTES, Failure, Setup, Verdict, decode, failed
from jaxrl_llm.errors import UserError

START_LIMIT_S = 120.0
# A keeper needs milliseconds; a machine that swaps needs more.
END_LIMIT_S = 5.0
CHUNK_BYTES = 2**20


def pack(value: object) -> bytes:
    """A frame for a worker. Raises whatever pickle does."""
    content = pickle.dumps(value)
    return len(content).to_bytes(LENGTH_BYTES, "big") + content


def pack_group(group: Sequence[Sample]) -> bytes:
    # Some mappings cannot be pickled, such as read-only ones.
    return pack([sample._replace(columns=dict(sample.columns)) for sample in group])


def _start_keeper() -> tuple[socket.socket, subprocess.Popen]:
    """The keeper, and our end of its worker's connection."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    # Not by multiprocessing, which would run the trainer's `__main__` again in each worker, imports of jax and all.
    code = f"import sys; sys.path[:] = {sys.path!r}; from jaxrl_llm.environments.watchdog import keep; keep({theirs.fileno()})"
    with theirs:
        try:
            keeper = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                pass_fds=[theirs.fileno()],
                # Ctrl-C in the terminal reaches the trainer alone.
                start_new_session=True,
            )
        except OSError:
            ours.close()
            raise
    return ours, keeper


class WorkerProcess:
    """At most one group. `limit` is when (monotonic s) our patience ends: inf while idle.

    Raises:
      UserError: the machine gives no further process.
    """

    def __init__(self, setup: Setup):
        self._setup = setup
        try:
            self._connection, self._keeper = _start_keeper()
        except OSError as error:
            raise UserError(f"reward.workers: a worker could not start: {error}") from error
        os.set_blocking(self._keeper.stdout.fileno(), False)
        self._is_over, self._is_deaf, self._is_mute = False, False, False
        self._incoming, self._errors = bytearray(), b""
        self._outgoing = memoryview(pack(setup))
        self._expect(None, 0, START_LIMIT_S)

    @property
    def idle(self) -> bool:
        return self.limit == math.inf

    def begin(self, index: int, frame: bytes, size: int, deadline_s: float) -> bool:
        """Hands over a group and starts its clock. False if the worker died while idle: the group is not to blame."""
        self._listen()
        self._incoming.clear()
        self._outgoing = memoryview(frame)
        self._send()
        self._expect(index, size, deadline_s)
        return not (self._is_over or self._is_deaf or self._is_mute)

    def rest(self) -> None:
        self._expect(None, 0, math.inf)

    def register(self, poll: select.poll) -> list[int]:
        """The file descriptors on which something may happen to it next."""
        fds = [self._keeper.stdout.fileno()]
        poll.register(fds[0], select.POLLIN)
        if not self._is_mute:
            fds.append(self._connection.fileno())
            poll.register(fds[1], select.POLLIN | (select.POLLOUT if self._outgoing else 0))
        return fds

    def exchange(self) -> Verdict | None:
        """Sends and receives what it can without waiting; the verdict, if there is one by now."""
        self._send()
        self._receive()
        if b"\n" not in self._incoming:
            # In this order: what was said before the end is there when the end is.
            self._listen()
            self._receive()
        while (end := self._incoming.find(b"\n")) >= 0:
            line = bytes(self._incoming[:end])
            del self._incoming[: end + 1]
            try:
                message = decode(line, len(self._setup.graders), self.size)
            except (ValueError, TypeError):
                return failed(Failure.DIED, self.grader, f"the worker said what is no verdict: {line[:100]!r}")
            if isinstance(message, Verdict):
                return message
            self.grader = message
        if len(self._incoming) > MAX_LINE_BYTES:
            return failed(Failure.DIED, self.grader, f"the worker said more than {MAX_LINE_BYTES:,} bytes")
        return failed(Failure.DIED, self.grader, self._how(self.kill())) if self._is_over else None

    def too_late(self) -> Verdict:
        return failed(Failure.TIMED_OUT, self.grader, f"no answer within {self.patience_s:g} s")

    def errors(self) -> list[str]:
        """The lines that came on standard error since the last call."""
        if not self._errors:
            return []
        *lines, rest = self._errors.split(b"\n")
        self._errors = b"" if self._is_over else rest
        return [line.decode(errors="replace") for line in (*lines, rest if self._is_over else b"") if line]

    def release(self) -> None:
        """Tells the keeper to end the worker and all that it started."""
        if self._keeper.stdin.closed:
            return
        # A grader may have stopped it.
        self._keeper.send_signal(signal.SIGCONT)
        # A word, since a child that the trainer forked may hold the pipe open, too.
        with suppress(OSError, ValueError):  # another thread may close it, too
            self._keeper.stdin.write(b"!")
        self._keeper.stdin.close()

    def kill(self) -> int | None:
        """Ends the worker and all that it started; the worker's exit code, if it could be had. Doing so twice is fine."""
        self.release()
        try:
            self._keeper.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            # The worker dies with it.
            self._keeper.kill()
            with suppress(subprocess.TimeoutExpired):
                self._keeper.wait(END_LIMIT_S)
        self._listen()
        self._is_over = True
        self._connection.close()
        self._keeper.stdout.close()
        return self._keeper.returncode

    def _how(self, code: int | None) -> str:
        if code is None or code >= 0:
            return f"exit code {code}"
        known = code in map(int.__neg__, signal.valid_signals())
        name = signal.strsignal(-code) if known else f"signal {-code}"
        return f"ended by {name} ({-code}); reward.memory_gib is {self._setup.memory_gib:g}"

    def _send(self) -> None:
        try:
            while self._outgoing and not self._is_deaf:
                self._outgoing = self._outgoing[self._connection.send(self._outgoing[:CHUNK_BYTES]) :]
        except BlockingIOError:
            pass
        except OSError:
            # It may have answered all the same.
            self._is_deaf, self._outgoing = True, memoryview(b"")

    def _receive(self) -> None:
        try:
            while not self._is_mute and len(self._incoming) <= MAX_LINE_BYTES:
                text = self._connection.recv(CHUNK_BYTES)
                self._incoming += text
                self._is_mute = not text
                if text.endswith(b"\n"):
                    break
        except BlockingIOError:
            pass
        except OSError:
            self._is_mute = True

    def _listen(self) -> None:
        """To what the keeper passes on, and whether it is still there."""
        if self._keeper.stdout.closed:
            return
        while (text := self._keeper.stdout.read(CHUNK_BYTES)) is not None:
            self._errors += text
            if not text:
                self._is_over = True
                break

    def _expect(self, group: int | None, size: int, patience_s: float) -> None:
        self.group, self.size = group, size
        self.grader = 0
        self.patience_s = patience_s
        self.limit = time.monotonic() + patience_s
