"""Initial states of a run, and the abstract states that checkpoints are restored into."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.replay import filled
from jaxrl_llm.metrics.guards import Guards
from jaxrl_llm.model import lora
from jaxrl_llm.model import params as model_params
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.critic import init_critic
from jaxrl_llm.model.hf.config import read_config
from jaxrl_llm.model.hf.load import load
from jaxrl_llm.model.hf.source import resolve as resolve_model
from jaxrl_llm.parallel import hosts
from jaxrl_llm.roles.blueprint import Blueprint, blank_fresh
from jaxrl_llm.roles.learner import Learner
from jaxrl_llm.roles.loaded_model import load_params
from jaxrl_llm.roles.state import RunState, SupervisedState
from jaxrl_llm.types import Groups, PyTree, TrainState
from jaxrl_llm.update.optimizer.state import abstract_state, make_init_state
from jaxrl_llm.update.optimizer.transform import make_optimizer


def start_supervised(blueprint: Blueprint, params: PyTree) -> SupervisedState:
    """State before the first supervised step; `params` are donated."""
    optimizer = make_optimizer(blueprint.cfg.warm_start.optimizer)
    start = make_init_state(blueprint.specs, optimizer, blueprint.train)
    return first_supervised(start(params, _updates(blueprint, 0)))


def first_supervised(train: TrainState) -> SupervisedState:
    return SupervisedState(np.array(0), train, Guards())


def start_rl(
    blueprint: Blueprint,
    learner: Learner,
    source: Any,
    params: PyTree,
    key: Key[Array, ""],
    stored: Callable[[int], Groups | None] = lambda version: None,
) -> RunState:
    """State before the first RL step.

    Args:
        blueprint, learner: of the run.
        source: state of the source of groups.
        params: the policy's; donated. Zero-initialized adapters and an untrained critic are added to them.
        key: random key of the adapters' initial values.
        stored: stored(version): groups with which the replay's buffer starts.
    """
    cfg, model, specs = blueprint.cfg, blueprint.model, blueprint.learner_specs

    def with_adapters_and_critic(params: PyTree) -> PyTree:
        of_adapters = jax.random.fold_in(key, 2**31 - 2)
        policy = lora.adapt(params, model_params.policy_params(specs, model), of_adapters, blueprint.train)
        return policy | (init_critic(params, model, cfg.objective.critic.kind) if cfg.objective.has_critic else {})

    start = make_init_state(specs, blueprint.optimizer, blueprint.train, with_adapters_and_critic)
    train = start(params, _updates(blueprint, cfg.warm_start.steps))
    state = first_state(blueprint, learner, source, train, _start_reference(blueprint, train.params))
    groups = stored(int(train.step))
    if groups is None:
        return state
    return state._replace(replay=filled(state.replay, groups, cfg.experience.replay, blueprint.vocab.pad))


def first_state(
    blueprint: Blueprint, learner: Learner, source: Any, train: TrainState, reference: PyTree | None
) -> RunState:
    """State before the first RL step, around arrays or around their shapes.

    Args:
        blueprint, learner: of the run.
        source: state of the source of groups.
        train, reference: parameters and optimizer state, concrete or abstract.
    """
    cfg, trained = blueprint.cfg, lora.split(blueprint.learner_specs)[0]
    blank = blank_fresh(cfg, blueprint.prompt_slots, blueprint.vocab.size)
    return RunState(
        step=np.array(cfg.warm_start.steps),
        eval_before=np.array(np.nan),
        train=train,
        reference=reference,
        source=source,
        filters=learner.filter.init(),
        replay=learner.replay.init(blank),
        guards=Guards(zero_gradient=np.zeros(len(jax.tree.leaves(trained, is_leaf=model_params.is_spec)), np.int64)),
    )


def supervised_target(blueprint: Blueprint) -> SupervisedState:
    """Abstract state of a supervised checkpoint: shapes, dtypes, shardings."""
    optimizer = make_optimizer(blueprint.cfg.warm_start.optimizer)
    return first_supervised(abstract_state(blueprint.specs, optimizer, blueprint.train))


def rl_target(blueprint: Blueprint, learner: Learner, source: Any) -> RunState:
    """Abstract state of an RL checkpoint: shapes, dtypes, shardings."""
    train = abstract_state(blueprint.learner_specs, blueprint.optimizer, blueprint.train)
    specs = blueprint.reference_specs
    reference = None if specs is None else model_params.abstract(specs, blueprint.train)
    return first_state(blueprint, learner, source, train, reference)


def abstract_target(blueprint: Blueprint, learner: Learner, source: Any, is_rl: bool) -> RunState | SupervisedState:
    """Abstract state of a checkpoint, of RL or of supervised training. Arguments as in `rl_target`."""
    return rl_target(blueprint, learner, source) if is_rl else supervised_target(blueprint)


def start_params(blueprint: Blueprint, key: Key[Array, ""]) -> PyTree:
    """Master parameters in the TRAIN layout, loaded from the pretrained model or initialized from `key`; f32, but in the compute
    dtype if they stay frozen."""
    cfg = blueprint.cfg
    source = cfg.model if isinstance(cfg.model, ModelConfig) else cfg.model.path
    frozen = cfg.lora.rank and not cfg.warm_start.steps
    dtype = blueprint.model.compute if frozen else "float32"
    return load_params(source, blueprint.specs, blueprint.train, key, dtype)


def _start_reference(blueprint: Blueprint, params: PyTree) -> PyTree | None:
    """Copy of the part of the policy that RL trains, or another model's parameters; None if no term reads a reference."""
    cfg = blueprint.cfg.objective
    if not cfg.has_reference:
        return None
    if cfg.reference.kind != "pretrained":
        return jax.tree.map(jnp.copy, blueprint.changed(params))
    directory = resolve_model(cfg.reference.path)
    if read_config(directory, blueprint.model.compute) != blueprint.model:
        raise UserError(
            f"objective.reference.path: got {cfg.reference.path}, whose config.json describes a model of another shape; want the "
            "policy's"
        )
    return load(directory, blueprint.specs, blueprint.train, jnp.float32)


def _updates(blueprint: Blueprint, number: int) -> jax.Array:
    return hosts.put(np.int32(number), blueprint.train.replicated)
