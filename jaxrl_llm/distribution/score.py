"""Scoring of tokens: log-probs, entropies, exact KL and values of a batch, through the tiles of `head`."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.distribution.head import Head, HeadInputs, over_logits
from jaxrl_llm.distribution.logits import (
    Normalized,
    at_kept_tokens,
    entropy,
    expectation,
    mask_logits,
    normalize,
    tempered,
)
from jaxrl_llm.model.config import ForwardOptions, ModelConfig
from jaxrl_llm.model.critic import critic_values
from jaxrl_llm.model.transformer import hidden
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.types import Batch, PyTree


class TokenScores(NamedTuple):
    logprobs: Float[Array, "R T"]
    """log p(tokens[r, t] | before it) at the batch's temperature, over the recorded kept tokens if there are any. Valid inside
    the loss mask alone."""
    entropy: Float[Array, "R T"]
    """Entropy of the distribution of tokens[r, t], nats."""
    values: Float[Array, "R T"] | None = None
    """Critic's value of the tokens before tokens[r, t], if there is a critic."""
    kl: Float[Array, "R T"] | None = None
    """Exact KL(policy || reference) of the distribution of tokens[r, t], nats, if a reference is given."""


class _TokenInputs(NamedTuple):
    """Columns of the batch that scoring reads."""

    tokens: Int[Array, "*rows"]
    temperature: Float[Array, "*rows"]
    kept_tokens: Int[Array, "*rows K"] | None
    eos_masked: Bool[Array, "*rows"] | None


class _TokenValues(NamedTuple):
    """Results for a token, with everything that the gradient needs beside its logits."""

    logprob: Float[Array, "*rows"]
    entropy: Float[Array, "*rows"]
    kl: Float[Array, "*rows"] | None
    by: tuple[Float[Array, "*rows"], Float[Array, "*rows"]]
    """`largest` and `log_sum` of the policy's logits."""
    reference_by: tuple[Float[Array, "*rows"], Float[Array, "*rows"]] | None


@dataclass(frozen=True)
class _FullVocabulary:
    """Distribution over all allowed tokens."""

    num_tokens: int | None
    ends: tuple[int, ...]
    needs_all_logits = False

    def value(self, x: Array, y: Array | None, read: _TokenInputs) -> _TokenValues:
        ids = jnp.arange(x.shape[-1])
        x, y = (None if z is None else normalize(self._only(z, ids, read), read.temperature) for z in (x, y))
        return _values(x, y, jnp.take_along_axis(x.logp, read.tokens[..., None], axis=-1)[..., 0])

    def pullback(
        self, x: Array, y: Array | None, ids: Array, read: _TokenInputs, value: _TokenValues, given: _TokenValues
    ) -> Float[Array, "s n W"]:
        logp = _again(self._only(x, ids, read), read.temperature, value.by)
        if given.kl is not None:
            y = _again(self._only(y, ids, read), read.temperature, value.reference_by)
        return _cotangent(logp, y, ids == read.tokens[..., None], read.temperature, value, given)

    def _only(self, x: Array, ids: Array, read: _TokenInputs) -> Array:
        return mask_logits(x, ids, self.num_tokens, self.ends, read.eos_masked)


@dataclass(frozen=True)
class _KeptTokens:
    """Distribution over the kept tokens; a slot without any has log-prob and entropy 0."""

    needs_all_logits = True

    def value(self, x: Array, y: Array | None, read: _TokenInputs) -> _TokenValues:
        x, y = (None if z is None else normalize(at_kept_tokens(z, read.kept_tokens), read.temperature) for z in (x, y))
        sampled = jnp.sum(jnp.where(read.kept_tokens == read.tokens[..., None], x.logp, 0.0), axis=-1)
        any_kept = jnp.any(read.kept_tokens >= 0, axis=-1)
        of = _values(x, y, sampled)
        return of._replace(
            entropy=jnp.where(any_kept, of.entropy, 0.0), kl=None if y is None else jnp.where(any_kept, of.kl, 0.0)
        )

    def pullback(
        self, x: Array, y: Array | None, ids: Array, read: _TokenInputs, value: _TokenValues, given: _TokenValues
    ) -> Float[Array, "s n V"]:
        logp = _again(at_kept_tokens(x, read.kept_tokens), read.temperature, value.by)
        if given.kl is not None:
            y = _again(at_kept_tokens(y, read.kept_tokens), read.temperature, value.reference_by)
        at_kept = _cotangent(logp, y, read.kept_tokens == read.tokens[..., None], read.temperature, value, given)
        put = jax.vmap(jax.vmap(lambda row, kept_tokens, dx: row.at[kept_tokens].add(dx)))
        return put(jnp.zeros_like(x), jnp.maximum(read.kept_tokens, 0), jnp.where(read.kept_tokens >= 0, at_kept, 0.0))


def _values(x: Normalized, y: Normalized | None, logprob: Array) -> _TokenValues:
    kl = None if y is None else expectation(x.logp, x.logp - y.logp)
    return _TokenValues(logprob, entropy(x.logp), kl, x[1:], None if y is None else y[1:])


def _again(x: Float[Array, "s n W"], temperature: Array, by: tuple[Array, Array]) -> Float[Array, "s n W"]:
    """Log-probs of a part of the logits, normalized by the given largest logit and log-sum."""
    largest, log_sum = by
    return tempered(x, largest[..., None], temperature) - log_sum[..., None]


def _cotangent(
    logp: Float[Array, "s n W"],
    reference: Float[Array, "s n W"] | None,
    sampled: Bool[Array, "s n W"],
    temperature: Float[Array, "s n"],
    value: _TokenValues,
    given: _TokenValues,
) -> Float[Array, "s n W"]:
    """Cotangent of the logits, with log p of the policy and log q of the reference, in units of 1 / temperature:

    d log p(sampled) = [sampled] - p     dH = -p (log p + H)     dKL = p (log p - log q - KL)
    """
    seen = logp > -jnp.inf
    finite = jnp.where(seen, logp, 0.0)
    dx = jnp.zeros_like(logp)
    of_p = jnp.zeros_like(logp)
    if given.logprob is not None:
        dx = jnp.where(sampled, given.logprob[..., None], 0.0)
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
    """What is fixed when a scoring program is compiled."""

    model: ModelConfig
    layout: Layout
    num_tokens: int
    """Tokens of the tokenizer; later entries of the vocabulary are padding."""
    ends: tuple[int, ...] = ()
    """End tokens, which have no mass where `Batch.eos_masked`."""
    forward: ForwardOptions = ForwardOptions()  # noqa: RUF009


def score_tokens(params: PyTree, batch: Batch, scoring: Scoring, reference: PyTree | None = None) -> TokenScores:
    """Score the tokens in the loss mask. The only place where logits and tokens are shifted by one.

    Tokens outside the mask need no logits, and have log-prob, entropy and KL 0.

    Args:
        params: layers stacked. With a critic (`model/critic.py`) in the tree there are `values`, of every token.
        batch: with the tokens.
        scoring: what was fixed at compile time.
        reference: parameters of the same model, for `kl`, whose gradient flows into `params` alone.

    Raises:
        ValueError: the batch has `eos_masked`, and `scoring.ends` is empty.
    """
    cfg, layout, ends, num_tokens = scoring.model, scoring.layout, scoring.ends, scoring.num_tokens
    if batch.eos_masked is not None and not ends:
        raise ValueError("ends: got none, want the end tokens that `batch.eos_masked` masks")
    order = _Order.of(batch, layout)
    read = _TokenInputs(*map(order.take, (batch.tokens, batch.temperature, batch.kept_tokens, batch.eos_masked)))

    def activations(params: PyTree) -> Array:
        return order.take_before(
            hidden(params, batch.tokens, batch.position, batch.until, cfg, layout, scoring.forward)
        )

    def source(params: PyTree) -> HeadInputs:
        return HeadInputs(params["embed" if cfg.tied_head else "head"], activations(params))

    policy = source(params)
    other = None if reference is None else source(jax.lax.stop_gradient(reference))
    limit = num_tokens if num_tokens < cfg.vocab_size else None
    rule = _FullVocabulary(limit, ends) if batch.kept_tokens is None else _KeptTokens()
    of = over_logits(rule, Head.of(cfg, layout), policy, other, read, order.count)
    back = lambda x: None if x is None else order.put_back(x)  # noqa: E731
    critic = params.get("critic", params)
    values = critic_values(critic, policy.h if critic is params else activations(critic))
    return TokenScores(back(of.logprob), back(of.entropy), back(values), back(of.kl))


class _Order(NamedTuple):
    """Order of each shard's tokens in which those in the loss mask come first."""

    slots: Int[Array, "s N"]
    """Slot of each token, counted over the shard's rows end to end."""
    before: Int[Array, "s N"]
    """Slot of the previous token."""
    rank: Int[Array, "s N"]
    """Position of a slot's token in this order."""
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
