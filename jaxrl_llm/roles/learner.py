"""The learner: filter -> replay -> scores -> advantage -> update -> publish. It needs no engine and no task."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxrl_llm.distribution.loss_terms import Loss
from jaxrl_llm.distribution.score import TokenScores
from jaxrl_llm.experience.filters import Filter
from jaxrl_llm.experience.replay import Replay
from jaxrl_llm.model import lora
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.losses import with_own_columns
from jaxrl_llm.roles.state import RunState
from jaxrl_llm.roles.updates import Learned
from jaxrl_llm.types import Credit, Experience, Groups, Policy, PyTree, Scores, TrainState


class Learner(NamedTuple):
    """The stages from graded groups to the next policy, each a function of values."""

    filter: Filter
    replay: Replay
    score: Callable[[RunState, Groups], Scores]
    """Log-probs and values that the objective reads, under the reference, the proximal policy and the critic."""
    advantage: Callable[[Groups, Scores], Credit]
    update: Callable[[RunState, Experience, np.random.Generator], tuple[TrainState, Learned]]
    """Epochs of minibatches; `state.train` is donated."""
    refresh: Callable[[RunState, TrainState], PyTree | None]
    """Reference after a step that ended with the given TrainState; the old reference is donated if it can change."""
    publish: Callable[[TrainState, Policy | None], Policy]
    """Policy with the parameters of a TrainState; the old policy's buffers are donated."""


def score_groups(
    objective: ObjectiveConfig,
    loss: Loss,
    score: Callable[[PyTree, Groups], TokenScores],
    state: RunState,
    groups: Groups,
) -> Scores:
    """Scores that the objective and the loss read.

    Args:
        objective: says which models are needed beside the policy.
        loss: says which columns it reads and which it adds.
        score: a `Scorer`.
        state: with the parameters.
        groups: their kept rows are scored.
    """
    reference = values = proximal = None
    if objective.reads_reference_logprobs:
        params = lora.join(state.reference, lora.split(state.train.params)[1])
        reference = score(params, groups).logprobs
    reads_proximal = "proximal_logprobs" in loss.columns
    if reads_proximal or objective.has_critic:
        own = score(state.train.params, groups)
        proximal, values = own.logprobs if reads_proximal else None, own.values
    return with_own_columns(Scores(reference, proximal, values), groups, loss.own)
