"""From log-probabilities to a token: Gumbel-max in two levels, one key a row.

Never the inverse of a cumulative sum: noise of 1e-2 in the logits changes 0.6 % of the tokens under Gumbel-max and half of
them under the inverse, and sums over another mesh are such noise.
"""

import operator
from functools import reduce
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrl_llm.model.distribution import entropy, process_logits

# Of the vocabulary, at most. Fixed, whatever the mesh: the noise a row draws must not depend on how the vocabulary is split.
# It is the number of blocks that is a power of two, not their size: then a `tensor` shard holds whole blocks, and no logits move.
BLOCKS = 128


def row_keys(key: Key[Array, ""], uid: Int[Array, " U"], first: Int[Array, " U"], each: int) -> Key[Array, " B"]:
    """One key a row from (run, prompt uid, sample number), unit by unit: samples first, first + 1, ... of `each` rows.

    A row knows nothing of its neighbours.
    """
    fold = jax.vmap(jax.random.fold_in)
    per_unit = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, uid)
    number = first[:, None] + jnp.arange(each)
    return fold(jnp.repeat(per_unit, each), number.reshape(-1))


class Vocabulary(flax.struct.PyTreeNode):
    """What decoding must know of the tokenizer; static."""

    size: int = flax.struct.field(pytree_node=False)
    pad: int = flax.struct.field(pytree_node=False)
    eos: tuple[int, ...] = flax.struct.field(pytree_node=False)
    """A row ends at any of them."""

    def ends(self, token: Int[Array, "*rows"]) -> Bool[Array, "*rows"]:
        return reduce(operator.or_, (token == eos for eos in self.eos))


class Controls(flax.struct.PyTreeNode):
    """What shapes the distribution, a row each: arrays, so that another value compiles nothing."""

    temperature: Float[Array, " B"]
    top_p: Float[Array, " B"]
    top_k: Int[Array, " B"]
    min_p: Float[Array, " B"]
    min_new_tokens: Int[Array, " B"]


class Drawn(NamedTuple):
    token: Int[Array, " B"]
    logprob: Float[Array, " B"]
    entropy: Float[Array, " B"]
    raw_logprob: Float[Array, " B"] | None = None
    support: Int[Array, "B K"] | None = None
    overflow: Bool[Array, " B"] | None = None


def draw(
    keys: Key[Array, " B"],
    slot: Int[Array, " B"],
    raw: Float[Array, "B V"],
    controls: Controls,
    live: Bool[Array, ""],
    vocab: Vocabulary,
    support: int,
    raw_logprobs: bool,
) -> Drawn:
    """One token a row. `slot` is the completion slot: with the row's key it names the noise."""
    logp = _distribution(raw, controls.temperature, live, vocab.size)
    token, logprob = pick(keys, slot, logp)
    return Drawn(token, logprob, entropy(logp))


def _distribution(raw: Array, temperature: Array, live: Array, num_tokens: int) -> Float[Array, "B V"]:
    """`process_logits` as one array that all its readers share, so that the log-prob stored is the one drawn from, to the bit.

    XLA:CPU would compute it anew inside the gather that stores one, and round it otherwise there (7e-7 nats); what a conditional
    gives it keeps. On a TPU a conditional in the loop makes the compiler move caches, so only the CPU gets one.
    """

    def kept(raw: Array, temperature: Array) -> Array:
        blank = lambda: jnp.zeros(raw.shape, jnp.float32)  # noqa: E731
        return jax.lax.cond(live, lambda: process_logits(raw, temperature, num_tokens), blank)

    def plain(raw: Array, temperature: Array) -> Array:
        return process_logits(raw, temperature, num_tokens)

    return jax.lax.platform_dependent(raw, temperature, cpu=kept, default=plain)


def pick(
    keys: Key[Array, " B"], position: Int[Array, " B"], logp: Float[Array, "B V"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """One token a row from exp(logp), and its entry of `logp` itself, to the bit.

    A block of the vocabulary by its total mass, then a token inside it: exact, and noise for BLOCKS + V / BLOCKS entries
    instead of V. `position` is the completion slot.
    """
    rows, vocab = logp.shape
    count = min(BLOCKS, vocab)
    blocks = jnp.pad(logp, ((0, 0), (0, -vocab % count)), constant_values=-jnp.inf).reshape(rows, count, -1)
    size = blocks.shape[2]
    # Two draws, not two slices of one: the compiler splits the noise over the mesh, and a slice would move it.
    pair = jax.vmap(lambda key, slot: jax.random.split(jax.random.fold_in(key, slot)))(keys, position)
    across, within = _gumbel(pair[:, 0], count), _gumbel(pair[:, 1], size)
    block = jnp.argmax(jax.nn.logsumexp(blocks, axis=-1) + across, axis=-1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    place = jnp.argmax(inside + within, axis=-1)
    token = (block * size + place).astype(jnp.int32)
    return token, jnp.take_along_axis(logp, token[:, None], axis=-1)[:, 0]


def _gumbel(keys: Key[Array, " B"], num: int) -> Float[Array, "B num"]:
    return jax.vmap(lambda key: jax.random.gumbel(key, (num,)))(keys)
