"""Small vocabularies; rows drawn at random under an automaton by the rules of the decode loop, one token at a time, and the
states of rows that are known."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxrl_llm.control.automaton import REFUSED, TokenAutomaton, TokenTexts
from jaxrl_llm.control.byte_automaton import DEAD, ByteAutomaton
from jaxrl_llm.errors import UserError


def vocabulary(
    texts: Sequence[str | bytes | None], ends: tuple[int, ...], special: dict[str, int] | None = None
) -> TokenTexts:
    """Tokens by their texts. A text is encoded as the longest token that it begins with, and so on; `special`: names of tokens."""
    as_bytes = [text.encode() if isinstance(text, str) else text for text in texts]
    number = {text: i for i, text in reversed([*enumerate(as_bytes)]) if text}
    number |= {name.encode(): i for name, i in (special or {}).items()}

    def encode(text: str) -> list[int]:
        ids, rest = [], text.encode()
        while rest:
            token = max((known for known in number if rest.startswith(known)), key=len, default=b"")
            if not token:
                raise UserError("want others")
            ids.append(number[token])
            rest = rest[len(token) :]
        return ids

    return TokenTexts(as_bytes, ends, encode, "")


FREE = ByteAutomaton(np.zeros((1, 256), np.int32), np.ones(1, bool), np.ones(1, bool))


def digits(least: int, most: int) -> ByteAutomaton:
    """Texts of some digits."""
    next = np.full((most + 1, 256), DEAD, np.int32)
    next[:-1, ord("0") : ord("9") + 1] = np.arange(1, most + 1)[:, None]
    return ByteAutomaton(next, np.arange(most + 1) >= least, np.zeros(most + 1, bool))


class DrawnRow(NamedTuple):
    tokens: list[int]
    sampled: list[bool]
    states: list[int]
    """State in which each token was drawn or forced."""
    wanted: list[int]
    """Tokens that the policy drew, those that others took the place of too."""
    behind: int
    """State behind the last token."""

    def text(self, vocabulary: TokenTexts) -> bytes:
        return b"".join(vocabulary.texts[token] or b"" for token in self.tokens)


def allowed(automaton: TokenAutomaton, state: int, room: int) -> np.ndarray:
    """bool[V]: the tokens that may be drawn where `room` more fit, this one included."""
    behind = automaton.next[state]
    return ((behind != REFUSED) & (automaton.distance[behind] < room))[automaton.classes]


def draw(automaton: TokenAutomaton, rng: np.random.Generator, limit: int, budget: int | None = None) -> DrawnRow:
    """Draw a row: classes with equal probability, and tokens of a class. Asserts that it never gets stuck, and is cut off by its
    limit only where it may be."""
    tokens, sampled, states, wanted, state = [], [], [], [], automaton.start
    for slot in range(limit):
        if budget is not None and slot >= budget:
            state = int(automaton.expires[state])
        token, is_drawn = int(automaton.forced[state]), automaton.forced[state] < 0
        if is_drawn:
            may = np.flatnonzero(allowed(automaton, state, limit - slot))
            assert len(may), f"stuck in state {state} in slot {slot} of {limit}, budget {budget}"
            chosen = rng.choice(np.unique(automaton.classes[may]))
            token = int(rng.choice(may[automaton.classes[may] == chosen]))
            wanted.append(token)
        behind = int(automaton.next[state, automaton.classes[token]])
        if automaton.replaces[behind]:
            token, is_drawn = int(automaton.forced[behind]), False
            behind = int(automaton.next[behind, automaton.classes[token]])
        tokens.append(token)
        sampled.append(bool(is_drawn))
        states.append(state)
        assert behind != REFUSED
        state = behind
        if automaton.ends[state]:
            break
    else:
        assert automaton.distance[state] == 0, f"cut off in state {state}"
    return DrawnRow(tokens, sampled, states, wanted, state)


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
