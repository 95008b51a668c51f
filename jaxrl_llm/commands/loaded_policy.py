"""The policy that `sample`, `eval`, `export` and `--benchmark` load: a newest checkpoint, a pretrained or an untrained model."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.model.config import PretrainedModel
from jaxrl_llm.model.hf.load import load
from jaxrl_llm.model.hf.source import resolve as resolve_model
from jaxrl_llm.model.params import abstract, unstack
from jaxrl_llm.parallel import hosts
from jaxrl_llm.parallel.config import resolve
from jaxrl_llm.roles import inputs
from jaxrl_llm.roles.blueprint import Blueprint, blueprint_of
from jaxrl_llm.roles.build import make_keys, make_publisher
from jaxrl_llm.roles.inputs import Inputs
from jaxrl_llm.roles.start_or_restore import start_params
from jaxrl_llm.roles.state import RunState, SupervisedState
from jaxrl_llm.rollout.config import NoReuse, NoTree, PerSample
from jaxrl_llm.rollout.engine import Engine
from jaxrl_llm.run_context import State, restore_read_only
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import Policy, PyTree, TrainState


class SamplingSetup(NamedTuple):
    """Blueprint, task and engine for sampling from a policy."""

    blueprint: Blueprint
    task: Task
    engine: Engine


class LoadedPolicy(NamedTuple):
    policy: Policy
    params: PyTree | None
    """The trainer's parameters; None for a pretrained model, which is loaded for sampling only."""
    name: str
    """Source of the policy, for output."""
    step: int


class RestoredParams(NamedTuple):
    """Parameters of a checkpoint, without the optimizer state."""

    params: PyTree
    version: jax.Array
    step: int
    in_rl: bool
    """True if the checkpoint is one of RL, False if of supervised training."""


def prepare_sampling(cfg: RunConfig, given: Inputs | None = None) -> SamplingSetup:
    """Return the setup of a config. Raises UserError with everything that does not fit.

    Args:
        given: what was read for `cfg`; None: it is read here.
    """
    given = given or inputs.read(cfg)
    blueprint = blueprint_of(cfg, given)
    return SamplingSetup(blueprint, given.task, blueprint.make_engine())


def restore_params(blueprint: Blueprint) -> RestoredParams | None:
    """Return the parameters of the newest checkpoint in the run directory; None if it has none."""

    def target(in_rl: bool) -> State:
        specs, layout = blueprint.learner_specs if in_rl else blueprint.specs, blueprint.train
        version = jax.ShapeDtypeStruct((), np.int32, sharding=layout.replicated)
        state = TrainState(abstract(specs, layout), None, version)
        rest = dict.fromkeys((RunState if in_rl else SupervisedState)._fields)
        return (RunState if in_rl else SupervisedState)(**rest | {"train": state})

    found = restore_read_only(Path(blueprint.cfg.run_dir), blueprint.cfg.checkpoint.keep, target)
    if found is None:
        return None
    train = found.tree.train
    return RestoredParams(train.params, train.step, found.step, isinstance(found.tree, RunState))


def load_policy(setup: SamplingSetup) -> LoadedPolicy:
    """Return the run's newest checkpoint; without one, the pretrained model it starts from; without that, an untrained policy."""
    blueprint, cfg = setup.blueprint, setup.blueprint.cfg
    restored = restore_params(blueprint)
    if restored is None and isinstance(cfg.model, PretrainedModel):
        directory = resolve_model(cfg.model.path)
        specs = unstack(blueprint.specs, blueprint.model.layers)
        params = load(directory, specs, blueprint.decode, jnp.dtype(blueprint.model.compute))
        version = hosts.put(np.int32(0), blueprint.decode.replicated)
        return LoadedPolicy(Policy(params, version), None, str(directory), 0)
    name = f"step {restored.step} of {cfg.run_dir}" if restored else "an untrained policy"
    if restored is None:
        params = start_params(blueprint, make_keys(cfg.seed).train)
        restored = RestoredParams(params, hosts.put(np.int32(0), blueprint.train.replicated), 0, False)
    policy = make_publisher(blueprint)(TrainState(restored.params, (), restored.version), None)
    return LoadedPolicy(policy, restored.params, name, restored.step)


def with_batch(cfg: RunConfig, prompts: int, samples: int) -> RunConfig:
    """Return the config with batches of `prompts`, rounded up to a multiple of the row shards, and groups of `samples`,
    independent and all with the same sampling parameters."""
    sizes, _ = resolve(cfg.mesh, jax.device_count())
    row_shards = sizes[0] * sizes[1] * sizes[3] * jax.process_count() if sizes else prompts
    return dataclasses.replace(
        cfg,
        rollout=dataclasses.replace(
            cfg.rollout,
            prompts=-(-prompts // row_shards) * row_shards,
            samples=samples,
            per_sample=PerSample(),
            tree=NoTree(),
            reuse=NoReuse(),
        ),
        update=dataclasses.replace(cfg.update, minibatches=1, micro_batches=1),
        warm_start=dataclasses.replace(cfg.warm_start, rows=row_shards),
    )
