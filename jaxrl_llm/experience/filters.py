"""Which groups may teach: what graders gave to keep bool[P]. A group is kept or dropped whole."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float

from jaxrl_llm.estimates import correct


def has_signal(reward: Float[np.ndarray, "P G"]) -> Bool[np.ndarray, " P"]:
    """max > min of the rewards; False where the group was not graded (NaN).

    Never asked of the advantages: six equal rewards of 0.3 have a float32 mean one ulp off, and an "advantage" of 0.75.
    """
    return np.max(reward, axis=1) > np.min(reward, axis=1)


def graded(reward: Float[np.ndarray, "P G"]) -> Bool[np.ndarray, " P"]:
    """Every group that has its rewards."""
    return ~np.isnan(reward).any(axis=1)


Filter = Callable[[Float[np.ndarray, "P G"], Float[np.ndarray, "n P G"]], Bool[np.ndarray, " P"]]
"""Rewards, and what each of the n graders gave, to the groups that are kept."""


def make_filter(name: str, graders: Sequence[str], threshold: float) -> Filter:
    """`graders`: their names. `threshold`: what the first of them must give a response that is right, as in the evaluation."""
    if name == "none":
        return lambda reward, parts: graded(reward)
    if name == "has_signal":
        return lambda reward, parts: has_signal(reward)
    if name == "success":
        return lambda reward, parts: has_signal(correct(parts[0], threshold))
    index = graders.index(name)
    return lambda reward, parts: has_signal(parts[index])
