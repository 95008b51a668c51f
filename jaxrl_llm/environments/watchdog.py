"""Watchdog: the process between the trainer and one worker. It starts the worker and kills all processes that the worker leaves.

The trainer writes to the watchdog's standard input, or closes it, to end the worker. The watchdog's standard output carries the
first bytes that the worker and its children write to standard error, and closes once all of them are gone; its exit code is the
worker's. So no child of a grader holds a descriptor open on which the trainer waits.
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

# Both together fit into an empty pipe, so a trainer that does not read blocks nobody.
MAX_ERRORS_BYTES = 8192
PIPE_BYTES = 65536
DROPPED = b"\n(a worker shows the first 8 KiB of its standard error; the rest is dropped)\n"
PARENT_CHECK_S = 1.0


def run_watchdog(connection: int) -> None:
    """Fork the worker, and watch it until it ends; in the forked worker, serve. `connection`: file descriptor of its socket."""
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
    watchdog, worker = os.getpid(), os.fork()
    if not worker:
        signal.set_wakeup_fd(-1)
        for fd in (woken, wake, errors):
            os.close(fd)
        _become_worker(watchdog, errors_in)
        return serve(socket.socket(fileno=connection))
    os.close(errors_in)
    os.close(connection)
    _exit_as(_watch(worker, trainer, woken, errors))


def _become_worker(watchdog: int, errors: int) -> None:
    """Set up process group, signals and standard streams of the forked worker."""
    # A separate group, for signals that a grader sends to its own group.
    os.setpgid(0, 0)
    descendants.die_with(watchdog)
    descendants.adopt_orphans()
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(signum, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDWR)
    for ours, theirs in ((nothing, 0), (nothing, 1), (errors, 2)):
        os.dup2(ours, theirs)
    os.close(nothing)
    os.close(errors)


def _watch(worker: int, trainer: int, woken: int, errors: int) -> int:
    """Return the worker's wait status once it and its descendants are gone: it ended, or the trainer asked for its end.

    Args:
        worker: pid of the worker.
        trainer: pid of the trainer.
        woken: pipe end that is readable when a child ended.
        errors: pipe end of the worker's standard error.
    """
    echo, open_fds, status = _StderrEcho(errors), {0, woken, errors}, None
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
    """Wait status of a worker that was sent SIGKILL; SIGKILL as well if it does not end in time."""
    limit = time.monotonic() + descendants.END_LIMIT_S
    while time.monotonic() < limit:
        with suppress(ChildProcessError):
            ended, status = os.waitpid(worker, os.WNOHANG)
            if ended:
                return status
        time.sleep(descendants.PAUSE_S)
    return signal.SIGKILL


class _StderrEcho:
    """Copies the first `MAX_ERRORS_BYTES` of a pipe to standard output, without blocking, and drops the rest."""

    def __init__(self, source: int):
        self._source, self._left = source, MAX_ERRORS_BYTES

    def pump(self) -> bool:
        """Read once, since a flood has no end. False at the end of the pipe."""
        with suppress(BlockingIOError):
            text = os.read(self._source, PIPE_BYTES)
            self._write(text)
            return bool(text)
        return True

    def _write(self, text: bytes) -> None:
        if self._left:
            kept, self._left = text[: self._left], max(0, self._left - len(text))
            with suppress(OSError):
                os.write(1, kept + (b"" if self._left else DROPPED))


def _exit_as(status: int) -> None:
    """End this process as the worker ended, signals included."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with suppress(OSError, ValueError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 1)
