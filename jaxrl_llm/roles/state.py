"""State of a run after a step: everything that resuming needs, as one pytree. A checkpoint is a map over it."""

from typing import Any, NamedTuple

import numpy as np

from jaxrl_llm.experience.buffer import Buffer
from jaxrl_llm.metrics.guards import Guards
from jaxrl_llm.types import PyTree, TrainState


class RunState(NamedTuple):
    """State of RL. The state of a new stage enters checkpoints by being a field here."""

    step: np.ndarray
    """Steps done, supervised ones included."""
    eval_before: np.ndarray
    """Held-out accuracy before RL, the metric `Evaluator.headline`."""
    train: TrainState
    reference: PyTree | None
    """Parameters of the reference policy if the objective reads one; only the adapters of a policy that has some."""
    source: Any
    filters: Any
    replay: Any
    guards: Guards


class SupervisedState(NamedTuple):
    """State of supervised training, which precedes RL."""

    step: np.ndarray
    train: TrainState
    guards: Guards


def split(state: RunState | SupervisedState) -> tuple[RunState | SupervisedState, dict[str, np.ndarray]]:
    """Return the state without the groups of its buffer, and these, by name: what never changes a checkpoint writes once."""
    if not isinstance(state, RunState) or not isinstance(state.replay, Buffer):
        return state, {}
    return state._replace(replay=state.replay._replace(packed={})), state.replay.packed


def joined(state: RunState | SupervisedState, groups: dict[str, np.ndarray]) -> RunState | SupervisedState:
    """Return the state that was split."""
    return state._replace(replay=state.replay._replace(packed=groups)) if groups else state
