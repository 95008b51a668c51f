"""The learner: filter -> replay -> scores -> advantage -> update -> publish. It needs no engine and no task."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxrl_llm.distribution.loss_terms import Loss
from jaxrl_llm.distribution.score import TokenScores
from jaxrl_llm.experience.filters import Filter
from jaxrl_llm.experience.replay import Replay
from jaxrl_llm.model import lora
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.losses import with_own_columns
from jaxrl_llm.roles.state import RunState
from jaxrl_llm.roles.updates import Learned
from jaxrl_llm.types import Credit, Experience, Groups, Policy, PyTree, Scores, TrainState, select_groups
from jaxrl_llm.update.packing import GroupSizes


class Learner(NamedTuple):
    """The stages from graded groups to the next policy, each a function of values."""

    filter: Filter
    replay: Replay
    score: Callable[[RunState, Groups], Scores]
    """Log-probs and values that the objective reads, under the reference, the proximal policy and the critic."""
    entropy: Callable[[RunState, Groups], Float[np.ndarray, " B"]]
    """Mean entropy of each kept row's sampled tokens under the policy, in nats."""
    advantage: Callable[[Groups, Scores], Credit]
    update: Callable[[RunState, Experience, np.random.Generator], tuple[TrainState, Learned]]
    """Epochs of minibatches; `state.train` is donated."""
    refresh: Callable[[RunState, TrainState], PyTree | None]
    """Reference after a step that ended with the given TrainState; the old reference is donated if it can change."""
    publish: Callable[[TrainState, Policy | None], Policy]
    """Policy with the parameters of a TrainState; the old policy's buffers are donated."""
    compile: Callable[[], None]
    """No stage: start to compile the update in a thread. Without it the first update compiles."""


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


def policy_entropy(
    score: Callable[[PyTree, Groups], TokenScores], sizes: GroupSizes, state: RunState, groups: Groups
) -> Float[np.ndarray, " B"]:
    """Return the mean entropy of each row's sampled tokens under the policy, in nats; 0 in rows that are not kept.

    Args:
        score: a `Scorer`.
        sizes: of the groups that it scores at once.
        state: with the parameters.
        groups: as many as there are, none larger than `sizes.most`.
    """
    found, at_once = [], min(sizes.prompts, sizes.rows // sizes.most)
    for first in range(0, len(groups.failure), at_once):
        part = select_groups(groups, np.arange(first, min(first + at_once, len(groups.failure))))
        entropy, inside = score(state.train.params, part).entropy, part.trainable_tokens
        found.append(np.where(inside, entropy, 0).sum(axis=1) / np.maximum(np.count_nonzero(inside, axis=1), 1))
    return np.concatenate(found)
