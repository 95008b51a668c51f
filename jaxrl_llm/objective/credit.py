"""Credit assignment: one function of graded groups and scores, whichever advantage the config names."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxrl_llm.errors import AdvantageError, UserError
from jaxrl_llm.objective.advantages import OwnAdvantage, estimate
from jaxrl_llm.objective.config import BaselineOver, ObjectiveConfig, ReusedRows
from jaxrl_llm.objective.estimator import Estimator, EstimatorInputs, at_tokens
from jaxrl_llm.objective.reward_kl import RewardKl
from jaxrl_llm.objective.statistics import Grouping
from jaxrl_llm.objective.tree_nodes import Tree
from jaxrl_llm.types import Credit, Groups, Rollouts, Scores

Advantage = Callable[[Groups, Scores], Credit]
NO_SCORES, NO_REWARD_KL = Scores(), RewardKl()


def make_advantage(objective: ObjectiveConfig, weights: Sequence[float] | None = None) -> Advantage:
    """Return the advantage function of an objective, a KL in the reward included. Its statistics (means, stds, ranks) are over the
    rows that `objective.baseline_over` names.

        advantage = rl.make_advantage(rl.preset("trl:grpo"))
        credit = advantage(groups, rl.Scores())

    `weights`: one per grader; None: 1 each.
    """
    advantage = objective.advantage
    if isinstance(advantage, OwnAdvantage):
        return partial(custom_credit, advantage.made(), advantage.function)
    return partial(
        estimator_credit,
        advantage,
        reward_kl=objective.reward_kl,
        weights=weights,
        baseline_over=objective.baseline_over,
        reused_rows=objective.reused_rows,
    )


def estimator_credit(
    estimator: Estimator,
    groups: Groups,
    scores: Scores = NO_SCORES,
    reward_kl: RewardKl = NO_REWARD_KL,
    weights: Sequence[float] | None = None,
    baseline_over: BaselineOver = "sampled",
    reused_rows: ReusedRows = "joint",
) -> Credit:
    """Return the credit by a published estimator, which sees the rows that count and no others: the rest is 0.

    Args:
        estimator: the published estimator.
        groups: graded groups.
        scores: includes values and reference log-probs if the estimator or the KL reads them.
        reward_kl: KL penalty subtracted from each token's reward.
        weights: one per grader; None: 1 each.
        baseline_over: rows that count, as in `ObjectiveConfig`.
        reused_rows: whose statistics they enter, as in `ObjectiveConfig`.
    """
    rollouts, counts = groups.rollouts, rows_that_count(groups, baseline_over)
    mask = rollouts.sampled if groups.taught is None else rollouts.sampled | groups.taught
    # A copy of all tokens costs more than the estimator.
    take = (lambda x: x) if counts.all() else (lambda x: None if x is None else x[counts])
    penalty, late = None, reward_kl.to == "advantage"
    if reward_kl.weight:
        of = rollouts.behavior_logprobs, scores.reference_logprobs, groups.trainable_tokens
        penalty = reward_kl(*map(take, of))
    graders = groups.components.shape[-1]
    found = estimate(
        estimator,
        EstimatorInputs(
            reward=take(groups.reward),
            reward_components=take(groups.components),
            component_weights=np.ones(graders) if weights is None else np.array(weights),
            groups=Grouping.of(take(_numbered(groups, reused_rows))),
            mask=take(mask),
            token_reward=None if late else penalty,
            values=take(scores.values),
            late_reward=penalty if late else None,
            step_reward=take(groups.step_reward),
            tree=_tree_of(rollouts, counts),
        ),
    )
    advantage, returns = (None if x is None else _put_back(x.astype(np.float32), counts) for x in found)
    advantage = at_tokens(advantage, mask)
    return Credit(advantage, returns, (advantage != 0).any(axis=1) if estimator.drops_zero_advantages else None)


def _tree_of(rollouts: Rollouts, counts: Bool[np.ndarray, " B"]) -> Tree | None:
    """Return which of the rows that count left which; prompts count with all their rows or with none."""
    if rollouts.trunk is None:
        return None
    number = np.cumsum(counts) - 1
    return Tree(number[rollouts.trunk_rows[counts]], rollouts.fork[counts])


def rows_that_count(groups: Groups, baseline_over: BaselineOver) -> Bool[np.ndarray, " B"]:
    """Return the rows whose rewards enter the statistics, `baseline_over` as in `ObjectiveConfig`. Never filler rows, nor groups
    that could not be graded or have no kept row: no number stands for them."""
    prompt = groups.rollouts.prompt
    if baseline_over == "kept":
        return groups.keep & (prompt >= 0)
    # Of kept rows a reward of NaN is a mistake, which the estimator reports.
    return (prompt >= 0) & groups.kept[prompt] & (groups.keep | ~np.isnan(groups.reward))


def _numbered(groups: Groups, reused_rows: ReusedRows) -> Int[np.ndarray, " B"]:
    """Return the number of the rows that each row is compared with, ascending. Reused rows are the last of their prompt."""
    prompt = groups.rollouts.prompt
    return prompt if reused_rows == "joint" or groups.reused is None else 2 * prompt + groups.reused


def _put_back(x: np.ndarray, rows: Bool[np.ndarray, " B"]) -> np.ndarray:
    """Return x, which has these rows only, with 0 in the others."""
    if rows.all():
        return x
    full = np.zeros((len(rows), *x.shape[1:]), x.dtype)
    full[rows] = x
    return full


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
