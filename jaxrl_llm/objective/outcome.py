"""What estimators of advantages read: rewards of groups, and rewards and values of their tokens."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

Group = Float[np.ndarray, "P G"]
Completion = Float[np.ndarray, "B C"]
Tokens = Bool[np.ndarray, "B C"]


class Outcome(NamedTuple):
    """What estimators read of P groups of G sequences."""

    reward: Group
    parts: Float[np.ndarray, "P G n"]
    """Of each grader, before weights."""
    part_weights: Float[np.ndarray, " n"]
    counts: Bool[np.ndarray, " P"]
    """The groups that are learned from; the others' numbers may be NaN and get advantage 0."""
    mask: Tokens
    """Tokens that the policy drew."""
    token_reward: Completion
    """Of each token beside its sequence's: minus weight * KL, or 0."""
    values: Completion | None = None
    """The critic's of what is before each token."""
    late_reward: Completion | None = None
    """As `token_reward`, but its returns to go join the advantages after every statistic."""


class Estimate(NamedTuple):
    advantage: Completion
    returns: Completion | None = None
    """What a critic is to predict."""


def of_groups_that_count(outcome: Outcome) -> Outcome:
    """With rewards of 0 and no tokens for the groups that do not count, in float64."""
    counted = outcome.counts[:, None]
    return outcome._replace(
        reward=np.where(counted, outcome.reward, 0.0).astype(np.float64),
        parts=np.where(counted[..., None], outcome.parts, 0.0).astype(np.float64),
        mask=outcome.mask & np.repeat(outcome.counts, outcome.reward.shape[1])[:, None],
    )


def scores(outcome: Outcome) -> Group:
    """Rewards of whole sequences."""
    return outcome.reward + own_rewards(outcome)


def own_rewards(outcome: Outcome) -> Group:
    """Of each sequence, the sum of its tokens' own rewards."""
    return np.where(outcome.mask, outcome.token_reward, 0.0).sum(axis=1).reshape(outcome.reward.shape)
