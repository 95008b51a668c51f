"""What ends a run on purpose: each error carries the exit code that the command line returns.

The message is written for the person who typed the command: name, got, want, what to do. `cli.main` prints it without a traceback.
"""


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
