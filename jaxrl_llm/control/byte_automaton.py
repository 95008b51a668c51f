"""Deterministic automata over bytes: what a text may be, independent of any vocabulary."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

DEAD = -1


@dataclass(frozen=True, eq=False)
class ByteAutomaton:
    """Texts from the start to an accepting state."""

    next: Int[np.ndarray, "S 256"]
    """State behind a byte, int32; DEAD: none."""
    accepts: Bool[np.ndarray, " S"]
    """States in which the text may end, with an end token."""
    free: Bool[np.ndarray, " S"]
    """States in which anything may follow: tokens without a text too, and the row may be cut off by its limit. An end token is
    allowed where `accepts`."""
    start: int = 0
