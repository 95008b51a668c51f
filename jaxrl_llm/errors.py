"""What ends a run on purpose: each error carries the exit code that the command line returns.

The message is written for the person who typed the command: name, got, want, what to do. `cli.main` prints it without a traceback.
"""

import errno
import os


class UserError(Exception):
    """Bad input: config, data, mesh, paths. Nothing was started, nothing was lost."""

    exit_code = 2


class CheckpointError(UserError):
    """No checkpoint of the run directory can be used, the storage does not give them, or a save failed for good."""

    exit_code = 3


class NonFiniteError(UserError):
    """Too many updates in a row had a non-finite loss or gradient, or the state is not finite; the latest checkpoint is from before
    that."""

    exit_code = 4


class GradingError(UserError):
    """No group could be graded for too many steps in a row: nothing can be learned."""

    exit_code = 4


class MismatchError(UserError):
    """The sampler's probabilities are too far from the trainer's; the last good checkpoint is the latest one."""

    exit_code = 4


class AdvantageError(UserError):
    """An advantage that float32 cannot hold, or one above what its estimator's formula allows; the last good checkpoint is the
    latest one."""

    exit_code = 4


class Preempted(Exception):
    """SIGTERM or Ctrl-C arrived, the state is saved: start the same command again to go on."""

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
    errno.EIO: "the disk, or what holds it, failed; start again when it is well",
    errno.ESTALE: "the shared directory was unmounted or moved; start again when it is back",
}


def in_words(error: OSError, path: os.PathLike | None = None) -> str:
    """`path: what the system said; what to do`, on one line. `path`: where the error's own is not what the person knows."""
    where = error.filename if path is None else path
    named = f"{os.fsdecode(where)}: " if isinstance(where, str | bytes | os.PathLike) else ""
    why = error.strerror or " ".join(str(error).split()) or type(error).__name__
    advice = f"; {WHAT_TO_DO[error.errno]}" if error.errno in WHAT_TO_DO else ""
    return f"{named}{why}{advice}"
