"""Execution of an automaton on the host: the states of tokens that are known."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from jaxrl_llm.control.automaton import REFUSED, TokenAutomaton


def advance(automaton: TokenAutomaton, state: int, token: int) -> int:
    """Return the state behind a token that was drawn in a state, or forced by it; REFUSED: the state allows no such token. Where
    another token takes the place of the drawn one, the state behind that."""
    forced = automaton.forced[state]
    behind = int(automaton.next[state, automaton.classes[token]]) if forced in (-1, token) else REFUSED
    if behind != REFUSED and automaton.replaces[behind]:
        return advance(automaton, behind, int(automaton.forced[behind]))
    return behind


def states_of(
    automaton: TokenAutomaton, tokens: Sequence[int], sampled: Sequence[bool] | None = None, budget: int | None = None
) -> Int[np.ndarray, " n+1"]:
    """Return the state in which each token of a row was drawn, and the state behind all of them. REFUSED behind a token that its
    state does not allow.

    Args:
        automaton: of the row.
        tokens: of the row, from its first slot on.
        sampled: the policy drew the token. Without it a token that took the place of another is taken for a drawn one.
        budget: slots of the row before states expire; None: they do not.
    """
    states, state = [], automaton.start
    for slot, token in enumerate(tokens):
        if state != REFUSED and budget is not None and slot >= budget:
            state = int(automaton.expires[state])
        states.append(state)
        if state != REFUSED and sampled is not None and not sampled[slot]:
            state = _replacing(automaton, state, token)
        state = REFUSED if state == REFUSED else advance(automaton, state, token)
    return np.array([*states, state], np.int32)


def _replacing(automaton: TokenAutomaton, state: int, token: int) -> int:
    """Return the state behind `state` that puts this token in the place of the drawn one; the state itself if there is none."""
    behind = automaton.next[state]
    behind = behind[(behind != REFUSED) & automaton.replaces[behind] & (automaton.forced[behind] == token)]
    return int(behind[0]) if len(behind) else state
