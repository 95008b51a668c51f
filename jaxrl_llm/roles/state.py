"""State of a run after a step: everything that resuming needs, as one pytree. A checkpoint is a map over it."""

from typing import Any, NamedTuple

import numpy as np

from jaxrl_llm.experience.buffer import Buffer
from jaxrl_llm.metrics.guards import Guards
from jaxrl_llm.roles.reusing import StoredVisits
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


VISIT = "visit/"
"""Beginning of the names of groups that are the last visits of their rows."""


def split(state: RunState | SupervisedState) -> tuple[RunState | SupervisedState, dict[str, np.ndarray]]:
    """Return the state without its packed groups, and these, by name: what never changes a checkpoint writes once."""
    groups: dict[str, np.ndarray] = {}
    if isinstance(state, RunState) and isinstance(state.replay, Buffer):
        groups |= state.replay.packed
        state = state._replace(replay=state.replay._replace(packed={}))
    if isinstance(state, RunState) and isinstance(getattr(state.source, "reuse", None), StoredVisits):
        reuse = state.source.reuse
        groups |= {VISIT + row: packed for row, packed in reuse.packed.items()}
        state = state._replace(source=state.source._replace(reuse=reuse._replace(packed={})))
    return state, groups


def joined(state: RunState | SupervisedState, groups: dict[str, np.ndarray]) -> RunState | SupervisedState:
    """Return the state that was split."""
    visits = {name.removeprefix(VISIT): packed for name, packed in groups.items() if name.startswith(VISIT)}
    if visits:
        reuse = state.source.reuse._replace(packed=visits)
        state = state._replace(source=state.source._replace(reuse=reuse))
    if buffer := {name: packed for name, packed in groups.items() if not name.startswith(VISIT)}:
        state = state._replace(replay=state.replay._replace(packed=buffer))
    return state
