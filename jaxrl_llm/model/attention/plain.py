"""Plain attention: over whole sequences for training and prefill, and of one query over a cache for decoding.

Dimensions: B rows, T query slots, U key slots, K key/value heads, G query heads per key/value head, H head dim.
Scores and softmax are f32. Masked keys have exactly zero weight.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.model.cache import UNLIMITED, QuantizedKV

# Finite, so that a query without any key gives numbers, not NaN; far below any real score.
MASKED = -1e30


def scores_of(products: Array, head_dim: int, scale: float | None, softcap: float | None) -> Array:
    """Attention scores of the products q k'.

    Args:
        products: q k', f32.
        head_dim: H.
        scale: factor of the products. None: H^-0.5.
        softcap: c; scores become c tanh(scores / c). None: no cap.
    """
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
    """softmax(scores) v over the keys where `mask` is True.

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: True where a query attends to a key.
        scale: as in `scores_of`.
        softcap: as in `scores_of`.
    """
    products = jnp.einsum("btkgh,bukh->bkgtu", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores_of(products, q.shape[-1], scale, softcap), MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgtu,bukh->btkgh", weights, v, preferred_element_type=jnp.float32).astype(q.dtype)


class PackedRows(NamedTuple):
    """Structure of rows of T slots, which hold packed sequences or trees of sequences: determines the attention mask."""

    until: Int[Array, "B T"]
    """End (exclusive) of the query slots that attend to the key."""
    position: Int[Array, "B T"]
    """Position of the token in its own sequence."""


def tree_mask(rows: PackedRows, window: int | Int[Array, ""] = UNLIMITED) -> Bool[Array, "B T T"]:
    """True where query t attends to key u: u <= t < until[u], and their positions are less than `window` apart.

    If `until` is the end of a key's sequence, this is the causal mask of packed rows. If sequences share a prefix, stored once
    before all of them, `until` of its keys is the end of the last sequence (column-wise masks: Wang et al. 2024, FlashMask).
    """
    until, position = rows
    slot = jnp.arange(until.shape[1])
    visible = (slot[None, None, :] <= slot[None, :, None]) & (slot[None, :, None] < until[:, None, :])
    if isinstance(window, int) and window == UNLIMITED:
        return visible
    return visible & (position[:, :, None] - position[:, None, :] < window)


def attend_part(
    q: Float[Array, "B K Q H"],
    k: Float[Array, "B K U H"] | Float[Array, "B K H U"] | QuantizedKV,
    v: Float[Array, "B K U H"] | QuantizedKV,
    mask: Bool[Array, "B U"] | Bool[Array, "B Q U"],
    scale: float | None = None,
    softcap: float | None = None,
    transposed: bool = False,
) -> tuple[Float[Array, "B K Q H"], Float[Array, "B K Q"], Float[Array, "B K Q"]]:
    """Unnormalized attention over a subset of the keys, for `merge`.

    Int8 keys and values are multiplied unscaled; their scales are applied to the scores and the weights.

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: True where the queries of a row attend to a key, or each of them does.
        scale: as in `scores_of`.
        softcap: as in `scores_of`.
        transposed: keys are [B K H U].

    Returns:
        The weighted sum of v, the sum of weights, and the maximum score.
    """
    k, key_scale = _unscaled(k, q.dtype)
    v, value_scale = _unscaled(v, q.dtype)
    products = jnp.einsum(
        "bkqh,bkhu->bkqu" if transposed else "bkqh,bkuh->bkqu", q, k, preferred_element_type=jnp.float32
    )
    products = products if key_scale is None else products * key_scale[:, :, None]
    mask = mask[:, None, None] if mask.ndim == 2 else mask[:, None]
    scores = jnp.where(mask, scores_of(products, q.shape[-1], scale, softcap), MASKED)
    # Above MASKED, so that the weights of a subset without keys are 0, not 1.
    top = jnp.maximum(jnp.max(scores, axis=-1), MASKED / 2)
    weights = jnp.exp(scores - top[..., None])
    scaled_weights = weights if value_scale is None else weights * value_scale[:, :, None]
    out = jnp.einsum("bkqu,bkuh->bkqh", scaled_weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out, jnp.sum(weights, axis=-1), top


def _unscaled(x: Array | QuantizedKV, dtype: jnp.dtype) -> tuple[Array, Array | None]:
    return (x.q.astype(dtype), x.scale) if isinstance(x, QuantizedKV) else (x, None)


def merge(*parts: tuple[Array, Array, Array]) -> Array:
    """Softmax attention over the union of the subsets' keys: exact, each part rescaled to the common maximum."""
    common = jnp.max(jnp.stack([top for _, _, top in parts]), axis=0)
    scale = [jnp.exp(top - common) for _, _, top in parts]
    total = sum(s * weight for s, (_, weight, _) in zip(scale, parts, strict=True))
    out = sum(s[..., None] * out for s, (out, _, _) in zip(scale, parts, strict=True))
    return out / total[..., None]
