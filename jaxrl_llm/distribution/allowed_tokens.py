"""Tokens that may be sampled: no padding of the vocabulary, and what a row's control allows. Drawing, top-k and scoring mask the
others by this file alone.
"""

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

# Classes per word of a mask.
WORD = 32


class AllowedTokens(flax.struct.PyTreeNode):
    """Allowed tokens of each row, as bits by class of token. W words of 32 classes, A automata, n tokens."""

    words: UInt32[Array, "*rows W"]
    """Bits of the allowed classes."""
    automaton: Int[Array, "*rows"] | None
    """Automaton of each row, which says what classes its tokens are in; None: there is one only."""
    classes: Int[Array, "A n"]
    """Class of each token in each automaton."""

    @property
    def mask(self) -> Bool[Array, "*rows n"]:
        """True for allowed tokens."""
        classes = self.classes[0] if self.automaton is None else self.classes[self.automaton]
        index, bit = classes // WORD, (classes % WORD).astype(jnp.uint32)
        word = self.words[..., :1]
        # Selected, not gathered: a gather per logit is slow on every backend, and the vocabulary may be sharded.
        for w in range(1, self.words.shape[-1]):
            word = jnp.where(index == w, self.words[..., w : w + 1], word)
        return (word >> bit) & 1 == 1


def mask_disallowed(
    x: Float[Array, "*rows n"], ids: Int[Array, " n"], num_tokens: int | None, allowed: AllowedTokens | None
) -> Float[Array, "*rows n"]:
    """Return logits of the tokens `ids`, f32, with -inf where not allowed.

    Args:
        x: raw logits.
        ids: token ids of the last dimension.
        num_tokens: tokens of the tokenizer; larger ids are padding of the vocabulary. None: it has none.
        allowed: of the tokens `ids`, padding never among them; None: all are allowed.
    """
    x = x.astype(jnp.float32)
    if allowed is not None:
        return jnp.where(allowed.mask, x, -jnp.inf)
    return x if num_tokens is None else jnp.where(ids < num_tokens, x, -jnp.inf)
