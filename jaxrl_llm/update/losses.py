"""Losses of tokens: one function per published part, model-free. Each returns a term a token; `Batch.weight` makes the mean.

    r = p / p_anchor, the anchor the policy as it sampled (behaviour) or the trainer's before the first update (proximal)
    term = w * surrogate(r, A) + KL - entropy,   w the correction p_proximal / p_behaviour, bounded or masked, without a gradient

A term of a whole sequence stands at each of its tokens: the aggregation `sequence` then takes its mean over sequences.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.model.distribution import TokenScores
from jaxrl_llm.types import Batch
from jaxrl_llm.update.config import (
    Cispo,
    Clip,
    Correction,
    CriticLoss,
    CrossEntropy,
    Distillation,
    Dpo,
    Dppo,
    Gmpo,
    Ipo,
    KlConfig,
    NoCorrection,
    PolicyGradient,
    Reinforce,
    Sapo,
    SecondMoment,
    TruncatedImportance,
)

Tokens = Float[Array, "R T"]
Mask = Bool[Array, "R T"]


class Terms(NamedTuple):
    """What a loss says of each token, inside the loss mask and out; sums come later, by global counts."""

    loss: Tokens
    means: dict[str, Tokens]
    """Named values to average over the tokens of the loss mask."""
    maxima: dict[str, Tokens]
    """Named values whose maximum over the loss mask is wanted; a minimum is the maximum of the negative."""
    weighted: dict[str, Tokens]
    """Named values to add up with the weights of the loss, which make a mean over sequences of what is one number for each."""


class Held(NamedTuple):
    """A surrogate's terms, and where a bound holds the token: no gradient."""

    loss: Tokens
    low: Mask
    high: Mask


def within(mask: Mask, x: Tokens) -> Tokens:
    """0 outside the mask. Differences mean nothing there and may overflow; taken before exp this keeps them out of the gradient."""
    return jnp.where(mask, x, 0.0)


def sum_by(ids: Int[Array, "R T"], x: Tokens) -> Tokens:
    """At each token the sum of x over the tokens of its row with its id."""
    slots = x.shape[1]
    return jax.vmap(lambda x, ids: jax.ops.segment_sum(x, ids, num_segments=slots + 1)[ids])(x, ids)


def mean_by(ids: Int[Array, "R T"], mask: Mask, x: Tokens) -> Tokens:
    """At each token the mean of x over the tokens in `mask` of its row with its id."""
    return sum_by(ids, within(mask, x)) / jnp.maximum(sum_by(ids, mask.astype(x.dtype)), 1)


def log_ratio(logprobs: Tokens, anchor: Tokens, batch: Batch, level: str) -> Tokens:
    """log r at each token.

    token: of itself. sequence: mean over its sequence (Zheng et al. 2025, GSPO, eq. 7). sequence_token: the value of that, each
    token with its own gradient (eq. 14). product: sum over its sequence (Ahmadian et al. 2024).
    """
    mask, own = batch.loss_mask, within(batch.loss_mask, logprobs - anchor)
    if level == "token":
        return own
    if level == "product":
        return sum_by(batch.segment, own)
    mean = mean_by(batch.segment, mask, own)
    if level == "sequence":
        return mean
    return jax.lax.stop_gradient(mean) + within(mask, logprobs - jax.lax.stop_gradient(logprobs))


def clip(logprobs: Tokens, log_r: Tokens, advantage: Tokens, batch: Batch, cfg: Clip) -> Held:
    """-min(r A, clip(r, 1 - low, 1 + high) A); with `dual` at most -dual A where A < 0.

    Source: Schulman et al. 2017 (PPO), eq. 7; separate bounds: Yu et al. 2025 (DAPO), eq. 10; dual: Ye et al. 2020, eq. 5.
    """
    ratio = jnp.exp(log_r)
    bounded = jnp.clip(ratio, 1 - cfg.low, 1 + cfg.high)
    loss = -jnp.minimum(ratio * advantage, bounded * advantage)
    low, high = (ratio < 1 - cfg.low) & (advantage < 0), (ratio > 1 + cfg.high) & (advantage > 0)
    if cfg.dual is not None:
        loss = jnp.where(advantage < 0, jnp.minimum(loss, -cfg.dual * advantage), loss)
        high = high | ((ratio > cfg.dual) & (advantage < 0))
    return Held(loss, low, high)


def cispo(logprobs: Tokens, log_r: Tokens, advantage: Tokens, batch: Batch, cfg: Cispo) -> Held:
    """-sg(clip(r, low, high)) A log p: every token keeps a gradient. Source: MiniMax-M1 2025, eq. 4."""
    ratio = jax.lax.stop_gradient(jnp.exp(log_r))
    loss = -jnp.clip(ratio, cfg.low, cfg.high) * advantage * logprobs
    return Held(loss, ratio < cfg.low, ratio > cfg.high)


def gmpo(logprobs: Tokens, log_r: Tokens, advantage: Tokens, batch: Batch, cfg: Gmpo) -> Held:
    """-mean(A) exp(mean over the sequence of x'), x' = sgn(A) min(sgn(A) x, sgn(A) clip(x, -low, high)), x = log r.

    Source: Zhao et al. 2025 (GMPO), eq. 4.
    """
    sign = jnp.sign(advantage)
    bounded = sign * jnp.minimum(sign * log_r, sign * jnp.clip(log_r, -cfg.low, cfg.high))
    ratio = jnp.exp(mean_by(batch.segment, batch.loss_mask, bounded))
    loss = -mean_by(batch.segment, batch.loss_mask, advantage) * ratio
    return Held(loss, (log_r < -cfg.low) & (advantage < 0), (log_r > cfg.high) & (advantage > 0))


def sapo(logprobs: Tokens, log_r: Tokens, advantage: Tokens, batch: Batch, cfg: Sapo) -> Held:
    """-A sigmoid(tau (r - 1)) 4 / tau: a soft gate, of slope 1 at r = 1. Source: Gao et al. 2025 (SAPO)."""
    tau = jnp.where(advantage > 0, cfg.positive, cfg.negative)
    loss = -advantage * jax.nn.sigmoid(tau * (jnp.exp(log_r) - 1)) * 4 / tau
    nothing = jnp.zeros_like(batch.loss_mask)
    return Held(loss, nothing, nothing)


def dppo(logprobs: Tokens, log_r: Tokens, advantage: Tokens, batch: Batch, cfg: Dppo) -> Held:
    """A token is dropped where it has moved beyond `high` up with A > 0, or beyond `low` down with A <= 0.

    tv: by p - p_old. kl: by KL of the two-way distributions (p_old, 1 - p_old) and (p, 1 - p), with the sign of p - p_old.
    Source: DPPO (arXiv 2602.04879); forms: SkyRL and prime-rl until August 2026, verl.
    """
    new = jax.lax.stop_gradient(jnp.exp(logprobs))
    old = jax.lax.stop_gradient(jnp.exp(logprobs - log_r))
    moved = new - old
    if cfg.divergence == "kl":
        tiny = jnp.finfo(new.dtype).tiny
        other = lambda p: jnp.maximum(1 - p, tiny)  # noqa: E731
        divergence = -old * log_r + other(old) * (jnp.log(other(old)) - jnp.log(other(new)))
        moved = jnp.sign(moved) * jax.lax.stop_gradient(jnp.maximum(divergence, 0))
    low, high = (moved < -cfg.low) & (advantage <= 0), (moved > cfg.high) & (advantage > 0)
    ratio = jnp.exp(log_r)
    if cfg.form == "ratio":
        term = ratio
    else:
        term = jax.lax.stop_gradient(jnp.minimum(ratio, cfg.cap)) * logprobs
    return Held(jnp.where(low | high, 0.0, -advantage * term), low, high)


def ipo(logprobs: Tokens, log_r: Tokens, advantage: Tokens, batch: Batch, cfg: Ipo) -> Held:
    """-A r where |p - p_old| <= eps, else 0, whatever the sign of A. Source: prime-rl's `ipo_loss_fn`."""
    moved = jax.lax.stop_gradient(jnp.exp(logprobs) - jnp.exp(logprobs - log_r))
    low, high = moved < -cfg.eps, moved > cfg.eps
    return Held(jnp.where(low | high, 0.0, -advantage * jnp.exp(log_r)), low, high)


def reinforce(logprobs: Tokens, log_r: Tokens, advantage: Tokens, batch: Batch, cfg: Reinforce) -> Held:
    """-A log p."""
    nothing = jnp.zeros_like(batch.loss_mask)
    return Held(-advantage * logprobs, nothing, nothing)


SURROGATES = {Clip: clip, Cispo: cispo, Gmpo: gmpo, Sapo: sapo, Dppo: dppo, Ipo: ipo, Reinforce: reinforce}


class Weighed(NamedTuple):
    """A correction's weight a token, and where it is bounded or masked."""

    weight: Tokens
    held: Mask


def weighed(mismatch: Tokens, batch: Batch, correction: Correction) -> Weighed:
    """From mismatch = log p_proximal - log p_behaviour; without a gradient."""
    mismatch = jax.lax.stop_gradient(mismatch)
    if isinstance(correction, NoCorrection | SecondMoment):
        return Weighed(jnp.ones_like(mismatch), jnp.zeros_like(batch.loss_mask))
    level = {"token": "token", "sequence": "product", "geometric": "sequence"}[correction.level]
    tested = jnp.exp(log_ratio(mismatch, jnp.zeros_like(mismatch), batch, level))
    if isinstance(correction, TruncatedImportance):
        held = (tested >= correction.cap) | (tested <= correction.floor)
        return Weighed(jnp.clip(tested, correction.floor, correction.cap), held)
    kept = (tested >= correction.low) & (tested <= correction.high)
    weight = {"level": tested, "token": jnp.exp(mismatch), "one": jnp.ones_like(tested)}[correction.weight]
    return Weighed(jnp.where(kept, weight, 0.0), ~kept)


def second_moment_mask(batch: Batch, threshold: float) -> Mask:
    """Tokens kept of a whole minibatch: those with the largest squared mismatch go, until the mean over the rest is at most
    `threshold` (M2PO)."""
    square = within(batch.loss_mask, batch.proximal_logprobs - batch.behavior_logprobs) ** 2
    order = jnp.sort(jnp.where(batch.loss_mask, square, jnp.inf).reshape(-1))
    # Ascending: a mean over the first n grows with n.
    sums = jnp.cumsum(jnp.where(jnp.isfinite(order), order, 0.0))
    fits = jnp.isfinite(order) & (sums <= threshold * jnp.arange(1, order.size + 1))
    largest = jnp.max(jnp.where(fits, order, -jnp.inf))
    return batch.loss_mask & (square <= largest)


def kl_estimate(difference: Tokens, factor: Tokens | float, cfg: KlConfig) -> Tokens:
    """factor * the estimate of KL(policy || other) from d = log p - log p_other.

    Source: Schulman 2020; k3 in a loss: Shao et al. 2024, eq. 4; the factor: Tang & Munos 2025.
    """
    d = difference if cfg.max_difference is None else jnp.clip(difference, -cfg.max_difference, cfg.max_difference)
    if cfg.kind == "k1":
        found = d
    elif cfg.kind == "k2":
        found = d**2 / 2
    else:
        found = k3(d)
    found = factor * found
    if cfg.max_value is not None:
        found = jnp.clip(found, -cfg.max_value, cfg.max_value)
    if cfg.kind == "k3_plus":
        square = d**2 / 2
        found = jax.lax.stop_gradient(found - square) + square
    return found


def kl_terms(scores: TokenScores, log_r: Tokens, batch: Batch, cfg: KlConfig) -> Tokens:
    if cfg.kind == "full":
        return scores.kl
    other = batch.reference_logprobs if cfg.to == "reference" else batch.behavior_logprobs
    score = within(batch.loss_mask, scores.logprobs - jax.lax.stop_gradient(scores.logprobs))
    factor = {"one": 1.0, "score": jnp.exp(score), "ratio": jnp.exp(log_r)}[cfg.times]
    return kl_estimate(within(batch.loss_mask, scores.logprobs - other), factor, cfg)


def k3(d: Tokens) -> Tokens:
    """e^-d - 1 + d: never negative, unbiased for the KL of d = log p - log q on samples of p (Schulman 2020).

    Near 0 by its series d^2 (1/2 - d/6 + d^2/24 - ...), whose bracket is positive: the difference itself rounds below 0 there, by
    as much as the processor's exp is off. At |d| = 0.25 the seven terms are good to 1e-9 of the value.
    """
    near = jnp.abs(d) < 0.25
    small = jnp.where(near, d, 0.0)
    series = 0.0
    for n in range(8, 1, -1):
        series = series * -small + 1 / math.factorial(n)
    return jnp.where(near, small * small * series, jnp.expm1(-jnp.where(near, 0.0, d)) + d)


def critic_terms(values: Tokens, batch: Batch, cfg: CriticLoss) -> Tokens:
    """1/2 max((v - R)^2, (v_clipped - R)^2). Source: Schulman et al. 2017's code; verl's 1/2."""
    loss = (values - batch.returns) ** 2
    if cfg.clip is not None:
        bounded = batch.values + jnp.clip(values - batch.values, -cfg.clip, cfg.clip)
        loss = jnp.maximum(loss, (bounded - batch.returns) ** 2)
    return loss / 2


def policy_terms(scores: TokenScores, batch: Batch, cfg: PolicyGradient, correction: Correction) -> Terms:
    """`objective.loss` of kind policy_gradient. Without `batch.proximal_logprobs` those of now stand in: in the first update on a
    batch they are the same."""
    mask, logprobs = batch.loss_mask, scores.logprobs
    now = jax.lax.stop_gradient(logprobs)
    proximal = now if batch.proximal_logprobs is None else batch.proximal_logprobs
    mismatch = within(mask, proximal - batch.behavior_logprobs)
    anchor = proximal if anchored_on_proximal(cfg, correction) else batch.behavior_logprobs
    own = log_ratio(logprobs, anchor, batch, "token")
    log_r = log_ratio(logprobs, anchor, batch, cfg.ratio)
    weight, held = weighed(mismatch, batch, correction)
    surrogate = SURROGATES[type(cfg.surrogate)](logprobs, log_r, batch.advantage, batch, cfg.surrogate)
    loss = weight * surrogate.loss
    ratio = jnp.exp(log_r)
    means = {"ratio/mean": ratio, "clip_ratio/low": surrogate.low, "clip_ratio/high": surrogate.high}
    means |= {"entropy": scores.entropy} | mismatch_means(mismatch)
    if not isinstance(correction, NoCorrection | SecondMoment):
        means |= {"mismatch/weight_mean": weight, "mismatch/truncated": held}
    if cfg.kl.weight > 0:
        means["kl"] = kl_terms(scores, own, batch, cfg.kl)
        loss = loss + cfg.kl.weight * means["kl"]
    if cfg.entropy > 0:
        loss = loss - cfg.entropy * scores.entropy
    if batch.returns is not None:
        means["critic/loss"] = critic_terms(scores.values, batch, cfg.critic)
        means |= {"critic/value": scores.values, "critic/return": batch.returns}
        loss = loss + cfg.critic.weight * means["critic/loss"]
    maxima = {"ratio/max": ratio, "ratio/-min": -ratio, "mismatch/max_abs_dlogp": jnp.abs(mismatch)}
    return Terms(loss, means, maxima, {})


def mismatch_means(mismatch: Tokens) -> dict[str, Tokens]:
    """Of mismatch = log p - log p_behaviour, under the same parameters: the k3 estimate of KL(sampler || trainer), and its size."""
    return {"mismatch/kl": k3(-mismatch), "mismatch/mean_abs_dlogp": jnp.abs(mismatch)}


def anchored_on_proximal(cfg: PolicyGradient, correction: Correction) -> bool:
    if cfg.anchor == "auto":
        return not isinstance(correction, NoCorrection)
    return cfg.anchor == "proximal"


def cross_entropy_terms(scores: TokenScores, batch: Batch, cfg: CrossEntropy, correction: Correction) -> Terms:
    """-log p(token). Nothing was sampled, so nothing is corrected."""
    return Terms(-scores.logprobs, {"entropy": scores.entropy}, {}, {})


def dpo_terms(scores: TokenScores, batch: Batch, cfg: Dpo, correction: Correction) -> Terms:
    """-log sigmoid(beta (m_best - m_worst)) at every token of a pair, m the sum over a sequence of log p - log p_ref.

    Advantages of 1 and -1 mark the two. Source: Rafailov et al. 2023 (DPO), eq. 7.
    """
    own = within(batch.loss_mask, scores.logprobs - batch.reference_logprobs)
    margin = sum_by(batch.group, jnp.sign(batch.advantage) * own)
    pairs = {"dpo/margin": margin, "dpo/accuracy": margin > 0}
    loss = -jax.nn.log_sigmoid(cfg.beta * margin)
    means, maxima = _beside_sampler(scores, batch)
    return Terms(loss, means, maxima, pairs)


def distillation_terms(scores: TokenScores, batch: Batch, cfg: Distillation, correction: Correction) -> Terms:
    """Exact KL(policy || teacher). Source: Agarwal et al. 2024 (GKD) with the reverse KL, on the policy's own samples."""
    means, maxima = _beside_sampler(scores, batch)
    return Terms(scores.kl, means | {"kl": scores.kl}, maxima, {})


def _beside_sampler(scores: TokenScores, batch: Batch) -> tuple[dict[str, Tokens], dict[str, Tokens]]:
    """Means and maxima where the loss reads no ratio: how far the policy is from the one that sampled."""
    away = within(batch.loss_mask, jax.lax.stop_gradient(scores.logprobs) - batch.behavior_logprobs)
    ratio = jnp.exp(away)
    maxima = {"ratio/max": ratio, "ratio/-min": -ratio, "mismatch/max_abs_dlogp": jnp.abs(away)}
    return {"entropy": scores.entropy} | mismatch_means(away), maxima


TERMS = {
    PolicyGradient: policy_terms,
    CrossEntropy: cross_entropy_terms,
    Dpo: dpo_terms,
    Distillation: distillation_terms,
}
