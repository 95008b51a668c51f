"""Weights that are not stored: each tensor is generated from its name with NumPy, in the golden script and in the tests."""

import re
import zlib
from collections.abc import Mapping

import numpy as np


def random_weight(name: str, shape: tuple[int, ...], seed: int, gemma: bool) -> np.ndarray:
    """Return f32: norms around 1 (Gemma: around 0, since 1 is added), biases around 0, matrices with rows of length about 1.

    Experts 0 and 1 are equal, and so are their rows in the router: every token's routing has a tie, which cannot change a result.
    """
    twin = re.sub(r"\.experts\.1\.", ".experts.0.", name)
    rng = np.random.default_rng([seed, zlib.crc32(twin.encode())])
    noise = rng.standard_normal(shape).astype(np.float32)
    if name.endswith("norm.weight"):
        return np.float32(0.0 if gemma else 1.0) + np.float32(0.3) * noise
    if name.endswith(".bias"):
        return np.float32(0.5) * noise
    if name.endswith("mlp.gate.weight"):
        noise[1] = noise[0]
    # Sharp attention, so that errors show; layers larger than the embedding, or tied heads would repeat their input.
    gain = {"embed_tokens": 0.3, "q_proj": 2.0, "down_proj": 2.0, "lm_head": 3.0}
    gain = next((g for part, g in gain.items() if part in name), 1.0)
    return noise * np.float32(gain * shape[-1] ** -0.5)


def draw_all(shapes: Mapping[str, list[int]], seed: int, gemma: bool) -> dict[str, np.ndarray]:
    return {name: random_weight(name, tuple(shape), seed, gemma) for name, shape in shapes.items()}
