"""Which groups may teach: rewards f32[P, G] to keep bool[P]. A group is kept or dropped whole."""

import numpy as np
from jaxtyping import Bool, Float


def has_signal(reward: Float[np.ndarray, "P G"]) -> Bool[np.ndarray, " P"]:
    """max > min of the rewards; False where the group was not graded (NaN).

    Never asked of the advantages: six equal rewards of 0.3 have a float32 mean one ulp off, and an "advantage" of 0.75.
    """
    return np.max(reward, axis=1) > np.min(reward, axis=1)


def graded(reward: Float[np.ndarray, "P G"]) -> Bool[np.ndarray, " P"]:
    """Every group that has its rewards."""
    return ~np.isnan(reward).any(axis=1)


FILTERS = {"has_signal": has_signal, "none": graded}
