"""The sentence: prompts -> generate -> reward -> filter -> replay -> advantage -> update -> publish -> generate ...

`train` reads from top to bottom as what a run does. Each stage is a function of values; this file is where they meet.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from jaxrl_llm import sources
from jaxrl_llm.checkpoint import Checkpoints
from jaxrl_llm.claim import claim
from jaxrl_llm.collect import GivenUp, collect
from jaxrl_llm.config import RunConfig
from jaxrl_llm.describe import as_floats, describe, describe_engine, responses
from jaxrl_llm.errors import AdvantageError, CheckpointError, GradingError, NonFiniteError, Preempted, UserError
from jaxrl_llm.evaluate import evaluate, headline, supervised_experience
from jaxrl_llm.guards import observe, observe_update
from jaxrl_llm.interrupt import stop_signal
from jaxrl_llm.learn import learn, without_zero_gradients
from jaxrl_llm.life import Life, begin, fresh_state, open_checkpoints, start_reference, target, trained_policy
from jaxrl_llm.metrics import CompileCounter, Recorder, Timers
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.plan import fit
from jaxrl_llm.prompts.stream import next_prompts
from jaxrl_llm.prompts.supervised import noisy_rows
from jaxrl_llm.rates import decode_rates, describe_updates
from jaxrl_llm.reference import refresh
from jaxrl_llm.rewards.pool import GraderPool
from jaxrl_llm.run import Run, build, publish
from jaxrl_llm.run_directory import RunLock, prepare_run_directory
from jaxrl_llm.sources import Sources
from jaxrl_llm.types import Groups, Policy, TrainState
from jaxrl_llm.unread import unread
from jaxrl_llm.update.batch import make_batch

log = logging.getLogger("jaxrl_llm.train")


# Of the held-out part's scores.
ACCURACIES = ("eval/exact", "eval/pass@", "eval/maj@")


class Shell(NamedTuple):
    """What a run holds open while it lives: everything with effects."""

    pool: GraderPool
    checkpoints: Checkpoints
    recorder: Recorder
    timers: Timers
    compiles: CompileCounter
    check_lock: Callable[[], None]
    """Raises UserError where the run directory is no longer this run's."""


class Result(NamedTuple):
    measure: str
    """What the two numbers are: `evaluate.headline`."""
    before: float
    """Before RL, after the warm start."""
    after: float
    run_dir: Path


def train(
    cfg: RunConfig, must_resume: bool = False, given: Sources | None = None, ends_process: bool = False
) -> Result:
    """Run `cfg` to its end, going on from the newest checkpoint in its run directory if there is one.

    Args:
        given: what was read of `cfg` already.
        ends_process: see `stop_signal`.
    """
    if must_resume and open_checkpoints(cfg).is_empty():
        raise CheckpointError(f"--resume: got {cfg.run_dir}, which holds no checkpoint; leave out --resume to start it")
    with stop_signal(ends_process, cfg.total_steps) as stopping:
        run = build(cfg, given or sources.read(cfg, trains=True))
        fit.check(run)
        for line in unread(cfg):
            log.warning("%s", line)
        with open_shell(cfg) as shell:
            life, policy, scores = start(run, shell), None, {}
            # Supervised steps alone have recorded the score, and RL may go on from them.
            is_recorded = not math.isnan(life.eval_before)
            if life.step == cfg.warm_start.steps and not life.began and (cfg.steps or not is_recorded):
                life, policy, scores = start_rl(run, shell, life)
                if not is_recorded:
                    shell.recorder.log(life.step, with_rates({"phase": "rl", **scores}, shell))
            while life.step < cfg.total_steps:
                if life.step < cfg.warm_start.steps:
                    life, metrics, error = warm_step(run, shell, life)
                    if life.step == cfg.warm_start.steps and not error:
                        life, policy, scores = start_rl(run, shell, life)
                        metrics |= scores
                else:
                    policy = policy or first_policy(run, shell, life.state)
                    try:
                        step = rl_step(run, shell, life, policy, partial(stops_alone, stopping, life.step))
                    except GivenUp:
                        leave(run, shell, life, stopping(life.step), " (the next one was given up while it sampled)")
                    except AdvantageError as refused:
                        shell.recorder.log(life.step + 1, {"phase": "rl", "warnings": [str(refused)]})
                        end(run, shell, life, refused)
                    life, policy, metrics = step.life, step.policy, step.metrics
                    if is_due(life.step - cfg.warm_start.steps, cfg.evaluation.every, cfg.steps):
                        scores = score_held_out(run, shell, life, policy)
                        metrics |= scores
                    life, metrics, error = guard(run, shell, step, metrics)
                shell.check_lock()
                shell.recorder.log(life.step, with_rates(metrics, shell))
                if error:
                    end(run, shell, life, error)
                stop = stopping(life.step)
                if is_due(life.step, cfg.checkpoint.every, cfg.total_steps) and may_save(life, cfg.total_steps):
                    save(run, shell, life)
                if stop and life.step < cfg.total_steps:
                    leave(run, shell, life, stop)
                shell.checkpoints.poll()
            if life.step:
                secure(run, shell, life)
            scores = scores or score_held_out(run, shell, life, publish(run, life.state, None))
            return result(run, life, scores)


def result(run: Run, life: Life, scores: dict[str, Any]) -> Result:
    measure = headline(run)
    after = scores.get(measure, float("nan"))
    return Result(measure.removeprefix("eval/"), life.eval_before, after, Path(run.cfg.run_dir).resolve())


def with_rates(metrics: dict[str, float], shell: Shell) -> dict[str, float]:
    """The step's metrics with its times, its compilations and the sampler's tokens a second."""
    times = shell.timers.take()
    if "completions/tokens" in metrics:
        metrics = metrics | {"tokens_per_s": metrics["completions/tokens"] / times["time/generate"]}
    return metrics | times | shell.compiles.take()


def is_due(step: int, every: int, last: int) -> bool:
    return step > 0 and (step % every == 0 or step == last)


def warm_step(run: Run, shell: Shell, life: Life) -> tuple[Life, dict[str, float], UserError | None]:
    """One supervised update on noisy answers, and what ends the run, if anything does."""
    cfg = run.cfg.warm_start
    places = range(life.step * cfg.rows, (life.step + 1) * cfg.rows)
    doing = shell.recorder.during("updating", first="compiling the update of the warm start")
    with shell.timers("update"), doing:
        rows = noisy_rows(run.task, run.warm_order, places, cfg.noise, run.cfg.seed)
        batch, _ = make_batch(supervised_experience(run, rows), run.shapes.warm_start, run.task.pad)
        state, metrics = run.warm_update(life.state, run.put_batch(batch))
        metrics, _ = without_zero_gradients(as_floats(jax.device_get(metrics)))
    found = observe_update(life.guards, run.cfg.update.guards, metrics)
    life = dataclasses.replace(life, step=life.step + 1, state=state, guards=found.guards)
    told = {"warnings": [str(found.error)]} if found.error else {}
    return life, {"phase": "warm_start", **metrics, **told}, found.error


def start_rl(run: Run, shell: Shell, life: Life) -> tuple[Life, Policy, dict[str, float]]:
    """What RL begins with: a fresh optimizer, the reference, the first policy, and the score before. Where no step of RL is to come
    the score alone."""
    state, reference = life.state, None
    if run.cfg.steps:
        state = fresh_state(run, life.state.params, int(life.state.step), began=True)
        reference = start_reference(run, state.params) if run.cfg.objective.has_reference else None
    policy = first_policy(run, shell, state)
    scores = score_held_out(run, shell, dataclasses.replace(life, state=state), policy)
    told = [f"{scores[name]:.4f} {name.removeprefix('eval/')}" for name in scores if name.startswith(ACCURACIES)]
    shell.recorder.message(f"held-out accuracy before RL: {', '.join(told) or 'not known'}")
    before = scores.get(headline(run), float("nan"))
    life = dataclasses.replace(life, began=run.cfg.steps > 0, state=state, reference=reference, eval_before=before)
    return life, policy, scores


def score_held_out(run: Run, shell: Shell, life: Life, policy: Policy) -> dict[str, Any]:
    """The evaluation's numbers, with a warning where nobody could grade it."""
    with shell.recorder.evaluating(f"evaluating {len(run.task.held_out)} held-out prompts"):
        scores = evaluate(run, life.state.params, policy, shell.pool)
    if scores.get("eval/left_out") != len(run.task.held_out):
        return scores
    warning = f"no held-out prompt could be graded; the first failure: {shell.pool.first_failure or 'on another host'}"
    shell.recorder.message(warning)
    return scores | {"warnings": [warning]}


def first_policy(run: Run, shell: Shell, state: TrainState) -> Policy:
    """Published, and all compiled that sampling and evaluation can come to need, whatever lengths they meet."""
    with shell.recorder.during("compiling what samples"):
        policy = publish(run, state, None)
        for num in {run.cfg.rollout.prompts, len(run.task.held_out)}:
            run.engine.warm(policy, num)
    return policy


class Step(NamedTuple):
    """What one step of RL leaves behind."""

    life: Life
    policy: Policy
    metrics: dict[str, float]
    zero_gradient: dict[str, bool]
    """As in `Learned`."""


def rl_step(run: Run, shell: Shell, life: Life, policy: Policy, give_up: Callable[[], bool] = lambda: False) -> Step:
    """The sentence, once. Raises GivenUp, with nothing changed, if `give_up` says so while responses are sampled."""
    cfg, timers = run.cfg, shell.timers
    rng = np.random.default_rng((cfg.seed, life.step))
    prompts, cursor = next_prompts(run.task, run.order, life.cursor, cfg.rollout.prompts)
    with shell.recorder.during("sampling", first="sampling the first responses"):
        graded, stats, waited = collect(run, shell.pool, policy, prompts, run.task.train, run.key, give_up)
    timers.add("generate", stats.seconds)
    timers.add("reward", waited)
    _, fresh, _ = run.filter.apply(run.filter.init(), graded)
    replay, groups, reused = run.replay.exchange(life.replay, fresh, rng)
    with timers("update"), shell.recorder.during("updating", first="compiling the update"):
        learned = learn(run, life, groups, rng)
        state = learned.state
    with timers("publish"):
        policy = jax.block_until_ready(publish(run, state, policy))
    done = life.step + 1 - cfg.warm_start.steps
    reference = refresh(cfg.objective.reference, life.reference, trained_policy(run, state.params), done)
    advantage = np.where(fresh.keep[:, None], learned.advantage, 0.0)
    show(run, shell, life.step + 1, fresh, advantage)
    with shell.recorder.during("measuring", first="measuring what this machine can do"):
        rates = describe_updates(run, learned.flops, learned.seconds) | describe_engine(stats, decode_rates(run))
    metrics = {
        "phase": "rl",
        **describe(cfg, fresh),
        **reused,
        **learned.metrics,
        **rates,
    }
    num_tokens = life.num_tokens + int(metrics["completions/tokens"])
    life = dataclasses.replace(
        life, step=life.step + 1, cursor=cursor, num_tokens=num_tokens, alarm=learned.alarm, state=state, reference=reference,
        replay=replay,
    )  # fmt: skip
    return Step(life, policy, metrics | {"num_tokens": num_tokens}, learned.zero_gradient)


def guard(run: Run, shell: Shell, step: Step, metrics: dict) -> tuple[Life, dict, UserError | None]:
    """The step's life with the guards' counts, its `metrics` with their warnings, and what ends the run, if anything does."""
    found = observe(step.life.guards, run.cfg.update.guards, metrics, step.zero_gradient, shell.pool.first_failure)
    for warning in found.warnings:
        shell.recorder.message(warning)
    told = [*metrics.get("warnings", ()), *found.warnings, *([str(found.error)] if found.error else ())]
    metrics = metrics | {"warnings": told} if told else metrics
    return dataclasses.replace(step.life, guards=found.guards), metrics, found.error


def show(run: Run, shell: Shell, step: int, groups: Groups, advantage: np.ndarray) -> None:
    """Rollouts to the run's record, and a few of them to the screen, where they are due."""
    recorder, cfg = shell.recorder, run.cfg.metrics
    if not (recorder.wants(step, cfg.rollouts_every) or recorder.wants(step, cfg.samples_every)):
        return
    num = cfg.rollout_groups if cfg.rollout_groups >= 0 else run.cfg.rollout.prompts
    rows = responses(run, groups, advantage, num * run.cfg.rollout.samples)
    if recorder.wants(step, cfg.rollouts_every):
        recorder.rollouts(step, rows)
    if recorder.wants(step, cfg.samples_every):
        recorder.samples(rows[: run.cfg.rollout.samples])


@contextmanager
def open_shell(cfg: RunConfig) -> Iterator[Shell]:
    """The run directory, locked, with config.yaml in it, and everything that must be closed again.

    Raises UserError if the directory cannot be written, is in use, or belongs to a run that computes something else.
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
                claim(run_dir, cfg, checkpoints)
            recorder = stack.enter_context(
                Recorder(run_dir, cfg.metrics, cfg.total_steps, leader, cfg.evaluations_after)
            )
        except OSError as error:
            raise UserError(
                f"run_dir: {error.filename or run_dir} cannot be read or written: {error.strerror}"
            ) from error
        pool = stack.enter_context(GraderPool(cfg.reward))
        stack.callback(close, recorder, checkpoints)
        yield Shell(pool, checkpoints, recorder, Timers(), CompileCounter(), check_lock)


def start(run: Run, shell: Shell) -> Life:
    """The newest life in the run directory, or one from the seed."""
    with shell.recorder.during("making the model" if isinstance(run.cfg.model, ModelConfig) else "reading the model"):
        return resume(run, shell) or begin(run)


def resume(run: Run, shell: Shell) -> Life | None:
    """The newest life in the run directory; None in a fresh one."""
    with shell.recorder.during("reading the newest checkpoint"):
        restored = shell.checkpoints.restore(partial(target, run))
    if restored is None:
        return None
    shell.recorder.truncate(restored.meta["offsets"])
    shell.recorder.message(f"going on from step {restored.step} in {run.cfg.run_dir}")
    if changed := run.task.changed(restored.meta.get("task")):
        shell.recorder.message(changed)
    return Life.revive(restored.tree, restored.meta)


def may_save(life: Life, last: int) -> bool:
    """While no update is finite nothing is learned, and what came before may be spoiled already."""
    return life.guards.nonfinite == 0 or life.step == last


def save(run: Run, shell: Shell, life: Life) -> None:
    """Start to save. A life whose updates are not finite pushes no older step out; one that is not finite itself ends the run."""
    try:
        meta = {"offsets": shell.recorder.offsets(), "began": life.began, "task": run.task.fingerprint}
        with shell.recorder.during(f"saving step {life.step}"):
            shell.checkpoints.save(life.step, life.tree(run.key), meta, prune=life.guards.nonfinite == 0)
    except OSError as error:
        shell.checkpoints.give_up(life.step, error)
    except NonFiniteError as error:
        end(run, shell, life, error)


def secure(run: Run, shell: Shell, life: Life) -> None:
    """Return when this life is on disk. Raises CheckpointError where it cannot be saved."""
    wait(shell)
    if not shell.checkpoints.has(life.step):
        save(run, shell, life)
        wait(shell)
        if not shell.checkpoints.has(life.step):
            kept = shell.checkpoints.steps()
            raise CheckpointError(
                f"{run.cfg.run_dir}: step {life.step} could not be saved, the reason is above; steps {kept} are kept"
            )


def close(recorder: Recorder, checkpoints: Checkpoints) -> None:
    with recorder.during("saving"):
        checkpoints.close()


def wait(shell: Shell) -> None:
    with shell.recorder.during("saving"):
        shell.checkpoints.wait()


def leave(run: Run, shell: Shell, life: Life, why: str, when: str = "") -> NoReturn:
    """Stop as `why`, a signal, asked, with this life saved."""
    secure(run, shell, life)
    raise Preempted(
        f"stopped by {why} after step {life.step}, saved in {run.cfg.run_dir}{when}; the same command goes on from there"
    )


def end(run: Run, shell: Shell, life: Life, error: UserError) -> NoReturn:
    """Raise what a guard found, with words on what the next start goes on from.

    Where graders or advantages are to blame this life is sound, and saved. Where no update was finite, the last that was has led to
    numbers from which nothing can be learned: what was saved since then is moved aside.
    """
    checkpoints, told = shell.checkpoints, ""
    if isinstance(error, GradingError | AdvantageError):
        secure(run, shell, life)
    else:
        moved = checkpoints.condemn(life.step - life.guards.nonfinite) if isinstance(error, NonFiniteError) else []
        names = ", ".join(path.name for path in moved)
        told = names and f"; moved aside, as no update from there was finite: {names}"
    checkpoints.wait()
    kept = checkpoints.steps()
    next_start = f"goes on from step {kept[-1]}" if kept else "begins anew: no step is saved"
    raise type(error)(f"{error}{told}; the next start in {run.cfg.run_dir} {next_start}") from error


def stops_alone(stopping: Callable[[int], str], step: int) -> bool:
    """Whether to stop at once. Several processes stop together, and only after a step."""
    return jax.process_count() == 1 and bool(stopping(step))
