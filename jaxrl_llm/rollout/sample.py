"""From logits to a token: Gumbel-max, one key a row. Plain draws take two levels; truncated ones look at K tokens alone.

Never the inverse of a cumulative sum: noise of 1e-2 in the logits changes 0.6 % of the tokens under Gumbel-max and half of
them under the inverse, and sums over another mesh are such noise.
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

from jaxrl_llm.distribution.score import entropy, process_logits, tempered
from jaxrl_llm.distribution.top_k import Allowed, likeliest, mass
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.parallel.layout import Layout

# Of the vocabulary, at most. Fixed, whatever the mesh: the noise a row draws must not depend on how the vocabulary is split.
# It is the number of blocks that is a power of two, not their size: then a `tensor` shard holds whole blocks, and no logits move.
BLOCKS = 128


class Vocabulary(flax.struct.PyTreeNode):
    """What sampling must know of the tokenizer; static."""

    size: int = flax.struct.field(pytree_node=False)
    pad: int = flax.struct.field(pytree_node=False)
    eos: tuple[int, ...] = flax.struct.field(pytree_node=False)
    """A row ends at any of them."""

    def ends(self, token: Int[Array, "*rows"]) -> Bool[Array, "*rows"]:
        return reduce(operator.or_, (token == eos for eos in self.eos))


@dataclass(frozen=True)
class Decoding:
    """What is fixed when the decode loop is compiled, beside its sizes and its caches. Hashable, so it may be static in a jit."""

    model: ModelConfig
    layout: Layout
    """Where policy, caches and rows lie."""
    vocab: Vocabulary
    steps: int = 1
    """Decode steps per segment at most: the lines of its record. A multiple of `interval`."""
    interval: int = 1
    """Steps from one check whether any row is still alive to the next."""
    max_kept_tokens: int = 0
    """K, the number of tokens that a truncated draw keeps at most and records. 0: draws are not truncated, and `top_p`, `top_k`
    and `min_p` are not read."""
    raw_logprobs: bool = False
    """Record each token's log-prob before truncation too."""


class Controls(flax.struct.PyTreeNode):
    """What the distribution is made with, row by row. Arrays: other values compile nothing.

    A row keeps its `top_k` likeliest tokens; of these the smallest set of likeliest ones that holds `top_p` of their mass; of these
    the ones with at least `min_p` of the likeliest one's probability. This is the order of Hugging Face's generate (vLLM asks
    for `min_p` first). All three look at probabilities after the temperature. No set is empty: the likeliest token is in each.
    """

    temperature: Float[Array, " B"]
    top_p: Float[Array, " B"]
    """In (0, 1]; 1: all (Holtzman et al. 2020)."""
    top_k: Int[Array, " B"]
    """0, or more than the support holds: all."""
    min_p: Float[Array, " B"]
    """In [0, 1); 0: all (Nguyen et al. 2024)."""
    min_new_tokens: Int[Array, " B"]
    """In slots below it no end token is drawn: its probability is 0 there, before anything is truncated."""


class Drawn(NamedTuple):
    token: Int[Array, " B"]
    logprob: Float[Array, " B"]
    """Of the token in the distribution that it was drawn from, to the bit; nats."""
    entropy: Float[Array, " B"]
    """Of that distribution."""
    raw_logprob: Float[Array, " B"] | None
    """Of the token before truncation: temperature and barred end tokens alone."""
    kept_tokens: Int[Array, "B K"] | None
    """The tokens kept, the likeliest first, -1 where they are fewer."""
    overflow: Bool[Array, " B"] | None
    """K tokens were kept, and the next would have been."""


def row_keys(key: Key[Array, ""], uid: Int[Array, " U"], first: Int[Array, " U"], each: int) -> Key[Array, " B"]:
    """One key a row from (run, prompt uid, sample number), unit by unit: samples first, first + 1, ... of `each` rows.

    A row knows nothing of its neighbors.
    """
    fold = jax.vmap(jax.random.fold_in)
    per_unit = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, uid)
    number = first[:, None] + jnp.arange(each)
    return fold(jnp.repeat(per_unit, each), number.reshape(-1))


class Plain(NamedTuple):
    """The distribution of a draw from the whole vocabulary."""

    logp: Float[Array, "B V"]


class Truncated(NamedTuple):
    """The distribution of a truncated draw."""

    ids: Int[Array, "B K"]
    """Tokens kept, the likeliest first; -1 from the first that is not."""
    logp: Float[Array, "B K"]
    """`process_logits` over those kept; -inf elsewhere."""
    raw: Float[Array, "B K"]
    """The same tokens' log-probs over the whole vocabulary."""
    overflow: Bool[Array, " B"]


def draw(
    keys: Key[Array, " B"],
    slot: Int[Array, " B"],
    raw_logits: Float[Array, "B V"],
    controls: Controls,
    live: Bool[Array, ""],
    decoding: Decoding,
) -> Drawn:
    """One token per row from its `distribution`, and what is recorded of it.

    Args:
        keys: one per row (`row_keys`); with `slot` it names the noise.
        slot: the completion slot that each row fills.
        raw_logits: the model's, not yet divided by a temperature.
        controls: what the distribution is made with, row by row.
        live: some row's token counts; else nothing need be right.
        decoding: read are its layout, vocabulary, support and whether raw log-probs are recorded.
    """
    return draw_from(keys, slot, distribution(slot, raw_logits, controls, live, decoding), decoding.raw_logprobs)


def distribution(
    slot: Int[Array, " B"],
    raw_logits: Float[Array, "B V"],
    controls: Controls,
    live: Bool[Array, ""],
    decoding: Decoding,
) -> Plain | Truncated:
    """What completion slot `slot[b]` of row b is drawn from; arguments as in `draw`.

    Where the controls would keep more than `decoding.max_kept_tokens` tokens, the likeliest stay: the distribution that is
    sampled from is always the recorded one.
    """
    vocab, eos_masked = decoding.vocab, slot < controls.min_new_tokens

    def plain(x: Array) -> Plain:
        return Plain(process_logits(x, controls.temperature, vocab.size, vocab.eos, eos_masked))

    def truncated(x: Array) -> Truncated:
        return truncate(
            x, Allowed(eos_masked, vocab.size, vocab.eos), controls, decoding.max_kept_tokens, decoding.layout
        )

    return _shared(truncated if decoding.max_kept_tokens else plain, raw_logits, live)


def draw_from(keys: Key[Array, " B"], slot: Int[Array, " B"], of: Plain | Truncated, raw_logprobs: bool) -> Drawn:
    keys = jax.vmap(jax.random.fold_in)(keys, slot)
    if isinstance(of, Truncated):
        rank = _rank(keys, of)[:, None]
        token, logprob, raw = (jnp.take_along_axis(x, rank, axis=-1)[:, 0] for x in (of.ids, of.logp, of.raw))
        return Drawn(token, logprob, entropy(of.logp), raw if raw_logprobs else None, of.ids, of.overflow)
    token = _two_level(keys, of.logp)
    logprob = jnp.take_along_axis(of.logp, token[:, None], axis=-1)[:, 0]
    return Drawn(token, logprob, entropy(of.logp), logprob if raw_logprobs else None, None, None)


def _shared(make: Callable, raw: Float[Array, "B V"], live: Bool[Array, ""]):
    """`make(raw)` as arrays that all their readers share, so that the log-prob stored is the one drawn from, to the bit.

    XLA:CPU would compute it anew inside the gather that stores one, and round it otherwise there (7e-7 nats); what a conditional
    gives it keeps. On a TPU a conditional in the loop makes the compiler move caches, so only the CPU gets one.
    """

    def kept(raw: Array):
        blank = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(make, raw))  # noqa: E731
        return jax.lax.cond(live, lambda: make(raw), blank)

    return jax.lax.platform_dependent(raw, cpu=kept, default=make)


def _two_level(keys: Key[Array, " B"], logp: Float[Array, "B V"]) -> Int[Array, " B"]:
    """A block of the vocabulary by its total mass, then a token inside it: exact, and noise for BLOCKS + V / BLOCKS entries
    instead of V."""
    rows, vocab = logp.shape
    count = min(BLOCKS, vocab)
    blocks = jnp.pad(logp, ((0, 0), (0, -vocab % count)), constant_values=-jnp.inf).reshape(rows, count, -1)
    size = blocks.shape[2]
    # Two draws, not two slices of one: the compiler splits the noise over the mesh, and a slice would move it.
    pair = jax.vmap(jax.random.split)(keys)
    across, within = _gumbel(pair[:, 0], count), _gumbel(pair[:, 1], size)
    block = jnp.argmax(jax.nn.logsumexp(blocks, axis=-1) + across, axis=-1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    place = jnp.argmax(inside + within, axis=-1)
    return (block * size + place).astype(jnp.int32)


def _rank(keys: Key[Array, " B"], of: Truncated) -> Int[Array, " B"]:
    """A token's noise is named by its id, not by its rank: small errors of the logits change many ranks and few tokens."""
    noise = jax.vmap(lambda key, ids: jax.vmap(lambda i: jax.random.gumbel(jax.random.fold_in(key, i)))(ids))
    return jnp.argmax(of.logp + noise(keys, of.ids), axis=-1)


def _gumbel(keys: Key[Array, " B"], num: int) -> Float[Array, "B num"]:
    return jax.vmap(lambda key: jax.random.gumbel(key, (num,)))(keys)


def truncate(
    x: Float[Array, "B V"], allowed: Allowed, controls: Controls, max_kept_tokens: int, layout: Layout
) -> Truncated:
    """What the controls keep of the tokens that are allowed, at most `max_kept_tokens` of them.

    Of equal logits the one that is earlier in the order of `likeliest` goes first: top-k keeps exactly k, and top-p stops as soon
    as it has its mass. A row with a logit that is not a number keeps nothing, and its log-probs are NaN.
    """
    x = x.astype(jnp.float32)
    # One more than may be kept: would the controls have kept it too?
    values, ids = likeliest(x, allowed, max_kept_tokens + 1, layout)
    largest, rank = jnp.max(values, axis=-1, keepdims=True), jnp.arange(max_kept_tokens + 1)
    z, total = tempered(values, largest, controls.temperature), mass(x, allowed, largest, controls.temperature)
    top_p, top_k, min_p = (c[:, None] for c in (controls.top_p, controls.top_k, controls.min_p))
    unbounded = (top_k == 0) | (top_k > max_kept_tokens)
    in_k = unbounded | (rank < top_k)
    share = jnp.where(in_k, jnp.exp(z), 0.0)
    of_k = jnp.where(unbounded, total, jnp.sum(share, axis=-1, keepdims=True))
    in_p = (top_p >= 1) | (jnp.cumsum(share, axis=-1) - share < top_p * of_k)
    keep = jnp.isfinite(total) & (z > -jnp.inf) & in_k & in_p & (z >= jnp.log(min_p))
    # By their number: sums of f32 need not grow from rank to rank, and what is kept must be the likeliest.
    keep = rank < jnp.sum(keep, axis=-1, keepdims=True)
    # The last is cut off at the end: XLA:CPU finds a top-k only where all of it is read, and else sorts.
    first = lambda x: x[:, :max_kept_tokens]  # noqa: E731
    kept = first(jnp.where(keep, values, -jnp.inf))
    return Truncated(
        ids=first(jnp.where(keep, ids, -1)),
        logp=process_logits(kept, controls.temperature, max_kept_tokens),
        raw=first(z - jnp.log(total)),
        overflow=jnp.any(keep & (rank == max_kept_tokens), axis=-1),
    )
