"""The training loop: prompts -> generate -> reward -> filter -> replay -> advantage -> update -> publish -> generate ...

`step` is one pass through these stages, `train` the loop around it, `sft` the supervised training that may precede it.
"""

import dataclasses
import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrl_llm.checkpoint.stopping import stop_signal
from jaxrl_llm.config.run_config import RunConfig, to_dict, with_absolute_paths
from jaxrl_llm.config.saved_config import save_config
from jaxrl_llm.errors import AdvantageError, CheckpointError, UserError
from jaxrl_llm.metrics.guards import observe, observe_update
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.roles import build, inputs, memory_check
from jaxrl_llm.roles.blueprint import Blueprint, blueprint_of
from jaxrl_llm.roles.collector import Collected, Collector, GivenUp
from jaxrl_llm.roles.evaluator import Evaluator
from jaxrl_llm.roles.first_groups import first_groups
from jaxrl_llm.roles.inputs import Inputs
from jaxrl_llm.roles.learner import Learner
from jaxrl_llm.roles.rates import describe_rates
from jaxrl_llm.roles.sampler import Sampler
from jaxrl_llm.roles.start_or_restore import abstract_target, start_params, start_rl, start_supervised
from jaxrl_llm.roles.state import RunState, SupervisedState
from jaxrl_llm.roles.summary import advantage_of, describe, replayed_rows, responses
from jaxrl_llm.roles.updates import Learned
from jaxrl_llm.rollout.engine import Engine
from jaxrl_llm.run_context import (
    RunContext,
    RunSettings,
    State,
    conclude,
    end,
    is_due,
    open_checkpoints,
    open_context,
    restore,
    save_and_wait,
    stop_run,
    with_rates,
)
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import Credit, Experience, Groups, Policy, PyTree, TrainState

log = logging.getLogger("jaxrl_llm.train")

# Prefixes of the held-out accuracies.
ACCURACIES = ("eval/exact", "eval/pass@", "eval/maj@")


class Result(NamedTuple):
    measure: str
    """Name of the metric in `before` and `after`: `Evaluator.headline`."""
    before: float
    """Before RL, after supervised training."""
    after: float
    run_dir: Path


class Run(NamedTuple):
    """An open run: its roles, and the context that records and saves what they do."""

    blueprint: Blueprint
    task: Task
    keys: build.Keys
    engine: Engine
    evaluator: Evaluator
    learner: Learner
    source: Sampler
    context: RunContext


def train(cfg: RunConfig, must_resume: bool = False, given: Inputs | None = None, ends_process: bool = False) -> Result:
    """Train as `cfg` says, from the newest checkpoint in its run directory if there is one.

    Args:
        cfg: the run.
        must_resume: raise CheckpointError if there is no checkpoint.
        given: inputs that were read for `cfg` already.
        ends_process: see `stop_signal`.

    Raises:
        UserError: something does not fit, or a guard ended the run.
        Preempted: a signal stopped the run; its state is saved.
    """
    if not cfg.steps:
        return sft(cfg, must_resume, given, ends_process)
    with open_run(cfg, must_resume, given, ends_process) as run:
        run.learner.compile()
        state, policy, scores = start(run)
        while state.step < cfg.total_steps:
            with saved_on_failure(run, state):
                done = step(run.learner, run.source, state, policy, np.random.default_rng((cfg.seed, int(state.step))))
            state, policy, metrics = done.state, done.policy, summary(run, done)
            if is_due(int(state.step) - cfg.warm_start.steps, cfg.evaluation.every, cfg.steps):
                scores = evaluate(run, state.train.params, policy)
                metrics |= scores
            state, metrics, error = guard(run, state, metrics, done.learned)
            conclude(run.context, state, metrics, error)
        return finish(run, state, policy, scores)


class Step(NamedTuple):
    """Result of one RL step."""

    state: RunState
    policy: Policy
    fresh: Groups
    """Groups of this step, graded and filtered, before replay."""
    trained: Groups
    """After replay; `credit` is theirs."""
    credit: Credit
    learned: Learned
    metrics: dict[str, float]
    """Metrics of filter and replay."""


def step(learner: Learner, source: Sampler, state: RunState, policy: Policy, rng: np.random.Generator) -> Step:
    """One RL step. If it raises before the update, `state` is unchanged; the update donates `state.train`, publish `policy`.

    Args:
        rng: for replay and the order of minibatches; made from seed and step, so that a resumed run repeats it.
    """
    source.use(policy)
    graded = source.take(int(state.step))
    filters, fresh, dropped = learner.filter.apply(state.filters, graded)
    replay, groups, reused = learner.replay.exchange(state.replay, fresh, rng, partial(learner.entropy, state))
    scores = learner.score(state, groups)
    credit = learner.advantage(groups, scores)
    train, learned = learner.update(state, Experience(groups, scores, credit), rng)
    policy = learner.publish(train, policy)
    reference = learner.refresh(state, train)
    source.observe(fresh)
    state = RunState(
        state.step + 1, state.eval_before, train, reference, source.state, filters, replay,
        state.guards._replace(alarm=learned.alarm),
    )  # fmt: skip
    return Step(state, policy, fresh, groups, credit, learned, dropped | reused)


def sft(cfg: RunConfig, must_resume: bool = False, given: Inputs | None = None, ends_process: bool = False) -> Result:
    """Supervised training alone, as `warm_start` says; `train` may continue from it. All else is as in `train`."""
    with open_run(dataclasses.replace(cfg, steps=0), must_resume, given, ends_process, full=cfg) as run:
        state = resume(run)
        if isinstance(state, RunState):
            raise UserError(
                f"{cfg.run_dir}: got a run in which RL has started, want another run_dir for supervised training"
            )
        state, metrics = supervise(run, state)
        policy = first_policy(run, state.train)
        scores = evaluate(run, state.train.params, policy)
        if metrics:
            conclude(run.context, state, metrics | scores, None)
        if state.step:
            save_and_wait(run.context, state)
        else:
            run.context.recorder.log(0, with_rates({"phase": "rl", **scores}, run.context))
        after = scores.get(run.evaluator.headline, math.nan)
        return Result(run.evaluator.headline.removeprefix("eval/"), after, after, Path(cfg.run_dir).resolve())


@contextmanager
def open_run(
    cfg: RunConfig, must_resume: bool, given: Inputs | None, ends_process: bool, full: RunConfig | None = None
) -> Iterator[Run]:
    """Open the run of `cfg`: check that everything fits, lock the run directory, build the roles.

    Args:
        cfg, must_resume, given, ends_process: as in `train`.
        full: config of the whole run, if `cfg` is a part of it; the run directory's config.yaml holds this one.

    Raises:
        UserError: something does not fit; before anything compiles.
        CheckpointError: `must_resume`, and there is no checkpoint.
    """
    if must_resume and open_checkpoints(cfg.run_dir, cfg.checkpoint.keep).is_empty():
        raise CheckpointError(f"--resume: got {cfg.run_dir}, which holds no checkpoint; leave out --resume to start it")
    with stop_signal(ends_process, cfg.total_steps) as stopping:
        blueprint = blueprint_of(cfg, given := given or inputs.read(cfg, trains=True))
        memory_check.check(blueprint, len(given.task.held_out))
        for line in given.cautions:
            log.warning("%s", line)
        with context_of(cfg, full, stopping, {"task": given.task.fingerprint}) as context:
            with closing((run := assemble(blueprint, given.task, context)).engine):
                yield run


def context_of(cfg: RunConfig, full: RunConfig | None = None, *args: Any) -> AbstractContextManager[RunContext]:
    """`open_context(..., *args)` for `cfg`; the run directory's config.yaml is that of `full`."""
    run_dir = Path(cfg.run_dir).resolve()
    whole = to_dict(with_absolute_paths(full or cfg))
    settings = RunSettings(
        run_dir, cfg.checkpoint, cfg.metrics, cfg.reward, cfg.total_steps, cfg.evaluations_after, whole
    )
    return open_context(settings, partial(save_config, run_dir, full or cfg), *args)


def assemble(blueprint: Blueprint, task: Task, context: RunContext) -> Run:
    """Build the roles; their calls are timed, and shown on the screen while they last."""
    keys, engine, during = build.make_keys(blueprint.cfg.seed), blueprint.make_engine(), context.recorder.during
    collect = Collector(engine, context.pool, task, blueprint.cfg.evaluation.threshold)
    score = build.make_scorer(blueprint, blueprint.shapes.experience)
    texts_of = lambda groups: task.decode(groups.rollouts.tokens, groups.rollouts.length)  # noqa: E731
    learner, timed = build.make_learner(blueprint, score, texts_of), context.timers.timed

    def collected(*args: Any) -> Collected:
        with during("sampling", first="sampling the first responses"):
            found = collect(*args)
        context.timers.add("generate", found.stats.seconds)
        context.timers.add("reward", found.waited)
        return found

    def update(*args: Any) -> tuple[TrainState, Learned]:
        with during("updating", first="compiling the update"):
            return learner.update(*args)

    def publish(*args: Any) -> Policy:
        return jax.block_until_ready(learner.publish(*args))

    return Run(
        blueprint=blueprint,
        task=task,
        keys=keys,
        engine=engine,
        evaluator=build.make_evaluator(blueprint, task, collect, score, keys.evaluation),
        learner=learner._replace(
            score=timed("update", learner.score),
            advantage=timed("update", learner.advantage),
            update=timed("update", update),
            publish=timed("publish", publish),
        ),
        source=build.make_sampler(blueprint.cfg, task, collected, keys.train),
        context=context,
    )


def start(run: Run) -> tuple[RunState, Policy, dict[str, Any]]:
    """State from which RL continues, its policy, and the scores of the evaluation before RL ({} for a resumed run).

    The state is the newest checkpoint's; without one it starts from supervised training, or from the model itself.
    """
    state, context, cfg = resume(run), run.context, run.blueprint.cfg
    if isinstance(state, RunState):
        run.source.state = state.source
        return state, first_policy(run, state.train), {}
    nonfinite = 0
    if cfg.warm_start.steps:
        trained, metrics = supervise(run, state)
        params, nonfinite = trained.train.params, trained.guards.nonfinite
    else:
        params, metrics = new_params(run), {"phase": "rl"}
    stored = partial(first_groups, run.blueprint, run.task, context.pool)
    state = start_rl(run.blueprint, run.learner, run.source.state, params, run.keys.train, stored)
    # Supervised updates count too: the newest sound state may be the one before the non-finite ones among them.
    state = state._replace(guards=state.guards._replace(nonfinite=nonfinite))
    policy = first_policy(run, state.train)
    scores = evaluate(run, state.train.params, policy)
    shown = [f"{scores[name]:.4f} {name.removeprefix('eval/')}" for name in scores if name.startswith(ACCURACIES)]
    context.recorder.message(f"held-out accuracy before RL: {', '.join(shown) or 'not known'}")
    state = state._replace(eval_before=np.array(scores.get(run.evaluator.headline, math.nan)))
    if metrics and state.step:
        conclude(context, state, metrics | scores, None)
    elif metrics:
        context.recorder.log(0, with_rates(metrics | scores, context))
    return state, policy, scores


def supervise(run: Run, state: SupervisedState | None) -> tuple[SupervisedState, dict[str, Any]]:
    """Supervised training to its last step, from `state` or new parameters. Returns its metrics, unrecorded; {} without one."""
    cfg, context, metrics = run.blueprint.cfg, run.context, {}
    supervised = build.make_supervised(run.blueprint, run.task)
    if state is None:
        state = start_supervised(run.blueprint, new_params(run))
    while state.step < cfg.warm_start.steps:
        with (
            context.timers("update"),
            context.recorder.during("updating", first="compiling the update of the warm start"),
        ):
            state, metrics = supervised(state)
        found = observe_update(state.guards, cfg.update.guards, metrics)
        state = state._replace(guards=found.guards)
        metrics = {"phase": "warm_start", **metrics, **({"warnings": [str(found.error)]} if found.error else {})}
        if found.error or state.step < cfg.warm_start.steps:
            conclude(context, state, metrics, found.error)
    return state, metrics


def resume(run: Run) -> State | None:
    """The newest state in the run directory; None in a new one."""
    target = partial(abstract_target, run.blueprint, run.learner, run.source.state)
    return restore(run.context, target, run.task)


def new_params(run: Run) -> PyTree:
    doing = "making the model" if isinstance(run.blueprint.cfg.model, ModelConfig) else "reading the model"
    with run.context.recorder.during(doing):
        return start_params(run.blueprint, run.keys.train)


def first_policy(run: Run, state: TrainState) -> Policy:
    """Publish the first policy, and start to compile what evaluates and samples."""
    with run.context.recorder.during("compiling what samples"):
        policy = run.learner.publish(state, None)
        for num in dict.fromkeys((len(run.task.held_out), run.source.stages.asks_at_once)):
            run.engine.compile_ahead(policy, num)
    return policy


def evaluate(run: Run, params: PyTree, policy: Policy) -> dict[str, Any]:
    """Held-out metrics, with a warning if no prompt could be graded."""
    held_out, context = len(run.task.held_out), run.context
    with context.recorder.evaluating(f"evaluating {held_out} held-out prompts"):
        scores = run.evaluator(params, policy)
    if scores.get("eval/left_out") != held_out:
        return scores
    warning = (
        f"no held-out prompt could be graded; the first failure: {context.pool.first_failure or 'on another host'}"
    )
    context.recorder.message(warning)
    return scores | {"warnings": [warning]}


@contextmanager
def saved_on_failure(run: Run, state: RunState) -> Iterator[None]:
    """Save `state` if the step after it does not finish: a signal asked to stop while it sampled, or an advantage was refused."""
    context, before = run.context, int(state.step)
    # Several processes stop together, which they can only do after a step.
    run.source.give_up = lambda: jax.process_count() == 1 and bool(context.stopping(before))
    try:
        yield
    except GivenUp:
        stop_run(context, state, context.stopping(before), " (the next one was given up while it sampled)")
    except AdvantageError as refused:
        context.recorder.log(before + 1, {"phase": "rl", "warnings": [str(refused)]})
        end(context, state, refused)


def summary(run: Run, done: Step) -> dict[str, Any]:
    """A step's metrics. Its rollouts are recorded and shown if that is due."""
    cfg, source = run.blueprint.cfg, run.source
    show(run, done)
    with run.context.recorder.during("measuring", first="measuring what this machine can do"):
        beside = run.context.compiles.any or run.engine.is_compiling
        rates = describe_rates(run.engine, source.last.stats, run.blueprint, done.learned, measured=not beside)
    return {
        "phase": "rl",
        **describe(source.with_rejected(done.fresh), [grader.label for grader in cfg.reward.graders], run.task),
        **source.metrics,
        **done.metrics,
        **replayed_rows(done.fresh, done.trained),
        **done.learned.metrics,
        **rates,
        "num_tokens": int(done.state.source.num_tokens),
    }


def show(run: Run, done: Step) -> None:
    """Record a step's rollouts and show a few of them, each if due."""
    recorder, cfg, now = run.context.recorder, run.blueprint.cfg.metrics, int(done.state.step)
    if not (recorder.wants(now, cfg.rollouts_every) or recorder.wants(now, cfg.samples_every)):
        return
    advantage = advantage_of(done.fresh, done.trained, done.credit)
    rows = responses(run.task, done.fresh, advantage, cfg.rollout_groups, run.engine.tables)
    if recorder.wants(now, cfg.rollouts_every):
        recorder.rollouts(now, rows)
    if recorder.wants(now, cfg.samples_every):
        recorder.samples(rows[: run.blueprint.cfg.rollout.samples])


def guard(
    run: Run, state: RunState, metrics: dict[str, Any], learned: Learned
) -> tuple[RunState, dict[str, Any], UserError | None]:
    """State with the guards' new counts, metrics with their warnings, and the error that ends the run, or None."""
    cfg, context = run.blueprint.cfg.update.guards, run.context
    found = observe(state.guards, cfg, metrics, learned.zero_gradient, context.pool.first_failure)
    for warning in found.warnings:
        context.recorder.message(warning)
    warnings = [*metrics.get("warnings", ()), *found.warnings, *([str(found.error)] if found.error else ())]
    metrics = metrics | {"warnings": warnings} if warnings else metrics
    return state._replace(guards=found.guards), metrics, found.error


def finish(run: Run, state: RunState, policy: Policy, scores: dict[str, Any]) -> Result:
    """Wait until the last state is on disk, and return the run's result."""
    if state.step:
        save_and_wait(run.context, state)
    scores = scores or evaluate(run, state.train.params, policy)
    measure = run.evaluator.headline
    before, after = float(state.eval_before), scores.get(measure, math.nan)
    return Result(measure.removeprefix("eval/"), before, after, Path(run.blueprint.cfg.run_dir).resolve())
