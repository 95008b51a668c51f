"""Automata over the tokens of a vocabulary: what may come next in a response, and what it leads to. Host, NumPy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

REFUSED = -1
# Largest distance of a state, for which `distribution/control_tables.py` has room.
MAX_DISTANCE = 2045


class TokenTexts(NamedTuple):
    """What a control needs to know of a tokenizer."""

    texts: Sequence[bytes | None]
    """Text of each token as it is read by graders, UTF-8 or a part of it; None: the token has no text, as special ones do."""
    ends: tuple[int, ...]
    """End tokens. With a text (the `#` of the arithmetic task) one counts as that text and ends the row; without, it is allowed
    where the text may end."""
    encode: Callable[[str], list[int]]
    """Token ids of a text."""
    fingerprint: str
    """Hash of all of this."""
    drops_space: bool = False
    """Decoding leaves out a space at the beginning of a response, as with SentencePiece, where words begin with one."""


@dataclass(frozen=True, eq=False)
class TokenAutomaton:
    """Deterministic automaton over tokens. Its tables have one column for all tokens that it treats alike: a class.

    Every state from which no end can be reached has been removed, so a row in any state can still end.
    """

    classes: Int[np.ndarray, " V"]
    """Class of each token, int32. End tokens share no class with other tokens."""
    next: Int[np.ndarray, "S K"]
    """State behind a token of the class, int32; REFUSED: such a token is not allowed."""
    distance: Int[np.ndarray, " S"]
    """Fewest tokens after which a row in this state may end, by an end token or by its limit; 0: at once. At most MAX_DISTANCE."""
    start: int
    ends: Bool[np.ndarray, " S"]
    """States that end the row: behind an end token or a stop sequence. Nothing follows them."""
    forced: Int[np.ndarray, " S"]
    """Token that comes next without being sampled, and that the state allows alone; -1: the policy samples."""
    replaces: Bool[np.ndarray, " S"]
    """The forced token takes the place of the token that led here ("Wait" in place of the end of thinking)."""
    expires: Int[np.ndarray, " S"]
    """State that this one becomes, before a token is sampled, in slots from the row's budget on; itself: it does not expire."""

    @property
    def expired_distance(self) -> int:
        """Room that a row needs when its budget is used up, in tokens."""
        expired = self.expires[self.expires != np.arange(len(self.expires))]
        return int(self.distance[expired].max(initial=0))

    def least_limit(self, budget: int) -> int:
        """Fewest completion tokens that a row must have room for, with a budget of so many. With less it may get stuck, even where
        the limit is below the budget: a row that thinks relies on its closing."""
        expires = (self.expires != np.arange(len(self.expires))).any()
        return max(int(self.distance[self.start]), budget + self.expired_distance if expires else 0)


def token_automaton(
    classes: Int[np.ndarray, " V"], next: Int[np.ndarray, "S K"], distance: Int[np.ndarray, " S"], start: int,
    ends: Bool[np.ndarray, " S"],
) -> TokenAutomaton:  # fmt: skip
    """Return an automaton that forces nothing and has no budget; arguments as its fields."""
    states = len(next)
    return TokenAutomaton(
        classes.astype(np.int32), next.astype(np.int32), distance.astype(np.int32), start, ends,
        np.full(states, -1, np.int32), np.zeros(states, bool), np.arange(states, dtype=np.int32),
    )  # fmt: skip
