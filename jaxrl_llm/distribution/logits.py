"""The one distribution: from logits and temperature to log-probabilities. Sampling and scoring both use it, and nothing else.

Truncated sampling uses `process_logits` over the logits of the kept tokens; the scorer reads the same logits.
"""

import operator
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def is_allowed(
    token: Int[Array, "*rows n"], num_tokens: int, ends: tuple[int, ...], eos_masked: Bool[Array, "*rows n"]
) -> Bool[Array, "*rows n"]:
    """False for padding of the vocabulary (entries from `num_tokens` on), and for the end tokens `ends` if `eos_masked`.

    The arguments broadcast against each other."""
    return (token < num_tokens) & ~(eos_masked & reduce(operator.or_, (token == end for end in ends), False))


def tempered(
    x: Float[Array, "*rows n"], largest: Float[Array, "*rows 1"], temperature: Float[Array, "*rows"]
) -> Float[Array, "*rows n"]:
    """(x - largest) / temperature; at temperature 0 its limit, 0 at the largest and -inf elsewhere, without a gradient."""
    # The largest is subtracted before the division, so that one pass serves the softmax and the limit.
    x = x - largest
    greedy = (temperature == 0)[..., None]
    limit = jnp.where(x == 0, 0.0, -jnp.inf)
    return jnp.where(greedy, limit, x / jnp.where(greedy, 1.0, temperature[..., None]))


class Normalized(NamedTuple):
    """Log-probs and their normalization: log p = `tempered`(x, largest, temperature) - log_sum."""

    logp: Float[Array, "*rows V"]
    largest: Float[Array, "*rows"]
    log_sum: Float[Array, "*rows"]


def process_logits(
    x: Float[Array, "*rows V"],
    temperature: Float[Array, "*rows"],
    num_tokens: int,
    ends: tuple[int, ...] = (),
    eos_masked: Bool[Array, "*rows"] | None = None,
) -> Float[Array, "*rows V"]:
    """log softmax(logits / temperature) in nats, f32, over the allowed tokens; -inf elsewhere.

    At temperature 0 its limit: uniform over the tokens with the largest logit, without a gradient.

    Args:
        x: logits.
        temperature: 0 or more.
        num_tokens: of the tokenizer; later entries are padding.
        ends: end tokens.
        eos_masked: True in rows where end tokens have no mass.
    """
    limit = num_tokens if num_tokens < x.shape[-1] else None
    return normalize(mask_logits(x, jnp.arange(x.shape[-1]), limit, ends, eos_masked), temperature).logp


def mask_logits(
    x: Float[Array, "*rows n"],
    ids: Int[Array, " n"],
    num_tokens: int | None,
    ends: tuple[int, ...],
    eos_masked: Bool[Array, "*rows"] | None,
) -> Float[Array, "*rows n"]:
    """Logits of the tokens `ids`, f32; -inf for those that are not allowed.

    Args:
        x: logits.
        ids: their tokens.
        num_tokens, ends, eos_masked: as in `process_logits`; `num_tokens` None: no entry is padding.
    """
    x = x.astype(jnp.float32)
    if num_tokens is None and eos_masked is None:
        return x
    num_tokens = jnp.iinfo(jnp.int32).max if num_tokens is None else num_tokens
    eos_masked = jnp.zeros(x.shape[:-1], bool) if eos_masked is None else eos_masked
    return jnp.where(is_allowed(ids, num_tokens, ends, eos_masked[..., None]), x, -jnp.inf)


def normalize(x: Float[Array, "*rows n"], temperature: Float[Array, "*rows"]) -> Normalized:
    """Normalize the distribution over all of `x`; -inf has no mass."""
    largest = jax.lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True))
    x = tempered(x, largest, temperature)
    log_sum = jnp.log(jnp.sum(jnp.exp(x), axis=-1, keepdims=True))
    return Normalized(x - log_sum, largest[..., 0], log_sum[..., 0])


def kept_token_logprobs(
    x: Float[Array, "*rows V"], temperature: Float[Array, "*rows"], kept_tokens: Int[Array, "*rows K"]
) -> Float[Array, "*rows K"]:
    """`process_logits` over the kept tokens (-1 after the last one, -inf there), nats.

    In a row without kept tokens nothing was sampled: its numbers are finite and meaningless.
    """
    return normalize(at_kept_tokens(x, kept_tokens), temperature).logp


def at_kept_tokens(x: Float[Array, "*rows V"], kept_tokens: Int[Array, "*rows K"]) -> Float[Array, "*rows K"]:
    kept = kept_tokens >= 0
    at_kept = jnp.take_along_axis(x.astype(jnp.float32), jnp.maximum(kept_tokens, 0), axis=-1)
    return jnp.where(kept | ~jnp.any(kept, axis=-1, keepdims=True), at_kept, -jnp.inf)


def entropy(logp: Float[Array, "*rows V"]) -> Float[Array, "*rows"]:
    """-sum p log p, nats."""
    return -expectation(logp, logp)


def expectation(logp: Float[Array, "*rows V"], of: Float[Array, "*rows V"]) -> Float[Array, "*rows"]:
    """sum p `of`, with 0 for p = 0."""
    # Another value where p is 0: the gradient of 0 * -inf would be NaN there, masked or not.
    positive = logp > -jnp.inf
    return jnp.sum(
        jnp.where(positive, jnp.exp(jnp.where(positive, logp, 0.0)) * jnp.where(positive, of, 0.0), 0.0), axis=-1
    )
