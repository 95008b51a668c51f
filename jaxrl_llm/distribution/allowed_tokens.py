"""Tokens that may be sampled: no padding of the vocabulary, and no end token before the minimum length. Sampling, top-k and scoring
mask the others by the functions of this file alone.
"""

import operator
from functools import reduce

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def is_allowed(
    token: Int[Array, "*rows n"], num_tokens: int, ends: tuple[int, ...], eos_masked: Bool[Array, "*rows n"]
) -> Bool[Array, "*rows n"]:
    """Return True for tokens that may be sampled. The arguments broadcast against each other.

    Args:
        token: token ids.
        num_tokens: tokens of the tokenizer; larger ids are padding of the vocabulary, and not allowed.
        ends: end-of-sequence tokens.
        eos_masked: where the tokens `ends` are not allowed.
    """
    return (token < num_tokens) & ~(eos_masked & reduce(operator.or_, (token == end for end in ends), False))


def mask_disallowed(
    x: Float[Array, "*rows n"],
    ids: Int[Array, " n"],
    num_tokens: int | None,
    ends: tuple[int, ...],
    eos_masked: Bool[Array, "*rows"] | None,
) -> Float[Array, "*rows n"]:
    """Return logits of the tokens `ids`, f32, with -inf where not `is_allowed`.

    Args:
        x: raw logits.
        ids: token ids of the last dimension.
        num_tokens: tokens of the tokenizer; None: the vocabulary has no padding.
        ends: end-of-sequence tokens.
        eos_masked: rows in which the tokens `ends` are not allowed; None: none.
    """
    x = x.astype(jnp.float32)
    if num_tokens is None and eos_masked is None:
        return x
    num_tokens = jnp.iinfo(jnp.int32).max if num_tokens is None else num_tokens
    eos_masked = jnp.zeros(x.shape[:-1], bool) if eos_masked is None else eos_masked
    return jnp.where(is_allowed(ids, num_tokens, ends, eos_masked[..., None]), x, -jnp.inf)


class AllowedTokens(flax.struct.PyTreeNode):
    """Predicate: which token ids a row may sample."""

    eos_masked: Bool[Array, " B"]
    """Rows in which the tokens `ends` are not allowed."""
    size: int = flax.struct.field(pytree_node=False)
    ends: tuple[int, ...] = flax.struct.field(pytree_node=False)

    def __call__(self, token: Int[Array, "B ..."]) -> Bool[Array, "B ..."]:
        """Return True for allowed ids, given per row or once for all rows (B = 1). The id -1 is never allowed."""
        return (token >= 0) & is_allowed(
            token, self.size, self.ends, self.eos_masked[(..., *(None,) * (token.ndim - 1))]
        )

    def keep(self, x: Float[Array, "B ..."], token: Int[np.ndarray, "..."], other: float) -> Float[Array, "B ..."]:
        """Return `x`, whose entries belong to `token`, with `other` where a token is not allowed. Free if all tokens always are."""
        always = (token >= 0) & (token < self.size) & ~np.isin(token, self.ends)
        return x if always.all() else jnp.where(self(jnp.asarray(token)[None]), x, other)
