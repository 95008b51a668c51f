"""Classification of storage errors: a file that cannot be read now, wrong bytes, a full disk."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

# Errors that say that a file does not exist or is something else: the storage itself works.
NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
FULL = {errno.ENOSPC: "disk full", errno.EDQUOT: "disk quota used up"}
# TensorStore raises ValueError for everything: absl's status comes first, the operating system's error number later in the text.
OS_ERROR = re.compile(r"os_error_code='(\d+)'")
STATUS = re.compile(
    r"\b(UNAVAILABLE|RESOURCE_EXHAUSTED|DEADLINE_EXCEEDED|ABORTED|CANCELLED|PERMISSION_DENIED|UNAUTHENTICATED):"
)


def is_blocked(error: BaseException, directory: Path) -> bool:
    """True if reading from `directory` failed because of the storage, not because of the contents.

    Some readers report a file that cannot be opened as missing, so every file is opened once more here.
    """
    return any(map(_is_from_storage, _chain(error))) or _cannot_be_opened(directory)


def reason(error: BaseException, directory: Path | None = None, size: int = 0) -> str:
    """One line on the error; for a full disk also the bytes to write into `directory` and those that are free."""
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
    """The error, its causes and contexts, and the members of exception groups."""
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


def _is_from_storage(error: BaseException) -> bool:
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
