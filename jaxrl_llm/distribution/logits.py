"""The token distribution: logits and temperature to log-probabilities. Sampling and scoring both use this one implementation.

A truncated distribution is `process_logits` of the logits at the kept tokens; the scorer evaluates the same logits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.distribution.allowed_tokens import AllowedTokens, mask_disallowed


def scale_by_temperature(
    x: Float[Array, "*rows n"], largest: Float[Array, "*rows 1"], temperature: Float[Array, "*rows"]
) -> Float[Array, "*rows n"]:
    """Return (x - largest) / temperature; at temperature 0 its limit, 0 at the largest and -inf elsewhere, without gradient."""
    # The largest is subtracted before the division: one pass finds it for the softmax and for the limit.
    x = x - largest
    greedy = (temperature == 0)[..., None]
    limit = jnp.where(x == 0, 0.0, -jnp.inf)
    return jnp.where(greedy, limit, x / jnp.where(greedy, 1.0, temperature[..., None]))


class LogSoftmax(NamedTuple):
    """Log-probs and their normalizer: log p = scale_by_temperature(x, largest, temperature) - log_sum."""

    logp: Float[Array, "*rows V"]
    largest: Float[Array, "*rows"]
    log_sum: Float[Array, "*rows"]


def process_logits(
    x: Float[Array, "*rows V"],
    temperature: Float[Array, "*rows"],
    num_tokens: int,
    allowed: AllowedTokens | None = None,
) -> Float[Array, "*rows V"]:
    """Return log softmax(logits / temperature) in nats, f32, over the allowed tokens; -inf elsewhere.

    At temperature 0 it is the limit: uniform over the tokens with the largest logit, without gradient.

    Args:
        x: raw logits.
        temperature: per row.
        num_tokens: tokens of the tokenizer; larger ids are padding of the vocabulary.
        allowed: tokens that the rows' controls allow; None: all.
    """
    limit = num_tokens if num_tokens < x.shape[-1] else None
    return normalize(mask_disallowed(x, jnp.arange(x.shape[-1]), limit, allowed), temperature).logp


def normalize(x: Float[Array, "*rows n"], temperature: Float[Array, "*rows"]) -> LogSoftmax:
    """Return the softmax over all of `x`; -inf has probability 0."""
    largest = jax.lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True))
    x = scale_by_temperature(x, largest, temperature)
    log_sum = jnp.log(jnp.sum(jnp.exp(x), axis=-1, keepdims=True))
    return LogSoftmax(x - log_sum, largest[..., 0], log_sum[..., 0])


def kept_logprobs(
    x: Float[Array, "*rows V"], temperature: Float[Array, "*rows"], kept_tokens: Int[Array, "*rows K"]
) -> Float[Array, "*rows K"]:
    """Return `process_logits` of the logits at the kept tokens (padded with -1, where the result is -inf), in nats.

    Rows without kept tokens were not sampled; their values are finite and meaningless.
    """
    return normalize(gather_kept(x, kept_tokens), temperature).logp


def gather_kept(x: Float[Array, "*rows V"], kept_tokens: Int[Array, "*rows K"]) -> Float[Array, "*rows K"]:
    """Return the logits of the kept tokens, f32, with -inf in place of padding; finite in rows without kept tokens."""
    kept = kept_tokens >= 0
    gathered = jnp.take_along_axis(x.astype(jnp.float32), jnp.maximum(kept_tokens, 0), axis=-1)
    return jnp.where(kept | ~jnp.any(kept, axis=-1, keepdims=True), gathered, -jnp.inf)


def entropy(logp: Float[Array, "*rows V"]) -> Float[Array, "*rows"]:
    """Return -sum p log p, in nats."""
    return -expectation(logp, logp)


def expectation(logp: Float[Array, "*rows V"], of: Float[Array, "*rows V"]) -> Float[Array, "*rows"]:
    """Return sum p * `of`, where terms with p = 0 count as 0."""
    # Replace values where p is 0: the gradient of 0 * -inf would be NaN, masked or not.
    seen = logp > -jnp.inf
    return jnp.sum(jnp.where(seen, jnp.exp(jnp.where(seen, logp, 0.0)) * jnp.where(seen, of, 0.0), 0.0), axis=-1)
