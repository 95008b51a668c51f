"""Find and kill all descendants of this process, daemons included.

On Linux a subreaper becomes the parent of every descendant that is orphaned, so neither a second fork nor `setsid` escapes it.
Elsewhere only a worker's process group is killed.
"""

import ctypes
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Collection
from contextlib import suppress
from typing import NamedTuple

LINUX = sys.platform == "linux"
END_LIMIT_S = 3.0
PAUSE_S = 0.002


def adopt_orphans() -> None:
    """Make this process the parent of its orphaned descendants."""
    if LINUX:
        PR_SET_CHILD_SUBREAPER = 36
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with(parent: int) -> None:
    """Ask Linux to kill this process when its parent ends, whatever a grader is doing at that time."""
    if LINUX:
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # The parent may have died before the call.
        if os.getppid() != parent:
            os._exit(1)


class EndedProcesses(NamedTuple):
    command: str
    """Command line of the first process that was still running; "" if none was."""
    statuses: dict[int, int]
    """Wait status per reaped pid, as `os.waitpid` returns it."""


def end_descendants(spared: Collection[int] = ()) -> EndedProcesses:
    """Kill and reap all descendants except `spared` and their descendants, in at most `END_LIMIT_S`."""
    command, statuses, limit = "", {}, time.monotonic() + END_LIMIT_S
    while LINUX and _has_children() and time.monotonic() < limit:
        # Repeated, because a process may fork between the listing and the kill.
        found = descendants(spared)
        if not found:
            break
        for pid in found:
            command = command or _command(pid)
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(PAUSE_S)
        for pid in found:
            with suppress(ChildProcessError):
                reaped, status = os.waitpid(pid, os.WNOHANG)
                statuses |= {reaped: status} if reaped else {}
    return EndedProcesses(command, statuses)


def descendants(spared: Collection[int] = ()) -> list[int]:
    """Return the pids of all descendants, zombies included, except `spared` and their descendants. Empty off Linux."""
    if not LINUX or not _has_children():
        return []
    children = defaultdict(list)
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            # pid (name) state parent ...; the name may hold any bytes.
            children[int(file.read().rpartition(b")")[2].split()[1])].append(int(name))
    found, todo = [], [os.getpid()]
    while todo:
        below = [pid for pid in children[todo.pop()] if pid not in spared]
        found += below
        todo += below
    return found


def _has_children() -> bool:
    """True if this process has children: one system call, where reading /proc takes milliseconds."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _command(pid: int) -> str:
    """Command line of a process; "" for a zombie."""
    with suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read(200).replace(b"\0", b" ").decode(errors="replace").strip()
    return ""
