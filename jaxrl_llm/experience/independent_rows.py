"""Rows that say how well the policy does by itself: neither helped by a hint nor begun with tokens of another row."""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool

from jaxrl_llm.experience.hints import hinted

if TYPE_CHECKING:
    from jaxrl_llm.types import Groups


def independent(groups: "Groups") -> Bool[np.ndarray, " B"]:
    """Return True for rows that the policy sampled from the prompt on, without a hint. Rows that leave others are not: where that
    is depends on what the others are."""
    rollouts = groups.rollouts
    is_root = np.ones(len(groups.keep), bool) if rollouts.trunk is None else rollouts.trunk == rollouts.sample
    return is_root & ~hinted(groups)


def independent_rows(groups: "Groups") -> "Groups":
    """Return the groups with their independent rows alone: the rewards of others are not the policy's by itself. A prompt may be
    left without a row."""
    alone = independent(groups)
    if alone.all():
        return groups
    # Configs contain rules, and are read before JAX is imported.
    from jaxrl_llm.types import map_groups

    rows = np.flatnonzero(alone & (groups.rollouts.prompt >= 0))
    return map_groups(groups, lambda x: x, lambda x, fill: x[rows])
