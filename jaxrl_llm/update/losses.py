"""Losses of tokens: one function per published loss, model-free. Each returns a term a token; `token_weights` makes the mean.

ratio r = exp(logprobs - behavior_logprobs), where the behaviour's log-probs are those captured while sampling.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.model.distribution import TokenScores
from jaxrl_llm.types import Batch
from jaxrl_llm.update.config import ClippedLoss, CrossEntropyLoss

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


def clipped_terms(scores: TokenScores, batch: Batch, cfg: ClippedLoss) -> Terms:
    """The clipped surrogate, plus kl * k3 to the reference, minus entropy * entropy, as configured."""
    # Outside the mask the difference means nothing and may overflow; the double `where` keeps it out of the gradient.
    difference = jnp.where(batch.loss_mask, scores.logprobs - batch.behavior_logprobs, 0.0)
    ratio = jnp.exp(difference)
    clipped = clipped_surrogate(ratio, batch.advantage, cfg.low, cfg.high)
    loss, means = clipped.loss, {"ratio/mean": ratio, "clip_ratio/low": clipped.low, "clip_ratio/high": clipped.high}
    means["entropy"] = scores.entropy
    if cfg.kl > 0:
        reference = jnp.where(batch.loss_mask, batch.reference_logprobs, scores.logprobs)
        means["kl"] = k3(scores.logprobs, reference)
        loss = loss + cfg.kl * means["kl"]
    if cfg.entropy > 0:
        loss = loss - cfg.entropy * scores.entropy
    maxima = {"ratio/max": ratio, "ratio/-min": -ratio, "mismatch/max_abs_dlogp": jnp.abs(difference)}
    return Terms(loss, means, maxima)


def cross_entropy_terms(scores: TokenScores, batch: Batch, cfg: CrossEntropyLoss) -> Terms:
    """-log p(token)."""
    return Terms(-scores.logprobs, {"entropy": scores.entropy}, {})


TERMS = {ClippedLoss: clipped_terms, CrossEntropyLoss: cross_entropy_terms}
