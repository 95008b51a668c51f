"""The state of a run is one pytree: what a checkpoint is a map over."""

import jax
import numpy as np
from fakes import state_of

from jaxrl_llm.metrics.guards import Guards
from jaxrl_llm.roles.state import RunState, SupervisedState
from jaxrl_llm.types import TrainState


def paths(state):
    return {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)}


def test_everything_that_resuming_needs_is_a_leaf():
    state = state_of(source={"visits": np.int64(3)}, filters=(np.float32(1),), replay={"version": np.zeros(4)})
    found = paths(state)
    assert {".step", ".eval_before", ".train.params['w']", ".train.step"} <= found
    assert {".source['visits']", ".filters[0]", ".replay['version']"} <= found
    assert {path for path in found if path.startswith(".guards")} == {f".guards.{name}" for name in Guards._fields}
    # Nothing where no reference is read, and a leaf for each of its parameters where one is.
    assert not any(path.startswith(".reference") for path in found)
    assert paths(state._replace(reference={"w": np.zeros(2)})) - found == {".reference['w']"}


def test_a_map_over_it_is_such_a_state_again():
    state = state_of(replay=(np.arange(3),))
    doubled = jax.tree.map(lambda x: 2 * x, state)
    assert (
        isinstance(doubled, RunState) and isinstance(doubled.train, TrainState) and isinstance(doubled.guards, Guards)
    )
    assert (int(doubled.step), int(doubled.train.step), float(doubled.eval_before)) == (10, 14, 0.5)
    np.testing.assert_array_equal(doubled.replay[0], [0, 2, 4])
    assert doubled.reference is None and int(state.step) == 5


def test_the_state_of_supervised_training_holds_nothing_of_rl():
    state = SupervisedState(np.array(3), TrainState({"w": np.zeros(2)}, (), np.int32(3)), Guards())
    assert set(SupervisedState._fields) <= set(RunState._fields)
    assert jax.tree.structure(state) != jax.tree.structure(state_of())
    assert {".step", ".train.params['w']", ".train.step"} <= paths(state)
