"""Weights that nobody stores: each tensor is drawn from its name, by NumPy alone, in the golden script and in the tests."""

import re
import zlib
from collections.abc import Mapping

import numpy as np


def draw(name: str, shape: tuple[int, ...], seed: int, gemma: bool) -> np.ndarray:
    """f32. Norms lie about 1 (Gemma: about 0, since 1 is added), biases about 0, rows of a matrix have a length of about 1.

    Experts 0 and 1 are one: their rows in the router too, so that every token's routing has a tie, and one that cannot matter.
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
    # Sharp attention, so that an error shows; layers that outweigh the embedding, or tied heads would repeat what they read.
    gain = {"embed_tokens": 0.3, "q_proj": 2.0, "down_proj": 2.0, "lm_head": 3.0}
    gain = next((g for part, g in gain.items() if part in name), 1.0)
    return noise * np.float32(gain * shape[-1] ** -0.5)


def draw_all(shapes: Mapping[str, list[int]], seed: int, gemma: bool) -> dict[str, np.ndarray]:
    return {name: draw(name, tuple(shape), seed, gemma) for name, shape in shapes.items()}
