"""Sampling of a token from logits: Gumbel-max with one key per row, in two levels, or over the K kept tokens if truncated.

Never by the inverse of a cumulative sum: noise of 1e-2 in the logits changes 0.6 % of the tokens under Gumbel-max and half of
them under the inverse, and sums in another order, as on another mesh, are such noise.
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

from jaxrl_llm.distribution.logits import entropy, process_logits, tempered
from jaxrl_llm.distribution.top_k import AllowedTokens, mass, top_k_tokens
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.parallel.layout import Layout

# Maximum number of blocks of the vocabulary. Fixed for every mesh: a row's noise must not depend on how the vocabulary is split.
# Their number, not their size, is a power of two, so that a `tensor` shard holds whole blocks and no logits move.
BLOCKS = 128


class Vocabulary(flax.struct.PyTreeNode):
    """The tokenizer's part in sampling; static."""

    size: int = flax.struct.field(pytree_node=False)
    pad: int = flax.struct.field(pytree_node=False)
    eos: tuple[int, ...] = flax.struct.field(pytree_node=False)
    """End tokens: a row ends at any of them."""

    def ends(self, token: Int[Array, "*rows"]) -> Bool[Array, "*rows"]:
        return reduce(operator.or_, (token == eos for eos in self.eos))


@dataclass(frozen=True)
class Decoding:
    """What is fixed when the decode loop is compiled, apart from sizes and caches. Hashable, so it may be static in a jit."""

    model: ModelConfig
    layout: Layout
    """Layout of policy, caches and rows."""
    vocab: Vocabulary
    steps: int = 1
    """Maximum number of decode steps per chunk, and number of lines of its record. A multiple of `interval`."""
    interval: int = 1
    """Steps between two checks whether any row is active."""
    max_kept_tokens: int = 0
    """K, maximum number of tokens that truncated sampling keeps and records. 0: sampling is not truncated, and `top_p`, `top_k`
    and `min_p` are not read."""
    raw_logprobs: bool = False
    """Record each token's log-prob before truncation too."""


class Controls(flax.struct.PyTreeNode):
    """Parameters of each row's distribution. They are arrays, so other values compile nothing.

    A row keeps its `top_k` likeliest tokens; of these the smallest set of likeliest ones that holds `top_p` of their mass; of these
    the ones with at least `min_p` of the likeliest one's probability. This is the order of Hugging Face's generate (vLLM asks
    for `min_p` first). All three look at probabilities after the temperature. No set is empty: the likeliest token is in each.
    """

    temperature: Float[Array, " B"]
    top_p: Float[Array, " B"]
    """In (0, 1]; 1: all (Holtzman et al. 2020)."""
    top_k: Int[Array, " B"]
    """0, or more than `max_kept_tokens`: all."""
    min_p: Float[Array, " B"]
    """In [0, 1); 0: all (Nguyen et al. 2024)."""
    min_new_tokens: Int[Array, " B"]
    """In slots below it end tokens have probability 0, before anything is truncated."""


class SampledToken(NamedTuple):
    token: Int[Array, " B"]
    logprob: Float[Array, " B"]
    """Log-prob of the token in the distribution it was sampled from, equal to the bit; nats."""
    entropy: Float[Array, " B"]
    """Entropy of that distribution, nats."""
    raw_logprob: Float[Array, " B"] | None
    """Log-prob of the token before truncation: with temperature and masked end tokens alone."""
    kept_tokens: Int[Array, "B K"] | None
    """Kept tokens, the likeliest first; -1 after the last."""
    overflow: Bool[Array, " B"] | None
    """K tokens were kept, and the next one would have been."""


def row_keys(key: Key[Array, ""], uid: Int[Array, " U"], first: Int[Array, " U"], rows: int) -> Key[Array, " B"]:
    """One key per row from (run, prompt uid, sample number): samples first, first + 1, ... of each sequence group.

    A row's key does not depend on the other rows.

    Args:
        key: of the run.
        uid: of each group's prompt.
        first: sample number of each group's first row.
        rows: F, rows per group.
    """
    fold = jax.vmap(jax.random.fold_in)
    per_group = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, uid)
    number = first[:, None] + jnp.arange(rows)
    return fold(jnp.repeat(per_group, rows), number.reshape(-1))


class Plain(NamedTuple):
    """Distribution over the whole vocabulary."""

    logp: Float[Array, "B V"]


class Truncated(NamedTuple):
    """Distribution over the kept tokens."""

    ids: Int[Array, "B K"]
    """Kept tokens, the likeliest first; -1 after the last."""
    logp: Float[Array, "B K"]
    """`process_logits` over the kept tokens; -inf elsewhere."""
    raw: Float[Array, "B K"]
    """Log-probs of the same tokens over the whole vocabulary."""
    overflow: Bool[Array, " B"]


def sample_token(
    keys: Key[Array, " B"],
    slot: Int[Array, " B"],
    raw_logits: Float[Array, "B V"],
    controls: Controls,
    live: Bool[Array, ""],
    decoding: Decoding,
) -> SampledToken:
    """Sample one token per row from its `distribution`, with what is recorded of it.

    Args:
        keys: one per row (`row_keys`), which with `slot` determines the noise.
        slot: the completion slot that each row fills.
        raw_logits: the model's, not divided by the temperature.
        controls: parameters of each row's distribution.
        live: some row is active; otherwise results may be wrong.
        decoding: its layout, vocabulary, `max_kept_tokens` and `raw_logprobs` are read.
    """
    return sample_from(keys, slot, distribution(slot, raw_logits, controls, live, decoding), decoding.raw_logprobs)


def distribution(
    slot: Int[Array, " B"],
    raw_logits: Float[Array, "B V"],
    controls: Controls,
    live: Bool[Array, ""],
    decoding: Decoding,
) -> Plain | Truncated:
    """Distribution of completion slot `slot[b]` of row b. Arguments as in `sample_token`.

    If the controls would keep more than `decoding.max_kept_tokens` tokens, only the likeliest are kept, so that the distribution
    sampled from is always the recorded one.
    """
    vocab, eos_masked = decoding.vocab, slot < controls.min_new_tokens

    def plain(x: Array) -> Plain:
        return Plain(process_logits(x, controls.temperature, vocab.size, vocab.eos, eos_masked))

    def truncated(x: Array) -> Truncated:
        return truncate(
            x, AllowedTokens(eos_masked, vocab.size, vocab.eos), controls, decoding.max_kept_tokens, decoding.layout
        )

    return _shared(truncated if decoding.max_kept_tokens else plain, raw_logits, live)


def sample_from(
    keys: Key[Array, " B"], slot: Int[Array, " B"], of: Plain | Truncated, raw_logprobs: bool
) -> SampledToken:
    """Sample one token per row from a given distribution. Arguments as in `sample_token`."""
    keys = jax.vmap(jax.random.fold_in)(keys, slot)
    if isinstance(of, Truncated):
        rank = _rank(keys, of)[:, None]
        token, logprob, raw = (jnp.take_along_axis(x, rank, axis=-1)[:, 0] for x in (of.ids, of.logp, of.raw))
        return SampledToken(token, logprob, entropy(of.logp), raw if raw_logprobs else None, of.ids, of.overflow)
    token = _two_level(keys, of.logp)
    logprob = jnp.take_along_axis(of.logp, token[:, None], axis=-1)[:, 0]
    return SampledToken(token, logprob, entropy(of.logp), logprob if raw_logprobs else None, None, None)


def _shared(make: Callable, raw: Float[Array, "B V"], live: Bool[Array, ""]):
    """`make(raw)` as arrays that all uses share, so that the stored log-prob equals the one sampled from to the bit.

    XLA:CPU would recompute it inside the gather that stores it, and round it differently (7e-7 nats); it keeps the result of a
    conditional. On a TPU a conditional in the loop makes the compiler move caches, so only the CPU gets one.
    """

    def computed_once(raw: Array):
        zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(make, raw))  # noqa: E731
        return jax.lax.cond(live, lambda: make(raw), zeros)

    return jax.lax.platform_dependent(raw, cpu=computed_once, default=make)


def _two_level(keys: Key[Array, " B"], logp: Float[Array, "B V"]) -> Int[Array, " B"]:
    """Sample a block of the vocabulary by its total mass, then a token of the block: exact, with noise for BLOCKS + V / BLOCKS
    entries instead of V."""
    rows, vocab = logp.shape
    count = min(BLOCKS, vocab)
    blocks = jnp.pad(logp, ((0, 0), (0, -vocab % count)), constant_values=-jnp.inf).reshape(rows, count, -1)
    size = blocks.shape[2]
    # Two keys, not two slices of one noise array: the compiler splits the noise over the mesh, and a slice would move it.
    pair = jax.vmap(jax.random.split)(keys)
    across, within = _gumbel(pair[:, 0], count), _gumbel(pair[:, 1], size)
    block = jnp.argmax(jax.nn.logsumexp(blocks, axis=-1) + across, axis=-1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    place = jnp.argmax(inside + within, axis=-1)
    return (block * size + place).astype(jnp.int32)


def _rank(keys: Key[Array, " B"], of: Truncated) -> Int[Array, " B"]:
    """Rank of the sampled token. Noise depends on a token's id, not on its rank: small errors in logits change many ranks."""
    noise = jax.vmap(lambda key, ids: jax.vmap(lambda i: jax.random.gumbel(jax.random.fold_in(key, i)))(ids))
    return jnp.argmax(of.logp + noise(keys, of.ids), axis=-1)


def _gumbel(keys: Key[Array, " B"], num: int) -> Float[Array, "B num"]:
    return jax.vmap(lambda key: jax.random.gumbel(key, (num,)))(keys)


def truncate(
    x: Float[Array, "B V"], allowed: AllowedTokens, controls: Controls, max_kept_tokens: int, layout: Layout
) -> Truncated:
    """Apply the controls to the allowed tokens, of which at most `max_kept_tokens` are kept.

    Equal logits are ordered as by `top_k_tokens`: top-k keeps exactly k, and top-p stops as soon as it has its mass. A row with a
    NaN logit keeps nothing, and its log-probs are NaN.

    Args:
        x: logits, not divided by the temperature.
        allowed: tokens that may be sampled.
        controls: parameters of each row's distribution.
        max_kept_tokens: K.
        layout: of the logits.
    """
    x = x.astype(jnp.float32)
    # One more than may be kept shows whether the controls would have kept it too.
    values, ids = top_k_tokens(x, allowed, max_kept_tokens + 1, layout)
    largest, rank = jnp.max(values, axis=-1, keepdims=True), jnp.arange(max_kept_tokens + 1)
    z, total = tempered(values, largest, controls.temperature), mass(x, allowed, largest, controls.temperature)
    top_p, top_k, min_p = (c[:, None] for c in (controls.top_p, controls.top_k, controls.min_p))
    unbounded = (top_k == 0) | (top_k > max_kept_tokens)
    in_k = unbounded | (rank < top_k)
    share = jnp.where(in_k, jnp.exp(z), 0.0)
    of_k = jnp.where(unbounded, total, jnp.sum(share, axis=-1, keepdims=True))
    in_p = (top_p >= 1) | (jnp.cumsum(share, axis=-1) - share < top_p * of_k)
    keep = jnp.isfinite(total) & (z > -jnp.inf) & in_k & in_p & (z >= jnp.log(min_p))
    # By their number: sums in f32 need not grow from rank to rank, and the kept tokens must be the likeliest.
    keep = rank < jnp.sum(keep, axis=-1, keepdims=True)
    # The last one is cut off at the end: XLA:CPU uses its top-k only if the whole result is read, and otherwise sorts.
    first = lambda x: x[:, :max_kept_tokens]  # noqa: E731
    kept = first(jnp.where(keep, values, -jnp.inf))
    return Truncated(
        ids=first(jnp.where(keep, ids, -1)),
        logp=process_logits(kept, controls.temperature, max_kept_tokens),
        raw=first(z - jnp.log(total)),
        overflow=jnp.any(keep & (rank == max_kept_tokens), axis=-1),
    )
