"""Effective sample size of a minibatch whose samples are of another policy than the one that is trained.

    ESS / N = (sum of w)^2 / (N * sum of w^2),   w = p / p_behavior of each of N samples

It is 1 if all weights are equal, and 1 / N if one outweighs all others. Source: Kong 1992; of sequences in RL: Huang et al. 2026,
"Stable Asynchrony: Variance-Controlled Off-Policy RL for LLMs" (VCPO, arXiv 2602.17616).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.types import Batch
from jaxrl_llm.update.config import EssScaling


class WeightSums(NamedTuple):
    """Sums over importance weights relative to the largest, so that none overflows; those of parts of a minibatch can be
    merged."""

    largest: Float[Array, ""]
    """Logarithm of the largest weight; -inf without weights."""
    sum: Float[Array, ""]
    square: Float[Array, ""]
    """Sum of the squares."""
    count: Int[Array, ""]


def weight_sums(log_ratio: Float[Array, "R T"], batch: Batch) -> dict[str, WeightSums]:
    """Return the sums over the tokens in the loss, and over the sequences that have one.

    Args:
        log_ratio: log p - log p_behavior per token; the weight of a sequence is the product over its tokens in the loss.
        batch: with whole sequences.
    """
    own = jnp.where(batch.loss_mask, jax.lax.stop_gradient(log_ratio), 0.0)
    # A sequence lies in one row of the batch, where its number is that of no other.
    by_segment = jax.vmap(lambda x, ids: jax.ops.segment_sum(x, ids, num_segments=x.shape[0] + 1))
    tokens = by_segment(batch.loss_mask.astype(jnp.int32), batch.segment)
    return {
        "sequences": _summed(by_segment(own, batch.segment), tokens > 0),
        "tokens": _summed(own, batch.loss_mask),
    }


def _summed(log_weight: Float[Array, "R N"], there: Bool[Array, "R N"]) -> WeightSums:
    log_weight = jnp.where(there, log_weight, -jnp.inf)
    largest = jnp.max(log_weight)
    weight = _exp_of_difference(log_weight, largest)
    return WeightSums(largest, jnp.sum(weight), jnp.sum(weight**2), jnp.sum(there))


def merged(one: WeightSums, other: WeightSums) -> WeightSums:
    """Return the sums over the weights of both."""
    largest = jnp.maximum(one.largest, other.largest)
    a, b = (_exp_of_difference(part.largest, largest) for part in (one, other))
    return WeightSums(
        largest, a * one.sum + b * other.sum, a**2 * one.square + b**2 * other.square, one.count + other.count
    )


def no_weights() -> WeightSums:
    return WeightSums(jnp.float32(-jnp.inf), jnp.float32(0), jnp.float32(0), jnp.int32(0))


def _exp_of_difference(log_weight: Array, largest: Array) -> Array:
    # Without a weight above 0 all are -inf, whose difference would be NaN.
    return jnp.exp(log_weight - jnp.where(largest == -jnp.inf, 0.0, largest))


def effective_share(sums: WeightSums) -> Float[Array, ""]:
    """Return ESS / N; 0 without a weight above 0, NaN if a weight is infinite or NaN."""
    share = sums.sum**2 / jnp.where(sums.square == 0, 1.0, sums.square * sums.count)
    return jnp.minimum(share, 1.0)  # exceeds it by rounding alone


def lr_scale(cfg: EssScaling, share: Float[Array, ""]) -> Float[Array, ""]:
    """Return the factor on the learning rate.

    Source: Huang et al. 2026; min(1, share / base), and its square root for Adam, in `_optimizer_step_with_buffer` of their code.
    """
    scale = jnp.minimum(share / cfg.base, 1.0)
    return jnp.sqrt(scale) if cfg.rule == "sqrt" else scale
