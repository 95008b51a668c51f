"""Errors that end a command on purpose, each with its exit code.

A message is for the user who typed the command: name, got, want, what to do. `cli.main` prints it without a traceback.
"""

import errno
import os


class UserError(Exception):
    """Bad input: config, data, mesh or paths."""

    exit_code = 2


class CheckpointError(UserError):
    """The run directory has no usable checkpoint, its storage cannot be read, or saving failed for good."""

    exit_code = 3


class NonFiniteError(UserError):
    """The loss or gradient of too many updates in a row was not finite, or the state is not finite. The newest checkpoint is older
    than that."""

    exit_code = 4


class GradingError(UserError):
    """No group could be graded for too many steps in a row, so that there is nothing to learn from."""

    exit_code = 4


class DroppedError(UserError):
    """Every graded group was dropped for too many steps in a row, so that there is nothing to learn from."""

    exit_code = 4


class MismatchError(UserError):
    """The log-probs of the sampler are too far from those of the trainer. The newest checkpoint is the last good one."""

    exit_code = 4


class AdvantageError(UserError):
    """An advantage is beyond float32, or beyond the bound of its estimator. The newest checkpoint is the last good one."""

    exit_code = 4


class Preempted(Exception):
    """SIGTERM or Ctrl-C arrived, and the state is saved: the same command resumes from it."""

    exit_code = 75


WHAT_TO_DO = {
    errno.ENOSPC: "free some space there, then start again",
    errno.EDQUOT: "free some space there, then start again",
    errno.EROFS: "want a place that can be written",
    errno.EACCES: "want a place that this user may read and write",
    errno.EPERM: "want a place that this user may read and write",
    errno.ENOTDIR: "a part of this path is a file, want directories",
    errno.EEXIST: "a part of this path is a file, want directories",
    errno.EISDIR: "want a file",
    errno.ENAMETOOLONG: "want a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "the disk failed; start again when it works",
    errno.ESTALE: "the shared directory was unmounted or moved; start again when it is mounted",
}


def describe_os_error(error: OSError, path: os.PathLike | None = None) -> str:
    """Return `path: reason; what to do`, on one line. `path` replaces the error's own, if the user knows another one."""
    path = error.filename if path is None else path
    prefix = f"{os.fsdecode(path)}: " if isinstance(path, str | bytes | os.PathLike) else ""
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    advice = f"; {WHAT_TO_DO[error.errno]}" if error.errno in WHAT_TO_DO else ""
    return f"{prefix}{reason}{advice}"
