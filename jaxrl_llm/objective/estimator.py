"""Base class of the advantage estimators, their inputs and their result."""

from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from jaxrl_llm.errors import UserError
from jaxrl_llm.objective.statistics import Grouping, Numbers, Rows
from jaxrl_llm.objective.tree_nodes import Tree

if TYPE_CHECKING:
    from jaxrl_llm.types import Credit, Groups, Scores

Completion = Float[np.ndarray, "B C"]
Tokens = Bool[np.ndarray, "B C"]


class EstimatorInputs(NamedTuple):
    """Inputs of an estimator: the B rows that count, of C tokens each. A group is one prompt's rows, one or more."""

    reward: Rows
    reward_components: Float[np.ndarray, "B n"]
    """One reward per grader, before weights; NaN of graders that do not grade the row's task."""
    component_weights: Float[np.ndarray, " n"]
    groups: Grouping
    mask: Tokens
    """Tokens sampled by the policy."""
    token_reward: Completion | None = None
    """Reward per token, added to the sequence's: minus weight * KL. None: 0 throughout."""
    values: Completion | None = None
    """The critic's value of the state before each token."""
    late_reward: Completion | None = None
    """As `token_reward`, but its returns-to-go are added to the advantages after normalization."""
    step_reward: Completion | None = None
    """Reward at the last token of each step, as in `Groups`. Estimators per token take it instead of `reward`, in which a grader
    counts with the mean of its steps. None: no grader has steps."""
    tree: Tree | None = None
    """Which rows left which; None: all are independent."""


class AdvantageEstimate(NamedTuple):
    advantage: Numbers
    """One per row, the same at all its tokens, or one per token."""
    returns: Completion | None = None
    """Targets of the critic."""


class Estimator:
    """Base class: each published estimator is a frozen dataclass with its constants as fields.

    A group of one row has nothing to compare with: estimators that compare within the group take its reward for the baseline, so it
    is 0 from it. In batch statistics it counts like any other row. Estimators without such a comparison treat it like any row.
    """

    kind: str
    compares_within_group: ClassVar[bool] = True
    """Compares samples within a group, so it needs at least two per prompt."""
    uses_batch_statistics: ClassVar[bool] = False
    """Uses statistics over all groups, so dropping one group changes the others' advantages."""
    uses_returns_to_go: ClassVar[bool] = False
    """Each token is credited with the rewards from it on."""
    compares_trees: ClassVar[bool] = False
    """Reads which rows share their beginnings."""
    needs_independent_rows: ClassVar[bool] = False
    """Counts on whole groups of independent responses: no tree."""
    drops_zero_advantages: ClassVar[bool] = False
    """Rows with all advantages 0 are left out of the loss."""
    reads_reference_logprobs: ClassVar[bool] = False

    def __call__(self, groups: "Groups", scores: "Scores | None" = None) -> "Credit":
        """Return the credit with grader weights of 1 and no KL in the reward. The baseline is over all graded rows of the groups
        with a kept row, also those that are not kept: `ObjectiveConfig.baseline_over` sampled. Raises UserError for trees if it
        needs independent rows."""
        trunk, sample = groups.rollouts.trunk, groups.rollouts.sample
        if self.needs_independent_rows and trunk is not None and (trunk != sample).any():
            raise UserError(f"{self.kind}: got trees, want independent responses, or tree_rl, tree_po, spo or tree_rpo")
        # Configs contain estimators, and are read before JAX is imported.
        from jaxrl_llm.objective.credit import NO_SCORES, estimator_credit

        return estimator_credit(self, groups, NO_SCORES if scores is None else scores)

    def estimate(self, inputs: EstimatorInputs) -> AdvantageEstimate:
        """Return the advantages, and returns if there is a critic."""
        raise NotImplementedError

    def bound(self, score: Rows, inputs: EstimatorInputs) -> float:
        """Return the largest |advantage| that the formula allows. `score`: `sequence_rewards`, at least one."""
        raise NotImplementedError

    def why_equal_rewards_teach(self, graders: int) -> str:
        """Return why a group of equal rewards can have nonzero advantages; "" if it cannot. `graders`: their number."""
        return ""


def in_float64(inputs: EstimatorInputs) -> EstimatorInputs:
    """Return the inputs with rewards in float64."""
    return inputs._replace(
        reward=np.asarray(inputs.reward, np.float64), reward_components=np.asarray(inputs.reward_components, np.float64)
    )


def at_tokens(x: Numbers, mask: Tokens) -> Completion:
    """Return one number per row at all its tokens in `mask`, 0 elsewhere; one per token as it is."""
    return x if x.ndim == 2 else np.where(mask, x[:, None], x.dtype.type(0))


def sequence_rewards(inputs: EstimatorInputs) -> Rows:
    """Return the reward of each sequence, token rewards included."""
    return inputs.reward + token_reward_sums(inputs)


def token_reward_sums(inputs: EstimatorInputs) -> Rows:
    """Return the sum of token rewards of each sequence."""
    if inputs.token_reward is None:
        return np.zeros(len(inputs.reward))
    return np.where(inputs.mask, inputs.token_reward, 0.0).sum(axis=1)
