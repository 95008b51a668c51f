"""The sentence: prompts -> generate -> reward -> filter -> replay -> advantage -> update -> publish -> generate ...

`train` reads from top to bottom as what a run does. Each stage is a function of values; this file is where they meet.
"""

import dataclasses
import logging
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxrl_llm import config as run_config
from jaxrl_llm.checkpoint import Checkpoints, RunLock, prepare_run_directory
from jaxrl_llm.collect import GivenUp, collect
from jaxrl_llm.config import RunConfig
from jaxrl_llm.describe import as_floats, describe, describe_engine, responses
from jaxrl_llm.errors import AdvantageError, CheckpointError, Preempted, UserError
from jaxrl_llm.evaluate import evaluate, headline, supervised_sequences
from jaxrl_llm.experience.batch import make_batch
from jaxrl_llm.experience.replay import fill
from jaxrl_llm.guards import observe, observe_update
from jaxrl_llm.learn import learn, without_zero_gradients
from jaxrl_llm.life import Life, begin, fresh_state, open_checkpoints, start_reference, target, trained_policy
from jaxrl_llm.metrics import CompileCounter, Recorder, Timers
from jaxrl_llm.prompts.stream import next_prompts
from jaxrl_llm.prompts.supervised import noisy_rows
from jaxrl_llm.prompts.task import Task
from jaxrl_llm.rates import decode_rates, describe_updates
from jaxrl_llm.reference import refresh
from jaxrl_llm.rewards.pool import GraderPool
from jaxrl_llm.run import Run, build, publish
from jaxrl_llm.types import Experience, Policy, TrainState
from jaxrl_llm.unread import unread

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


class Result(NamedTuple):
    measure: str
    """What the two numbers are: `evaluate.headline`."""
    before: float
    """Before RL, after the warm start."""
    after: float
    run_dir: Path


def train(cfg: RunConfig, must_resume: bool = False) -> Result:
    """Run `cfg` to its end, going on from the newest checkpoint in its run directory if there is one."""
    run = build(cfg, what_cannot_train)
    for line in unread(cfg):
        log.warning("%s", line)
    with open_shell(cfg) as shell, stop_signal() as stopping:
        life, policy, scores = resume(run, shell, must_resume) or begin(run), None, {}
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
                policy = policy or first_policy(run, life.state)
                try:
                    step = rl_step(run, shell, life, policy, partial(stops_alone, stopping, life.step))
                except GivenUp:
                    leave(run, shell, life, "the next one was given up while it sampled")
                except AdvantageError as refused:
                    shell.recorder.log(life.step + 1, {"phase": "rl", "warnings": [str(refused)]})
                    raise
                life, policy, metrics = step.life, step.policy, step.metrics
                if is_due(life.step - cfg.warm_start.steps, cfg.evaluation.every, cfg.steps):
                    scores = score_held_out(run, shell, life, policy)
                    metrics |= scores
                life, metrics, error = guard(run, shell, step, metrics)
            shell.recorder.log(life.step, with_rates(metrics, shell))
            if error:
                raise error
            stop = stopping(life.step)
            if stop or is_due(life.step, cfg.checkpoint.every, cfg.total_steps):
                save(run, shell, life)
            if stop and life.step < cfg.total_steps:
                leave(run, shell, life)
            shell.checkpoints.poll()
        if not scores:
            scores = score_held_out(run, shell, life, publish(run, life.state, None))
        measure = headline(run)
        after = scores.get(measure, float("nan"))
        return Result(measure.removeprefix("eval/"), life.eval_before, after, Path(cfg.run_dir).resolve())


def what_cannot_train(cfg: RunConfig, task: Task | None) -> list[str]:
    """What sampling and evaluation can do and training cannot, in words."""
    found, steps = run_config.training_problems(cfg), cfg.warm_start.steps
    if steps and task is not None and not task.has_targets:
        found.append(f"task.response: got nothing, want the right response: warm_start.steps is {steps}")
    return found


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
    with shell.timers("update"):
        rows = noisy_rows(run.task, run.warm_order, places, cfg.noise, run.cfg.seed)
        batch, _ = make_batch(supervised_sequences(run, rows), run.shapes.warm_start, run.task.pad)
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
    policy = first_policy(run, state)
    scores = score_held_out(run, shell, dataclasses.replace(life, state=state), policy)
    told = [f"{scores[name]:.4f} {name.removeprefix('eval/')}" for name in scores if name.startswith(ACCURACIES)]
    shell.recorder.message(f"held-out accuracy before RL: {', '.join(told) or 'not known'}")
    before = scores.get(headline(run), float("nan"))
    life = dataclasses.replace(life, began=run.cfg.steps > 0, state=state, reference=reference, eval_before=before)
    return life, policy, scores


def score_held_out(run: Run, shell: Shell, life: Life, policy: Policy) -> dict[str, Any]:
    """The evaluation's numbers, with a warning where nobody could grade it."""
    scores = evaluate(run, life.state.params, policy, shell.pool)
    if scores.get("eval/left_out") != len(run.task.held_out):
        return scores
    warning = f"no held-out prompt could be graded; the first failure: {shell.pool.first_failure or 'on another host'}"
    shell.recorder.message(warning)
    return scores | {"warnings": [warning]}


def first_policy(run: Run, state: TrainState) -> Policy:
    """Published, and all compiled that sampling and evaluation can come to need, whatever lengths they meet."""
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
    version = int(life.state.step)
    prompts, cursor = next_prompts(run.task, run.order, life.cursor, cfg.rollout.prompts)
    rollouts, graded, stats, waited = collect(run, shell.pool, policy, prompts, run.task.train, run.key, give_up)
    timers.add("generate", stats.seconds)
    timers.add("reward", waited)
    keep = run.keep(graded.reward, graded.parts)
    parts = np.moveaxis(graded.parts, 0, -1).reshape(len(rollouts.length), -1)
    fresh = Experience(rollouts, graded.reward.reshape(-1), parts.astype(np.float32))
    replay, experience, counts = fill(life.replay, fresh, keep, version, cfg.experience.replay, rng)
    with timers("update"):
        learned = learn(run, life, experience, counts, rng)
        state = learned.state
    with timers("publish"):
        policy = jax.block_until_ready(publish(run, state, policy))
    done = life.step + 1 - cfg.warm_start.steps
    reference = refresh(cfg.objective.reference, life.reference, trained_policy(run, state.params), done)
    advantage = np.where(np.repeat(keep, cfg.rollout.samples)[:, None], learned.advantage, 0.0)
    show(run, shell, life.step + 1, fresh, advantage)
    metrics = {
        "phase": "rl",
        **describe(cfg, graded, rollouts, keep, counts),
        **learned.metrics,
        **describe_updates(run, learned.flops, learned.seconds),
        **describe_engine(stats, decode_rates(run)),
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


def show(run: Run, shell: Shell, step: int, experience: Experience, advantage: np.ndarray) -> None:
    """Rollouts to the run's record, and a few of them to the screen, where they are due."""
    recorder, cfg = shell.recorder, run.cfg.metrics
    if not (recorder.wants(step, cfg.rollouts_every) or recorder.wants(step, cfg.samples_every)):
        return
    groups = cfg.rollout_groups if cfg.rollout_groups >= 0 else run.cfg.rollout.prompts
    rows = responses(run, experience, advantage, groups * run.cfg.rollout.samples)
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
    with ExitStack() as stack:
        if leader:
            prepare_run_directory(run_dir)
            stack.enter_context(RunLock(run_dir))
            claim(run_dir, cfg)
        pool = stack.enter_context(GraderPool(cfg.reward))
        recorder = stack.enter_context(Recorder(run_dir, cfg.metrics, cfg.total_steps, active=leader))
        checkpoints = open_checkpoints(cfg)
        stack.callback(checkpoints.close)
        yield Shell(pool, checkpoints, recorder, Timers(), CompileCounter())


def claim(run_dir: Path, cfg: RunConfig) -> None:
    """Write config.yaml; where there is one already, only what may change may differ."""
    path = run_dir / "config.yaml"
    if path.exists():
        differing = run_config.changes(run_config.to_dict(run_config.load(path)), run_config.to_dict(cfg))
        if differing:
            listed = "\n  ".join(differing)
            raise UserError(
                f"{run_dir}: holds a run with another config; use another run_dir, or undo these changes:\n  {listed}"
            )
    path.write_text(run_config.dump(cfg), encoding="utf-8")


def resume(run: Run, shell: Shell, must: bool) -> Life | None:
    """The newest life in the run directory; None in a fresh one."""
    restored = shell.checkpoints.restore(partial(target, run))
    if restored is None:
        if must:
            raise CheckpointError(
                f"--resume: got {run.cfg.run_dir}, which holds no checkpoint; leave out --resume to start it"
            )
        shell.recorder.truncate({"metrics.jsonl": 0, "rollouts.jsonl": 0})
        return None
    shell.recorder.truncate(restored.meta["offsets"])
    shell.recorder.message(f"going on from step {restored.step} in {run.cfg.run_dir}")
    if changed := run.task.changed(restored.meta.get("task")):
        shell.recorder.message(changed)
    return Life.revive(restored.tree, restored.meta)


def save(run: Run, shell: Shell, life: Life) -> None:
    meta = {"offsets": shell.recorder.offsets(), "began": life.began, "task": run.task.fingerprint}
    shell.checkpoints.save(life.step, life.tree(run.key), meta)


def leave(run: Run, shell: Shell, life: Life, when: str = "") -> NoReturn:
    """Stop as SIGTERM asked, with this life saved."""
    shell.checkpoints.wait()
    if life.step not in shell.checkpoints.steps():
        save(run, shell, life)
        shell.checkpoints.wait()
    raise Preempted(f"stopped by SIGTERM after step {life.step}, saved in {run.cfg.run_dir}{when and f' ({when})'}")


def stops_alone(stopping: Callable[[int], bool], step: int) -> bool:
    """Whether to stop at once. Several processes stop together, and only after a step."""
    return jax.process_count() == 1 and stopping(step)


@contextmanager
def stop_signal() -> Iterator[Callable[[int], bool]]:
    """A question to ask after each step: was the job told to stop?

    One process listens to SIGTERM itself. Several must stop after the same step: there JAX's preemption service listens, and a
    handler of ours, set after it, would make it deaf.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    try:
        yield lambda step: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)
