"""Losses of tokens: one function per published part, model-free. Each returns a term a token; `Batch.weight` makes the mean.

    r = p / p_anchor, the anchor the policy as it sampled (behavior) or the trainer's before the first update (proximal)
    term = w * surrogate(r, A) + KL - entropy,   w the correction p_proximal / p_behavior, bounded or masked, without a gradient

`make_loss` puts together what an objective asks for; `as_loss` takes a function of your own.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.distribution.loss import Loss, Mask, Terms, Tokens
from jaxrl_llm.distribution.score import TokenScores
from jaxrl_llm.errors import UserError
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.loss_config import (
    Correction,
    CriticLoss,
    CrossEntropy,
    Distillation,
    Dpo,
    KlConfig,
    NoCorrection,
    OwnLoss,
    PolicyGradient,
    SecondMoment,
    TruncatedImportance,
    anchored_on_proximal,
    scores_proximal,
)
from jaxrl_llm.objective.surrogates import SURROGATES, log_ratio, sum_by, within
from jaxrl_llm.types import ArrayLike, Batch, Groups, OwnColumn, Scores

UNCORRECTED = NoCorrection()


class Weighed(NamedTuple):
    """A correction's weight a token, and where it is bounded or masked."""

    weight: Tokens
    held: Mask


def weighed(mismatch: Tokens, batch: Batch, correction: Correction) -> Weighed:
    """From mismatch = log p_proximal - log p_behavior; without a gradient."""
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
    return Terms(loss, means, maxima)


def mismatch_means(mismatch: Tokens) -> dict[str, Tokens]:
    """Of mismatch = log p - log p_behavior, under the same parameters: the k3 estimate of KL(sampler || trainer), and its size."""
    return {"mismatch/kl": k3(-mismatch), "mismatch/mean_abs_dlogp": jnp.abs(mismatch)}


def cross_entropy_terms(scores: TokenScores, batch: Batch) -> Terms:
    """-log p(token). Nothing was sampled, so nothing is corrected."""
    return Terms(-scores.logprobs, {"entropy": scores.entropy})


def dpo_terms(scores: TokenScores, batch: Batch, cfg: Dpo) -> Terms:
    """-log sigmoid(beta (m_best - m_worst)) at every token of a pair, m the sum over a sequence of log p - log p_ref.

    Advantages of 1 and -1 mark the two. Source: Rafailov et al. 2023 (DPO), eq. 7.
    """
    own = within(batch.loss_mask, scores.logprobs - batch.reference_logprobs)
    margin = sum_by(batch.group, jnp.sign(batch.advantage) * own)
    pairs = {"dpo/margin": margin, "dpo/accuracy": margin > 0}
    loss = -jax.nn.log_sigmoid(cfg.beta * margin)
    means, maxima = _beside_sampler(scores, batch)
    return Terms(loss, means, maxima, pairs)


def distillation_terms(scores: TokenScores, batch: Batch) -> Terms:
    """Exact KL(policy || teacher). Source: Agarwal et al. 2024 (GKD) with the reverse KL, on the policy's own samples."""
    means, maxima = _beside_sampler(scores, batch)
    return Terms(scores.kl, means | {"kl": scores.kl}, maxima)


def _beside_sampler(scores: TokenScores, batch: Batch) -> tuple[dict[str, Tokens], dict[str, Tokens]]:
    """Means and maxima where the loss reads no ratio: how far the policy is from the one that sampled."""
    away = within(batch.loss_mask, jax.lax.stop_gradient(scores.logprobs) - batch.behavior_logprobs)
    ratio = jnp.exp(away)
    maxima = {"ratio/max": ratio, "ratio/-min": -ratio, "mismatch/max_abs_dlogp": jnp.abs(away)}
    return {"entropy": scores.entropy} | mismatch_means(away), maxima


CROSS_ENTROPY = Loss(cross_entropy_terms)
"""Of supervised training."""


def make_loss(
    objective: ObjectiveConfig, correction: Correction = UNCORRECTED, max_new_tokens: int = 1, updates: int = 1
) -> Loss:
    """The loss that an objective asks for.

    Args:
      objective: its loss, and whether a critic is trained beside it.
      correction: of the sampler's arithmetic, `auto` resolved.
      max_new_tokens: the length of the aggregation `constant` where the config says none.
      updates: on each batch; where there is one, the update scores the proximal policy itself.
    """
    cfg = objective.loss
    if isinstance(cfg, CrossEntropy):
        return CROSS_ENTROPY
    if isinstance(cfg, Dpo):
        return Loss(partial(dpo_terms, cfg=cfg), "sequence", columns=("reference_logprobs",))
    if isinstance(cfg, Distillation):
        return Loss(distillation_terms)
    if isinstance(cfg, OwnLoss):
        return as_loss(
            cfg.traced("objective.loss"), cfg.aggregation, cfg.length or max_new_tokens, cfg.columns, cfg.columns_made()
        )
    columns = ("reference_logprobs",) * cfg.reads_reference_logprobs
    columns += ("proximal_logprobs",) * scores_proximal(cfg, correction, updates)
    columns += ("values", "returns") * objective.has_critic
    drops = isinstance(correction, SecondMoment)
    return Loss(
        partial(policy_terms, cfg=cfg, correction=correction),
        cfg.aggregation,
        cfg.length or max_new_tokens,
        columns,
        keep=partial(second_moment_mask, threshold=correction.threshold) if drops else None,
    )


def as_loss(
    function: Callable[[TokenScores, Batch], Tokens | Terms],
    aggregation: str = "token",
    length: int = 1,
    columns: tuple[str, ...] = (),
    own: Sequence[OwnColumn | Callable[[Groups, Scores], ArrayLike]] = (),
) -> Loss:
    """A loss of your own. `ratio/*`, `mismatch/*` and `entropy` are measured for it, unless its own `Terms` name them.

    Args:
      function: of the scores and the batch, to one term per token [R T], inside the loss mask and out, or to `Terms`.
      aggregation: what the terms are averaged over, by counts over the whole minibatch: as `objective.loss.aggregation`.
      length: of the aggregation `constant`.
      columns: of `Batch`, those that it reads beside the ones that are always there.
      own: columns that it brings along; of a function `f` one is called as it is, `batch.own["f"]`.
    """

    def terms(scores: TokenScores, batch: Batch) -> Terms:
        found = function(scores, batch)
        found = found if isinstance(found, Terms) else Terms(found)
        if jnp.shape(found.loss) != batch.tokens.shape:
            raise UserError(
                f"the loss {getattr(function, '__name__', function)}: got terms of shape {list(jnp.shape(found.loss))}, want "
                f"one term per token, {list(batch.tokens.shape)}: the mean is taken for you"
            )
        means, maxima = _beside_sampler(scores, batch)
        return found._replace(means=means | found.means, maxima=maxima | found.maxima)

    brought = tuple(c if isinstance(c, OwnColumn) else OwnColumn(c.__name__, c) for c in own)
    return Loss(terms, aggregation, length, columns, brought)


def with_own(scores: Scores, groups: Groups, columns: Sequence[OwnColumn]) -> Scores:
    """The scores with the columns that a loss brings along. Raises UserError for one that is not [B C]."""
    made, shape = {}, groups.rollouts.tokens.shape
    for column in columns:
        found = np.asarray(column.make(groups, scores))
        if found.shape != shape:
            raise UserError(
                f"the column {column.name} of the loss: got {found.dtype}{list(found.shape)}, want one number per token of the "
                f"completions, {list(shape)}"
            )
        made[column.name] = found.astype(column.dtype)
    return scores.replace(own=made)
