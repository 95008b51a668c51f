"""Attention in its two forms: whole sequences for training and prefill, one query against a cache for decode.

Letters here: B rows, T query slots, U key slots, K key/value heads, G query heads a key/value head, H head dim.
Scores and softmax are f32. Masked keys count exactly nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.model.cache import WHOLE, Scaled

# Finite, so that a query with no key at all gives numbers, not NaN; far below any real score.
MASKED = -1e30


def scores_of(products: Array, head_dim: int, scale: float | None, softcap: float | None) -> Array:
    """Scores of q k' : times `scale` (None: H^-0.5), and c tanh(scores / c) where there is a cap."""
    scores = products * (head_dim**-0.5 if scale is None else scale)
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def attend(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B U K H"],
    v: Float[Array, "B U K H"],
    mask: Bool[Array, "B T U"],
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T K G H"]:
    """softmax(scores) v over the keys where `mask` is True."""
    products = jnp.einsum("btkgh,bukh->bkgtu", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores_of(products, q.shape[-1], scale, softcap), MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgtu,bukh->btkgh", weights, v, preferred_element_type=jnp.float32).astype(q.dtype)


class Rows(NamedTuple):
    """What decides which keys a query sees in whole rows of T slots: packed sequences, or a tree of them."""

    until: Int[Array, "B T"]
    """The slot before which a key is seen last."""
    position: Int[Array, "B T"]
    """Of the token in its own sequence."""


def tree_mask(rows: Rows, reach: int | Int[Array, ""] = WHOLE) -> Bool[Array, "B T T"]:
    """Query t sees key u where u <= t < until[u], and their positions are less than `reach` apart.

    With `until` the end of a key's sequence this is the causal mask of packed rows; where sequences share a prefix, which then
    stands once before them all, `until` of its keys is the end of the last (masks by such columns: Wang et al. 2024, FlashMask).
    """
    until, position = rows
    slot = jnp.arange(until.shape[1])
    seen = (slot[None, None, :] <= slot[None, :, None]) & (slot[None, :, None] < until[:, None, :])
    if isinstance(reach, int) and reach == WHOLE:
        return seen
    return seen & (position[:, :, None] - position[:, None, :] < reach)


def attend_part(
    q: Float[Array, "B K Q H"],
    k: Float[Array, "B K U H"] | Float[Array, "B K H U"] | Scaled,
    v: Float[Array, "B K U H"] | Scaled,
    mask: Bool[Array, "B U"],
    scale: float | None = None,
    softcap: float | None = None,
    across: bool = False,
) -> tuple[Float[Array, "B K Q H"], Float[Array, "B K Q"], Float[Array, "B K Q"]]:
    """Attention over a part of the keys, unnormalized: (weighted sum of v, sum of weights, maximum score), for `merge`.

    `across`: keys lie [B K H U]. Keys and values in int8 multiply as they are; their scales go to the scores and the weights.
    """
    k, of_keys = _bare(k, q.dtype)
    v, of_values = _bare(v, q.dtype)
    products = jnp.einsum("bkqh,bkhu->bkqu" if across else "bkqh,bkuh->bkqu", q, k, preferred_element_type=jnp.float32)
    products = products if of_keys is None else products * of_keys[:, :, None]
    scores = jnp.where(mask[:, None, None, :], scores_of(products, q.shape[-1], scale, softcap), MASKED)
    # Above MASKED, so that the weights of a part without a key are 0, not 1.
    top = jnp.maximum(jnp.max(scores, axis=-1), MASKED / 2)
    weights = jnp.exp(scores - top[..., None])
    shares = weights if of_values is None else weights * of_values[:, :, None]
    out = jnp.einsum("bkqu,bkuh->bkqh", shares.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out, jnp.sum(weights, axis=-1), top


def _bare(x: Array | Scaled, dtype: jnp.dtype) -> tuple[Array, Array | None]:
    return (x.q.astype(dtype), x.scale) if isinstance(x, Scaled) else (x, None)


def merge(*parts: tuple[Array, Array, Array]) -> Array:
    """Softmax attention over the union of the parts' keys: exact, each part rescaled to the common maximum."""
    common = jnp.max(jnp.stack([top for _, _, top in parts]), axis=0)
    scale = [jnp.exp(top - common) for _, _, top in parts]
    total = sum(s * weight for s, (_, weight, _) in zip(scale, parts, strict=True))
    out = sum(s[..., None] * out for s, (out, _, _) in zip(scale, parts, strict=True))
    return out / total[..., None]
