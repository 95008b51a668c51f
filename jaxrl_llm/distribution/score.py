"""The one distribution: logits and temperature to log-probabilities. Drawing and scoring both come here, and nowhere else.

A truncated draw is one from `process_logits` of the logits at the tokens it kept, its support; the scorer reads the same logits.
"""

import operator
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.distribution.head import Head, Source, over_logits
from jaxrl_llm.model.config import ForwardOptions, ModelConfig
from jaxrl_llm.model.critic import values_of
from jaxrl_llm.model.transformer import hidden
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.types import Batch, PyTree


def drawable(
    token: Int[Array, "*rows n"], num_tokens: int, ends: tuple[int, ...], eos_masked: Bool[Array, "*rows n"]
) -> Bool[Array, "*rows n"]:
    """False for padding of the vocabulary, entries from `num_tokens` on, and for the end tokens `ends` where `barred`.

    The arguments broadcast against each other."""
    return (token < num_tokens) & ~(eos_masked & reduce(operator.or_, (token == end for end in ends), False))


def tempered(
    x: Float[Array, "*rows n"], largest: Float[Array, "*rows 1"], temperature: Float[Array, "*rows"]
) -> Float[Array, "*rows n"]:
    """(x - largest) / temperature; at temperature 0 the limit: 0 at the largest, -inf elsewhere. No gradient flows there."""
    # The largest is subtracted before the division: one pass finds it for the softmax and for the limit.
    x = x - largest
    greedy = (temperature == 0)[..., None]
    limit = jnp.where(x == 0, 0.0, -jnp.inf)
    return jnp.where(greedy, limit, x / jnp.where(greedy, 1.0, temperature[..., None]))


class Normalized(NamedTuple):
    """Log-probs and what they were made with: log p = `tempered`(x, largest, temperature) - log_sum."""

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
    """log softmax(logits / temperature) in nats, f32, over what is `drawable`; -inf elsewhere.

    At temperature 0 it is the limit: uniform over the tokens of the largest logit, -inf elsewhere. No gradient flows there.
    """
    limit = num_tokens if num_tokens < x.shape[-1] else None
    return normalize(only_drawable(x, jnp.arange(x.shape[-1]), limit, ends, eos_masked), temperature).logp


def only_drawable(
    x: Float[Array, "*rows n"],
    ids: Int[Array, " n"],
    num_tokens: int | None,
    ends: tuple[int, ...],
    eos_masked: Bool[Array, "*rows"] | None,
) -> Float[Array, "*rows n"]:
    """Logits of the tokens `ids`, f32; -inf where they are not `drawable`. `num_tokens` None: no entry is padding."""
    x = x.astype(jnp.float32)
    if num_tokens is None and eos_masked is None:
        return x
    num_tokens = jnp.iinfo(jnp.int32).max if num_tokens is None else num_tokens
    eos_masked = jnp.zeros(x.shape[:-1], bool) if eos_masked is None else eos_masked
    return jnp.where(drawable(ids, num_tokens, ends, eos_masked[..., None]), x, -jnp.inf)


def normalize(x: Float[Array, "*rows n"], temperature: Float[Array, "*rows"]) -> Normalized:
    """The distribution over all of `x`; -inf has no mass."""
    largest = jax.lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True))
    x = tempered(x, largest, temperature)
    log_sum = jnp.log(jnp.sum(jnp.exp(x), axis=-1, keepdims=True))
    return Normalized(x - log_sum, largest[..., 0], log_sum[..., 0])


def support_logprobs(
    x: Float[Array, "*rows V"], temperature: Float[Array, "*rows"], kept_tokens: Int[Array, "*rows K"]
) -> Float[Array, "*rows K"]:
    """`process_logits` of the logits at the tokens in `support` (-1 where there are fewer; -inf there), nats.

    A row without any has had nothing drawn from it: finite numbers that mean nothing.
    """
    return normalize(_at_support(x, kept_tokens), temperature).logp


def _at_support(x: Float[Array, "*rows V"], kept_tokens: Int[Array, "*rows K"]) -> Float[Array, "*rows K"]:
    kept = kept_tokens >= 0
    at_support = jnp.take_along_axis(x.astype(jnp.float32), jnp.maximum(kept_tokens, 0), axis=-1)
    return jnp.where(kept | ~jnp.any(kept, axis=-1, keepdims=True), at_support, -jnp.inf)


def entropy(logp: Float[Array, "*rows V"]) -> Float[Array, "*rows"]:
    """-sum p log p, nats."""
    return -_mean(logp, logp)


def _mean(logp: Float[Array, "*rows V"], of: Float[Array, "*rows V"]) -> Float[Array, "*rows"]:
    """sum p `of`, 0 where p is 0."""
    # A value of its own where p is 0: the gradient of 0 * -inf would be NaN there, masked or not.
    seen = logp > -jnp.inf
    return jnp.sum(jnp.where(seen, jnp.exp(jnp.where(seen, logp, 0.0)) * jnp.where(seen, of, 0.0), 0.0), axis=-1)


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


class _Read(NamedTuple):
    """What scoring reads of the batch, token by token."""

    tokens: Int[Array, "*rows"]
    temperature: Float[Array, "*rows"]
    kept_tokens: Int[Array, "*rows K"] | None
    eos_masked: Bool[Array, "*rows"] | None


class _Value(NamedTuple):
    """What is made of a token's logits, and all that its gradient needs beside them."""

    logprob: Float[Array, "*rows"]
    entropy: Float[Array, "*rows"]
    kl: Float[Array, "*rows"] | None
    by: tuple[Float[Array, "*rows"], Float[Array, "*rows"]]
    """`largest` and `log_sum` of the policy's logits."""
    reference_by: tuple[Float[Array, "*rows"], Float[Array, "*rows"]] | None


@dataclass(frozen=True)
class _OfVocabulary:
    """Over all that is drawable."""

    num_tokens: int | None
    ends: tuple[int, ...]
    whole = False

    def value(self, x: Array, y: Array | None, read: _Read) -> _Value:
        ids = jnp.arange(x.shape[-1])
        x, y = (None if z is None else normalize(self._only(z, ids, read), read.temperature) for z in (x, y))
        return _values(x, y, jnp.take_along_axis(x.logp, read.tokens[..., None], axis=-1)[..., 0])

    def pullback(
        self, x: Array, y: Array | None, ids: Array, read: _Read, value: _Value, given: _Value
    ) -> Float[Array, "s n W"]:
        logp = _again(self._only(x, ids, read), read.temperature, value.by)
        if given.kl is not None:
            y = _again(self._only(y, ids, read), read.temperature, value.reference_by)
        return _cotangent(logp, y, ids == read.tokens[..., None], read.temperature, value, given)

    def _only(self, x: Array, ids: Array, read: _Read) -> Array:
        return only_drawable(x, ids, self.num_tokens, self.ends, read.eos_masked)


@dataclass(frozen=True)
class _OfSupport:
    """Over the tokens that a truncated draw kept; a token without any has log-prob and entropy 0."""

    whole = True

    def value(self, x: Array, y: Array | None, read: _Read) -> _Value:
        x, y = (None if z is None else normalize(_at_support(z, read.kept_tokens), read.temperature) for z in (x, y))
        drawn = jnp.sum(jnp.where(read.kept_tokens == read.tokens[..., None], x.logp, 0.0), axis=-1)
        any_kept = jnp.any(read.kept_tokens >= 0, axis=-1)
        of = _values(x, y, drawn)
        return of._replace(
            entropy=jnp.where(any_kept, of.entropy, 0.0), kl=None if y is None else jnp.where(any_kept, of.kl, 0.0)
        )

    def pullback(
        self, x: Array, y: Array | None, ids: Array, read: _Read, value: _Value, given: _Value
    ) -> Float[Array, "s n V"]:
        logp = _again(_at_support(x, read.kept_tokens), read.temperature, value.by)
        if given.kl is not None:
            y = _again(_at_support(y, read.kept_tokens), read.temperature, value.reference_by)
        at_support = _cotangent(logp, y, read.kept_tokens == read.tokens[..., None], read.temperature, value, given)
        put = jax.vmap(jax.vmap(lambda row, kept_tokens, dx: row.at[kept_tokens].add(dx)))
        return put(
            jnp.zeros_like(x), jnp.maximum(read.kept_tokens, 0), jnp.where(read.kept_tokens >= 0, at_support, 0.0)
        )


def _values(x: Normalized, y: Normalized | None, logprob: Array) -> _Value:
    kl = None if y is None else _mean(x.logp, x.logp - y.logp)
    return _Value(logprob, entropy(x.logp), kl, x[1:], None if y is None else y[1:])


def _again(x: Float[Array, "s n W"], temperature: Array, by: tuple[Array, Array]) -> Float[Array, "s n W"]:
    """Log-probs of a part of the logits that were normalized `by` these numbers."""
    largest, log_sum = by
    return tempered(x, largest[..., None], temperature) - log_sum[..., None]


def _cotangent(
    logp: Float[Array, "s n W"],
    reference: Float[Array, "s n W"] | None,
    drawn: Bool[Array, "s n W"],
    temperature: Float[Array, "s n"],
    value: _Value,
    given: _Value,
) -> Float[Array, "s n W"]:
    """Of the logits, where log p and log q are of policy and reference, in units of 1 / temperature:

    d log p(drawn) = [drawn] - p     dH = -p (log p + H)     dKL = p (log p - log q - KL)
    """
    seen = logp > -jnp.inf
    finite = jnp.where(seen, logp, 0.0)
    dx = jnp.zeros_like(logp)
    of_p = jnp.zeros_like(logp)
    if given.logprob is not None:
        dx = jnp.where(drawn, given.logprob[..., None], 0.0)
        of_p = -given.logprob[..., None]
    if given.entropy is not None:
        of_p = of_p - given.entropy[..., None] * (finite + value.entropy[..., None])
    if given.kl is not None:
        of_p = of_p + given.kl[..., None] * (finite - jnp.where(seen, reference, 0.0) - value.kl[..., None])
    # At temperature 0 no gradient flows.
    scale = jnp.where(temperature == 0, 0.0, 1 / jnp.where(temperature == 0, 1.0, temperature))
    return jnp.where(seen, (dx + jnp.exp(finite) * of_p) * scale[..., None], 0.0)


@dataclass(frozen=True)
class Scoring:
    """What is fixed when a program that scores tokens is compiled."""

    model: ModelConfig
    layout: Layout
    num_tokens: int
    """Of the tokenizer: entries of the vocabulary behind them are padding."""
    ends: tuple[int, ...] = ()
    """End tokens, which could not be drawn where `Batch.barred`."""
    forward: ForwardOptions = ForwardOptions()  # noqa: RUF009


def score_tokens(params: PyTree, batch: Batch, scoring: Scoring, reference: PyTree | None = None) -> TokenScores:
    """Score the tokens in the loss mask. The only place where logits and tokens shift.

    Tokens outside the mask cost no logits, and have log-prob, entropy and KL 0.

    Args:
        params: layers stacked. A tree with a critic (`model/critic.py`) has `values`, of every token.
        reference: parameters of the same model; `kl` is then from the policy to it, and its gradient flows into `params` alone.

    Raises:
        ValueError: a batch has bars, and `scoring.ends` is empty.
    """
    cfg, layout, ends, num_tokens = scoring.model, scoring.layout, scoring.ends, scoring.num_tokens
    if batch.eos_masked is not None and not ends:
        raise ValueError("ends: got none, want the end tokens that `batch.barred` is about")
    order = _Order.of(batch, layout)
    read = _Read(*map(order.take, (batch.tokens, batch.temperature, batch.kept_tokens, batch.eos_masked)))

    def activations(params: PyTree) -> Array:
        return order.take_before(
            hidden(params, batch.tokens, batch.position, batch.until, cfg, layout, scoring.forward)
        )

    def source(params: PyTree) -> Source:
        return Source(params["embed" if cfg.tied_head else "head"], activations(params))

    policy = source(params)
    other = None if reference is None else source(jax.lax.stop_gradient(reference))
    limit = num_tokens if num_tokens < cfg.vocab_size else None
    rule = _OfVocabulary(limit, ends) if batch.kept_tokens is None else _OfSupport()
    of = over_logits(rule, Head.of(cfg, layout), policy, other, read, order.count)
    back = lambda x: None if x is None else order.put_back(x)  # noqa: E731
    critic = params.get("critic", params)
    values = values_of(critic, policy.h if critic is params else activations(critic))
    return TokenScores(back(of.logprob), back(of.entropy), back(values), back(of.kl))


class _Order(NamedTuple):
    """The tokens of each shard of the rows in one line, those in the loss mask first."""

    slots: Int[Array, "s N"]
    """Slot of the shard's rows, end to end, that a token stands in."""
    before: Int[Array, "s N"]
    """Slot of the token before it."""
    rank: Int[Array, "s N"]
    """Where a slot's token stands in the line."""
    count: Int[Array, " s"]
    """Tokens in the loss mask."""
    layout: Layout
    shape: tuple[int, int]

    @staticmethod
    def of(batch: Batch, layout: Layout) -> "_Order":
        rows, slots = batch.tokens.shape
        by_shard = lambda x: layout.constrain(x.reshape(layout.size("rows"), -1), "rows", None)  # noqa: E731
        mask = by_shard(batch.loss_mask)
        order = jnp.argsort(~mask, axis=-1, stable=True)
        first = jnp.arange(rows)[:, None] % (rows // len(mask)) * slots
        before = jnp.take_along_axis(by_shard(first + batch.before), order, axis=-1)
        return _Order(order, before, jnp.argsort(order, axis=-1), jnp.sum(mask, axis=-1), layout, (rows, slots))

    def take(self, x: Array | None) -> Array | None:
        return None if x is None else self._gathered(x, self.slots)

    def take_before(self, x: Array) -> Array:
        return self._gathered(x, self.before)

    def put_back(self, x: Float[Array, "s N"]) -> Float[Array, "R T"]:
        x = jnp.take_along_axis(x, self.rank, axis=-1).reshape(self.shape)
        return self.layout.constrain(x, "rows", None)

    def _gathered(self, x: Array, slots: Array) -> Array:
        x = x.reshape(*slots.shape, *x.shape[2:])
        axes = ("rows", *(None,) * (x.ndim - 1))
        return self.layout.constrain(jax.vmap(lambda x, i: x[i])(self.layout.constrain(x, *axes), slots), *axes)
