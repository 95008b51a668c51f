"""From log-probabilities to a token: Gumbel-max in two levels, one key a row.

Never the inverse of a cumulative sum: noise of 1e-2 in the logits changes 0.6 % of the tokens under Gumbel-max and half of
them under the inverse, and sums over another mesh are such noise.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

# Of the vocabulary, at most. Fixed, whatever the mesh: the noise a row draws must not depend on how the vocabulary is split.
# It is the number of blocks that is a power of two, not their size: then a `tensor` shard holds whole blocks, and no logits move.
BLOCKS = 128


def row_keys(key: Key[Array, ""], uid: Int[Array, " P"], samples: int) -> Key[Array, " B"]:
    """One key a row from (run, prompt uid, sample number), prompt-major. A row knows nothing of its neighbours."""
    per_prompt = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, uid)
    return jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)), in_axes=(0, None))(
        per_prompt, jnp.arange(samples)
    ).reshape(-1)


def draw(
    keys: Key[Array, " B"], position: Int[Array, ""], logp: Float[Array, "B V"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """One token a row from exp(logp), and its entry of `logp` itself, to the bit.

    A block of the vocabulary by its total mass, then a token inside it: exact, and noise for BLOCKS + V / BLOCKS entries
    instead of V. `position` is the completion slot: with the row's key it names the noise.
    """
    rows, vocab = logp.shape
    count = min(BLOCKS, vocab)
    blocks = jnp.pad(logp, ((0, 0), (0, -vocab % count)), constant_values=-jnp.inf).reshape(rows, count, -1)
    size = blocks.shape[2]
    # Two draws, not two slices of one: the compiler splits the noise over the mesh, and a slice would move it.
    pair = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, position)))(keys)
    across, within = _gumbel(pair[:, 0], count), _gumbel(pair[:, 1], size)
    block = jnp.argmax(jax.nn.logsumexp(blocks, axis=-1) + across, axis=-1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    place = jnp.argmax(inside + within, axis=-1)
    token = (block * size + place).astype(jnp.int32)
    return token, jnp.take_along_axis(logp, token[:, None], axis=-1)[:, 0]


def _gumbel(keys: Key[Array, " B"], num: int) -> Float[Array, "B num"]:
    return jax.vmap(lambda key: jax.random.gumbel(key, (num,)))(keys)
