"""The process between the trainer and a worker: it starts the worker, and ends all that the worker leaves.

The trainer says a word on the keeper's standard input, or closes it, when it wants no more of the worker. The keeper's standard
output carries the beginning of what the worker and its children write to standard error, and ends when they are all gone; its exit
code is the worker's. So no child of a grader holds anything open whose end the trainer waits for.
"""

import os
import resource
import select
import signal
import socket
import time
from contextlib import suppress

from jaxrl_llm.environments import descendants
from jaxrl_llm.environments.worker import serve

# Both together fit into an empty pipe, so that a trainer that does not read stalls nobody.
MAX_ERRORS_BYTES = 8192
PIPE_BYTES = 65536
DROPPED = b"\n(a worker shows the first 8 KiB of its standard error; the rest is dropped)\n"
PARENT_CHECK_S = 1.0


def keep(connection: int) -> None:
    """A keeper's life; in the worker, which it forks, the worker's. `connection`: a socket's file descriptor, for the worker."""
    trainer = os.getppid()
    # It ends with its worker. A batch system's SIGTERM is for the trainer, which may want to save first.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    descendants.adopt_orphans()
    errors, errors_in = os.pipe()
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    keeper, worker = os.getpid(), os.fork()
    if not worker:
        signal.set_wakeup_fd(-1)
        for fd in (woken, wake, errors):
            os.close(fd)
        _become_worker(keeper, errors_in)
        return serve(socket.socket(fileno=connection))
    os.close(errors_in)
    os.close(connection)
    _exit_as(_watch(worker, trainer, woken, errors))


def _become_worker(keeper: int, errors: int) -> None:
    """Settles in the forked process."""
    # A group of its own, for what a grader sends to "its" group.
    os.setpgid(0, 0)
    descendants.die_with(keeper)
    descendants.adopt_orphans()
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(signum, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDWR)
    for ours, theirs in ((nothing, 0), (nothing, 1), (errors, 2)):
        os.dup2(ours, theirs)
    os.close(nothing)
    os.close(errors)


def _watch(worker: int, trainer: int, woken: int, errors: int) -> int:
    """The worker's status, once it and all below it are gone: because it ended, or because the trainer wants no more of it."""
    echo, open_fds, status = _Echo(errors), {0, woken, errors}, None
    for fd in (1, errors):
        os.set_blocking(fd, False)
    while status is None:
        ready, _, _ = select.select(open_fds, [], [], PARENT_CHECK_S)
        if errors in ready and not echo.pump():
            open_fds.discard(errors)
        if woken in ready:
            os.read(woken, 4096)
        ended, found = os.waitpid(worker, os.WNOHANG)
        status = found if ended else None
        if 0 in ready or os.getppid() != trainer:
            break
    if not descendants.LINUX:
        with suppress(OSError):
            os.killpg(worker, signal.SIGKILL)
    statuses = descendants.end_descendants().statuses
    if status is None:
        status = statuses[worker] if worker in statuses else _last_status(worker)
    echo.pump()
    return status


def _last_status(worker: int) -> int:
    """Of a worker that died of SIGKILL, or that not even this ends: then as if it had."""
    limit = time.monotonic() + descendants.END_LIMIT_S
    while time.monotonic() < limit:
        with suppress(ChildProcessError):
            ended, status = os.waitpid(worker, os.WNOHANG)
            if ended:
                return status
        time.sleep(descendants.PAUSE_S)
    return signal.SIGKILL


class _Echo:
    """Reads what comes from a pipe, without waiting, and says the first of it."""

    def __init__(self, source: int):
        self._source, self._left = source, MAX_ERRORS_BYTES

    def pump(self) -> bool:
        """One read, since a flood has no end. False at the pipe's end."""
        with suppress(BlockingIOError):
            text = os.read(self._source, PIPE_BYTES)
            self._say(text)
            return bool(text)
        return True

    def _say(self, text: bytes) -> None:
        if self._left:
            told, self._left = text[: self._left], max(0, self._left - len(text))
            with suppress(OSError):
                os.write(1, told + (b"" if self._left else DROPPED))


def _exit_as(status: int) -> None:
    """Ends this process as the worker ended, signals included."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with suppress(OSError, ValueError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 1)
