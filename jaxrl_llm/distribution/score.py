"""Scoring: log-probs, entropy, KL and critic values of the tokens of a batch, with exact gradients."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxrl_llm.distribution.allowed_tokens import AllowedTokens, mask_disallowed
from jaxrl_llm.distribution.control_tables import ControlTables, allowed_tokens
from jaxrl_llm.distribution.head import Head, HeadInputs, VocabularyBlock, over_logits
from jaxrl_llm.distribution.logits import (
    LogSoftmax,
    entropy,
    expectation,
    gather_kept,
    normalize,
    scale_by_temperature,
)
from jaxrl_llm.model.config import ForwardOptions, ModelConfig
from jaxrl_llm.model.critic import critic_values
from jaxrl_llm.model.transformer import hidden
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.types import Batch, PyTree


class TokenScores(NamedTuple):
    """Scores per token; 0 outside the loss mask, except `values`."""

    logprobs: Float[Array, "R T"]
    """log p(tokens[r, t] | prefix) in nats, at the batch's temperature and over the kept tokens if recorded. Valid inside the loss
    mask only."""
    entropy: Float[Array, "R T"]
    """Entropy of the distribution of tokens[r, t], in nats."""
    values: Float[Array, "R T"] | None = None
    """Critic value of the prefix of tokens[r, t]; None without a critic."""
    kl: Float[Array, "R T"] | None = None
    """Exact KL(policy || reference) of the distribution of tokens[r, t], in nats; None without a reference."""


class _TokenInputs(NamedTuple):
    """Columns of the batch that scoring uses, per token."""

    tokens: Int[Array, "*rows"]
    temperature: Float[Array, "*rows"]
    kept_tokens: Int[Array, "*rows K"] | None
    words: UInt32[Array, "*rows W"] | None
    automaton: Int[Array, "*rows"] | None
    """These two as in `AllowedTokens`."""


class _LogitScores(NamedTuple):
    """Scores of one token's logits, and the normalizers that the gradient needs."""

    logprob: Float[Array, "*rows"]
    entropy: Float[Array, "*rows"]
    kl: Float[Array, "*rows"] | None
    normalizer: tuple[Float[Array, "*rows"], Float[Array, "*rows"]]
    """`largest` and `log_sum` of the policy's logits."""
    reference_normalizer: tuple[Float[Array, "*rows"], Float[Array, "*rows"]] | None


@dataclass(frozen=True)
class _FullVocabulary:
    """Scores under the distribution over all allowed tokens."""

    num_tokens: int | None
    needs_full_vocabulary = False

    def value(self, x: Array, y: Array | None, block: VocabularyBlock, inputs: _TokenInputs) -> _LogitScores:
        x, y = (None if z is None else normalize(self._mask(z, block, inputs), inputs.temperature) for z in (x, y))
        return _scores(x, y, jnp.take_along_axis(x.logp, inputs.tokens[..., None], axis=-1)[..., 0])

    def pullback(
        self,
        x: Array,
        y: Array | None,
        block: VocabularyBlock,
        inputs: _TokenInputs,
        value: _LogitScores,
        given: _LogitScores,
    ) -> Float[Array, "s n W"]:
        logp = _renormalize(self._mask(x, block, inputs), inputs.temperature, value.normalizer)
        if given.kl is not None:
            y = _renormalize(self._mask(y, block, inputs), inputs.temperature, value.reference_normalizer)
        return _cotangent(logp, y, block.ids == inputs.tokens[..., None], inputs.temperature, value, given)

    def _mask(self, x: Array, block: VocabularyBlock, inputs: _TokenInputs) -> Array:
        allowed = None if inputs.words is None else AllowedTokens(inputs.words, inputs.automaton, block.classes)
        return mask_disallowed(x, block.ids, self.num_tokens, allowed)


@dataclass(frozen=True)
class _KeptTokens:
    """Scores under the distribution over the kept tokens; without any, log-prob and entropy are 0."""

    needs_full_vocabulary = True

    def value(self, x: Array, y: Array | None, block: VocabularyBlock, inputs: _TokenInputs) -> _LogitScores:
        x, y = (
            None if z is None else normalize(gather_kept(z, inputs.kept_tokens), inputs.temperature) for z in (x, y)
        )
        logprob = jnp.sum(jnp.where(inputs.kept_tokens == inputs.tokens[..., None], x.logp, 0.0), axis=-1)
        any_kept = jnp.any(inputs.kept_tokens >= 0, axis=-1)
        of = _scores(x, y, logprob)
        return of._replace(
            entropy=jnp.where(any_kept, of.entropy, 0.0), kl=None if y is None else jnp.where(any_kept, of.kl, 0.0)
        )

    def pullback(
        self,
        x: Array,
        y: Array | None,
        block: VocabularyBlock,
        inputs: _TokenInputs,
        value: _LogitScores,
        given: _LogitScores,
    ) -> Float[Array, "s n V"]:
        logp = _renormalize(gather_kept(x, inputs.kept_tokens), inputs.temperature, value.normalizer)
        if given.kl is not None:
            y = _renormalize(gather_kept(y, inputs.kept_tokens), inputs.temperature, value.reference_normalizer)
        at_kept = _cotangent(logp, y, inputs.kept_tokens == inputs.tokens[..., None], inputs.temperature, value, given)
        put = jax.vmap(jax.vmap(lambda row, kept_tokens, dx: row.at[kept_tokens].add(dx)))
        return put(
            jnp.zeros_like(x), jnp.maximum(inputs.kept_tokens, 0), jnp.where(inputs.kept_tokens >= 0, at_kept, 0.0)
        )


def _scores(x: LogSoftmax, y: LogSoftmax | None, logprob: Array) -> _LogitScores:
    kl = None if y is None else expectation(x.logp, x.logp - y.logp)
    return _LogitScores(logprob, entropy(x.logp), kl, x[1:], None if y is None else y[1:])


def _renormalize(
    x: Float[Array, "s n W"], temperature: Array, normalizer: tuple[Array, Array]
) -> Float[Array, "s n W"]:
    """Return log-probs of a slice of the logits, given the normalizer of all of them."""
    largest, log_sum = normalizer
    return scale_by_temperature(x, largest[..., None], temperature) - log_sum[..., None]


def _cotangent(
    logp: Float[Array, "s n W"],
    reference: Float[Array, "s n W"] | None,
    is_sampled: Bool[Array, "s n W"],
    temperature: Float[Array, "s n"],
    value: _LogitScores,
    given: _LogitScores,
) -> Float[Array, "s n W"]:
    """Return the cotangent of the logits. Times temperature, for log p of the policy, log q of the reference and sampled token t:

    d log p(t) = [t] - p     dH = -p (log p + H)     dKL = p (log p - log q - KL)
    """
    seen = logp > -jnp.inf
    finite = jnp.where(seen, logp, 0.0)
    dx = jnp.zeros_like(logp)
    of_p = jnp.zeros_like(logp)
    if given.logprob is not None:
        dx = jnp.where(is_sampled, given.logprob[..., None], 0.0)
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
    """Static settings of programs that score tokens."""

    model: ModelConfig
    layout: Layout
    num_tokens: int
    """Tokens of the tokenizer; larger ids are padding of the vocabulary."""
    forward: ForwardOptions = ForwardOptions()  # noqa: RUF009


def score_tokens(
    params: PyTree,
    batch: Batch,
    scoring: Scoring,
    reference: PyTree | None = None,
    tables: ControlTables | None = None,
) -> TokenScores:
    """Score the tokens in the loss mask. The only place where logits are shifted against tokens.

    Tokens outside the mask need no logits; their log-prob, entropy and KL are 0.

    Args:
        params: with stacked layers. With a critic (`model/critic.py`), `values` are returned for every token.
        batch: the tokens and how they were sampled.
        scoring: static settings.
        reference: parameters of the reference model; enables `kl`, whose gradient flows into `params` only.
        tables: in which `batch.control_state` is read.

    Raises:
        ValueError: the batch has `control_state` that has to be read, and there are no tables.
    """
    cfg, layout, num_tokens = scoring.model, scoring.layout, scoring.num_tokens
    order = _ScoringOrder.of(batch, layout)
    allowed = _allowed(batch, tables, order)
    inputs = _TokenInputs(
        *map(order.take, (batch.tokens, batch.temperature, batch.kept_tokens)),
        *((None, None) if allowed is None else (allowed.words, allowed.automaton)),
    )

    def activations(params: PyTree) -> Array:
        return order.take_before(
            hidden(params, batch.tokens, batch.position, batch.until, cfg, layout, scoring.forward)
        )

    def head_inputs(params: PyTree) -> HeadInputs:
        return HeadInputs(params["embed" if cfg.tied_head else "head"], activations(params))

    policy = head_inputs(params)
    other = None if reference is None else head_inputs(jax.lax.stop_gradient(reference))
    limit = num_tokens if num_tokens < cfg.vocab_size else None
    rule = _FullVocabulary(limit) if batch.kept_tokens is None else _KeptTokens()
    classes = None if allowed is None else allowed.classes
    of = over_logits(rule, Head.of(cfg, layout), policy, other, inputs, order.count, classes)
    back = lambda x: None if x is None else order.put_back(x)  # noqa: E731
    critic = params.get("critic", params)
    values = critic_values(critic, policy.h if critic is params else activations(critic))
    return TokenScores(back(of.logprob), back(of.entropy), back(values), back(of.kl))


def _allowed(batch: Batch, tables: ControlTables | None, order: "_ScoringOrder") -> AllowedTokens | None:
    """Return the allowed tokens in the order of scoring; None: all are. Kept tokens are allowed ones already."""
    if batch.control_state is None or batch.kept_tokens is not None:
        return None
    if tables is None:
        raise ValueError("tables: got none, want the control tables in which `batch.control_state` is read")
    return allowed_tokens(tables, order.take(batch.control_state))


class _ScoringOrder(NamedTuple):
    """Order in which each row shard's tokens are scored: flattened, tokens in the loss mask first."""

    slots: Int[Array, "s N"]
    """Flat slot, within the shard, of each token in the order."""
    before: Int[Array, "s N"]
    """Flat slot of the token that precedes it."""
    rank: Int[Array, "s N"]
    """Position in the order of each flat slot; the inverse of `slots`."""
    count: Int[Array, " s"]
    """Tokens in the loss mask."""
    layout: Layout
    shape: tuple[int, int]

    @staticmethod
    def of(batch: Batch, layout: Layout) -> "_ScoringOrder":
        rows, slots = batch.tokens.shape
        by_shard = lambda x: layout.constrain(x.reshape(layout.size("rows"), -1), "rows", None)  # noqa: E731
        mask = by_shard(batch.loss_mask)
        order = jnp.argsort(~mask, axis=-1, stable=True)
        first = jnp.arange(rows)[:, None] % (rows // len(mask)) * slots
        before = jnp.take_along_axis(by_shard(first + batch.before), order, axis=-1)
        return _ScoringOrder(order, before, jnp.argsort(order, axis=-1), jnp.sum(mask, axis=-1), layout, (rows, slots))

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
