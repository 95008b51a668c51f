"""Initial states, from shapes alone: a checkpoint's abstract state is that of a new run. Nothing is compiled."""

import jax
import numpy as np
import pytest
from fakes import VALUES, blueprint

from jaxrl_llm.experience.buffer import Buffer
from jaxrl_llm.experience.filters import Filter
from jaxrl_llm.experience.replay import make_replay
from jaxrl_llm.metrics.guards import Guards
from jaxrl_llm.model import lora
from jaxrl_llm.model import params as model_params
from jaxrl_llm.roles.learner import Learner
from jaxrl_llm.roles.start_or_restore import first_state, first_supervised, rl_target, supervised_target
from jaxrl_llm.roles.state import RunState, SupervisedState, joined, split
from jaxrl_llm.types import TrainState

SOURCE = {"visits": np.int64(0)}


def learner_of(of) -> Learner:
    """Its states alone."""
    keeps = Filter(lambda: {"of the filter": np.zeros(2)}, None)
    return Learner(keeps, make_replay(of.cfg.experience.replay), *[None] * 7)


def target(**changes):
    of = blueprint(**changes)
    return of, rl_target(of, learner_of(of), SOURCE)


def shapes(tree):
    return jax.tree.map(lambda x: (np.shape(x), np.dtype(getattr(x, "dtype", int))), tree)


def specs_as_shapes(specs):
    return model_params.map_specs(lambda s: (s.shape, np.dtype("float32")), specs)


def test_a_first_state_by_hand():
    of, state = target(warm_start={"steps": 7})
    assert isinstance(state, RunState) and int(state.step) == 7
    assert np.isnan(state.eval_before) and state.source is SOURCE
    np.testing.assert_array_equal(state.filters["of the filter"], [0, 0])
    assert state.replay == () and state.reference is None
    assert shapes(state.train.params) == specs_as_shapes(of.learner_specs)
    assert state.train.step.shape == () and state.train.step.dtype == np.int32
    assert int(target()[1].step) == 0


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        ({}, lambda of: of.specs),
        ({"objective": "verl:ppo"}, lambda of: of.learner_specs),
        # Frozen matrices have no gradient to be counted.
        ({"lora": {"rank": 2}}, lambda of: lora.split(of.learner_specs)[0]),
    ],
)
def test_guards_count_a_gradient_for_each_parameter_that_is_trained(changes, trained):
    of, state = target(**changes)
    num = len(jax.tree.leaves(trained(of), is_leaf=model_params.is_spec))
    assert state.guards._replace(zero_gradient=None) == Guards(zero_gradient=None)
    np.testing.assert_array_equal(state.guards.zero_gradient, np.zeros(num, np.int64))


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": {"reward_kl": {"weight": 0.1}}},
        {"objective": {"reward_kl": {"weight": 0.1}}, "lora": {"rank": 2}},
        {"objective": {"preset": "verl:ppo", "reward_kl": {"weight": 0.1}}},
        {
            "objective": {"reward_kl": {"weight": 0.1}, "reference": {"kind": "pretrained", "path": "x"}},
            "lora": {"rank": 2},
        },
    ],
)
def test_a_reference_is_in_the_target_where_the_objective_reads_one(changes):
    of, state = target(**changes)
    assert jax.tree.structure(state.reference) == jax.tree.structure(
        model_params.abstract(of.reference_specs, of.train)
    )
    where = jax.tree.map(lambda x: x.sharding, state.reference)
    assert where == model_params.shardings(of.reference_specs, of.train)


def test_a_buffer_is_empty_and_its_groups_travel_apart_from_the_state():
    rollout = VALUES["rollout"] | {"top_k": 3, "max_kept_tokens": 4}
    _, state = target(rollout=rollout, experience={"replay": {"capacity": 5}})
    buffer = state.replay
    assert isinstance(buffer, Buffer) and buffer.known.number.tolist() == [-1] * 5 and buffer.packed == {}
    tree, blobs = split(state._replace(replay=buffer._replace(packed={"3": np.ones(7, np.uint8)})))
    assert list(blobs) == ["3"] and tree.replay.packed == {} and joined(tree, blobs).replay.packed == blobs
    assert split(tree) == (tree, {}) and joined(tree, {}) is tree


def test_around_arrays_it_is_what_the_target_describes():
    """The same function makes both, so a checkpoint of one is read as the other."""
    of, described = target(experience={"replay": {"capacity": 5}}, objective={"reward_kl": {"weight": 0.1}})
    arrays = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), (described.train, described.reference))
    state = first_state(of, learner_of(of), SOURCE, *arrays)
    assert jax.tree.structure(state) == jax.tree.structure(described) and shapes(state) == shapes(described)
    assert state.train is arrays[0] and state.reference is arrays[1]


def test_supervised_training_holds_the_policy_alone_with_its_own_optimizer():
    of = blueprint(
        objective="verl:ppo", lora={"rank": 2}, warm_start={"steps": 3, "optimizer": {"kind": "adamw", "lr": 1e-3}}
    )
    state = supervised_target(of)
    assert isinstance(state, SupervisedState) and int(state.step) == 0 and state.guards == Guards()
    assert shapes(state.train.params) == specs_as_shapes(of.specs)
    train = TrainState({}, (), np.int32(0))
    assert first_supervised(train).train is train and int(first_supervised(train).step) == 0
    # Every parameter is moved, so each has moments; RL's are those of the adapters and the critic.
    moments = lambda train: sum(x.size for x in jax.tree.leaves(train.opt_state) if x.ndim)  # noqa: E731
    assert moments(state.train) == 2 * model_params.count(of.specs)
    trained = lora.split(of.learner_specs)[0]
    assert moments(rl_target(of, learner_of(of), SOURCE).train) == 2 * sum(
        int(np.prod(s.shape)) for s in jax.tree.leaves(trained, is_leaf=model_params.is_spec) if s.shape
    )
