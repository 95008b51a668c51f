"""The learner: filter -> replay -> scores -> advantage -> update -> publish. It knows no engine and no task."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxrl_llm.distribution.loss import Loss
from jaxrl_llm.distribution.score import TokenScores
from jaxrl_llm.experience.filters import Filter
from jaxrl_llm.experience.replay import Replay
from jaxrl_llm.model import lora
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.losses import with_own
from jaxrl_llm.roles.state import RunState
from jaxrl_llm.roles.updates import Learned
from jaxrl_llm.types import Credit, Experience, Groups, Policy, PyTree, Scores, TrainState


class Learner(NamedTuple):
    """The stages between graded groups and the next policy, each a function of values."""

    filter: Filter
    replay: Replay
    score: Callable[[RunState, Groups], Scores]
    """What the objective reads of the models beside the policy."""
    advantage: Callable[[Groups, Scores], Credit]
    update: Callable[[RunState, Experience, np.random.Generator], tuple[TrainState, Learned]]
    """Epochs of minibatches; the state's `train` is donated."""
    refresh: Callable[[RunState, TrainState], PyTree | None]
    """The reference after a step that made the new TrainState; the old one is donated where it can change."""
    publish: Callable[[TrainState, Policy | None], Policy]
    """The policy that the parameters make; an old one lends its buffers."""


def score_groups(
    objective: ObjectiveConfig,
    loss: Loss,
    score: Callable[[PyTree, Groups], TokenScores],
    state: RunState,
    groups: Groups,
) -> Scores:
    """The scores that the objective and the loss read.

    Args:
        objective: which models stand beside the policy.
        loss: which columns it reads, and which it brings along.
        score: of whole groups under parameters, as `Scorer`.
        state: with the parameters.
        groups: of which the rows that are kept are scored.
    """
    reference = values = proximal = None
    if objective.reads_reference_logprobs:
        params = lora.join(state.reference, lora.split(state.train.params)[1])
        reference = score(params, groups).logprobs
    reads_proximal = "proximal_logprobs" in loss.columns
    if reads_proximal or objective.has_critic:
        own = score(state.train.params, groups)
        proximal, values = own.logprobs if reads_proximal else None, own.values
    return with_own(Scores(reference, proximal, values), groups, loss.own)
