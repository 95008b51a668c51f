"""Token losses: one model-free function per published part. Each returns one term per token; `Batch.weight` makes the mean.

    r = p / p_anchor, the anchor being the behavior policy (as sampled) or the proximal one (the trainer's before the first update)
    term = w * surrogate(r, A) + KL - entropy,   w = p_proximal / p_behavior, truncated or masked, without a gradient

`make_loss` builds the loss of an objective; `as_loss` wraps a custom function.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from jaxrl_llm.distribution.loss_terms import Loss, Mask, Terms, Tokens
from jaxrl_llm.distribution.score import TokenScores
from jaxrl_llm.errors import UserError
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.loss_config import (
    Aggregation,
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
from jaxrl_llm.objective.surrogates import SURROGATES, log_ratio, shaped, sum_by_id, zero_outside
from jaxrl_llm.types import ArrayLike, Batch, Groups, OwnColumn, Scores

UNCORRECTED = NoCorrection()
# Column of the tokens that `PolicyGradient.shaping` is for.
SHAPED = "shaped"
# Columns of a batch that are there if a loss reads them.
OPTIONAL = ("reference_logprobs", "proximal_logprobs", "values", "returns")


def shaped_tokens(groups: Groups, scores: Scores) -> Bool[np.ndarray, "B C"]:
    """Return the tokens of rows of an earlier step, or of a file, and those that the policy did not sample."""
    sampled = groups.rollouts.sampled
    reused = np.zeros_like(sampled) if groups.reused is None else sampled & groups.reused[:, None]
    return reused if groups.taught is None else reused | groups.taught


class ImportanceWeight(NamedTuple):
    """Importance weight per token, and where it is truncated or masked."""

    weight: Tokens
    truncated: Mask


def importance_weight(mismatch: Tokens, batch: Batch, correction: Correction) -> ImportanceWeight:
    """Return the weight from mismatch = log p_proximal - log p_behavior, without a gradient."""
    mismatch = jax.lax.stop_gradient(mismatch)
    if isinstance(correction, NoCorrection | SecondMoment):
        return ImportanceWeight(jnp.ones_like(mismatch), jnp.zeros_like(batch.loss_mask))
    level = {"token": "token", "sequence": "product", "geometric": "sequence"}[correction.level]
    tested = jnp.exp(log_ratio(mismatch, jnp.zeros_like(mismatch), batch, level))
    if isinstance(correction, TruncatedImportance):
        truncated = (tested >= correction.cap) | (tested <= correction.floor)
        return ImportanceWeight(jnp.clip(tested, correction.floor, correction.cap), truncated)
    kept = (tested >= correction.low) & (tested <= correction.high)
    weight = {"level": tested, "token": jnp.exp(mismatch), "one": jnp.ones_like(tested)}[correction.weight]
    return ImportanceWeight(jnp.where(kept, weight, 0.0), ~kept)


def second_moment_mask(batch: Batch, threshold: float) -> Mask:
    """Return the tokens of a whole minibatch to keep: those with the largest squared mismatch are dropped until the mean over the
    rest is at most `threshold` (M2PO)."""
    square = zero_outside(batch.loss_mask, batch.proximal_logprobs - batch.behavior_logprobs) ** 2
    order = jnp.sort(jnp.where(batch.loss_mask, square, jnp.inf).reshape(-1))
    # Ascending, so the mean over the first n increases with n.
    sums = jnp.cumsum(jnp.where(jnp.isfinite(order), order, 0.0))
    fits = jnp.isfinite(order) & (sums <= threshold * jnp.arange(1, order.size + 1))
    largest = jnp.max(jnp.where(fits, order, -jnp.inf))
    return batch.loss_mask & (square <= largest)


def kl_estimate(difference: Tokens, factor: Tokens | float, cfg: KlConfig) -> Tokens:
    """Return factor * the estimate of KL(policy || other) from d = log p - log p_other.

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
    """Return the KL term per token, before its weight. `log_r`: the token-level log-ratio, for `times: ratio`."""
    if cfg.kind == "full":
        return scores.kl
    other = batch.reference_logprobs if cfg.to == "reference" else batch.behavior_logprobs
    score = zero_outside(batch.loss_mask, scores.logprobs - jax.lax.stop_gradient(scores.logprobs))
    factor = {"one": 1.0, "score": jnp.exp(score), "ratio": jnp.exp(log_r)}[cfg.times]
    return kl_estimate(zero_outside(batch.loss_mask, scores.logprobs - other), factor, cfg)


def k3(d: Tokens) -> Tokens:
    """Return e^-d - 1 + d: never negative, unbiased for the KL of d = log p - log q on samples of p (Schulman 2020).

    Near 0 it uses the series d^2 (1/2 - d/6 + d^2/24 - ...), whose bracket is positive: the direct difference can round below 0 by
    the error of the processor's exp. At |d| = 0.25 the seven terms are accurate to 1e-9 relative.
    """
    near = jnp.abs(d) < 0.25
    small = jnp.where(near, d, 0.0)
    series = 0.0
    for n in range(8, 1, -1):
        series = series * -small + 1 / math.factorial(n)
    return jnp.where(near, small * small * series, jnp.expm1(-jnp.where(near, 0.0, d)) + d)


def critic_terms(values: Tokens, batch: Batch, cfg: CriticLoss) -> Tokens:
    """Return 1/2 max((v - R)^2, (v_clipped - R)^2). Source: Schulman et al. 2017's code; verl's 1/2."""
    loss = (values - batch.returns) ** 2
    if cfg.clip is not None:
        bounded = batch.values + jnp.clip(values - batch.values, -cfg.clip, cfg.clip)
        loss = jnp.maximum(loss, (bounded - batch.returns) ** 2)
    return loss / 2


def policy_terms(scores: TokenScores, batch: Batch, cfg: PolicyGradient, correction: Correction) -> Terms:
    """Return the terms of the loss policy_gradient.

    Args:
        scores: log-probs and entropies of the policy being trained.
        batch: without `proximal_logprobs` the current ones are used: they are equal in the first update on a batch.
        cfg: the loss.
        correction: of the sampler's mismatch, `auto` resolved.
    """
    mask, logprobs = batch.loss_mask, scores.logprobs
    now = jax.lax.stop_gradient(logprobs)
    proximal = now if batch.proximal_logprobs is None else batch.proximal_logprobs
    mismatch = zero_outside(mask, proximal - batch.behavior_logprobs)
    anchor = proximal if anchored_on_proximal(cfg, correction) else batch.behavior_logprobs
    own = log_ratio(logprobs, anchor, batch, "token")
    log_r = log_ratio(logprobs, anchor, batch, cfg.ratio)
    weight, truncated = importance_weight(mismatch, batch, correction)
    surrogate = SURROGATES[type(cfg.surrogate)](logprobs, log_r, batch.advantage, batch, cfg.surrogate)
    loss = weight * surrogate.loss
    if cfg.shaping is not None:
        reused = log_ratio(logprobs, batch.behavior_logprobs, batch, "token")
        loss = jnp.where(batch.own[SHAPED], shaped(reused, batch.advantage, cfg.shaping), loss)
    ratio = jnp.exp(log_r)
    means = {"ratio/mean": ratio, "clip_ratio/low": surrogate.low, "clip_ratio/high": surrogate.high}
    means |= {"entropy": scores.entropy} | mismatch_means(mismatch)
    if not isinstance(correction, NoCorrection | SecondMoment):
        means |= {"mismatch/weight_mean": weight, "mismatch/truncated": truncated}
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
    return Terms(loss, means, maxima, log_ratio=zero_outside(mask, now - batch.behavior_logprobs))


def mismatch_means(mismatch: Tokens) -> dict[str, Tokens]:
    """Return the k3 estimate of KL(sampler || trainer) and the mean |mismatch|, mismatch = log p - log p_behavior at equal
    parameters."""
    return {"mismatch/kl": k3(-mismatch), "mismatch/mean_abs_dlogp": jnp.abs(mismatch)}


def cross_entropy_terms(scores: TokenScores, batch: Batch) -> Terms:
    """Return -log p(token) per token; nothing was sampled, so nothing is corrected."""
    return Terms(-scores.logprobs, {"entropy": scores.entropy})


def dpo_terms(scores: TokenScores, batch: Batch, cfg: Dpo) -> Terms:
    """Return -log sigmoid(beta (m_best - m_worst)) at every token of a pair, m = sum over a sequence of log p - log p_ref.

    Advantages of 1 and -1 mark the best and the worst. Source: Rafailov et al. 2023 (DPO), eq. 7.
    """
    own = zero_outside(batch.loss_mask, scores.logprobs - batch.reference_logprobs)
    margin = sum_by_id(batch.group, jnp.sign(batch.advantage) * own)
    pairs = {"dpo/margin": margin, "dpo/accuracy": margin > 0}
    loss = -jax.nn.log_sigmoid(cfg.beta * margin)
    return _with_sampler_metrics(Terms(loss, weighted=pairs), scores, batch)


def distillation_terms(scores: TokenScores, batch: Batch) -> Terms:
    """Return the exact KL(policy || teacher) per token. Source: Agarwal et al. 2024 (GKD) with the reverse KL, on the policy's own
    samples."""
    return _with_sampler_metrics(Terms(scores.kl, {"kl": scores.kl}), scores, batch)


def _with_sampler_metrics(terms: Terms, scores: TokenScores, batch: Batch) -> Terms:
    """Return the terms with the distance to the behavior policy beside their own metrics, for losses without a ratio."""
    away = zero_outside(batch.loss_mask, jax.lax.stop_gradient(scores.logprobs) - batch.behavior_logprobs)
    ratio = jnp.exp(away)
    maxima = {"ratio/max": ratio, "ratio/-min": -ratio, "mismatch/max_abs_dlogp": jnp.abs(away)}
    means = {"entropy": scores.entropy} | mismatch_means(away)
    return terms._replace(means=means | terms.means, maxima=maxima | terms.maxima, log_ratio=away)


CROSS_ENTROPY = Loss(cross_entropy_terms)
"""The loss of supervised training."""


def make_loss(
    objective: ObjectiveConfig, correction: Correction = UNCORRECTED, max_new_tokens: int = 1, updates: int = 1
) -> Loss:
    """Return the loss of an objective.

    Args:
        objective: gives the loss and whether a critic is trained with it.
        correction: of the sampler's mismatch, `auto` resolved.
        max_new_tokens: default `length` of the aggregation `constant`.
        updates: number per batch; with one, the update itself scores the proximal policy.
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
        () if cfg.shaping is None else (OwnColumn(SHAPED, shaped_tokens, np.bool_),),
        keep=partial(second_moment_mask, threshold=correction.threshold) if drops else None,
    )


def as_loss(
    function: Callable[[TokenScores, Batch], Tokens | Terms],
    aggregation: str = "token",
    length: int = 1,
    columns: tuple[str, ...] = (),
    own: Sequence[OwnColumn | Callable[[Groups, Scores], ArrayLike]] = (),
) -> Loss:
    """Return a custom function as a loss. `ratio/*`, `mismatch/*` and `entropy` are measured for it unless its `Terms` include
    them.

    Args:
        function: maps scores and batch to one term per token [R T], any value outside the loss mask, or to `Terms`.
        aggregation: average of the terms over the whole minibatch, as `objective.loss.aggregation`.
        length: for the aggregation `constant`.
        columns: optional columns of `Batch` that it reads.
        own: columns that it defines; a function `f` becomes `batch.own["f"]`.
    """

    if aggregation not in get_args(Aggregation):
        raise UserError(f"aggregation: got {aggregation!r}, want one of {', '.join(get_args(Aggregation))}")
    if unknown := [name for name in columns if name not in OPTIONAL]:
        raise UserError(f"columns: got {unknown[0]!r}, want some of {', '.join(OPTIONAL)}")

    def terms(scores: TokenScores, batch: Batch) -> Terms:
        found = function(scores, batch)
        found = found if isinstance(found, Terms) else Terms(found)
        if jnp.shape(found.loss) != batch.tokens.shape:
            raise UserError(
                f"the loss {getattr(function, '__name__', function)}: got terms of shape {list(jnp.shape(found.loss))}, want "
                f"one term per token, {list(batch.tokens.shape)}: the mean is taken for you"
            )
        return _with_sampler_metrics(found, scores, batch)

    defined = tuple(c if isinstance(c, OwnColumn) else OwnColumn(c.__name__, c) for c in own)
    return Loss(terms, aggregation, length, columns, defined)


def with_own_columns(scores: Scores, groups: Groups, columns: Sequence[OwnColumn]) -> Scores:
    """Return the scores with the columns that a loss defines. Raises UserError if one is not [B C]."""
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
