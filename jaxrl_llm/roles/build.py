"""Functions that build the roles from a blueprint, each alone: a sampler needs no optimizer, a learner no engine."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Key

from jaxrl_llm.config.mixtures import grades_all, most_graders
from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.config import AutoFilter, OwnBudget, OwnGate, Shuffled
from jaxrl_llm.experience.curricula import Order, counted, in_order, mixed_order
from jaxrl_llm.experience.filters import Filter, make_filter
from jaxrl_llm.experience.group_filters import KeepAll, Signal
from jaxrl_llm.experience.hints import NoHints
from jaxrl_llm.experience.own_stages import own_budget, own_gate
from jaxrl_llm.experience.packed_groups import Packing
from jaxrl_llm.experience.replay import make_replay
from jaxrl_llm.model import params as model_params
from jaxrl_llm.model.publish import publisher
from jaxrl_llm.objective.credit import make_advantage
from jaxrl_llm.objective.loss_config import anchored_on_proximal
from jaxrl_llm.objective.losses import CROSS_ENTROPY
from jaxrl_llm.objective.rules import drops_equal_rewards
from jaxrl_llm.parallel.compiled_ahead import CompiledAhead, abstract
from jaxrl_llm.perf.work import TrainFlops, count_adapter_params, count_tokens, train_flops
from jaxrl_llm.roles.asking import Asking, ByBudget, UntilAccepted
from jaxrl_llm.roles.blueprint import Blueprint, blank_fresh, correction_for, group_sizes, uses_of
from jaxrl_llm.roles.collector import Collected
from jaxrl_llm.roles.evaluator import Evaluator
from jaxrl_llm.roles.hinting import Hinting, NoHinting
from jaxrl_llm.roles.known_responses import under_control
from jaxrl_llm.roles.learner import Learner, policy_entropy, score_groups
from jaxrl_llm.roles.reference import refresh
from jaxrl_llm.roles.reusing import NoReusing, Reusing
from jaxrl_llm.roles.sampler import Sampler, Stages
from jaxrl_llm.roles.scorer import Scorer
from jaxrl_llm.roles.state import RunState
from jaxrl_llm.roles.supervised import Supervised, right_responses
from jaxrl_llm.roles.updates import Updates
from jaxrl_llm.rollout.config import NoReuse
from jaxrl_llm.tasks.rows import Row
from jaxrl_llm.tasks.stream import completion_limits
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import Batch, Experience, Groups, Policy, PyTree, TrainState
from jaxrl_llm.update.batch import abstract_batch
from jaxrl_llm.update.optimizer.state import abstract_state
from jaxrl_llm.update.optimizer.transform import make_optimizer
from jaxrl_llm.update.packing import BatchShape
from jaxrl_llm.update.step import jit_score, jit_update


class Keys(NamedTuple):
    train: Key[Array, ""]
    """For initial parameters, and for sampling in training."""
    evaluation: Key[Array, ""]


def make_keys(seed: int) -> Keys:
    """Keys of a run with this seed."""
    return Keys(*jax.random.split(jax.random.key(seed)))


def make_sampler(cfg: RunConfig, task: Task, collect: Callable[..., Collected], key: Key[Array, ""]) -> Sampler:
    """Sampler over the `train` rows of a task.

    Args:
        cfg: of the run.
        task: with the rows.
        collect: a `Collector`.
        key: random key of all sampled tokens.
    """
    curriculum = cfg.experience.curriculum
    if isinstance(curriculum, Shuffled):
        curriculum = in_order(order_of(task, cfg.seed))
    else:
        curriculum = curriculum.over([row.columns for row in task.train], cfg.seed)
    texts_of = lambda groups: task.decode(groups.rollouts.tokens, groups.rollouts.length)  # noqa: E731
    gate = cfg.experience.gate
    gate = own_gate(gate) if isinstance(gate, OwnGate) else gate
    stages = Stages(
        counted(curriculum), gate, asking_for(cfg, texts_of), hinting_for(cfg, task), reusing_for(cfg, task)
    )
    return Sampler(task, stages, collect, key, cfg.seed)


def hinting_for(cfg: RunConfig, task: Task) -> Hinting | NoHinting:
    """Hints of a run, over the `train` rows of its task."""
    rule = cfg.experience.hints
    if isinstance(rule, NoHints):
        return NoHinting()
    return Hinting(rule, task, cfg.rollout.max_new_tokens, cfg.warm_start.steps, cfg.steps)


def reusing_for(cfg: RunConfig, task: Task) -> Reusing | NoReusing:
    """Reuse of a run, over the `train` rows of its task."""
    if isinstance(cfg.rollout.reuse, NoReuse):
        return NoReusing()
    packing = Packing(blank_fresh(cfg, task.prompt_slots, task.num_tokens), task.pad)
    kept = cfg.rollout.max_kept_of(task.num_tokens)
    return Reusing(cfg.rollout.reuse, task, packing, cfg.rollout.max_new_tokens, kept)


def order_of(task: Task, seed: int) -> Order:
    """Order of a task's training rows: shuffled each epoch; the tasks of a mixture by weight."""
    parts = task.parts.values()
    return mixed_order([len(part.rows) for part in parts], [part.weight for part in parts], seed)


def asking_for(cfg: RunConfig, texts_of: Callable[[Groups], list[str]]) -> Asking:
    """What a step asks for; `texts_of` as in `make_learner`."""
    rollout, refill, budget = cfg.rollout, cfg.experience.refill, cfg.experience.budget
    if refill is None:
        budget = own_budget(budget) if isinstance(budget, OwnBudget) else budget
        return ByBudget(budget, rollout.prompts, rollout.prompts * rollout.samples)
    judge = make_filter(refill.filter, texts_of)
    if jax.tree.leaves(judge.init()):
        raise UserError(
            "experience.refill.filter: got a filter with a state, want one without: groups are judged as they finish, in any order"
        )
    return UntilAccepted(judge, rollout.prompts, rollout.samples, refill.attempts)


def make_learner(blueprint: Blueprint, score: Scorer, texts_of: Callable[[Groups], list[str]]) -> Learner:
    """Learner of a run.

    Args:
        blueprint: of the run.
        score: scores all groups of a step.
        texts_of: decodes the responses of groups, one text per row, for a filter that reads them.
    """
    cfg, loss, objective = blueprint.cfg, blueprint.loss, blueprint.cfg.objective
    adapters = count_adapter_params(blueprint.learner_specs, blueprint.model)

    def flops(batch: Batch) -> TrainFlops:
        return train_flops(blueprint.model, *count_tokens(blueprint.model, batch), adapters)

    def refreshed(state: RunState, train: TrainState) -> PyTree | None:
        done = int(state.step) + 1 - cfg.warm_start.steps
        return refresh(objective.reference, state.reference, blueprint.changed(train.params), done)

    program = make_update_program(blueprint)
    return Learner(
        filter=filter_for(cfg, texts_of),
        replay=make_replay(cfg.experience.replay, blueprint.vocab.pad),
        score=partial(score_groups, objective, loss, score),
        entropy=partial(policy_entropy, score, group_sizes(cfg)),
        advantage=make_advantage(objective, [grader.weight for grader in cfg.reward.graders]),
        update=Updates(
            program=program,
            loss=loss,
            cfg=cfg.update,
            shape=blueprint.shapes.update,
            pad=blueprint.vocab.pad,
            rows=blueprint.train.sharding(("rows", None)),
            anchored_on_proximal=anchored_on_proximal(objective.loss, correction_for(cfg)),
            reads_distribution=objective.reads_reference_distribution,
            reward_kl=objective.reward_kl,
            flops=flops,
            tables=blueprint.tables,
        ),
        refresh=refreshed,
        publish=make_publisher(blueprint),
        compile=program.start,
    )


def make_update_program(blueprint: Blueprint) -> CompiledAhead:
    """The program of one update, for the arguments that a run gives it."""
    cfg, train = blueprint.cfg, blueprint.train
    update = jit_update(
        blueprint.learner_specs, blueprint.loss, blueprint.optimizer, blueprint.scoring,
        micro_batches=cfg.update.micro_batches, ess_scaling=cfg.update.ess_scaling,
    )  # fmt: skip
    specs = blueprint.reference_specs if cfg.objective.reads_reference_distribution else None
    kept = cfg.rollout.max_kept_of(blueprint.vocab.size)
    return CompiledAhead(
        update,
        abstract_state(blueprint.learner_specs, blueprint.optimizer, train),
        abstract_batch(blueprint.shapes.update, uses_of(cfg), kept, blueprint.loss.own, train),
        None if specs is None else model_params.abstract(specs, train),
        abstract(blueprint.tables),
    )


def make_publisher(blueprint: Blueprint) -> Callable[[TrainState, Policy | None], Policy]:
    """Function from a TrainState to its policy; the buffers of the old policy are donated."""
    weights = blueprint.cfg.rollout.engine.weights
    publish = publisher(blueprint.model, blueprint.train, blueprint.decode, weights)
    return lambda train, old: publish(train.params, train.step, old)


def make_evaluator(
    blueprint: Blueprint, task: Task, collect: Callable[..., Collected], score: Scorer, key: Key[Array, ""]
) -> Evaluator:
    """Evaluator on the held-out rows of a task.

    Args:
        blueprint: of the run.
        task: with the rows.
        collect: a `Collector`.
        score: scores all groups of a step.
        key: random key of all sampled tokens.
    """
    cfg, slots = blueprint.cfg, blueprint.cfg.rollout.max_new_tokens

    def right(rows: list[Row]) -> Experience:
        found = right_responses(task, slots, cfg.rollout.temperature, rows)
        limit = completion_limits(rows, np.arange(len(rows)), slots)
        rollouts = under_control(found.groups.rollouts, blueprint.controls, cfg.rollout, limit)
        return found._replace(groups=found.groups.replace(rollouts=rollouts))

    return Evaluator(
        task=task,
        collect=collect,
        key=key,
        at_once=cfg.rollout.prompts,
        threshold=cfg.evaluation.threshold,
        right=right,
        score_right=make_scorer(blueprint, blueprint.shapes.held_out),
        score=score if cfg.experience.replays or cfg.experience.trains_hints else None,
    )


def make_supervised(blueprint: Blueprint, task: Task) -> Supervised:
    cfg, shape = blueprint.cfg, blueprint.shapes.supervised
    optimizer = make_optimizer(cfg.warm_start.optimizer)
    return Supervised(
        cfg=cfg.warm_start,
        task=task,
        # Not the order of the RL prompts.
        order=order_of(task, cfg.seed + 1),
        seed=cfg.seed,
        right=partial(right_responses, task, cfg.rollout.max_new_tokens, cfg.rollout.temperature),
        update=jit_update(blueprint.specs, CROSS_ENTROPY, optimizer, blueprint.scoring),
        shape=shape,
        rows=blueprint.train.sharding(("rows", None)),
    )


def make_scorer(blueprint: Blueprint, shape: BatchShape) -> Scorer:
    """Scorer of groups that fill batches of the given shape."""
    rows = blueprint.train.sharding(("rows", None))
    program = jit_score(blueprint.scoring, shape.num_micro_batches)
    return Scorer(program, shape, blueprint.vocab.pad, rows, blueprint.tables)


def filter_for(cfg: RunConfig, texts_of: Callable[[Groups], list[str]]) -> Filter:
    """Filter that `experience.filter` names, `auto` resolved; `texts_of` as in `make_learner`."""
    chosen, graders = cfg.experience.filter, cfg.reward.graders
    if isinstance(chosen, AutoFilter):
        several = most_graders(cfg)
        by = "reward" if several == 1 else graders[0].label if grades_all(cfg, graders[0]) else "success"
        chosen = Signal(by=by) if drops_equal_rewards(cfg.objective, several) else KeepAll()
    return make_filter(chosen, texts_of)
