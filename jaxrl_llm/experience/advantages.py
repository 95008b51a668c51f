"""What each token's action was worth: one function per published estimator, in float64 over whole groups.

A sequence's reward is the graders' plus the sum of its tokens' own, which are minus weight * KL where `objective.reward_kl` asks
for it. Most estimators give all tokens of a sequence the same advantage. A group of equal rewards gets exactly 0 from those with a
baseline: subtracting its first reward before the mean makes the differences exact.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxrl_llm.experience.config import (
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
    """The groups that are learnt from; the others' numbers may be NaN and get advantage 0."""
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


def estimate(cfg: AdvantageConfig, outcome: Outcome) -> Estimate:
    """Advantages of the tokens in `mask` of the groups that count; 0 elsewhere."""
    counted = outcome.counts[:, None]
    clean = outcome._replace(
        reward=np.where(counted, outcome.reward, 0.0).astype(np.float64),
        parts=np.where(counted[..., None], outcome.parts, 0.0).astype(np.float64),
        mask=outcome.mask & np.repeat(outcome.counts, outcome.reward.shape[1])[:, None],
    )
    found = ESTIMATORS[type(cfg)](clean, cfg)
    if outcome.late_reward is not None:
        found = found._replace(advantage=found.advantage + _to_go(outcome.late_reward, clean.mask, 1.0))
    within = lambda x: None if x is None else np.where(clean.mask, x, 0.0)  # noqa: E731
    return Estimate(within(found.advantage), within(found.returns))


def reward_kl(logprobs: Completion, reference: Completion, mask: Tokens, cfg: RewardKl) -> Completion:
    """Minus weight * the estimate of KL(policy that sampled || reference) at each token (Schulman 2020)."""
    d = np.where(mask, logprobs.astype(np.float64) - reference, 0.0)
    return -cfg.weight * {"k1": d, "k2": d**2 / 2, "k3": np.expm1(-d) + d}[cfg.kind]


def scores(outcome: Outcome) -> Group:
    """Rewards of whole sequences."""
    own = np.where(outcome.mask, outcome.token_reward, 0.0).sum(axis=1)
    return outcome.reward + own.reshape(outcome.reward.shape)


def centred(score: Group) -> Group:
    """r - mean of the group."""
    shifted = score - score[:, :1]
    return shifted - shifted.mean(axis=1, keepdims=True)


def about_mean(x: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """x - mean of `kept`: exact zeros where all are equal."""
    if not kept.size:
        return x
    first = kept.flat[0]
    return x - first - (kept - first).mean()


def _each(advantage: Group, outcome: Outcome) -> Estimate:
    return Estimate(np.broadcast_to(advantage.reshape(-1, 1), outcome.mask.shape))


def grpo(outcome: Outcome, cfg: Grpo) -> Estimate:
    score, ddof = scores(outcome), int(cfg.std == "sample")
    kept = score[outcome.counts]
    away = centred(score) if cfg.mean_over == "group" else about_mean(score, kept)
    if cfg.std_over == "group":
        std = centred(score).std(axis=1, ddof=ddof, keepdims=True)
    else:
        std = np.full((len(score), 1), kept.std(ddof=ddof) if kept.size > ddof else 0.0)
    return _each(_ratio(away, std + cfg.eps), outcome)


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """top / bottom, 0 where bottom is 0."""
    return np.divide(top, bottom, out=np.zeros(np.broadcast_shapes(top.shape, bottom.shape)), where=bottom != 0)


def mean_only(outcome: Outcome, cfg: MeanOnly) -> Estimate:
    """E[gradient] is (1 - 1/G) of the true one, since the mean holds the sample itself."""
    return _each(centred(scores(outcome)), outcome)


def rloo(outcome: Outcome, cfg: Rloo) -> Estimate:
    """G/(G-1) times the centred reward; unbiased."""
    score = scores(outcome)
    advantage = centred(score) * (score.shape[1] / (score.shape[1] - 1))
    if cfg.whiten:
        kept = advantage[outcome.counts]
        advantage = (advantage - kept.mean()) / (kept.std(ddof=1) + 1e-4)
    return _each(advantage, outcome)


def leave_one_out(outcome: Outcome, cfg: LeaveOneOut) -> Estimate:
    """The others' std has G - 2; with G = 2 nothing is scaled."""
    score = scores(outcome)
    n = score.shape[1] - 1
    away = centred(score) * ((n + 1) / n)
    # Of the others, about the group's first reward: exact zeros for equal ones.
    shifted = score - score[:, :1]
    mean = (shifted.sum(axis=1, keepdims=True) - shifted) / n
    square = ((shifted**2).sum(axis=1, keepdims=True) - shifted**2) / n
    variance = np.maximum(square - mean**2, 0.0) * (n / max(n - 1, 1))
    std = np.sqrt(variance) if n > 1 else np.zeros_like(score)
    return _each(np.where(std > 0, away / (std + cfg.eps), away), outcome)


def max_rl(outcome: Outcome, cfg: MaxRl) -> Estimate:
    score = scores(outcome)
    mean = score.mean(axis=1, keepdims=True)
    return _each(np.where(mean > 0, _ratio(centred(score), mean + cfg.eps), 0.0), outcome)


def pass_at_k(outcome: Outcome, cfg: PassAtK) -> Estimate:
    score = scores(outcome)
    ranked = np.sort(score, axis=1)
    ahead = ranked[:, -1] - ranked[:, -2]
    advantage = np.zeros_like(score)
    advantage[np.arange(len(score)), score.argmax(axis=1)] = ahead
    std = centred(score).std(axis=1, ddof=1, keepdims=True)
    return _each(advantage / (std + cfg.eps) if cfg.scale else advantage, outcome)


def opo(outcome: Outcome, cfg: Opo) -> Estimate:
    score = scores(outcome)
    length = outcome.mask.sum(axis=1).reshape(score.shape)
    away = score - score[:, :1]
    return _each(away - _ratio((length * away).sum(axis=1, keepdims=True), length.sum(axis=1, keepdims=True)), outcome)


def gpg(outcome: Outcome, cfg: Gpg) -> Estimate:
    score = scores(outcome)
    kept = score[outcome.counts]
    return _each(centred(score) * (kept.size / max(np.count_nonzero(kept), 1)), outcome)


def gdpo(outcome: Outcome, cfg: Gdpo) -> Estimate:
    """Whitened with (A - mean) / (std + eps), std with n - 1."""
    own = (outcome.token_reward * outcome.mask).sum(axis=1).reshape(outcome.reward.shape)
    total = np.zeros_like(outcome.reward)
    for weight, part in zip(outcome.part_weights, np.moveaxis(outcome.parts, -1, 0), strict=True):
        away = centred(part)
        total += weight * away / (away.std(axis=1, ddof=1, keepdims=True) + cfg.eps)
    total += centred(own)
    kept = total[outcome.counts]
    if kept.size < 2:
        return _each(total, outcome)
    return _each((total - kept.mean()) / (kept.std(ddof=1) + cfg.eps), outcome)


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


def whiten(x: Completion, mask: Tokens, ddof: int = 1, eps: float = 1e-8, beside_std: float = 0.0) -> Completion:
    """(x - mean) / (sqrt(var + eps) + beside_std) over the tokens in `mask`; of fewer than two, x itself."""
    kept = x[mask]
    if kept.size < 2:
        return x
    return about_mean(x, kept) / (np.sqrt(kept.var(ddof=ddof) + eps) + beside_std)


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
