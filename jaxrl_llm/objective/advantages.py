"""What each token's action was worth: one function per published estimator, in float64 over whole groups.

A sequence's reward is the graders' plus the sum of its tokens' own, which are minus weight * KL where `objective.reward_kl` asks
for it. Most estimators give all tokens of a sequence the same advantage. Equal rewards give exactly 0 where there is a baseline,
and the order of rows changes nothing, not even the last bit.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxrl_llm.errors import AdvantageError
from jaxrl_llm.objective.advantage_config import (
    AdvantageConfig,
    BestWorst,
    Gae,
    Gdpo,
    Gpg,
    Grpo,
    LeaveOneOut,
    MaxRl,
    MeanOnly,
    Opo,
    PassAtK,
    Raw,
    ReinforcePlusPlus,
    RewardKl,
    Rloo,
)
from jaxrl_llm.objective.bounds import bound
from jaxrl_llm.objective.outcome import Completion, Group, Outcome, Tokens, of_groups_that_count, own_rewards, scores
from jaxrl_llm.objective.statistics import (
    batch_centred,
    batch_deviation,
    centred,
    deviation,
    others,
    ratio,
    total,
    whiten,
)


class Estimate(NamedTuple):
    advantage: Completion
    returns: Completion | None = None
    """What a critic is to predict."""


def estimate(cfg: AdvantageConfig, outcome: Outcome) -> Estimate:
    """Advantages of the tokens in `mask` of the groups that count, 0 elsewhere.

    Raises AdvantageError where float32 does not hold what is read or found, or an advantage is above the `bound` of its formula.
    """
    outcome = of_groups_that_count(outcome)
    _check_float32(cfg, outcome, {name: read(outcome) for name, (read, _) in READ.items()})
    within = lambda x: None if x is None else np.where(outcome.mask, x, 0.0)  # noqa: E731
    # What is too large is named by the checks, and is no warning.
    with np.errstate(over="ignore", invalid="ignore"):
        found = Estimate(*map(within, ESTIMATORS[type(cfg)](outcome, cfg)))
        _check_bound(cfg, outcome, found.advantage)
        if outcome.late_reward is not None:
            late = within(_to_go(outcome.late_reward, outcome.mask, 1.0))
            found = found._replace(advantage=found.advantage + late)
    _check_float32(cfg, outcome, {"advantages": found.advantage, "returns": found.returns})
    return found


LOWER_REWARDS = "bound what the graders return, or lower their reward.graders.weight"
LOWER_KL = "k1 and k2 of objective.reward_kl.kind stay smaller than k3; or lower its weight"
READ = {
    "rewards": (lambda o: o.reward.reshape(-1, 1), LOWER_REWARDS),
    "rewards per token": (lambda o: o.token_reward, LOWER_KL),
    "late rewards per token": (lambda o: o.late_reward, LOWER_KL),
    "values of the critic": (lambda o: o.values, "the critic has diverged: lower its learning rate"),
}
"""What must be a number that float32 holds, and what to do where it is not."""


def _check_float32(cfg: AdvantageConfig, outcome: Outcome, columns: dict[str, np.ndarray | None]) -> None:
    most = np.finfo(np.float32).max
    for name, x in columns.items():
        # Most often all are small, those that no token of `mask` has among them.
        if x is None or np.abs(x).max(initial=0.0) <= most:
            continue
        largest = np.abs(np.where(outcome.mask, x, 0.0)).max(initial=0.0)
        if not largest <= most:
            todo = READ[name][1] if name in READ else f"rewards reach {np.abs(outcome.reward).max():g}; {LOWER_REWARDS}"
            raise AdvantageError(
                f"objective.advantage.kind {cfg.kind}: got {name} of {largest:g}, want at most {most:g}, the largest that "
                f"float32 holds: {todo}"
            )


def _check_bound(cfg: AdvantageConfig, outcome: Outcome, advantage: Completion) -> None:
    largest, most = np.abs(advantage).max(initial=0.0), bound(cfg, outcome)
    # Roundings in float64 are far below this, and float32 hardly tells it.
    if largest > most * (1 + 1e-7):
        raise AdvantageError(
            f"objective.advantage.kind {cfg.kind}: got an advantage of {largest:g}, want at most {most:g}, the most that its "
            "formula gives for these rewards: this is a bug of the estimator, please report it; another kind avoids it"
        )


def reward_kl(logprobs: Completion, reference: Completion, mask: Tokens, cfg: RewardKl) -> Completion:
    """Minus weight * the estimate of KL(policy that sampled || reference) at each token (Schulman 2020)."""
    # What is infinite is named by `estimate`.
    with np.errstate(over="ignore", invalid="ignore"):
        return -cfg.weight * KL[cfg.kind](np.where(mask, logprobs.astype(np.float64) - reference, 0.0))


# e^-d - 1 + d is never below 0, but its roundings are.
KL = {"k1": lambda d: d, "k2": lambda d: d**2 / 2, "k3": lambda d: np.maximum(np.expm1(-d) + d, 0.0)}


def _rows(x: Group, outcome: Outcome) -> tuple[Completion, Tokens]:
    """As one token per sequence, and which of these count."""
    return x.reshape(-1, 1), np.repeat(outcome.counts, x.shape[1])[:, None]


def _each(advantage: Group, outcome: Outcome) -> Estimate:
    return Estimate(np.broadcast_to(advantage.reshape(-1, 1), outcome.mask.shape))


def grpo(outcome: Outcome, cfg: Grpo) -> Estimate:
    score, ddof = scores(outcome), int(cfg.std == "sample")
    rows, kept = _rows(score, outcome)
    several = np.count_nonzero(kept) > 1
    away, std = centred(score), deviation(score, ddof)
    if cfg.mean_over == "batch" and several:
        away = batch_centred(rows, kept).reshape(score.shape)
    if cfg.std_over == "batch" and several:
        std = batch_deviation(rows, kept, ddof)
    return _each(ratio(away, std + cfg.eps), outcome)


def mean_only(outcome: Outcome, cfg: MeanOnly) -> Estimate:
    """E[gradient] is (1 - 1/G) of the true one, since the mean holds the sample itself."""
    return _each(centred(scores(outcome)), outcome)


def _about_others(score: Group) -> Group:
    """r - mean of the G - 1 others, which is G / (G - 1) times what it is about the mean of all."""
    return centred(score) * (score.shape[1] / (score.shape[1] - 1))


def rloo(outcome: Outcome, cfg: Rloo) -> Estimate:
    """Unbiased."""
    advantage = _about_others(scores(outcome))
    if cfg.whiten:
        advantage = whiten(*_rows(advantage, outcome), 1, 0.0, 1e-4)
    return _each(advantage, outcome)


def leave_one_out(outcome: Outcome, cfg: LeaveOneOut) -> Estimate:
    """The others' std has G - 2; with G = 2 nothing is scaled."""
    score = scores(outcome)
    std = deviation(others(score), 1)[..., 0]
    return _each(_about_others(score) / np.where(std > 0, std + cfg.eps, 1.0), outcome)


def max_rl(outcome: Outcome, cfg: MaxRl) -> Estimate:
    score = scores(outcome)
    mean = total(score) / score.shape[1]
    return _each(np.where(mean > 0, ratio(centred(score), mean + cfg.eps), 0.0), outcome)


def pass_at_k(outcome: Outcome, cfg: PassAtK) -> Estimate:
    score = scores(outcome)
    ranked = np.sort(score, axis=1)
    ahead = ranked[:, -1] - ranked[:, -2]
    advantage = np.zeros_like(score)
    advantage[np.arange(len(score)), score.argmax(axis=1)] = ahead
    return _each(ratio(advantage, deviation(score, 1) + cfg.eps) if cfg.scale else advantage, outcome)


def opo(outcome: Outcome, cfg: Opo) -> Estimate:
    score = scores(outcome)
    length = outcome.mask.sum(axis=1).reshape(score.shape)
    above = score - score.min(axis=1, keepdims=True)
    return _each(above - ratio(total(length * above), total(length)), outcome)


def gpg(outcome: Outcome, cfg: Gpg) -> Estimate:
    score = scores(outcome)
    kept = score[outcome.counts]
    return _each(centred(score) * (kept.size / max(np.count_nonzero(kept), 1)), outcome)


def gdpo(outcome: Outcome, cfg: Gdpo) -> Estimate:
    """Whitened with (A - mean) / (std + eps), std with n - 1."""
    summed = centred(own_rewards(outcome))
    for weight, part in zip(outcome.part_weights, np.moveaxis(outcome.parts, -1, 0), strict=True):
        summed += weight * ratio(centred(part), deviation(part, 1) + cfg.eps)
    return _each(whiten(*_rows(summed, outcome), 1, 0.0, cfg.eps), outcome)


def raw(outcome: Outcome, cfg: Raw) -> Estimate:
    return _each(scores(outcome), outcome)


def best_worst(outcome: Outcome, cfg: BestWorst) -> Estimate:
    """0 throughout a group of equal rewards."""
    score = scores(outcome)
    advantage, rows = np.zeros_like(score), np.flatnonzero(np.ptp(score, axis=1) > 0)
    advantage[rows, score.argmax(axis=1)[rows]] = 1
    advantage[rows, score.argmin(axis=1)[rows]] = -1
    return _each(advantage, outcome)


def reinforce_pp(outcome: Outcome, cfg: ReinforcePlusPlus) -> Estimate:
    if cfg.baseline:
        returns = _each(centred(scores(outcome)), outcome).advantage
    else:
        # verl: what is between two drawn tokens passes credit on.
        returns = _to_go(token_rewards(outcome), outcome.mask, cfg.gamma)
    ddof = int(cfg.variance == "sample")
    if cfg.eps_beside == "std":
        return Estimate(whiten(returns, outcome.mask, ddof, 0.0, cfg.eps))
    return Estimate(whiten(returns, outcome.mask, ddof, cfg.eps))


def gae(outcome: Outcome, cfg: Gae) -> Estimate:
    """delta_t = r_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lam A_{t+1}. Tokens that were not drawn are passed over."""
    reward, mask, values = token_rewards(outcome), outcome.mask, outcome.values.astype(np.float64)
    advantage = np.zeros_like(reward)
    after, value = np.zeros(len(reward)), np.zeros(len(reward))
    for t in reversed(range(reward.shape[1])):
        delta = reward[:, t] + cfg.gamma * value - values[:, t]
        now = delta + cfg.gamma * cfg.lam * after
        after, value = np.where(mask[:, t], now, after), np.where(mask[:, t], values[:, t], value)
        advantage[:, t] = after
    returns = advantage + values
    return Estimate(whiten(advantage, mask) if cfg.whiten else advantage, returns)


def token_rewards(outcome: Outcome) -> Completion:
    """The tokens' own rewards, the sequence's at the last token that was drawn."""
    mask = outcome.mask
    last: Int[np.ndarray, " B"] = mask.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)
    rewards = np.where(mask, outcome.token_reward, 0.0).astype(np.float64)
    rewards[np.arange(len(last)), last] += np.where(mask.any(axis=1), outcome.reward.reshape(-1), 0.0)
    return rewards


def _to_go(rewards: Completion, mask: Tokens, gamma: float) -> Completion:
    returns, after = np.zeros_like(rewards), np.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        after = np.where(mask[:, t], rewards[:, t] + gamma * after, after)
        returns[:, t] = after
    return returns


ESTIMATORS = {
    Grpo: grpo,
    MeanOnly: mean_only,
    Rloo: rloo,
    LeaveOneOut: leave_one_out,
    MaxRl: max_rl,
    PassAtK: pass_at_k,
    Opo: opo,
    Gpg: gpg,
    Gdpo: gdpo,
    Raw: raw,
    BestWorst: best_worst,
    ReinforcePlusPlus: reinforce_pp,
    Gae: gae,
}
