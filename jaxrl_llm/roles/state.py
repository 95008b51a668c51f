"""The state of a run after a step: everything a resume needs, as one pytree. A checkpoint is a map over it."""

from typing import Any, NamedTuple

import numpy as np

from jaxrl_llm.metrics.guards import Guards
from jaxrl_llm.types import PyTree, TrainState


class RunState(NamedTuple):
    """Of RL. What a stage remembers from step to step enters here, by being a field."""

    step: np.ndarray
    """Steps done, supervised ones included."""
    num_tokens: np.ndarray
    """Completion tokens sampled so far."""
    eval_before: np.ndarray
    """Held-out accuracy before RL (`Evaluator.headline`)."""
    train: TrainState
    reference: PyTree | None
    """Parameters of the reference policy where the objective reads one; of a policy with adapters these alone."""
    source: Any
    filters: Any
    replay: Any
    guards: Guards


class SupervisedState(NamedTuple):
    """Of supervised training, which comes before RL."""

    step: np.ndarray
    train: TrainState
    guards: Guards
