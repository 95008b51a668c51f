"""The processes below this one: found, whatever they did to leave, and ended.

On Linux a subreaper is the parent of every process below it whose own parent is gone, so that neither a second fork nor `setsid`
leads out. Elsewhere only the process group of a worker is ended.
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
    """Makes this process the parent of what its descendants leave behind."""
    if LINUX:
        PR_SET_CHILD_SUBREAPER = 36
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with(parent: int) -> None:
    """Asks Linux to kill this process when its parent ends, whatever the grader is doing then."""
    if LINUX:
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # The parent may have died before the call.
        if os.getppid() != parent:
            os._exit(1)


class Ended(NamedTuple):
    command: str
    """Of the first process that was still running; "" if none was."""
    statuses: dict[int, int]
    """By pid, of the children that were reaped; as `os.waitpid` gives them."""


def end_descendants(spared: Collection[int] = ()) -> Ended:
    """Kills and reaps every process below this one but the `spared` and those below them, in `END_LIMIT_S` at most."""
    command, statuses, limit = "", {}, time.monotonic() + END_LIMIT_S
    while LINUX and _has_children() and time.monotonic() < limit:
        # Again and again: a process that forks while it is being looked for is found the next time.
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
    return Ended(command, statuses)


def descendants(spared: Collection[int] = ()) -> list[int]:
    """Pids below this process, zombies too, without the `spared` and those below them. Off Linux: none."""
    if not LINUX or not _has_children():
        return []
    children = defaultdict(list)
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            # pid (name) state parent ...; the name may hold anything.
            children[int(file.read().rpartition(b")")[2].split()[1])].append(int(name))
    found, todo = [], [os.getpid()]
    while todo:
        below = [pid for pid in children[todo.pop()] if pid not in spared]
        found += below
        todo += below
    return found


def _has_children() -> bool:
    """One call of the kernel, where a look into /proc costs milliseconds."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _command(pid: int) -> str:
    """Its command line, "" for a zombie."""
    with suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read(200).replace(b"\0", b" ").decode(errors="replace").strip()
    return ""
