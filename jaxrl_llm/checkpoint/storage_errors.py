"""What a storage that fails means: a file that cannot be read now, bytes that are wrong, a disk that is full."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

# What the storage answers where a file is not there, or is something else: found, not failed.
NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
FULL = {errno.ENOSPC: "disk full", errno.EDQUOT: "disk quota used up"}
# TensorStore raises ValueError for all: absl's status comes first, the number of the operating system's error somewhere behind.
OS_ERROR = re.compile(r"os_error_code='(\d+)'")
STATUS = re.compile(
    r"\b(UNAVAILABLE|RESOURCE_EXHAUSTED|DEADLINE_EXCEEDED|ABORTED|CANCELLED|PERMISSION_DENIED|UNAUTHENTICATED):"
)


def is_blocked(error: BaseException, directory: Path) -> bool:
    """Whether a read of what lies in `directory` failed because the storage did not give it, not because of what it holds.

    Some readers take a file that cannot be looked at for one that is missing: so each file is opened once more here.
    """
    return any(map(_says_blocked, _chain(error))) or _cannot_be_opened(directory)


def reason(error: BaseException, directory: Path | None = None, size: int = 0) -> str:
    """One line on what went wrong; of a full disk, how much was to be written into `directory` and how much is free."""
    full = next((words for found in _chain(error) if (words := FULL.get(_number(found)))), None)
    if full is None or directory is None:
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
    there = next(path for path in (directory, *directory.parents) if path.exists())
    needs = f", the step needs about {in_bytes(size)}" if size else ""
    return f"{full}: {in_bytes(shutil.disk_usage(there).free)} free in {directory}{needs}"


def in_bytes(n: int) -> str:
    for power, unit in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        if n >= 10**power:
            return f"{n / 10**power:.1f} {unit}"
    return f"{n} bytes"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, those it comes from, and the members of groups."""
    seen, todo = set(), [error]
    while todo:
        found = todo.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        todo += [found.__cause__, found.__context__, *getattr(found, "exceptions", ())]


def _number(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    number = OS_ERROR.search(str(error))
    return int(number[1]) if number else None


def _says_blocked(error: BaseException) -> bool:
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return False
    number = _number(error)
    if number is not None:
        return number not in NOT_THERE
    # An OSError without a number is a time-out; threads that cannot be started are a RuntimeError.
    return isinstance(error, OSError | RuntimeError) or STATUS.search(str(error)) is not None


def _cannot_be_opened(directory: Path) -> bool:
    def refuse(error: OSError) -> None:
        raise error

    try:
        for parent, _, names in os.walk(directory, onerror=refuse):
            for name in names:
                with open(os.path.join(parent, name), "rb") as file:
                    file.read(1)
    except OSError as error:
        return error.errno not in NOT_THERE
    return False
