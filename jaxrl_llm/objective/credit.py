"""Credit assignment: one function of graded groups and scores, whichever advantage the config names."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from jaxtyping import Float

from jaxrl_llm.errors import AdvantageError, UserError
from jaxrl_llm.objective.advantages import OwnAdvantage, estimate
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.estimator import Estimator, EstimatorInputs
from jaxrl_llm.objective.reward_kl import RewardKl
from jaxrl_llm.types import Credit, Groups, Scores

Advantage = Callable[[Groups, Scores], Credit]
NO_SCORES, NO_REWARD_KL = Scores(), RewardKl()


def make_advantage(objective: ObjectiveConfig, weights: Sequence[float] | None = None) -> Advantage:
    """Return the advantage function of an objective, a KL in the reward included.

        advantage = rl.make_advantage(rl.preset("trl:grpo"))
        credit = advantage(groups, rl.Scores())

    `weights`: one per grader; None: 1 each.
    """
    advantage = objective.advantage
    if isinstance(advantage, OwnAdvantage):
        return partial(custom_credit, advantage.made(), advantage.function)
    return partial(estimator_credit, advantage, reward_kl=objective.reward_kl, weights=weights)


def estimator_credit(
    estimator: Estimator,
    groups: Groups,
    scores: Scores = NO_SCORES,
    reward_kl: RewardKl = NO_REWARD_KL,
    weights: Sequence[float] | None = None,
) -> Credit:
    """Return the credit by a published estimator.

    Args:
        estimator: the published estimator.
        groups: graded groups.
        scores: includes values and reference log-probs if the estimator or the KL reads them.
        reward_kl: KL penalty subtracted from each token's reward.
        weights: one per grader; None: 1 each.
    """
    rollouts, prompts, graders = groups.rollouts, len(groups.failure), groups.components.shape[-1]
    zeros = np.zeros(rollouts.sampled.shape)
    penalty = (
        reward_kl(rollouts.behavior_logprobs, scores.reference_logprobs, groups.trainable_tokens)
        if reward_kl.weight
        else zeros
    )
    late = reward_kl.to == "advantage"
    found = estimate(
        estimator,
        EstimatorInputs(
            reward=groups.reward.reshape(prompts, -1),
            reward_components=groups.components.reshape(prompts, -1, graders),
            component_weights=np.ones(graders) if weights is None else np.array(weights),
            used=groups.kept,
            mask=rollouts.sampled,
            token_reward=zeros if late else penalty,
            late_reward=penalty if late else None,
            values=scores.values,
        ),
    )
    advantage = found.advantage.astype(np.float32)
    returns = None if found.returns is None else found.returns.astype(np.float32)
    return Credit(advantage, returns, (advantage != 0).any(axis=1) if estimator.drops_zero_advantages else None)


def custom_credit(
    function: Callable[[Groups, Scores], Credit | Float[np.ndarray, "B ..."]], name: str, groups: Groups, scores: Scores
) -> Credit:
    """Return the credit by a custom function that returns a Credit, or one number per row [B] or per token [B C].

    Args:
        function: custom advantage of groups and scores.
        name: its name, for error messages.
        groups: graded groups.
        scores: the columns that it reads.

    Raises:
        UserError: it returned another shape, or returns, which only a critic reads.
        AdvantageError: a number does not fit float32.
    """
    return as_credit(function(groups, scores), groups, f"objective.advantage {name}")


def as_credit(found: Credit | Float[np.ndarray, "B ..."], groups: Groups, name: str) -> Credit:
    """Return what a custom advantage computed for the groups as their credit: 0 outside the tokens to train on.

    `name`: its name in error messages; errors as in `custom_credit`.
    """
    credit = found if isinstance(found, Credit) else Credit(np.asarray(found))
    advantage, mask = np.asarray(credit.advantage), groups.trainable_tokens
    if advantage.shape not in (mask.shape, mask.shape[:1]):
        raise UserError(
            f"{name}: got {advantage.dtype}{list(advantage.shape)}, want one number per row, "
            f"[{len(mask)}], or per token, {list(mask.shape)}"
        )
    if credit.returns is not None:
        raise UserError(f"{name}: got returns, want None: only the advantage gae has a critic")
    masked = np.where(mask, advantage if advantage.ndim == 2 else advantage[:, None], 0.0)
    with np.errstate(over="ignore"):
        rounded = masked.astype(np.float32)
    if not np.isfinite(rounded).all():
        raise AdvantageError(
            f"{name}: got an advantage of {masked[~np.isfinite(rounded)][0]:g}, want a number that float32 holds"
        )
    return Credit(rounded, None, credit.keep)


def reward_kl_metrics(reward_kl: RewardKl, groups: Groups, scores: Scores) -> dict[str, float]:
    """Return the metric `reward_kl`, the mean KL estimate over the trained tokens in nats; empty without a KL in the reward."""
    mask = groups.trainable_tokens
    if reward_kl.weight == 0 or not mask.any():
        return {}
    penalty = reward_kl(groups.rollouts.behavior_logprobs, scores.reference_logprobs, mask)
    return {"reward_kl": float(-penalty.sum() / mask.sum() / reward_kl.weight)}
