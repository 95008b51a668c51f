"""Base class of the advantage estimators, their inputs and their result."""

from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

if TYPE_CHECKING:
    from jaxrl_llm.types import Credit, Groups, Scores

Group = Float[np.ndarray, "P G"]
Completion = Float[np.ndarray, "B C"]
Tokens = Bool[np.ndarray, "B C"]


class EstimatorInputs(NamedTuple):
    """Inputs of an estimator: P groups of G sequences, B = P * G rows of C tokens."""

    reward: Group
    reward_components: Float[np.ndarray, "P G n"]
    """One reward per grader, before weights."""
    component_weights: Float[np.ndarray, " n"]
    used: Bool[np.ndarray, " P"]
    """Groups to train on; the numbers of the others may be NaN, and their advantages are 0."""
    mask: Tokens
    """Tokens sampled by the policy."""
    token_reward: Completion
    """Reward per token, added to the sequence's: minus weight * KL, or 0."""
    values: Completion | None = None
    """The critic's value of the state before each token."""
    late_reward: Completion | None = None
    """As `token_reward`, but its returns-to-go are added to the advantages after normalization."""


class AdvantageEstimate(NamedTuple):
    advantage: Completion
    returns: Completion | None = None
    """Targets of the critic."""


class Estimator:
    """Base class: each published estimator is a frozen dataclass with its constants as fields."""

    kind: str
    compares_within_group: ClassVar[bool] = True
    """Compares samples within a group, so it needs at least two per prompt."""
    uses_batch_statistics: ClassVar[bool] = False
    """Uses statistics over all groups, so dropping one group changes the others' advantages."""
    uses_returns_to_go: ClassVar[bool] = False
    """Each token is credited with the rewards from it on."""
    drops_zero_advantages: ClassVar[bool] = False
    """Rows with all advantages 0 are left out of the loss."""
    reads_reference_logprobs: ClassVar[bool] = False

    def __call__(self, groups: "Groups", scores: "Scores | None" = None) -> "Credit":
        """Return the credit with grader weights of 1 and no KL in the reward."""
        # Configs contain estimators, and are read before JAX is imported.
        from jaxrl_llm.objective.credit import NO_SCORES, estimator_credit

        return estimator_credit(self, groups, NO_SCORES if scores is None else scores)

    def estimate(self, inputs: EstimatorInputs) -> AdvantageEstimate:
        """Return the advantages of the used groups, and returns if there is a critic."""
        raise NotImplementedError

    def bound(self, score: Group, inputs: EstimatorInputs) -> float:
        """Return the largest |advantage| that the formula allows. `score`: rewards of the used groups, at least one group."""
        raise NotImplementedError

    def why_equal_rewards_teach(self, graders: int) -> str:
        """Return why a group of equal rewards can have nonzero advantages; "" if it cannot. `graders`: their number."""
        return ""


def without_unused_groups(inputs: EstimatorInputs) -> EstimatorInputs:
    """Return the inputs in float64, with rewards 0 and no tokens in the mask for unused groups."""
    used = inputs.used[:, None]
    return inputs._replace(
        reward=np.where(used, inputs.reward, 0.0).astype(np.float64),
        reward_components=np.where(used[..., None], inputs.reward_components, 0.0).astype(np.float64),
        mask=inputs.mask & np.repeat(inputs.used, inputs.reward.shape[1])[:, None],
    )


def sequence_rewards(inputs: EstimatorInputs) -> Group:
    """Return the reward of each sequence, token rewards included."""
    return inputs.reward + token_reward_sums(inputs)


def token_reward_sums(inputs: EstimatorInputs) -> Group:
    """Return the sum of token rewards of each sequence."""
    return np.where(inputs.mask, inputs.token_reward, 0.0).sum(axis=1).reshape(inputs.reward.shape)
