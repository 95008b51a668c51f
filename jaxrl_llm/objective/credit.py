"""What each token was worth, as one function of graded groups and of scores, whichever advantage the config names."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from jaxtyping import Float

from jaxrl_llm.errors import AdvantageError, UserError
from jaxrl_llm.objective.advantages import OwnAdvantage, estimate
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.estimator import Estimator
from jaxrl_llm.objective.outcome import Outcome
from jaxrl_llm.objective.reward_kl import RewardKl
from jaxrl_llm.types import Credit, Groups, Scores

Advantage = Callable[[Groups, Scores], Credit]
UNSCORED, UNPAID = Scores(), RewardKl()


def make_advantage(objective: ObjectiveConfig, weights: Sequence[float]) -> Advantage:
    """The advantage that an objective asks for; `weights`: of the graders."""
    advantage = objective.advantage
    if isinstance(advantage, OwnAdvantage):
        return partial(of_own, advantage.made(), advantage.function)
    return partial(of_estimator, advantage, reward_kl=objective.reward_kl, weights=weights)


def of_estimator(
    estimator: Estimator,
    groups: Groups,
    scores: Scores = UNSCORED,
    reward_kl: RewardKl = UNPAID,
    weights: Sequence[float] | None = None,
) -> Credit:
    """The credit that a published estimator gives.

    Args:
      scores: with the values and the reference's log-probs where the estimator and the KL read them.
      reward_kl: what is taken from each token's reward.
      weights: of the graders; None: 1 each.
    """
    rollouts, prompts, graders = groups.rollouts, len(groups.failure), groups.components.shape[-1]
    nothing = np.zeros(rollouts.sampled.shape)
    paid = (
        reward_kl(rollouts.behavior_logprobs, scores.reference_logprobs, groups.teaching)
        if reward_kl.weight
        else nothing
    )
    late = reward_kl.to == "advantage"
    found = estimate(
        estimator,
        Outcome(
            reward=groups.reward.reshape(prompts, -1),
            parts=groups.components.reshape(prompts, -1, graders),
            part_weights=np.ones(graders) if weights is None else np.array(weights),
            counts=groups.kept,
            mask=rollouts.sampled,
            token_reward=nothing if late else paid,
            late_reward=paid if late else None,
            values=scores.values,
        ),
    )
    advantage = found.advantage.astype(np.float32)
    returns = None if found.returns is None else found.returns.astype(np.float32)
    return Credit(advantage, returns, (advantage != 0).any(axis=1) if estimator.leaves_zeros_out else None)


def of_own(
    function: Callable[[Groups, Scores], Credit | Float[np.ndarray, "B ..."]], name: str, groups: Groups, scores: Scores
) -> Credit:
    """The credit that a function of your own gives: itself, or one number per row [B] or per token [B C].

    Raises:
      UserError: it gave another shape, or returns, which only a critic reads.
      AdvantageError: a number is none that float32 holds.
    """
    found = function(groups, scores)
    credit = found if isinstance(found, Credit) else Credit(np.asarray(found))
    advantage, mask = np.asarray(credit.advantage), groups.teaching
    if advantage.shape not in (mask.shape, mask.shape[:1]):
        raise UserError(
            f"objective.advantage {name}: got {advantage.dtype}{list(advantage.shape)}, want one number per row, "
            f"[{len(mask)}], or per token, {list(mask.shape)}"
        )
    if credit.returns is not None:
        raise UserError(f"objective.advantage {name}: got returns, want None: only the advantage gae has a critic")
    each = np.where(mask, advantage if advantage.ndim == 2 else advantage[:, None], 0.0)
    with np.errstate(over="ignore"):
        held = each.astype(np.float32)
    if not np.isfinite(held).all():
        raise AdvantageError(
            f"objective.advantage {name}: got an advantage of {each[~np.isfinite(held)][0]:g}, want a number that float32 holds"
        )
    return Credit(held, None, credit.keep)


def mean_kl(reward_kl: RewardKl, groups: Groups, scores: Scores) -> dict[str, float]:
    """`reward_kl`: the mean estimate of the KL over the tokens that teach, where it is taken from rewards."""
    mask = groups.teaching
    if reward_kl.weight == 0 or not mask.any():
        return {}
    paid = reward_kl(groups.rollouts.behavior_logprobs, scores.reference_logprobs, mask)
    return {"reward_kl": float(-paid.sum() / mask.sum() / reward_kl.weight)}
