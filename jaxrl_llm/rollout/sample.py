"""Sampling of tokens from logits by Gumbel-max, one key per row: in two levels, or among K kept tokens where truncated.

Inverse-CDF sampling is avoided: noise of 1e-2 in the logits changes 0.6 % of the tokens under Gumbel-max and half of them under
inverse CDF, and summing over another mesh introduces such noise.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrl_llm.distribution.allowed_tokens import AllowedTokens, mask_disallowed
from jaxrl_llm.distribution.logits import entropy, process_logits, scale_by_temperature
from jaxrl_llm.distribution.top_k import most_likely, total_weight
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.parallel.layout import Layout

# Maximum number of blocks of the vocabulary. Independent of the mesh, because a row's noise must not depend on how the vocabulary
# is sharded. A power of two, so that a `tensor` shard holds whole blocks and no logits move.
BLOCKS = 128


class Vocabulary(flax.struct.PyTreeNode):
    """The tokenizer properties that sampling needs; static."""

    size: int = flax.struct.field(pytree_node=False)
    pad: int = flax.struct.field(pytree_node=False)
    eos: tuple[int, ...] = flax.struct.field(pytree_node=False)
    """End-of-sequence tokens; a row ends at any of them."""

    def ends(self, token: Int[Array, "*rows"]) -> Bool[Array, "*rows"]:
        """Return True for end-of-sequence tokens."""
        return reduce(operator.or_, (token == eos for eos in self.eos))


@dataclass(frozen=True)
class Decoding:
    """Static settings of the decode loop, apart from its sizes and caches. Hashable, so it may be a static argument of jit."""

    model: ModelConfig
    layout: Layout
    """Sharding of policy, caches and rows."""
    vocab: Vocabulary
    steps: int = 1
    """Maximum decode steps per chunk. A multiple of `interval`."""
    interval: int = 1
    """Decode steps between two checks that some row is still active."""
    max_kept_tokens: int = 0
    """K, the maximum number of tokens kept by truncation and recorded. 0: no truncation, and `top_p`, `top_k` and `min_p` are
    ignored."""
    raw_logprobs: bool = False
    """Also record each token's log-prob before truncation."""


class Controls(flax.struct.PyTreeNode):
    """Sampling parameters per row. Arrays: other values compile nothing.

    Filters apply in this order: the `top_k` most likely tokens; the smallest set of most likely tokens with `top_p` of the
    remaining probability; tokens with at least `min_p` times the probability of the most likely one. This is the order of Hugging
    Face's generate (vLLM applies `min_p` first). All three use probabilities after the temperature and always keep the most likely
    token."""

    temperature: Float[Array, " B"]
    top_p: Float[Array, " B"]
    """In (0, 1]; 1: all (Holtzman et al. 2020)."""
    top_k: Int[Array, " B"]
    """0, or more than K: all."""
    min_p: Float[Array, " B"]
    """In [0, 1); 0: all (Nguyen et al. 2024)."""
    min_new_tokens: Int[Array, " B"]
    """In slots below it end-of-sequence tokens have probability 0, before truncation, unless nothing else is allowed."""
    control: Int[Array, " B"]
    """State of the session's control tables in which the row starts; 0: its tokens are free."""
    budget: Int[Array, " B"]
    """Completion slot from which states of the control expire (`TokenAutomaton.expires`)."""


class SampledTokens(NamedTuple):
    """One sampled token per row and what is recorded of it; log-probs and entropies in nats."""

    token: Int[Array, " B"]
    logprob: Float[Array, " B"]
    """Log-prob of the token under the distribution it was sampled from, to the bit."""
    entropy: Float[Array, " B"]
    """Entropy of that distribution."""
    raw_logprob: Float[Array, " B"] | None
    """Log-prob of the token before truncation, with temperature and control."""
    kept_tokens: Int[Array, "B K"] | None
    """The kept tokens, most likely first, padded with -1."""
    overflow: Bool[Array, " B"] | None
    """True if K tokens were kept and another one qualified."""

    def only_where(self, sampled: Bool[Array, " B"]) -> "SampledTokens":
        """Return the same with nothing recorded of rows whose token was not sampled."""
        here = lambda x, other: None if x is None else jnp.where(sampled.reshape(-1, *(1,) * (x.ndim - 1)), x, other)  # noqa: E731
        return SampledTokens(
            self.token, here(self.logprob, 0.0), here(self.entropy, 0.0), here(self.raw_logprob, 0.0),
            here(self.kept_tokens, -1), here(self.overflow, False),
        )  # fmt: skip


def row_keys(key: Key[Array, ""], uid: Int[Array, " U"], sample: Int[Array, "U F"]) -> Key[Array, " B"]:
    """Return one key per row, derived from (key, prompt uid, sample number) and independent of the other rows.

    Args:
        key: the key of the step.
        uid: prompt uid of each sequence group.
        sample: sample number of each row.
    """
    fold = jax.vmap(jax.random.fold_in)
    per_group = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, uid)
    return fold(jnp.repeat(per_group, sample.shape[1]), sample.reshape(-1))


class FullDistribution(NamedTuple):
    """Distribution over the whole vocabulary."""

    logp: Float[Array, "B V"]


class TruncatedDistribution(NamedTuple):
    """Distribution over the tokens kept by top-k, top-p and min-p."""

    ids: Int[Array, "B K"]
    """Kept tokens, most likely first, padded with -1."""
    logp: Float[Array, "B K"]
    """`process_logits` over the kept tokens; -inf elsewhere."""
    raw: Float[Array, "B K"]
    """Log-probs of the same tokens over the whole vocabulary."""
    overflow: Bool[Array, " B"]


def sample_tokens(
    keys: Key[Array, " B"],
    slot: Int[Array, " B"],
    raw_logits: Float[Array, "B V"],
    controls: Controls,
    any_active: Bool[Array, ""],
    decoding: Decoding,
    allowed: AllowedTokens | None = None,
) -> SampledTokens:
    """Sample one token per row from its `distribution`.

    Args:
        keys: one per row (`row_keys`); folded with `slot` for the noise.
        slot: the completion slot that each row fills.
        raw_logits: logits of the model, before the temperature.
        controls: sampling parameters per row.
        any_active: False if all rows have finished, in which case the result is unused.
        decoding: `layout`, `vocab`, `max_kept_tokens` and `raw_logprobs` are used.
        allowed: tokens that the rows' controls allow; None: all.
    """
    of = distribution(raw_logits, controls, any_active, decoding, allowed)
    return sample_from(keys, slot, of, decoding.raw_logprobs)


def distribution(
    raw_logits: Float[Array, "B V"],
    controls: Controls,
    any_active: Bool[Array, ""],
    decoding: Decoding,
    allowed: AllowedTokens | None = None,
) -> FullDistribution | TruncatedDistribution:
    """Return the distribution of each row's next token; arguments as in `sample_tokens`.

    Where more than `decoding.max_kept_tokens` tokens qualify, the most likely are kept, so the distribution sampled from is always
    the recorded one.
    """

    def full(x: Array) -> FullDistribution:
        return FullDistribution(process_logits(x, controls.temperature, decoding.vocab.size, allowed))

    def truncated(x: Array) -> TruncatedDistribution:
        x = mask_disallowed(x, jnp.arange(x.shape[-1]), None, allowed)
        return truncate(x, decoding.vocab.size, controls, decoding.max_kept_tokens, decoding.layout)

    return _materialize(truncated if decoding.max_kept_tokens else full, raw_logits, any_active)


def sample_from(
    keys: Key[Array, " B"],
    slot: Int[Array, " B"],
    of: FullDistribution | TruncatedDistribution,
    raw_logprobs: bool,
) -> SampledTokens:
    """Sample one token per row from the distribution `of`; `raw_logprobs`: also return log-probs before truncation."""
    keys = jax.vmap(jax.random.fold_in)(keys, slot)
    if isinstance(of, TruncatedDistribution):
        rank = _rank(keys, of)[:, None]
        token, logprob, raw = (jnp.take_along_axis(x, rank, axis=-1)[:, 0] for x in (of.ids, of.logp, of.raw))
        return SampledTokens(token, logprob, entropy(of.logp), raw if raw_logprobs else None, of.ids, of.overflow)
    token = _two_level(keys, of.logp)
    logprob = logprob_of(of, token)
    return SampledTokens(token, logprob, entropy(of.logp), logprob if raw_logprobs else None, None, None)


def logprob_of(of: FullDistribution | TruncatedDistribution, token: Int[Array, " B"]) -> Float[Array, " B"]:
    """Return the log-prob of a token per row; -inf where it was not kept."""
    if isinstance(of, TruncatedDistribution):
        return jnp.max(jnp.where(of.ids == token[:, None], of.logp, -jnp.inf), axis=-1)
    return jnp.take_along_axis(of.logp, token[:, None], axis=-1)[:, 0]


def _materialize(make: Callable, raw: Float[Array, "B V"], any_active: Bool[Array, ""]):
    """Return `make(raw)`, computed once for all consumers, so that the recorded log-prob equals the sampled one to the bit.

    XLA:CPU would recompute it inside the gather of the log-prob, with other rounding (7e-7 nats); it does not recompute the result
    of a conditional. On TPU a conditional in the loop makes the compiler move caches, so only the CPU gets one.
    """

    def kept(raw: Array):
        blank = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(make, raw))  # noqa: E731
        return jax.lax.cond(any_active, lambda: make(raw), blank)

    return jax.lax.platform_dependent(raw, cpu=kept, default=make)


def _two_level(keys: Key[Array, " B"], logp: Float[Array, "B V"]) -> Int[Array, " B"]:
    """Sample a block of the vocabulary by its total probability, then a token inside it: exact, with BLOCKS + V / BLOCKS random
    numbers per row instead of V."""
    rows, vocab = logp.shape
    count = min(BLOCKS, vocab)
    blocks = jnp.pad(logp, ((0, 0), (0, -vocab % count)), constant_values=-jnp.inf).reshape(rows, count, -1)
    size = blocks.shape[2]
    # Two arrays of noise, not slices of one: the compiler shards the noise over the mesh, and slicing would move it.
    pair = jax.vmap(jax.random.split)(keys)
    across, within = _gumbel(pair[:, 0], count), _gumbel(pair[:, 1], size)
    block = jnp.argmax(jax.nn.logsumexp(blocks, axis=-1) + across, axis=-1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    offset = jnp.argmax(inside + within, axis=-1)
    return (block * size + offset).astype(jnp.int32)


def _rank(keys: Key[Array, " B"], of: TruncatedDistribution) -> Int[Array, " B"]:
    """Return the rank of the sampled token. Noise is keyed by token id, not by rank: small errors of the logits change many ranks
    and few tokens."""
    noise = jax.vmap(lambda key, ids: jax.vmap(lambda i: jax.random.gumbel(jax.random.fold_in(key, i)))(ids))
    return jnp.argmax(of.logp + noise(keys, of.ids), axis=-1)


def _gumbel(keys: Key[Array, " B"], num: int) -> Float[Array, "B num"]:
    return jax.vmap(lambda key: jax.random.gumbel(key, (num,)))(keys)


def truncate(
    x: Float[Array, "B V"], num_tokens: int, controls: Controls, max_kept_tokens: int, layout: Layout
) -> TruncatedDistribution:
    """Apply top-k, top-p and min-p, and keep at most `max_kept_tokens` tokens per row.

    Ties are broken by the order of `most_likely`: top-k keeps exactly k, and top-p stops as soon as it has its probability. A row
    with a NaN logit keeps no token, and its log-probs are NaN.

    Args:
        x: logits, f32; -inf where not allowed.
        num_tokens: tokens of the tokenizer; larger ids are padding of the vocabulary.
        controls: sampling parameters per row.
        max_kept_tokens: K.
        layout: sharding of rows and vocabulary.
    """
    # One token more than may be kept, to detect overflow.
    values, ids = most_likely(x, num_tokens, max_kept_tokens + 1, layout)
    largest, rank = jnp.max(values, axis=-1, keepdims=True), jnp.arange(max_kept_tokens + 1)
    z, total = (
        scale_by_temperature(values, largest, controls.temperature),
        total_weight(x, num_tokens, largest, controls.temperature),
    )
    top_p, top_k, min_p = (c[:, None] for c in (controls.top_p, controls.top_k, controls.min_p))
    unbounded = (top_k == 0) | (top_k > max_kept_tokens)
    in_k = unbounded | (rank < top_k)
    share = jnp.where(in_k, jnp.exp(z), 0.0)
    of_k = jnp.where(unbounded, total, jnp.sum(share, axis=-1, keepdims=True))
    in_p = (top_p >= 1) | (jnp.cumsum(share, axis=-1) - share < top_p * of_k)
    keep = jnp.isfinite(total) & (z > -jnp.inf) & in_k & in_p & (z >= jnp.log(min_p))
    # By count, because f32 cumulative sums need not be monotonic, and the kept tokens must be the most likely ones.
    keep = rank < jnp.sum(keep, axis=-1, keepdims=True)
    # The overflow column is cut off only here: XLA:CPU uses top-k only if its whole result is used, and sorts otherwise.
    first = lambda x: x[:, :max_kept_tokens]  # noqa: E731
    kept = first(jnp.where(keep, values, -jnp.inf))
    return TruncatedDistribution(
        ids=first(jnp.where(keep, ids, -1)),
        logp=process_logits(kept, controls.temperature, max_kept_tokens),
        raw=first(z - jnp.log(total)),
        overflow=jnp.any(keep & (rank == max_kept_tokens), axis=-1),
    )
