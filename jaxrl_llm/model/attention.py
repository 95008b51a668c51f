"""Attention in its two forms: whole sequences for training and prefill, one query against a cache for decode.

Letters here: B rows, T query slots, U key slots, K key/value heads, G query heads a key/value head, H head dim.
Scores and softmax are f32. Masked keys count exactly nothing.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Finite, so that a query with no key at all gives zeros, not NaN; far below any real score.
MASKED = -1e30


def rope(x: Float[Array, "B T *heads H"], position: Int[Array, "B T"], theta: float) -> Float[Array, "B T *heads H"]:
    """Turn the pairs (i, i + H/2) by position * theta^(-2i/H) (Su et al. 2021, in the half-split form of Llama).

    The angle is f32: bfloat16 rounds 257 to 256, which is another angle altogether.
    """
    half = x.shape[-1] // 2
    frequency = theta ** -(jnp.arange(half, dtype=jnp.float32) / half)
    angle = position.astype(jnp.float32)[..., None] * frequency
    angle = angle.reshape(*position.shape, *(1,) * (x.ndim - 3), half)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attend(
    q: Float[Array, "B T K G H"], k: Float[Array, "B U K H"], v: Float[Array, "B U K H"], mask: Bool[Array, "B T U"]
) -> Float[Array, "B T K G H"]:
    """softmax(q k' / sqrt(H)) v over the keys where `mask` is True."""
    scores = jnp.einsum("btkgh,bukh->bkgtu", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgtu,bukh->btkgh", weights, v, preferred_element_type=jnp.float32).astype(q.dtype)


def causal_mask(segment: Int[Array, "B T"], position: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Query t sees key u of the same sequence, not later. Padding (segment 0) sees padding, and nobody reads it."""
    same = segment[:, :, None] == segment[:, None, :]
    return same & (position[:, :, None] >= position[:, None, :])


def attend_part(
    q: Float[Array, "B K Q H"], k: Float[Array, "B K U H"], v: Float[Array, "B K U H"], mask: Bool[Array, "B U"]
) -> tuple[Float[Array, "B K Q H"], Float[Array, "B K Q"], Float[Array, "B K Q"]]:
    """Attention over a part of the keys, unnormalised: (weighted sum of v, sum of weights, maximum score), for `merge`."""
    scores = jnp.einsum("bkqh,bkuh->bkqu", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    seen = mask[:, None, None, :]
    top = jnp.max(jnp.where(seen, scores, MASKED), axis=-1)
    weights = jnp.where(seen, jnp.exp(scores - top[..., None]), 0.0)
    out = jnp.einsum("bkqu,bkuh->bkqh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out, jnp.sum(weights, axis=-1), top


def merge(*parts: tuple[Array, Array, Array]) -> Array:
    """Softmax attention over the union of the parts' keys: exact, each part rescaled to the common maximum."""
    common = jnp.max(jnp.stack([top for _, _, top in parts]), axis=0)
    scale = [jnp.exp(top - common) for _, _, top in parts]
    total = sum(s * weight for s, (_, weight, _) in zip(scale, parts, strict=True))
    out = sum(s[..., None] * out for s, (out, _, _) in zip(scale, parts, strict=True))
    return out / total[..., None]
