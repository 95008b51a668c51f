"""Automata over the tokens of a vocabulary: what may come next in a response, and what it leads to. Host, NumPy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Int

from jaxrl_llm.control.graph import ENDLESS, distances

REFUSED = -1
# Largest distance of a state, for which `distribution/control_tables.py` has room.
MAX_DISTANCE = 2045


class Transitions(Protocol):
    """What an automaton and the tables of several have in common."""

    next: Int[np.ndarray, "S K"]
    forced: Int[np.ndarray, " S"]
    replaces: Bool[np.ndarray, " S"]
    expires: Int[np.ndarray, " S"]

    def after(self, state: int, token: int) -> int:
        """Return the state behind a token; REFUSED if it is not allowed."""


def states_of(
    automaton: Transitions, state: int, slot: int, tokens: Sequence[int], budget: int,
    sampled: Sequence[bool] | None = None,
) -> Int[np.ndarray, " n+1"]:  # fmt: skip
    """Return the states in which known tokens are filled in, and the one behind them; REFUSED behind a token that is not allowed:
    another than the forced one, or one whose place another takes.

    Args:
        automaton: of the tokens.
        state: before the first of them.
        slot: of the first of them.
        tokens: token ids.
        budget: slot from which states expire.
        sampled: the policy drew the token; None: no token took the place of another.
    """
    found = np.full(len(tokens) + 1, REFUSED, np.int32)
    for i, token in enumerate(tokens):
        state = automaton.expires[state] if slot + i >= budget else state
        if sampled is not None and not sampled[i]:
            state = _replacing(automaton, state, token)
        found[i] = state
        state = automaton.after(state, token) if automaton.forced[state] in (-1, token) else REFUSED
        if state == REFUSED or automaton.replaces[state]:
            return found
    found[-1] = state
    return found


def _replacing(automaton: Transitions, state: int, token: int) -> int:
    """Return the state that puts the token in the place of one drawn in `state`; the state itself if there is none."""
    behind = automaton.next[state]
    behind = behind[behind != REFUSED]
    found = behind[automaton.replaces[behind] & (automaton.forced[behind] == token)]
    return found[0] if len(found) and automaton.forced[state] < 0 else state


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

    def after(self, state: int, token: int) -> int:
        """Return the state behind a token; REFUSED if it is not allowed."""
        return int(self.next[state, self.classes[token]])

    @property
    def expired_distance(self) -> int:
        """Room that a row needs when its budget is used up, in tokens."""
        expired = self.expires[self.expires != np.arange(len(self.expires))]
        return int(self.distance[expired].max(initial=0))

    @property
    def closing(self) -> Int[np.ndarray, " S"]:
        """Room that a row in each state needs when its budget is used up, in tokens; 0: the row does not think any more, or never
        did."""
        thinks = distances(self.next, self.expires != np.arange(len(self.expires))) != ENDLESS
        return np.where(thinks, self.expired_distance, 0)

    def least_limit(self, budget: int) -> int:
        """Fewest completion tokens that a row must have room for, with a budget of so many. With less it may get stuck, or be cut
        off in its closing: a row that thinks relies on it."""
        closing = int(self.closing[self.start])
        return max(int(self.distance[self.start]), budget + closing if closing else 0)


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
