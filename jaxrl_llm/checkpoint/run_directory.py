"""Run directory: a check that it is writable, the lock that lets one run write it, and atomic writes of files."""

import errno
import fcntl
import os
import socket
from datetime import datetime
from pathlib import Path
from typing import IO, Self

from jaxrl_llm.errors import UserError

# Errors of file systems without locks on directories, such as NFS.
NO_LOCKS = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def prepare_run_directory(path: Path) -> None:
    """Create the directory and check that a file can be written, synced and renamed there. Raises UserError otherwise."""
    probe = path / f".probe-{socket.gethostname()}-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(probe, b"probe")
        probe.unlink()
    except OSError as error:
        raise UserError(f"run_dir: got {path}, want a directory that can be made and written ({error})") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file atomically: a reader at any moment, also after a crash, finds the old or the new content."""
    partial = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class RunLock:
    """Lock held by the process that writes to a run directory (process 0 of a job); the kernel frees it when that process ends.

    It has two parts: a lock on the directory itself, which cannot be deleted without being noticed, and one on the file `lock` in
    it, which names the holder and is the only one if directories cannot be locked. Raises UserError if another process holds one.
    """

    def __init__(self, run_directory: Path):
        self._directory = Path(run_directory)
        self._path = self._directory / "lock"

    def __enter__(self) -> Self:
        self._handle = os.open(self._directory, os.O_RDONLY)
        try:
            self._is_locked = self._lock_directory()
            self._file = self._lock_file()
        except BaseException:
            os.close(self._handle)
            raise
        return self

    def check(self) -> None:
        """Raise UserError if the run directory no longer belongs to this run; write `lock` again if only that file is gone."""
        try:
            if not os.path.samestat(os.fstat(self._handle), os.stat(self._directory)):
                raise UserError(
                    f"run_dir: {self._directory} is another directory than at the start; nothing was written into it"
                )
            if os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path)):
                return
        except FileNotFoundError:
            if not self._directory.exists():
                raise UserError(f"run_dir: {self._directory} was moved or deleted during the run") from None
        if not self._is_locked:
            raise UserError(
                f"run_dir: {self._path} was deleted or replaced, so another run may write here too; this one has stopped, what it "
                "saved is kept: make sure that no other is running, then start the same command again"
            )
        self._file.close()
        self._file = self._lock_file()

    def __exit__(self, *_: object) -> None:
        self._file.close()
        os.close(self._handle)

    def _lock_directory(self) -> bool:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._in_use(self._path.read_text(encoding="utf-8") if self._path.exists() else "") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return False
        return True

    def _lock_file(self) -> IO[str]:
        # "a+": opening must not erase the holder's name.
        file = self._path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read()
            file.close()
            if not isinstance(error, BlockingIOError):
                raise UserError(
                    f"run_dir: {self._directory} cannot be locked ({error.strerror}); give a directory on a file system with locks"
                ) from None
            raise self._in_use(holder) from None
        file.truncate(0)
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        file.write(f"pid {os.getpid()} on {socket.gethostname()} since {since}\n")
        file.flush()
        return file

    def _in_use(self, holder: str) -> UserError:
        by = holder.strip() or "another process"
        return UserError(f"run_dir: {self._directory} is in use by {by}; stop that run or give another directory")
