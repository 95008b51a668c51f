"""Rotary position embedding (Su et al. 2021, half-split as in Llama) and its context-length scalings."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrl_llm.model.config import LinearRope, Llama3Rope, ModelConfig, YarnRope


class Rotation(NamedTuple):
    """Rotation of queries and keys: constants of a config, known before tracing."""

    frequency: Float[np.ndarray | Array, " H/2"]
    """f32, radians per position, one per pair."""
    scale: float | Float[Array, ""] = 1.0
    """Multiplies cosine and sine."""


class Angles(NamedTuple):
    """Sine and cosine per position, f32; shared by all heads, and by all layers with the same rotation."""

    sin: Float[Array, "B T H/2"]
    cos: Float[Array, "B T H/2"]


def angles(position: Int[Array, "B T"], rotation: Rotation) -> Angles:
    """Sine and cosine of position * frequency[i], times the scale.

    The angle is f32: bfloat16 rounds 257 to 256, an entirely different angle.
    """
    angle = position.astype(jnp.float32)[..., None] * rotation.frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    if not (isinstance(rotation.scale, float) and rotation.scale == 1.0):
        sin, cos = sin * rotation.scale, cos * rotation.scale
    return Angles(sin, cos)


def shared_angles(position: Int[Array, "B T"], rotation: Rotation, count: Int[Array, ""]) -> Angles:
    """`angles`, computed once per decode step for all layers. `count` is any traced number >= 0.

    XLA:CPU would recompute them in each product of each layer, for every head, but keeps the result of a conditional. On a TPU a
    conditional in the loop makes the compiler move caches, so only the CPU gets one.
    """

    def computed_once(position: Array, count: Array) -> Angles:
        zeros = jnp.zeros((*position.shape, rotation.frequency.shape[-1]), jnp.float32)
        return jax.lax.cond(count >= 0, lambda: angles(position, rotation), lambda: Angles(zeros, zeros))

    return jax.lax.platform_dependent(
        position, count, cpu=computed_once, default=lambda position, _: angles(position, rotation)
    )


def rope(x: Float[Array, "B T *heads H"], angles: Angles) -> Float[Array, "B T *heads H"]:
    """Rotate the pairs (i, i + H/2)."""
    half = x.shape[-1] // 2
    sin, cos = (a.reshape(*x.shape[:2], *(1,) * (x.ndim - 3), half) for a in angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def rotation(cfg: ModelConfig, slides: bool) -> Rotation:
    """The rotation of a layer. Sliding layers with a separate base are never scaled."""
    if slides and cfg.sliding_rope_theta is not None:
        return Rotation(_plain(cfg.sliding_rope_theta, cfg.head_dim).astype(np.float32))
    plain, scale = _plain(cfg.rope_theta, cfg.head_dim), 1.0
    match cfg.rope_scaling:
        case LinearRope(factor=factor):
            plain = plain / factor
        case Llama3Rope() as scaling:
            plain = _llama3(plain, scaling)
        case YarnRope() as scaling:
            plain = _yarn(plain, cfg.rope_theta, scaling)
            scale = scaling.attention_factor or 0.1 * math.log(max(scaling.factor, 1.0)) + 1.0
    return Rotation(plain.astype(np.float32), scale)


def _plain(theta: float, head_dim: int) -> np.ndarray:
    """theta^(-2i/H), f64."""
    return theta ** -(np.arange(0, head_dim, 2) / head_dim)


def _llama3(frequency: np.ndarray, scaling: Llama3Rope) -> np.ndarray:
    """Scale pairs that make few turns within the original length, keep those that make many (Llama 3.1)."""
    turns = scaling.original_length * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / max(high - low, 1e-9), 0.0, 1.0)
    return frequency * (kept + (1 - kept) / scaling.factor)


def _yarn(frequency: np.ndarray, theta: float, scaling: YarnRope) -> np.ndarray:
    """Interpolate from pairs that make `beta_fast` turns within the original length (kept) to `beta_slow` (divided by the factor).

    Peng et al. 2023, section 3.2, with the ends clipped to 0 and H - 1, as published checkpoints were trained.
    """
    head_dim = 2 * len(frequency)

    def pair(turns: float) -> float:
        return head_dim * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    # 1e-3 if both ends are the same pair: the ramp is then a step.
    stretched = np.clip((np.arange(len(frequency)) - low) / ((high - low) or 1e-3), 0.0, 1.0)
    return frequency * (stretched / scaling.factor + 1 - stretched)
