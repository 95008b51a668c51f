"""The one distribution: logits and temperature to log-probabilities. Drawing and scoring both come here, and nowhere else.

A truncated draw is one from `process_logits` of the logits at the tokens it kept, its support; the scorer reads the same logits.
"""

import operator
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.model.config import ModelConfig, Whole
from jaxrl_llm.model.transformer import gather_head, hidden, logits_in_loop
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.types import Batch, PyTree

# Slots of a row whose logits exist at a time while scoring.
CHUNK = 128
WHOLE_ROWS = Whole()


def drawable(
    token: Int[Array, "*rows n"], num_tokens: int, ends: tuple[int, ...], barred: Bool[Array, "*rows n"]
) -> Bool[Array, "*rows n"]:
    """False for padding of the vocabulary, entries from `num_tokens` on, and for the end tokens `ends` where `barred`.

    The arguments broadcast against each other."""
    return (token < num_tokens) & ~(barred & reduce(operator.or_, (token == end for end in ends), False))


def tempered(
    x: Float[Array, "*rows n"], largest: Float[Array, "*rows 1"], temperature: Float[Array, "*rows"]
) -> Float[Array, "*rows n"]:
    """(x - largest) / temperature; at temperature 0 the limit: 0 at the largest, -inf elsewhere. No gradient flows there."""
    # The largest is subtracted before the division: one pass finds it for the softmax and for the limit.
    x = x - largest
    greedy = (temperature == 0)[..., None]
    limit = jnp.where(x == 0, 0.0, -jnp.inf)
    return jnp.where(greedy, limit, x / jnp.where(greedy, 1.0, temperature[..., None]))


def process_logits(
    x: Float[Array, "*rows V"],
    temperature: Float[Array, "*rows"],
    num_tokens: int,
    ends: tuple[int, ...] = (),
    barred: Bool[Array, "*rows"] | None = None,
) -> Float[Array, "*rows V"]:
    """log softmax(logits / temperature) in nats, f32, over what is `drawable`; -inf elsewhere.

    At temperature 0 it is the limit: uniform over the tokens of the largest logit, -inf elsewhere. No gradient flows there.
    """
    x = x.astype(jnp.float32)
    if num_tokens < x.shape[-1] or barred is not None:
        barred = jnp.zeros(x.shape[:-1], bool) if barred is None else barred
        x = jnp.where(drawable(jnp.arange(x.shape[-1]), num_tokens, ends, barred[..., None]), x, -jnp.inf)
    x = tempered(x, jax.lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True)), temperature)
    return x - jnp.log(jnp.sum(jnp.exp(x), axis=-1, keepdims=True))


def support_logprobs(
    x: Float[Array, "*rows V"], temperature: Float[Array, "*rows"], support: Int[Array, "*rows K"]
) -> Float[Array, "*rows K"]:
    """`process_logits` of the logits at the tokens in `support` (-1 where there are fewer; -inf there), nats.

    A row without any has had nothing drawn from it: finite numbers that mean nothing.
    """
    kept = support >= 0
    at_support = jnp.take_along_axis(x.astype(jnp.float32), jnp.maximum(support, 0), axis=-1)
    kept = kept | ~jnp.any(kept, axis=-1, keepdims=True)
    return process_logits(jnp.where(kept, at_support, -jnp.inf), temperature, support.shape[-1])


def entropy(logp: Float[Array, "*rows V"]) -> Float[Array, "*rows"]:
    """-sum p log p, nats."""
    # A value of its own where p is 0: the gradient of 0 * -inf would be NaN there, masked or not.
    seen = logp > -jnp.inf
    safe = jnp.where(seen, logp, 0.0)
    return -jnp.sum(jnp.where(seen, jnp.exp(safe) * safe, 0.0), axis=-1)


class TokenScores(NamedTuple):
    logprobs: Float[Array, "R T"]
    """log p(tokens[r, t] | before it) at the batch's temperature, over the recorded support where there is one. Read it inside the
    loss mask alone."""
    entropy: Float[Array, "R T"]
    """Of the distribution that tokens[r, t] was drawn from."""
    values: Float[Array, "R T"] | None = None
    """The critic's of what is before tokens[r, t]; where there is a critic."""
    kl: Float[Array, "R T"] | None = None
    """Exact KL(policy || reference) of the distribution that tokens[r, t] was drawn from; where a reference is given."""


class _Slots(NamedTuple):
    """What scoring reads of the batch, slot by slot."""

    tokens: Int[Array, "R T"]
    temperature: Float[Array, "R T"]
    support: Int[Array, "R T K"] | None
    barred: Bool[Array, "R T"] | None


def score_tokens(
    params: PyTree,
    batch: Batch,
    cfg: ModelConfig,
    num_tokens: int,
    layout: Layout,
    ends: tuple[int, ...] = (),
    how: Whole = WHOLE_ROWS,
    reference: PyTree | None = None,
) -> TokenScores:
    """Score every token of a batch under `params` (layers stacked). The only place where logits and tokens shift.

    `ends`: the end tokens that could not be drawn where `batch.barred`; ValueError where a batch has bars and they are not given.
    Logits exist for `CHUNK` slots at a time and are made again in the backward pass, so no [R, T, V] array ever does.
    """
    if batch.barred is not None and not ends:
        raise ValueError("ends: got none, want the end tokens that `batch.barred` is about")
    h = hidden(params, batch.tokens, batch.position, batch.until, cfg, layout)
    rows, slots = batch.tokens.shape
    # A token is scored from the activation before it, which with a shared prompt stands elsewhere in the row.
    h = jnp.take_along_axis(h, batch.before[:, :, None], axis=1)
    read = _Slots(batch.tokens, batch.temperature, batch.support, batch.barred)
    head = gather_head(params, cfg, layout)

    @jax.checkpoint
    def score(chunk: tuple[Array, _Slots]) -> tuple[Array, Array]:
        h, read = chunk
        return _score(logits_in_loop(head, h, cfg), read, num_tokens, ends)

    pad = -slots % CHUNK if slots > CHUNK else 0
    size = min(CHUNK, slots)

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, -1, size, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(rows, -1)[:, :slots]

    scores = jax.lax.map(score, jax.tree.map(split, (h, read)))
    return TokenScores(*(join(x) for x in scores))


def _score(x: Float[Array, "R T V"], read: _Slots, num_tokens: int, ends: tuple[int, ...]) -> tuple[Array, Array]:
    """Log-prob of each token and entropy of its distribution. Tokens outside `num_tokens` and barred ones are in no support."""
    if read.support is None:
        logp = process_logits(x, read.temperature, num_tokens, ends, read.barred)
        return jnp.take_along_axis(logp, read.tokens[..., None], axis=-1)[..., 0], entropy(logp)
    logp = support_logprobs(x, read.temperature, read.support)
    drawn = jnp.sum(jnp.where(read.support == read.tokens[..., None], logp, 0.0), axis=-1)
    return drawn, jnp.where(jnp.any(read.support >= 0, axis=-1), entropy(logp), 0.0)
