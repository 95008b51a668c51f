"""The sentence: prompts -> generate -> reward -> filter -> replay -> advantage -> update -> publish -> generate ...

`step` is the sentence once, `train` the loop around it, `sft` the supervised training that may come before it.
"""

import dataclasses
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrl_llm.checkpoint.preemption import stop_signal
from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.config.unread import unread
from jaxrl_llm.errors import AdvantageError, CheckpointError, UserError
from jaxrl_llm.metrics.guards import observe, observe_update
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.perf.rates import UpdateRates, decode_rates, describe_updates, update_rates
from jaxrl_llm.plan import fit
from jaxrl_llm.roles import sources
from jaxrl_llm.roles.blueprint import Blueprint, blueprint_of
from jaxrl_llm.roles.build import (
    Keys,
    make_evaluator,
    make_keys,
    make_learner,
    make_sampler,
    make_scorer,
    make_supervised,
)
from jaxrl_llm.roles.collector import Collected, Collector, GivenUp
from jaxrl_llm.roles.evaluator import Evaluator
from jaxrl_llm.roles.initial_state import rl_target, start_params, start_rl, start_supervised, supervised_target
from jaxrl_llm.roles.learner import Learner
from jaxrl_llm.roles.sampler import Sampler
from jaxrl_llm.roles.sources import Sources
from jaxrl_llm.roles.state import RunState, SupervisedState
from jaxrl_llm.roles.summary import describe, describe_engine, responses
from jaxrl_llm.roles.updates import Learned
from jaxrl_llm.rollout.engine import Engine
from jaxrl_llm.run_context import (
    RunContext,
    State,
    conclude,
    end,
    is_due,
    leave,
    open_checkpoints,
    open_context,
    restore,
    secure,
    with_rates,
)
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import Credit, Experience, Groups, Policy, PyTree, TrainState

log = logging.getLogger("jaxrl_llm.train")

# Of the held-out part's scores.
ACCURACIES = ("eval/exact", "eval/pass@", "eval/maj@")


class Result(NamedTuple):
    measure: str
    """What the two numbers are: `Evaluator.headline`."""
    before: float
    """Before RL, after supervised training."""
    after: float
    run_dir: Path


class Run(NamedTuple):
    """A run that is open: its roles, and the context that records and saves what they do."""

    blueprint: Blueprint
    task: Task
    keys: Keys
    engine: Engine
    evaluator: Evaluator
    learner: Learner
    source: Sampler
    context: RunContext


def train(
    cfg: RunConfig, must_resume: bool = False, given: Sources | None = None, ends_process: bool = False
) -> Result:
    """Run `cfg` to its end, going on from the newest checkpoint in its run directory if there is one.

    Args:
        must_resume: whether a checkpoint must be there.
        given: what was read of `cfg` already.
        ends_process: see `stop_signal`.
    """
    if not cfg.steps:
        return sft(cfg, must_resume, given, ends_process)
    with open_run(cfg, must_resume, given, ends_process) as run:
        state, policy, scores = start(run)
        while state.step < cfg.total_steps:
            rng = np.random.default_rng((cfg.seed, int(state.step)))
            with keeping(run, state):
                done = step(run.learner, run.source, state, policy, rng)
            state, policy, metrics = done.state, done.policy, summary(run, done)
            if is_due(int(state.step) - cfg.warm_start.steps, cfg.evaluation.every, cfg.steps):
                scores = evaluate(run, state.train.params, policy)
                metrics |= scores
            state, metrics, error = guard(run, state, metrics, done.learned)
            conclude(run.context, state, metrics, error)
        return finish(run, state, policy, scores)


class Step(NamedTuple):
    """What one step of RL leaves behind."""

    state: RunState
    policy: Policy
    fresh: Groups
    """Graded and filtered, before replay."""
    credit: Credit
    learned: Learned
    metrics: dict[str, float]
    """Of filter and replay."""


def step(learner: Learner, source: Sampler, state: RunState, policy: Policy, rng: np.random.Generator) -> Step:
    """The sentence, once. Where it raises, `state` is as it was, unless an update had begun."""
    source.use(policy)
    graded = source.take(int(state.step))
    filters, fresh, dropped = learner.filter.apply(state.filters, graded)
    replay, groups, reused = learner.replay.exchange(state.replay, fresh, rng)
    scores = learner.score(state, groups)
    credit = learner.advantage(groups, scores)
    train, learned = learner.update(state, Experience(groups, scores, credit), rng)
    policy = learner.publish(train, policy)
    reference = learner.refresh(state, train)
    source.observe(fresh)
    state = RunState(
        state.step + 1, state.num_tokens + fresh.rollouts.length.sum(), state.eval_before, train, reference,
        source.state, filters, replay, state.guards._replace(alarm=learned.alarm),
    )  # fmt: skip
    return Step(state, policy, fresh, credit, learned, dropped | reused)


def sft(cfg: RunConfig, must_resume: bool = False, given: Sources | None = None, ends_process: bool = False) -> Result:
    """The supervised training of `cfg` alone, `warm_start`; arguments as of `train`, which may go on from it."""
    with open_run(dataclasses.replace(cfg, steps=0), must_resume, given, ends_process, whole=cfg) as run:
        state = resume(run)
        if isinstance(state, RunState):
            raise UserError(
                f"{cfg.run_dir}: got a run whose RL has begun, want another run_dir for supervised training"
            )
        state, metrics = supervise(run, state)
        policy = first_policy(run, state.train)
        scores = evaluate(run, state.train.params, policy)
        if metrics:
            conclude(run.context, state, metrics | scores, None)
        if state.step:
            secure(run.context, state)
        else:
            run.context.recorder.log(0, with_rates({"phase": "rl", **scores}, run.context))
        after = scores.get(run.evaluator.headline, math.nan)
        return Result(run.evaluator.headline.removeprefix("eval/"), after, after, Path(cfg.run_dir).resolve())


@contextmanager
def open_run(
    cfg: RunConfig, must_resume: bool, given: Sources | None, ends_process: bool, whole: RunConfig | None = None
) -> Iterator[Run]:
    """The run of `cfg`, arguments as of `train`.

    Args:
        whole: the run that `cfg` is a part of, which the run directory is kept for.

    Raises:
        UserError: something does not fit; before anything compiles.
        CheckpointError: one must be there.
    """
    if must_resume and open_checkpoints(cfg).is_empty():
        raise CheckpointError(f"--resume: got {cfg.run_dir}, which holds no checkpoint; leave out --resume to start it")
    with stop_signal(ends_process, cfg.total_steps) as stopping:
        given = given or sources.read(cfg, trains=True)
        blueprint = blueprint_of(cfg, given)
        fit.check(blueprint, len(given.task.held_out))
        for line in unread(cfg):
            log.warning("%s", line)
        with open_context(cfg, stopping, {"task": given.task.fingerprint}, whole) as context:
            yield assemble(blueprint, given.task, context)


def assemble(blueprint: Blueprint, task: Task, context: RunContext) -> Run:
    """The roles, timed, and shown at work on the screen."""
    keys, engine = make_keys(blueprint.cfg), blueprint.make_engine(task.tokenizer.spellings)
    collect = Collector(engine, context.pool, task)
    score = make_scorer(blueprint, blueprint.shapes.experience)
    texts_of = lambda groups: task.decode(groups.rollouts.tokens, groups.rollouts.length)  # noqa: E731
    learner, timed = make_learner(blueprint, score, texts_of), context.timers.timed
    during = context.recorder.during

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
        evaluator=make_evaluator(blueprint, task, collect, score, keys.evaluation),
        learner=learner._replace(
            score=timed("update", learner.score),
            advantage=timed("update", learner.advantage),
            update=timed("update", update),
            publish=timed("publish", publish),
        ),
        source=make_sampler(blueprint.cfg, task, collected, keys.train),
        context=context,
    )


def start(run: Run) -> tuple[RunState, Policy, dict[str, Any]]:
    """The state that RL goes on from, its policy, and the evaluation's scores where there was one: the newest in the run directory;
    else one that supervised training led to, or the model itself."""
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
    state = start_rl(run.blueprint, run.learner, run.source.state, params, run.keys.train)
    # Supervised updates count as well: what came before those that were not finite may be the last that is sound.
    state = state._replace(guards=state.guards._replace(nonfinite=nonfinite))
    policy = first_policy(run, state.train)
    scores = evaluate(run, state.train.params, policy)
    told = [f"{scores[name]:.4f} {name.removeprefix('eval/')}" for name in scores if name.startswith(ACCURACIES)]
    context.recorder.message(f"held-out accuracy before RL: {', '.join(told) or 'not known'}")
    state = state._replace(eval_before=np.array(scores.get(run.evaluator.headline, math.nan)))
    if metrics and state.step:
        conclude(context, state, metrics | scores, None)
    elif metrics:
        context.recorder.log(0, with_rates(metrics | scores, context))
    return state, policy, scores


def supervise(run: Run, state: SupervisedState | None) -> tuple[SupervisedState, dict[str, Any]]:
    """Supervised training to its end, from `state` or from the seed. The last step's metrics are returned, not recorded: its
    evaluation joins them; {} where no step was left."""
    cfg, context, metrics = run.blueprint.cfg, run.context, {}
    supervised = make_supervised(run.blueprint, run.task)
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
    """The newest state in the run directory; None in a fresh one."""

    def target(is_rl: bool) -> State:
        return rl_target(run.blueprint, run.learner, run.source.state) if is_rl else supervised_target(run.blueprint)

    return restore(run.context, target, run.task)


def new_params(run: Run) -> PyTree:
    doing = "making the model" if isinstance(run.blueprint.cfg.model, ModelConfig) else "reading the model"
    with run.context.recorder.during(doing):
        return start_params(run.blueprint, run.keys.train)


def first_policy(run: Run, state: TrainState) -> Policy:
    """Published, and all compiled that sampling and evaluation can come to need, whatever lengths they meet."""
    with run.context.recorder.during("compiling what samples"):
        policy = run.learner.publish(state, None)
        for num in {run.blueprint.cfg.rollout.prompts, len(run.task.held_out)}:
            run.engine.warm(policy, num)
    return policy


def evaluate(run: Run, params: PyTree, policy: Policy) -> dict[str, Any]:
    """The evaluation's numbers, with a warning where nobody could grade it."""
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
def keeping(run: Run, state: RunState) -> Iterator[None]:
    """Keep `state` where the step after it does not come to its end: a signal asked to stop, or an advantage was refused."""
    context, before = run.context, int(state.step)
    # Several processes stop together, and only after a step.
    run.source.give_up = lambda: jax.process_count() == 1 and bool(context.stopping(before))
    try:
        yield
    except GivenUp:
        leave(context, state, context.stopping(before), " (the next one was given up while it sampled)")
    except AdvantageError as refused:
        context.recorder.log(before + 1, {"phase": "rl", "warnings": [str(refused)]})
        end(context, state, refused)


def summary(run: Run, done: Step) -> dict[str, Any]:
    """A step's numbers; its rollouts are recorded and shown where that is due."""
    cfg, recorder, stats, learned = run.blueprint.cfg, run.context.recorder, run.source.last.stats, done.learned
    show(run, done)
    with recorder.during("measuring", first="measuring what this machine can do"):
        rates = describe_engine(stats, *decode_rates(run.engine))
        if learned.seconds:
            rates |= describe_updates(
                learned.flops, learned.seconds, learning_rates(run.blueprint), run.blueprint.train
            )
    return {
        "phase": "rl",
        **describe(done.fresh, [grader.label for grader in cfg.reward.graders]),
        **done.metrics,
        **learned.metrics,
        **rates,
        "num_tokens": int(done.state.num_tokens),
    }


def learning_rates(blueprint: Blueprint) -> UpdateRates:
    return update_rates(blueprint.model, blueprint.shapes.update, blueprint.train, blueprint.cfg.lora.rank > 0)


def show(run: Run, done: Step) -> None:
    """Rollouts to the run's record, and a few of them to the screen, where they are due."""
    recorder, cfg, now = run.context.recorder, run.blueprint.cfg.metrics, int(done.state.step)
    if not (recorder.wants(now, cfg.rollouts_every) or recorder.wants(now, cfg.samples_every)):
        return
    advantage = np.where(done.fresh.keep[:, None], done.credit.advantage, 0.0)
    num = cfg.rollout_groups if cfg.rollout_groups >= 0 else len(done.fresh.failure)
    rows = responses(run.task, done.fresh, advantage, num)
    if recorder.wants(now, cfg.rollouts_every):
        recorder.rollouts(now, rows)
    if recorder.wants(now, cfg.samples_every):
        recorder.samples(rows[: run.blueprint.cfg.rollout.samples])


def guard(
    run: Run, state: RunState, metrics: dict[str, Any], learned: Learned
) -> tuple[RunState, dict[str, Any], UserError | None]:
    """The state with the guards' counts, the step's metrics with their warnings, and what ends the run, if anything does."""
    cfg, context = run.blueprint.cfg.update.guards, run.context
    found = observe(state.guards, cfg, metrics, learned.zero_gradient, context.pool.first_failure)
    for warning in found.warnings:
        context.recorder.message(warning)
    told = [*metrics.get("warnings", ()), *found.warnings, *([str(found.error)] if found.error else ())]
    metrics = metrics | {"warnings": told} if told else metrics
    return state._replace(guards=found.guards), metrics, found.error


def finish(run: Run, state: RunState, policy: Policy, scores: dict[str, Any]) -> Result:
    """The run's result, with its last state on disk."""
    if state.step:
        secure(run.context, state)
    scores = scores or evaluate(run, state.train.params, policy)
    measure = run.evaluator.headline
    after = scores.get(measure, math.nan)
    run_dir = Path(run.blueprint.cfg.run_dir).resolve()
    return Result(measure.removeprefix("eval/"), float(state.eval_before), after, run_dir)
