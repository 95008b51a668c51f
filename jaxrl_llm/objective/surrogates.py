"""Policy-gradient surrogates: one function per published equation, of each token's log-prob, log-ratio and advantage.

A term of a whole sequence is repeated at each of its tokens; the aggregation `sequence` then averages it over sequences.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxrl_llm.distribution.loss_terms import Mask, Tokens
from jaxrl_llm.objective.loss_config import Cispo, Clip, Dppo, Gmpo, Ipo, Reinforce, Sapo
from jaxrl_llm.types import Batch


class SurrogateTerms(NamedTuple):
    """Per-token surrogate loss, and the tokens at which the lower (`low`) or upper (`high`) bound is active."""

    loss: Tokens
    low: Mask
    high: Mask


def zero_outside(mask: Mask, x: Tokens) -> Tokens:
    """Return x, 0 outside the mask. Differences there are meaningless and may overflow; masking before exp protects the
    gradient."""
    return jnp.where(mask, x, 0.0)


def sum_by_id(ids: Int[Array, "R T"], x: Tokens) -> Tokens:
    """Return at each token the sum of x over the tokens of its row with the same id."""
    slots = x.shape[1]
    return jax.vmap(lambda x, ids: jax.ops.segment_sum(x, ids, num_segments=slots + 1)[ids])(x, ids)


def mean_by_id(ids: Int[Array, "R T"], mask: Mask, x: Tokens) -> Tokens:
    """Return at each token the mean of x over the tokens in `mask` of its row with the same id."""
    return sum_by_id(ids, zero_outside(mask, x)) / jnp.maximum(sum_by_id(ids, mask.astype(x.dtype)), 1)


def log_ratio(logprobs: Tokens, anchor: Tokens, batch: Batch, level: str) -> Tokens:
    """Return log r per token.

    Args:
        logprobs: log p of the policy.
        anchor: log p of the ratio's denominator.
        batch: gives the loss mask and the sequences.
        level: token: of the token itself. sequence: mean over its sequence (Zheng et al. 2025, GSPO, eq. 7). sequence_token: that
            value with each token's own gradient (eq. 14). product: sum over its sequence (Ahmadian et al. 2024).
    """
    mask, own = batch.loss_mask, zero_outside(batch.loss_mask, logprobs - anchor)
    if level == "token":
        return own
    if level == "product":
        return sum_by_id(batch.segment, own)
    mean = mean_by_id(batch.segment, mask, own)
    if level == "sequence":
        return mean
    return jax.lax.stop_gradient(mean) + zero_outside(mask, logprobs - jax.lax.stop_gradient(logprobs))


def clip(logprobs: Tokens, log_r: Tokens, advantage: Tokens, batch: Batch, cfg: Clip) -> SurrogateTerms:
    """-min(r A, clip(r, 1 - low, 1 + high) A); with `dual`, at most -dual A where A < 0.

    Source: Schulman et al. 2017 (PPO), eq. 7; separate bounds: Yu et al. 2025 (DAPO), eq. 10; dual: Ye et al. 2020, eq. 5.
    """
    ratio = jnp.exp(log_r)
    bounded = jnp.clip(ratio, 1 - cfg.low, 1 + cfg.high)
    loss = -jnp.minimum(ratio * advantage, bounded * advantage)
    low, high = (ratio < 1 - cfg.low) & (advantage < 0), (ratio > 1 + cfg.high) & (advantage > 0)
    if cfg.dual is not None:
        loss = jnp.where(advantage < 0, jnp.minimum(loss, -cfg.dual * advantage), loss)
        high = high | ((ratio > cfg.dual) & (advantage < 0))
    return SurrogateTerms(loss, low, high)


def cispo(logprobs: Tokens, log_r: Tokens, advantage: Tokens, batch: Batch, cfg: Cispo) -> SurrogateTerms:
    """-sg(clip(r, low, high)) A log p: every token keeps a gradient. Source: MiniMax-M1 2025, eq. 4."""
    ratio = jax.lax.stop_gradient(jnp.exp(log_r))
    loss = -jnp.clip(ratio, cfg.low, cfg.high) * advantage * logprobs
    return SurrogateTerms(loss, ratio < cfg.low, ratio > cfg.high)


def gmpo(logprobs: Tokens, log_r: Tokens, advantage: Tokens, batch: Batch, cfg: Gmpo) -> SurrogateTerms:
    """-mean(A) exp(mean over the sequence of x'), x' = sgn(A) min(sgn(A) x, sgn(A) clip(x, -low, high)), x = log r.

    Source: Zhao et al. 2025 (GMPO), eq. 4.
    """
    sign = jnp.sign(advantage)
    bounded = sign * jnp.minimum(sign * log_r, sign * jnp.clip(log_r, -cfg.low, cfg.high))
    ratio = jnp.exp(mean_by_id(batch.segment, batch.loss_mask, bounded))
    loss = -mean_by_id(batch.segment, batch.loss_mask, advantage) * ratio
    return SurrogateTerms(loss, (log_r < -cfg.low) & (advantage < 0), (log_r > cfg.high) & (advantage > 0))


def sapo(logprobs: Tokens, log_r: Tokens, advantage: Tokens, batch: Batch, cfg: Sapo) -> SurrogateTerms:
    """-A sigmoid(tau (r - 1)) 4 / tau: a soft gate with slope 1 at r = 1. Source: Gao et al. 2025 (SAPO)."""
    tau = jnp.where(advantage > 0, cfg.positive, cfg.negative)
    loss = -advantage * jax.nn.sigmoid(tau * (jnp.exp(log_r) - 1)) * 4 / tau
    never = jnp.zeros_like(batch.loss_mask)
    return SurrogateTerms(loss, never, never)


def dppo(logprobs: Tokens, log_r: Tokens, advantage: Tokens, batch: Batch, cfg: Dppo) -> SurrogateTerms:
    """Drop tokens whose probability rose by more than `high` with A > 0, or fell by more than `low` with A <= 0.

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
    return SurrogateTerms(jnp.where(low | high, 0.0, -advantage * term), low, high)


def ipo(logprobs: Tokens, log_r: Tokens, advantage: Tokens, batch: Batch, cfg: Ipo) -> SurrogateTerms:
    """-A r where |p - p_old| <= eps, else 0, for either sign of A. Source: prime-rl's `ipo_loss_fn`."""
    moved = jax.lax.stop_gradient(jnp.exp(logprobs) - jnp.exp(logprobs - log_r))
    low, high = moved < -cfg.eps, moved > cfg.eps
    return SurrogateTerms(jnp.where(low | high, 0.0, -advantage * jnp.exp(log_r)), low, high)


def reinforce(logprobs: Tokens, log_r: Tokens, advantage: Tokens, batch: Batch, cfg: Reinforce) -> SurrogateTerms:
    """-A log p."""
    never = jnp.zeros_like(batch.loss_mask)
    return SurrogateTerms(-advantage * logprobs, never, never)


def shaped(log_r: Tokens, advantage: Tokens, gamma: float) -> Tokens:
    """-A r / (r + gamma): a rare token of a good response keeps a gradient. Source: Yan et al. 2025 (LUFFY), eq. 8."""
    return -advantage * jax.nn.sigmoid(log_r - math.log(gamma))


SURROGATES = {Clip: clip, Cispo: cispo, Gmpo: gmpo, Sapo: sapo, Dppo: dppo, Ipo: ipo, Reinforce: reinforce}
