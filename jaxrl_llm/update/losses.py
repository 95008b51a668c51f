"""Losses of tokens: one function per published loss, model-free. Each returns a term a token; `token_weights` makes the mean.

ratio r = exp(logprobs - behavior_logprobs), where the behaviour's log-probs are those captured while sampling.

A sampler of other arithmetic than the trainer's (8-bit weights, say) is corrected for: with a weight w a token,

    w = min(exp(proximal - behaviour), cap), without a gradient        r = exp(logprobs - proximal)

where the proximal log-probs are those of the trainer's parameters before the first update on the batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.model.distribution import TokenScores
from jaxrl_llm.types import Batch
from jaxrl_llm.update.config import ClippedLoss, Correction, CrossEntropyLoss, NoCorrection, TruncatedImportance

Tokens = Float[Array, "R T"]


class Clipped(NamedTuple):
    loss: Tokens
    low: Bool[Array, "R T"]
    """The lower bound holds the token: no gradient."""
    high: Bool[Array, "R T"]
    """The upper bound holds the token: no gradient."""


def clipped_surrogate(ratio: Tokens, advantage: Tokens, low: float, high: float) -> Clipped:
    """-min(r A, clip(r, 1 - low, 1 + high) A).

    Source: Schulman et al. 2017 (PPO), eq. 7; separate bounds: Yu et al. 2025 (DAPO), eq. 10.
    """
    bounded = jnp.clip(ratio, 1 - low, 1 + high)
    return Clipped(
        loss=-jnp.minimum(ratio * advantage, bounded * advantage),
        low=(ratio < 1 - low) & (advantage < 0),
        high=(ratio > 1 + high) & (advantage > 0),
    )


def k3(logprobs: Tokens, reference_logprobs: Tokens) -> Tokens:
    """e^d - d - 1 with d = reference - policy: never negative, unbiased for KL(policy || reference) on the policy's samples.

    Source: Schulman 2020, "Approximating KL divergence"; Shao et al. 2024 (GRPO), eq. 4.
    """
    d = reference_logprobs - logprobs
    return jnp.exp(d) - d - 1


def token_weights(mask: Bool[Array, "R T"], segment: Int[Array, "R T"], normalize: str, length: int) -> Tokens:
    """Weights whose sum over the tokens of any term is its mean; counted over the whole minibatch, all devices.

    "token": 1 / N tokens. "sequence": 1 / (tokens of its sequence * sequences). "constant": 1 / (length * sequences).
    Only tokens in `mask` count, and only sequences that have one. With none at all every weight is 0.
    """
    mask = mask.astype(jnp.float32)
    slots = mask.shape[1]
    in_sequence = jax.vmap(lambda m, s: jax.ops.segment_sum(m, s, num_segments=slots + 1)[s])(mask, segment)
    share = mask / jnp.maximum(in_sequence, 1)
    sequences = jnp.maximum(jnp.sum(share), 1)
    if normalize == "token":
        return mask / jnp.maximum(jnp.sum(mask), 1)
    if normalize == "sequence":
        return share / sequences
    return mask / (length * sequences)


class Terms(NamedTuple):
    """What a loss says of each token, inside the loss mask and out; sums come later, by global counts."""

    loss: Tokens
    means: dict[str, Tokens]
    """Named values to average over the tokens of the loss mask."""
    maxima: dict[str, Tokens]
    """Named values whose maximum over the loss mask is wanted; a minimum is the maximum of the negative."""


class Anchored(NamedTuple):
    """A batch's tokens against the policy that sampled them, inside the loss mask; the rest is 0, or 1 where it is a factor."""

    ratio: Tokens
    """To the policy before the first update: what the clip sees."""
    weight: Tokens
    """What the surrogate is multiplied by; 1 without a correction."""
    held: Bool[Array, "R T"]
    """The weight is at its cap."""
    mismatch: Tokens
    """The trainer's log-prob less the sampler's; without a correction the trainer's of now."""


def anchored(logprobs: Tokens, batch: Batch, correction: Correction) -> Anchored:
    """Ratio and weight. Without `batch.proximal_logprobs` a correction takes the log-probs of now: they are the same in the first
    update on a batch, so where it is the only one no second pass is needed."""
    # Outside the mask differences mean nothing and may overflow; the double `where` keeps them out of the gradient.
    within = lambda x: jnp.where(batch.loss_mask, x, 0.0)  # noqa: E731
    if isinstance(correction, NoCorrection):
        difference = within(logprobs - batch.behavior_logprobs)
        return Anchored(jnp.exp(difference), jnp.ones_like(difference), jnp.zeros_like(batch.loss_mask), difference)
    proximal = jax.lax.stop_gradient(logprobs) if batch.proximal_logprobs is None else batch.proximal_logprobs
    mismatch = within(proximal - batch.behavior_logprobs)
    raw = jnp.exp(mismatch)
    ratio = jnp.exp(within(logprobs - proximal))
    return Anchored(ratio, jnp.minimum(raw, correction.cap), raw >= correction.cap, mismatch)


def clipped_terms(scores: TokenScores, batch: Batch, cfg: ClippedLoss, correction: Correction) -> Terms:
    """The clipped surrogate times the correction's weight, plus kl * k3 to the reference, minus entropy * entropy."""
    ratio, weight, held, mismatch = anchored(scores.logprobs, batch, correction)
    clipped = clipped_surrogate(ratio, batch.advantage, cfg.low, cfg.high)
    loss = weight * clipped.loss
    means = {"ratio/mean": ratio, "clip_ratio/low": clipped.low, "clip_ratio/high": clipped.high}
    means |= {"entropy": scores.entropy, "mismatch/kl": k3(jnp.zeros_like(mismatch), mismatch)}
    means["mismatch/mean_abs_dlogp"] = jnp.abs(mismatch)
    if isinstance(correction, TruncatedImportance):
        means |= {"mismatch/weight_mean": weight, "mismatch/truncated": held}
    if cfg.kl > 0:
        reference = jnp.where(batch.loss_mask, batch.reference_logprobs, scores.logprobs)
        means["kl"] = k3(scores.logprobs, reference)
        loss = loss + cfg.kl * means["kl"]
    if cfg.entropy > 0:
        loss = loss - cfg.entropy * scores.entropy
    maxima = {"ratio/max": ratio, "ratio/-min": -ratio, "mismatch/max_abs_dlogp": jnp.abs(mismatch)}
    return Terms(loss, means, maxima)


def cross_entropy_terms(scores: TokenScores, batch: Batch, cfg: CrossEntropyLoss, correction: Correction) -> Terms:
    """-log p(token). Nothing was sampled, so nothing is corrected."""
    return Terms(-scores.logprobs, {"entropy": scores.entropy}, {})


TERMS = {ClippedLoss: clipped_terms, CrossEntropyLoss: cross_entropy_terms}
