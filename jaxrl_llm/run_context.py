"""What a run holds open while it lives, and everything it does with it: records, checkpoints, stops."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import jax

from jaxrl_llm.checkpoint.run_directory import RunLock, prepare_run_directory
from jaxrl_llm.checkpoint.store import Checkpoints, Restored
from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.config.saved import claim
from jaxrl_llm.environments.grader_pool import GraderPool
from jaxrl_llm.errors import AdvantageError, CheckpointError, GradingError, NonFiniteError, Preempted, UserError
from jaxrl_llm.metrics.recorder import CompileCounter, Recorder, Timers
from jaxrl_llm.roles.state import RunState, SupervisedState
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import PyTree

log = logging.getLogger("jaxrl_llm.train")
State = RunState | SupervisedState
NOTHING: Mapping[str, Any] = MappingProxyType({})


class RunContext(NamedTuple):
    cfg: RunConfig
    pool: GraderPool
    checkpoints: Checkpoints
    recorder: Recorder
    timers: Timers
    compiles: CompileCounter
    check_lock: Callable[[], None]
    """Raises UserError where the run directory is no longer this run's."""
    stopping: Callable[[int], str]
    """Of the step: the signal that asks to stop, "" where none does."""
    about: Mapping[str, Any]
    """What a checkpoint says beside the state."""


@contextmanager
def open_context(
    cfg: RunConfig,
    stopping: Callable[[int], str] = lambda step: "",
    about: Mapping[str, Any] = NOTHING,
    whole: RunConfig | None = None,
) -> Iterator[RunContext]:
    """The run directory, locked, with config.yaml in it, and everything that must be closed again.

    Args:
        cfg, stopping, about: as in `Shell`.
        whole: what config.yaml says, where `cfg` is a part of a run.

    Raises:
        UserError: the directory cannot be written, is in use, or belongs to a run that computes something else.
    """
    run_dir, leader = Path(cfg.run_dir).resolve(), jax.process_index() == 0
    checkpoints, check_lock = open_checkpoints(cfg), lambda: None
    with ExitStack() as stack:
        try:
            if leader:
                prepare_run_directory(run_dir)
                check_lock = stack.enter_context(RunLock(run_dir)).check
                # A link to a disk that is gone would be told after hours, by the first save.
                prepare_run_directory(checkpoints.directory)
                checkpoints.refuse_other_formats()
                claim(run_dir, whole or cfg, checkpoints.is_empty())
            recorder = stack.enter_context(
                Recorder(run_dir, cfg.metrics, cfg.total_steps, leader, cfg.evaluations_after)
            )
        except OSError as error:
            raise UserError(
                f"run_dir: {error.filename or run_dir} cannot be read or written: {error.strerror}"
            ) from error
        pool = stack.enter_context(GraderPool(cfg.reward))
        stack.callback(_close, recorder, checkpoints)
        yield RunContext(cfg, pool, checkpoints, recorder, Timers(), CompileCounter(), check_lock, stopping, about)


def open_checkpoints(cfg: RunConfig) -> Checkpoints:
    return Checkpoints(Path(cfg.run_dir).resolve() / "checkpoints", keep=cfg.checkpoint.keep)


def restore(context: RunContext, target: Callable[[bool], PyTree], task: Task) -> State | None:
    """The newest state in the run directory; None in a fresh one.

    Args:
        target: what a checkpoint holds, of RL or (False) of supervised training.
        task: as it is now.
    """
    with context.recorder.during("reading the newest checkpoint"):
        restored = context.checkpoints.restore(partial(_of, target))
    if restored is None:
        return None
    context.recorder.truncate(restored.meta["offsets"])
    context.recorder.message(f"going on from step {restored.step} in {context.cfg.run_dir}")
    if changed := task.changed(restored.meta.get("task")):
        context.recorder.message(changed)
    return restored.tree


def look(cfg: RunConfig, target: Callable[[bool], PyTree]) -> Restored | None:
    """The newest checkpoint of a run directory that may be another process's; None if it has none."""
    if not (Path(cfg.run_dir) / "checkpoints").is_dir():
        return None
    checkpoints = open_checkpoints(cfg)
    try:
        return checkpoints.restore(partial(_of, target), owned=False)
    finally:
        checkpoints.close()


def _of(target: Callable[[bool], PyTree], meta: dict[str, Any]) -> PyTree:
    return target(meta["phase"] == "rl")


def conclude(context: RunContext, state: State, metrics: dict[str, Any], error: UserError | None) -> None:
    """End a step: record it, save it where that is due, and leave where a guard or a signal asks for it."""
    step, last = int(state.step), context.cfg.total_steps
    context.check_lock()
    context.recorder.log(step, with_rates(metrics, context))
    if error:
        end(context, state, error)
    stop = context.stopping(step)
    # While no update is finite nothing is learned, and what came before may be spoiled already.
    if is_due(step, context.cfg.checkpoint.every, last) and (state.guards.nonfinite == 0 or step == last):
        save(context, state)
    if stop and step < last:
        leave(context, state, stop)
    context.checkpoints.poll()


def is_due(step: int, every: int, last: int) -> bool:
    return step > 0 and (step % every == 0 or step == last)


def with_rates(metrics: dict[str, Any], context: RunContext) -> dict[str, Any]:
    """The step's metrics with its times, its compilations and the sampler's tokens per second."""
    times = context.timers.take()
    if "completions/tokens" in metrics:
        metrics = metrics | {"tokens_per_s": metrics["completions/tokens"] / times["time/generate"]}
    return metrics | times | context.compiles.take()


def save(context: RunContext, state: State) -> None:
    """Start to save. A state whose updates are not finite pushes no older step out; one that is not finite itself ends the run."""
    step = int(state.step)
    try:
        phase = "rl" if isinstance(state, RunState) else "supervised"
        meta = {"offsets": context.recorder.offsets(), "phase": phase, **context.about}
        with context.recorder.during(f"saving step {step}"):
            context.checkpoints.save(step, state, meta, prune=bool(state.guards.nonfinite == 0))
    except OSError as error:
        context.checkpoints.give_up(step, error)
    except NonFiniteError as error:
        end(context, state, error)


def secure(context: RunContext, state: State) -> None:
    """Return when this state is on disk. Raises CheckpointError where it cannot be saved."""
    step = int(state.step)
    _wait(context)
    if not context.checkpoints.has(step):
        save(context, state)
        _wait(context)
        if not context.checkpoints.has(step):
            kept = context.checkpoints.steps()
            raise CheckpointError(
                f"{context.cfg.run_dir}: step {step} could not be saved, the reason is above; steps {kept} are kept"
            )


def _close(recorder: Recorder, checkpoints: Checkpoints) -> None:
    with recorder.during("saving"):
        checkpoints.close()


def _wait(context: RunContext) -> None:
    with context.recorder.during("saving"):
        context.checkpoints.wait()


def leave(context: RunContext, state: State, why: str, when: str = "") -> NoReturn:
    """Stop as `why`, a signal, asked, with this state saved."""
    secure(context, state)
    raise Preempted(
        f"stopped by {why} after step {state.step}, saved in {context.cfg.run_dir}{when}; the same command goes on from there"
    )


def end(context: RunContext, state: State, error: UserError) -> NoReturn:
    """Raise what a guard found, with words on what the next start goes on from.

    Where graders or advantages are to blame this state is sound, and saved. Where no update was finite, the last that was has led
    to numbers from which nothing can be learned: what was saved since then is moved aside.
    """
    checkpoints, told = context.checkpoints, ""
    if isinstance(error, GradingError | AdvantageError):
        secure(context, state)
    else:
        since = int(state.step - state.guards.nonfinite)
        moved = checkpoints.condemn(since) if isinstance(error, NonFiniteError) else []
        names = ", ".join(path.name for path in moved)
        told = names and f"; moved aside, as no update from there was finite: {names}"
    checkpoints.wait()
    kept = checkpoints.steps()
    next_start = f"goes on from step {kept[-1]}" if kept else "begins anew: no step is saved"
    raise type(error)(f"{error}{told}; the next start in {context.cfg.run_dir} {next_start}") from error
