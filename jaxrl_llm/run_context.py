"""The context of a running job: run directory, lock, records, graders, checkpoints, signals, and how a run ends."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import jax

from jaxrl_llm.checkpoint.config import CheckpointConfig
from jaxrl_llm.checkpoint.run_directory import RunLock, prepare_run_directory
from jaxrl_llm.checkpoint.store import Checkpoints, Restored
from jaxrl_llm.environments.config import RewardConfig
from jaxrl_llm.environments.grader_pool import GraderPool
from jaxrl_llm.errors import AdvantageError, CheckpointError, GradingError, NonFiniteError, Preempted, UserError
from jaxrl_llm.metrics.config import MetricsConfig
from jaxrl_llm.metrics.recorder import Recorder
from jaxrl_llm.metrics.timers import CompileCounter, Timers
from jaxrl_llm.roles.state import RunState, SupervisedState, joined, split
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import PyTree

log = logging.getLogger("jaxrl_llm.train")
State = RunState | SupervisedState
NOTHING: Mapping[str, Any] = MappingProxyType({})


class RunSettings(NamedTuple):
    """The part of a run's config that its context reads."""

    run_dir: Path
    """Absolute."""
    checkpoint: CheckpointConfig
    metrics: MetricsConfig
    reward: RewardConfig
    total_steps: int
    """Supervised and RL steps together."""
    evaluations_after: Callable[[int], int]
    """Number of evaluations still to come after a step."""
    config: Mapping[str, Any]
    """The whole config, for the records."""


class RunContext(NamedTuple):
    settings: RunSettings
    pool: GraderPool
    checkpoints: Checkpoints
    recorder: Recorder
    timers: Timers
    compiles: CompileCounter
    check_lock: Callable[[], None]
    """Raises UserError if the run directory no longer belongs to this run."""
    stopping: Callable[[int], str]
    """Name of the signal that asks to stop after a step; "" if there is none."""
    about: Mapping[str, Any]
    """Metadata that a checkpoint stores beside the state."""


@contextmanager
def open_context(
    settings: RunSettings,
    save_config: Callable[[bool], None],
    stopping: Callable[[int], str] = lambda step: "",
    about: Mapping[str, Any] = NOTHING,
) -> Iterator[RunContext]:
    """Lock the run directory, write its config.yaml, and open everything that must be closed again.

    Args:
        settings: of the run.
        save_config: writes config.yaml; its argument is True if the directory holds no checkpoint. Raises UserError if the
            directory belongs to a run that computes something else.
        stopping, about: fields of `RunContext`.

    Raises:
        UserError: the directory cannot be written, is in use, or belongs to another run.
    """
    run_dir, is_leader = settings.run_dir, jax.process_index() == 0
    checkpoints, check_lock = open_checkpoints(run_dir, settings.checkpoint.keep), lambda: None
    with ExitStack() as stack:
        try:
            if is_leader:
                prepare_run_directory(run_dir)
                check_lock = stack.enter_context(RunLock(run_dir)).check
                # A dangling link to another disk would otherwise be found hours later, by the first save.
                prepare_run_directory(checkpoints.directory)
                checkpoints.refuse_other_formats()
                save_config(checkpoints.is_empty())
            recorder = Recorder(
                run_dir, settings.metrics, settings.total_steps, is_leader, settings.evaluations_after, settings.config
            )
            stack.enter_context(recorder)
        except OSError as error:
            raise UserError(
                f"run_dir: {error.filename or run_dir} cannot be read or written: {error.strerror}"
            ) from error
        pool = stack.enter_context(GraderPool(settings.reward))
        stack.callback(_close, recorder, checkpoints)
        yield RunContext(settings, pool, checkpoints, recorder, Timers(), CompileCounter(), check_lock, stopping, about)


def open_checkpoints(run_dir: Path, keep: int) -> Checkpoints:
    return Checkpoints(Path(run_dir).resolve() / "checkpoints", keep=keep)


def restore(context: RunContext, target: Callable[[bool], PyTree], task: Task) -> State | None:
    """The newest state in the run directory; None in a new one.

    Args:
        target: abstract tree of a checkpoint, of RL (True) or of supervised training (False).
        task: compared with the task that the checkpoint was trained on.
    """
    with context.recorder.during("reading the newest checkpoint"):
        restored = context.checkpoints.restore(partial(_target_of, target))
    if restored is None:
        return None
    context.recorder.truncate(restored.meta["offsets"])
    context.recorder.message(f"resuming from step {restored.step} in {context.settings.run_dir}")
    if changed := task.changed(restored.meta.get("task")):
        context.recorder.message(changed)
    return joined(restored.tree, restored.blobs)


def restore_read_only(run_dir: Path, keep: int, target: Callable[[bool], PyTree]) -> Restored | None:
    """The newest checkpoint of a run directory that another process may be writing to; None if there is none."""
    if not (Path(run_dir) / "checkpoints").is_dir():
        return None
    checkpoints = open_checkpoints(run_dir, keep)
    try:
        return checkpoints.restore(partial(_target_of, target), owned=False)
    finally:
        checkpoints.close()


def _target_of(target: Callable[[bool], PyTree], meta: dict[str, Any]) -> PyTree:
    return target(meta["phase"] == "rl")


def conclude(context: RunContext, state: State, metrics: dict[str, Any], error: UserError | None) -> None:
    """End a step: record its metrics, save the state if a save is due, and stop the run if a guard or a signal asks for it."""
    step, last = int(state.step), context.settings.total_steps
    context.check_lock()
    context.recorder.log(step, with_rates(metrics, context))
    if error:
        end(context, state, error)
    stop = context.stopping(step)
    # While updates are non-finite nothing is learned, and the state before them may be damaged already.
    if is_due(step, context.settings.checkpoint.every, last) and (state.guards.nonfinite == 0 or step == last):
        save(context, state)
    if stop and step < last:
        stop_run(context, state, stop)
    context.checkpoints.poll()


def is_due(step: int, every: int, last: int) -> bool:
    return step > 0 and (step % every == 0 or step == last)


def with_rates(metrics: dict[str, Any], context: RunContext) -> dict[str, Any]:
    """A step's metrics with its times, its compilations and the sampler's tokens per second."""
    times = context.timers.take()
    if "completions/tokens" in metrics:
        metrics = metrics | {"tokens_per_s": metrics["completions/tokens"] / times["time/generate"]}
    return metrics | times | context.compiles.take()


def save(context: RunContext, state: State) -> None:
    """Start saving a state. One with non-finite updates removes no older checkpoint; a non-finite state ends the run."""
    step = int(state.step)
    try:
        phase = "rl" if isinstance(state, RunState) else "supervised"
        meta = {"offsets": context.recorder.offsets(), "phase": phase, **context.about}
        with context.recorder.during(f"saving step {step}"):
            tree, blobs = split(state)
            context.checkpoints.save(step, tree, meta, bool(state.guards.nonfinite == 0), blobs)
    except OSError as error:
        context.checkpoints.give_up(step, error)
    except NonFiniteError as error:
        end(context, state, error)


def save_and_wait(context: RunContext, state: State) -> None:
    """Return when the state is on disk. Raises CheckpointError if it cannot be saved."""
    step = int(state.step)
    _wait(context)
    if not context.checkpoints.has(step):
        save(context, state)
        _wait(context)
        if not context.checkpoints.has(step):
            kept = context.checkpoints.steps()
            raise CheckpointError(
                f"{context.settings.run_dir}: step {step} could not be saved, the reason is above; steps {kept} are kept"
            )


def _close(recorder: Recorder, checkpoints: Checkpoints) -> None:
    with recorder.during("saving"):
        checkpoints.close()


def _wait(context: RunContext) -> None:
    with context.recorder.during("saving"):
        context.checkpoints.wait()


def stop_run(context: RunContext, state: State, signal: str, when: str = "") -> NoReturn:
    """Save the state and raise Preempted, because `signal` asked the run to stop."""
    save_and_wait(context, state)
    raise Preempted(
        f"stopped by {signal} after step {state.step}, saved in {context.settings.run_dir}{when}; "
        "the same command resumes from there"
    )


def end(context: RunContext, state: State, error: UserError) -> NoReturn:
    """Raise a guard's error, with the step from which the next start resumes.

    If graders or advantages are the cause, the state is sound and is saved. After non-finite updates it is not: checkpoints saved
    since the last finite update are moved to other names, as training from there gave non-finite numbers.
    """
    checkpoints, moved = context.checkpoints, ""
    if isinstance(error, GradingError | AdvantageError):
        save_and_wait(context, state)
    elif isinstance(error, NonFiniteError):
        names = ", ".join(path.name for path in checkpoints.condemn(int(state.step - state.guards.nonfinite)))
        moved = names and f"; moved aside, as no update from there was finite: {names}"
    checkpoints.wait()
    kept = checkpoints.steps()
    next_start = f"resumes from step {kept[-1]}" if kept else "begins again: no step is saved"
    raise type(error)(f"{error}{moved}; the next start in {context.settings.run_dir} {next_start}") from error
